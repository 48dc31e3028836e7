"""The ladder: a step with one change at a time, to see what each setting and each kernel brings."""

import contextlib
import dataclasses
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_twotower.bench import measure, training_steps
from megatron_twotower.bench.gpu import steps
from megatron_twotower.bench.gpu.steps import OBJECTIVES
from megatron_twotower.bench.training_steps import FORWARD_BACKWARD
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import RunConfig, flatten
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.ops import dispatch
from megatron_twotower.train.loop import Trainer
from megatron_twotower.types import Batch


@dataclass(frozen=True)
class Rung:
    """One change to a step as configured.

    Attributes:
        name: The name of the change, for `--rungs`.
        overrides: Settings to change.
        without: Packages and kernels of `ops.dispatch` to switch off.
    """

    name: str
    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


LADDER = (
    Rung("no Triton: attention too in torch", without=("triton",)),
    Rung("denoiser's scan in torch", without=("scan",)),
    Rung("convolutions in torch", without=("convolution", "causal-conv1d")),
    Rung("gated norm in torch", without=("gated norm",)),
    Rung("modulation and gate in torch", without=("modulation",)),
    Rung("loss in torch", without=("cross-entropy",)),
    Rung("context tower's scan in torch", without=("mamba-ssm",)),
    Rung("context tower's convolution by our kernel", without=("causal-conv1d",)),
    Rung("M and E recomputed", ("train.recompute_layers=ME",)),
    Rung("all layers recomputed", ("train.recompute_layers=ME*-",)),
    Rung("two sequences a micro-batch", ("data.micro_batch_size=2", "data.global_batch_size=2")),
    Rung("two noise draws a context pass", ("noise.draws_per_context=2",)),
    Rung("a noise level for each block", ("noise.time_per=block",)),
    Rung("blocks of 32 tokens", ("noise.block_size_tokens=32",)),
    Rung("router in fp64", ("train.router_dtype=fp64",)),
    Rung("Megatron's own layers", ("train.transformer_impl=local",)),
    Rung("FP8, a scale a tensor", ("train.precision=fp8_current",)),
    Rung("FP8, a scale a block", ("train.precision=fp8_blockwise",)),
    Rung("FP8, scales of the steps before", ("train.precision=fp8_delayed",)),
    Rung("fp32", ("train.precision=fp32",)),
)


def select_rungs(names: Sequence[str], *, full: bool) -> list[Rung]:
    """The rungs with these names; without names all rungs if `full`, else none.

    Raises:
        UserError: No rung has one of the names.
    """
    by_name = {rung.name: rung for rung in LADDER}
    unknown = sorted(set(names) - by_name.keys())
    if unknown:
        raise UserError(f"--rungs: found {unknown[0]!r}, expected some of {'; '.join(by_name)}")
    return [by_name[name] for name in names] or (list(LADDER) if full else [])


def rung_config(config: RunConfig, rung: Rung, *, recipe: str, overrides: Sequence[str]) -> RunConfig | str:
    """The configuration of a rung, with the layers of `config`; or the reason why it cannot run.

    Args:
        recipe: The recipe of `config`.
        overrides: The overrides of `config`.
    """
    changed = load_recipe(recipe, [*overrides, *rung.overrides])
    changed = dataclasses.replace(changed, model=config.model, parallel=config.parallel)
    if rung.overrides and dict(flatten(changed)) == dict(flatten(config)):
        return "configured so"
    try:
        for objective in OBJECTIVES.values():
            validate(dataclasses.replace(changed, objective=objective), world_size=parallel.world_size())
    except UserError as error:
        return str(error)
    return changed


def measure_rung(
    config: RunConfig, rung: Rung, groups: ProcessGroupCollection, *, repeats: int, budget_seconds: float
) -> dict[str, Any]:
    """Seconds, tokens and peak memory of both objectives with one change, or the reason why not.

    The reason is `skipped` if the change is not possible here, and `failed` for any other error, so
    that the results of the other rungs are not lost. A case that runs out of memory is `None`.

    Args:
        config: The configuration of the rung, see `rung_config`.
        repeats: See `measure.time_cases`.
        budget_seconds: See `measure.time_cases`.
    """
    row: dict[str, Any] = {"rung": rung.name, "overrides": list(rung.overrides), "without": list(rung.without)}
    row["failed"] = None
    packages = ("triton" if name in dispatch.TRITON_KERNELS else name for name in rung.without)
    missing = {package: reason for package in packages if (reason := dispatch.unavailable(package))}
    if len(missing) == len(rung.without) > 0:
        return row | {"skipped": "; ".join(f"{package}: {reason}" for package, reason in missing.items())}

    def measurement(trainer: Trainer, batch: Batch, peak: int) -> dict[str, Any]:
        step = training_steps.step_case("", trainer, batch)
        times = measure.time_cases([step], repeats=repeats, budget_seconds=budget_seconds)[""]
        seconds = times.summary()["stage_seconds"][FORWARD_BACKWARD]
        return {"seconds": seconds, "tokens": batch.tokens.numel(), "peak_bytes": peak}

    cases: dict[str, Any] = dict.fromkeys(OBJECTIVES)
    for name in OBJECTIVES:
        try:
            with dispatch.without(*rung.without), contextlib.suppress(torch.OutOfMemoryError):
                cases[name] = steps.measure_trainer(config, name, groups, measurement)
        except UserError as error:  # a fault that is only found when a model is built
            return row | {"skipped": str(error)}
        except Exception as error:  # kernels and compilers raise anything
            reason = f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return row | {"skipped": None, "failed": reason, "traceback": traceback.format_exc()}
    return row | {"skipped": None, "cases": cases}

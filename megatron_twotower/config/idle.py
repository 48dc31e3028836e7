"""Settings that the others make useless. To set one of them is an error, not a wish without effect.

A setting whose action is switched off (such as `train.validation_sequences` without validations) is
no error: nobody expects it to act. A setting for another kind of the same thing is one (such as
`schedule.decay_steps` of a cosine).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from megatron_twotower.common.errors import require
from megatron_twotower.config.schema import ConditioningConfig, Fp8Config, NoiseConfig, PhaseConfig, RunConfig, flatten


@dataclass(frozen=True)
class Idle:
    """Settings that have an effect only in certain runs.

    Attributes:
        keys: The settings; `phases.X` is the field X of every phase.
        used: Whether a run uses them.
        words: What does not use them, for the error.
    """

    keys: tuple[str, ...]
    used: Callable[[RunConfig], bool]
    words: str


def _keys(section: str, owner: type[Any]) -> tuple[str, ...]:
    return tuple(f"{section}.{item.name}" for item in fields(owner))


def _has_experts(config: RunConfig) -> bool:
    return "E" in config.model.hybrid_override_pattern


IDLE = (
    Idle(
        (*_keys("noise", NoiseConfig), *_keys("conditioning", ConditioningConfig), "phases.block_size_tokens"),
        lambda config: config.objective == "two_tower",
        "objective ar",
    ),
    Idle(("train.recompute_layers",), lambda config: config.objective == "two_tower", "objective ar"),
    Idle(("conditioning.initialisation",), lambda config: config.init.denoiser is None, "init.denoiser"),
    Idle(
        ("schedule.decay_steps", "schedule.decay_shape", "phases.decay_tokens"),
        lambda config: config.schedule.kind == "wsd",
        "another schedule.kind than wsd",
    ),
    Idle(
        ("schedule.minimum_learning_rate", "phases.minimum_learning_rate"),
        lambda config: config.schedule.kind != "constant",
        "schedule.kind constant",
    ),
    Idle(
        ("data.shuffle_run_tokens", "data.shuffle_window_runs"),
        lambda config: config.data.shuffle == "windowed",
        "another data.shuffle than windowed",
    ),
    Idle(
        ("data.align_blocks",),
        lambda config: config.objective == "two_tower" and config.data.documents == "respect",
        "objective ar or data.documents ignore",
    ),
    Idle(("noise.late_bias",), lambda config: config.noise.mask_counts != "random", "noise.mask_counts random"),
    Idle(("phases.mixture",), lambda config: config.data.blend != "", "no data.blend"),
    Idle(
        ("fp8.history_steps", "fp8.margin"),
        lambda config: config.train.precision == "fp8_delayed",
        "another train.precision than fp8_delayed",
    ),
    Idle(
        _keys("fp8", Fp8Config),
        lambda config: "fp8" in config.train.precision + config.train.context_precision,
        "train.precision and train.context_precision without FP8",
    ),
    Idle(
        ("parallel.bucket_parameters",),
        lambda config: config.parallel.overlap_grad_reduce,
        "parallel.overlap_grad_reduce false",
    ),
    Idle(
        (
            *("train.router_dtype", "train.router_bias_update_rate", "train.sequence_aux_loss"),
            *("parallel.expert", "parallel.expert_tensor", "parallel.moe_dispatcher"),
        ),
        _has_experts,
        "a model without experts",
    ),
)


def _settings(config: RunConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield the key in `IDLE`, the key for a message, and the value of each setting."""
    for key, value in flatten(config):
        yield key, key, value
    for number, phase in enumerate(config.phases):
        for name, value in flatten(phase):
            yield f"phases.{name}", f"phases.{number}.{name}", value


_DEFAULTS = dict(flatten(RunConfig())) | {f"phases.{name}": value for name, value in flatten(PhaseConfig())}


def refuse_idle(config: RunConfig) -> None:
    """Refuse settings that a training run would not use.

    Raises:
        UserError: One line with the key, what was found, and what does not use it.
    """
    unused = {key: idle.words for idle in IDLE if not idle.used(config) for key in idle.keys}
    for key, shown, value in _settings(config):
        require(
            key not in unused or value == _DEFAULTS[key],
            f"{shown}: found {value!r} with {unused.get(key)}, which does not use it, expected {_DEFAULTS[key]!r}",
        )
    foreign = sorted(set(config.train.recompute_layers) - set(config.model.hybrid_override_pattern))
    require(
        not foreign,
        f"train.recompute_layers: found {''.join(foreign)}, expected letters of the pattern "
        f"{config.model.hybrid_override_pattern}",
    )

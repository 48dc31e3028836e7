"""Megatron's AdamW and learning-rate schedule, and a step that skips non-finite gradients."""

import bisect
import enum
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_twotower.config.phases import Phase, resolve_phases, whole_run
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.mcore.optimizer_state import nonempty_optimizers
from megatron_twotower.mcore.parallel import ModelChunks

# Parameters of two dimensions that are no weight matrices: decay would pull gates to zero and
# shorten filters.
NO_WEIGHT_DECAY = ("*scale_shift_table", "*conv1d_weight")


class Outcome(enum.IntEnum):
    """What became of an optimizer step.

    A step that is not `TAKEN` changes no weight and no optimizer state, on all ranks.

    Attributes:
        TAKEN: The step was taken.
        NOT_FINITE: The loss or a gradient is not finite.
        UNSCORED: The global batch gives no gradient, because no position of it is scored.
    """

    TAKEN = 0
    NOT_FINITE = 1
    UNSCORED = 2


def build_optimizer(config: RunConfig, model: ModelChunks, groups: ProcessGroupCollection) -> MegatronOptimizer:
    """Build AdamW with fp32 main weights, clipping by the global gradient norm."""
    ours = config.optimizer
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=ours.learning_rate,
        min_lr=config.schedule.minimum_learning_rate,
        weight_decay=ours.weight_decay,
        adam_beta1=ours.beta1,
        adam_beta2=ours.beta2,
        adam_eps=ours.epsilon,
        clip_grad=ours.clip_gradient_norm,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=ours.distributed,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(settings)
    overrides[ParamKey(name=NO_WEIGHT_DECAY)] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(
        settings, model.chunks, config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
    )
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, torch.optim.AdamW):
            # Megatron 0.16.1 builds torch's AdamW unfused; fused it took 0.4 of the time on a CPU.
            for group in inner.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    return optimizer


@torch.no_grad()
def guarded_step(optimizer: MegatronOptimizer, *, outcome: Tensor) -> tuple[Outcome, float]:
    """Take one step of the optimizer; none if the gradients are not finite.

    A step that is not taken changes nothing. It is Megatron's own step, with a check of the
    gradient norm, which is the same on every rank, before anything is scaled by it.

    Args:
        optimizer: Megatron's optimizer, whose gradients are reduced.
        outcome: () int, an `Outcome`; another one than `TAKEN` to take no step in any case. It is
            the same on every rank, and read after the norm, for which the host waits in any case.

    Returns:
        What became of the step, and the global gradient norm before clipping.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm() or 0.0)
    found = Outcome(int(outcome.item())) if math.isfinite(norm) else Outcome.NOT_FINITE
    if found is not Outcome.TAKEN:
        return found, norm
    for inner in nonempty_optimizers(optimizer):
        parameters = inner.get_parameters()
        if parameters and inner.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=inner.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return Outcome.TAKEN, norm


def build_schedule(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the learning-rate schedule, which takes one step before each optimizer step.

    Optimizer step k, counted from 1, then has the rate of Megatron's schedule at k. The warm-up
    ends with the highest rate in its last step, and a decay with the lowest rate in the last step.
    Every phase has a warm-up, and then `wsd`, `cosine` or `constant`.
    """
    phases = resolve_phases(config)
    if not config.phases:
        return OptimizerParamScheduler(optimizer, **_rates(config, phases[0]))
    return PhasedScheduler(optimizer, config, phases)


class PhasedScheduler(OptimizerParamScheduler):
    """Megatron's schedule of each phase, one after the other.

    Its state is that of one schedule for the complete run.
    """

    def __init__(self, optimizer: MegatronOptimizer, config: RunConfig, phases: Sequence[Phase]) -> None:
        # The schedules of phases only compute rates: they have no parameters.
        no_parameters = SimpleNamespace(param_groups=[])
        self._starts = [phase.first_step for phase in phases]
        self._schedules = [OptimizerParamScheduler(no_parameters, **_rates(config, phase)) for phase in phases]
        super().__init__(optimizer, **_rates(config, whole_run(config)))

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the rate of step `num_steps`, counted from 1, in its phase; all groups have it."""
        number = max(bisect.bisect_left(self._starts, self.num_steps) - 1, 0)
        self._schedules[number].num_steps = self.num_steps - self._starts[number]
        return self._schedules[number].get_lr({})


def _rates(config: RunConfig, phase: Phase) -> dict[str, Any]:
    """Return the arguments of Megatron's scheduler for one phase."""
    schedule, steps = config.schedule, phase.steps
    styles = {"wsd": "WSD", "cosine": "cosine", "constant": "constant"}
    decay = config.optimizer.weight_decay
    return {
        "init_lr": 0.0,
        "max_lr": phase.learning_rate,
        "min_lr": phase.minimum_learning_rate,
        "lr_warmup_steps": phase.warmup_steps,
        "lr_decay_steps": steps,
        "lr_decay_style": styles[schedule.kind],
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_steps": steps,
        "wd_incr_style": "constant",
        "wsd_decay_steps": phase.decay_steps,
        "lr_wsd_decay_style": schedule.decay_shape,
        # A resumed run follows its recipe; only the step comes from the checkpoint.
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": True,
    }

"""Parameter groups, AdamW and learning-rate schedule: Megatron's, configured."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_twotower.config import RunConfig

# Matrices in shape only: decay would pull gates to zero and shorten filters.
NO_WEIGHT_DECAY = ("*scale_shift_table", "*conv1d_weight")


def build_optimizer(
    config: RunConfig, model: DistributedDataParallel, groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """AdamW over the trained parameters, fp32 main weights, clipped by the global gradient norm."""
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
        bf16=config.train.precision == "bf16",
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=ours.distributed,
    )
    overrides = get_standard_config_overrides(settings)
    overrides[ParamKey(name=NO_WEIGHT_DECAY)] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(
        settings, [model], config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
    )
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, torch.optim.AdamW):
            # Megatron 0.16.1 builds torch's AdamW unfused; fused took 0.4 of its time on a CPU.
            for group in inner.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    return optimizer


def build_schedule(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up, then `wsd`, `cosine` or `constant`; one scheduler step per optimizer step."""
    schedule, steps = config.schedule, config.train.steps
    styles = {"wsd": "WSD", "cosine": "cosine", "constant": "constant"}
    decay = config.optimizer.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.learning_rate,
        min_lr=schedule.minimum_learning_rate,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=styles[schedule.kind],
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.decay_steps,
        lr_wsd_decay_style=schedule.decay_shape,
        # A run that goes on follows its recipe; only the step comes from the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )

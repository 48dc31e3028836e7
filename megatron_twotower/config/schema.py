"""Every name, unit, default and range of a run, and the way from a Hydra recipe to a checked `RunConfig`.

The frozen dataclasses below are the only place where a setting is declared. A recipe
(`recipes/NAME.yaml`) may set any of them and nothing else: an unknown key is an error.
`ModelConfig` keeps the names of a Hugging Face NemotronH `config.json`, so that a backbone's
configuration is read word for word.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_twotower.common.errors import require

LAYER_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, under the names of a NemotronH `config.json`. Both towers have this shape.

    An empty pattern stands for the whole shape of `init.backbone`.
    """

    hybrid_override_pattern: str = ""
    vocab_size: int = 4096
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    mamba_num_heads: int = 8
    mamba_head_dim: int = 64
    ssm_state_size: int = 64
    n_groups: int = 2
    conv_kernel: int = 4
    chunk_size: int = 64
    intermediate_size: int = 1024
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    moe_shared_expert_intermediate_size: int = 512
    routed_scaling_factor: float = 2.5
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # Lower clamp of the discretised time step. NVIDIA trains without; transformers clamps its
    # chunked scan (and not its step) at time_step_min, so exported configurations say time_step_min
    # 0.
    time_step_clamp: float = 0.0
    max_position_embeddings: int = 262144

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner(self) -> int:
        """Channels of the Mamba mixer between its projections (`expand` is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim


@dataclass(frozen=True)
class InitConfig:
    """Where weights come from.

    backbone: a Hugging Face folder with a NemotronH, or of two towers, and then it is their context
        tower; null for random numbers keyed by seed and tensor name.
    denoiser: a two-tower folder, or a denoiser exported alone, to go on from; the backbone is then
        the context tower in that folder, or the one it points to. null: the denoiser starts as a
        copy of the backbone.
    """

    backbone: str | None = None
    denoiser: str | None = None


@dataclass(frozen=True)
class ConditioningConfig:
    """adaLN-single. `identity`: the denoiser starts as the backbone; `released`: tables are randn / sqrt(hidden)."""

    initialisation: str = "identity"
    frequencies: int = 256
    period: float = 10000.0
    time_scale: float = 1000.0
    round_time_to_bf16: bool = False


@dataclass(frozen=True)
class NoiseConfig:
    """Absorbing diffusion with a linear schedule: a token is masked with probability t, its noise level.

    draws_per_context: noisy copies of each sequence that share one pass of the context tower.
    """

    block_size_tokens: int = 16
    mask_token_id: int = 3
    time_per: str = "sequence"
    time_sampling: str = "uniform"
    time_min: float = 0.001
    time_max: float = 1.0
    weighting: str = "masked_mean"
    report_buckets: int = 5
    draws_per_context: int = 1


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order.

    folder: a prepared folder; with a blend, the folder its corpora are in (empty for the one the
    blend file is in).
    blend: a blend file (YAML), or empty for the one corpus in `folder`.
    documents: `ignore` packs sequences across boundaries, as released; `respect` keeps documents
        apart, each padded to whole blocks of the largest size any phase has.
    shuffle: `full` reads from all over a corpus; `windowed` permutes runs of neighbouring sequences
        (about a shard) and mixes `shuffle_window_runs` of them at a time; `none` reads a corpus as
        it stands.
    damaged_shards: `stop`, or `skip`: a sequence that touches one keeps its place, unscored, and is
    counted.
    verify_shards: compare each shard with its checksum when a process first reads it; without, only
        its size (but `skip` always compares). Turn it off where shards were verified (`twotower
        data verify`) and are many.
    prefetch_batches: steps read ahead, by prefetch_workers threads.
    """

    folder: str = ""
    blend: str = ""
    documents: str = "ignore"
    shuffle: str = "full"
    shuffle_run_tokens: int = 1 << 20
    shuffle_window_runs: int = 32
    damaged_shards: str = "stop"
    verify_shards: bool = True
    sequence_length_tokens: int = 256
    micro_batch_size: int = 8
    global_batch_size: int = 8
    prefetch_batches: int = 2
    prefetch_workers: int = 1


# Not frozen, because OmegaConf would then refuse `phases.0.tokens=...` on the command line.
@dataclass
class PhaseConfig:
    """A stretch of the run with a mixture, a block size and a learning-rate schedule of its own.

    tokens: length, rounded to whole global batches. mixture: of the blend; empty for the one named
    as the phase. null stands for what `noise`, `optimizer` and `schedule` say.
    """

    name: str = ""
    tokens: int = 0
    mixture: str = ""
    block_size_tokens: int | None = None
    learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    warmup_tokens: int | None = None
    decay_tokens: int | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as Megatron runs it. Weight decay skips vectors and biases."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_gradient_norm: float = 1.0
    distributed: bool = False


@dataclass(frozen=True)
class ScheduleConfig:
    """`wsd`: warm up, stay, decay over the last `decay_steps`. `cosine` decays from warm-up to the end."""

    kind: str = "wsd"
    warmup_steps: int = 20
    decay_steps: int = 0
    decay_shape: str = "linear"
    minimum_learning_rate: float = 0.0


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work; what is left of the world is data parallel.

    expert_tensor: ranks that split each expert; 0 for as many as `tensor`.
    pipeline: stages that the layers of both towers are cut into, at the same places.
        pipeline_chunks: stretches of layers on each stage; above 1 the schedule is interleaved.
        pipeline_layers: layers of each of the pipeline x pipeline_chunks stretches, in order; empty
        for equal ones.
    context: ranks that split a sequence. Only 1 is built.
    moe_dispatcher: how tokens travel to their experts; `deepep` and `hybridep` are kernels of the
    package deep_ep.
    overlap_grad_reduce: reduce the gradients of a bucket while the backward pass makes the next
    ones.
    overlap_param_gather: gather updated parameters while the next forward pass runs (distributed
    optimizer).
    bucket_parameters: how many parameters are reduced or gathered at a time; 0 for Megatron's
    choice.
    ranks: how many the layout is made for, 0 for any number. card: the accelerator that `twotower
    plan` reckons with.
    """

    tensor: int = 1
    sequence: bool = False
    expert: int = 1
    expert_tensor: int = 0
    pipeline: int = 1
    pipeline_chunks: int = 1
    pipeline_layers: list[int] = field(default_factory=list)
    context: int = 1
    moe_dispatcher: str = "alltoall"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_parameters: int = 0
    threads_per_rank: int = 0
    ranks: int = 0
    card: str = "h100"

    @property
    def expert_tensor_ranks(self) -> int:
        return self.expert_tensor or self.tensor


@dataclass(frozen=True)
class TrainConfig:
    """The loop. Counts of steps are optimizer steps. steps: 0 for the length of all phases.

    transformer_impl: whose modules layers are made of: `local` for Megatron's own,
        `transformer_engine`, or `auto`: the latter where it and a CUDA device are there and the
        precision is not fp32.
    precision: of what trains. FP8 is what projections and experts multiply in; the rest is as in
    bf16.
    context_precision: of the frozen tower: `wide` as its parameters, or FP8, and then its weights
    are held in it.
    checkpoint_async: write checkpoints while training goes on, from a copy in host memory.
    keep_checkpoints: the newest so many stay; keep_every_steps: so do those of every so many steps
    (0: none).
    verify_checkpoints: compare each file with its checksum before a run goes on from it.
    on_damaged_checkpoint: `stop`, or go on from the `previous` one.
    stop_after_nonfinite: a step whose loss or gradients are not finite is skipped; so many in a row
    end the run.
    hang_timeout_seconds: a rank that stands still so long ends the job, by name (0: never).
    ledger: write down which samples every step consumed (`ledger/` in the run folder).
    """

    steps: int = 100
    transformer_impl: str = "auto"
    precision: str = "fp32"
    context_precision: str = "wide"
    recompute_layers: str = ""
    router_dtype: str = "fp32"
    router_bias_update_rate: float = 1e-3
    sequence_aux_loss: float = 0.0
    log_every_steps: int = 10
    validate_every_steps: int = 0
    validation_sequences: int = 64
    checkpoint_every_steps: int = 0
    checkpoint_async: bool = True
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    verify_checkpoints: bool = True
    on_damaged_checkpoint: str = "stop"
    stop_after_nonfinite: int = 10
    hang_timeout_seconds: int = 900
    ledger: bool = False


@dataclass(frozen=True)
class Fp8Config:
    """How FP8 is scaled, where `train.precision` or `train.context_precision` asks for it.

    format: `hybrid` is e4m3, and e5m2 for gradients.
    history_steps, margin: of fp8_delayed: a scale comes from the largest value of so many passes,
        lowered by 2 ** margin.
    first_layers_bf16, last_layers_bf16: so many layers at each end of both towers stay out of it
    (not of fp8_delayed).
    router_padding: the router itself gives every expert a multiple of 16 tokens; without, they are
    padded by a copy.
    """

    format: str = "hybrid"
    history_steps: int = 1024
    margin: int = 0
    first_layers_bf16: int = 0
    last_layers_bf16: int = 0
    router_padding: bool = False


@dataclass(frozen=True)
class FusionConfig:
    """Kernels of Transformer Engine that do several steps in one. Without it there are none.

    permutation: of tokens to their experts and back. router: choice and weights of experts, where
    the router is fp32.
    gradient_accumulation: weight gradients go straight into the fp32 sums. squared_relu: of routed
        experts, with the weight of the token.
    """

    permutation: bool = True
    router: bool = True
    gradient_accumulation: bool = True
    squared_relu: bool = True


@dataclass(frozen=True)
class LoggingConfig:
    console: bool = True
    wandb: str = "offline"
    project: str = "megatron-twotower"
    name: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    objective: str = "two_tower"
    seed: int = 1234
    output: str = "runs/default"
    resume: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    phases: list[PhaseConfig] = field(default_factory=list)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dataclasses as ("section.key", value) pairs."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def validate_model(model: ModelConfig) -> None:
    unknown = set(model.hybrid_override_pattern) - set(LAYER_KINDS)
    require(
        not unknown and bool(model.hybrid_override_pattern),
        f"model.hybrid_override_pattern: found {model.hybrid_override_pattern!r}, "
        f"expected letters of {''.join(LAYER_KINDS)}",
    )
    divisors = (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups"))
    for whole, part in divisors:
        a, b = getattr(model, whole), getattr(model, part)
        require(a % b == 0, f"model.{whole} {a}: expected a multiple of model.{part} {b}")
    require(
        1 <= model.num_experts_per_tok <= model.n_routed_experts,
        f"model.num_experts_per_tok: found {model.num_experts_per_tok}, "
        f"expected 1 to model.n_routed_experts {model.n_routed_experts}",
    )

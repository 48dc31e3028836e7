"""Every setting of a run: its name, default, accepted values, unit and meaning.

The dataclasses below are the only place where a setting is declared. A recipe (`recipes/NAME.yaml`)
may set any of them and nothing else: an unknown key is an error. The accepted values and the unit
of a setting are part of its field (`setting`); rules between several settings are in
`config/validation.py`. `ModelConfig` keeps the names of a Hugging Face NemotronH `config.json`, so
that the configuration of a backbone is read without translation.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_twotower.config.precision import CONTEXT_PRECISIONS, PRECISIONS
from megatron_twotower.config.setting import FREE, setting

# The value of `noise.block_size_tokens` and `noise.mask_token_id` in a recipe that does not say:
# `recipes.resolve` fills in that of a folder.
FROM_FOLDER = -1
LAYER_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, under the names of a NemotronH `config.json`. Both towers have this shape.

    Attributes:
        hybrid_override_pattern: One letter of `LAYER_KINDS` for each layer. Empty: all fields come
            from the `config.json` of `init.backbone`.
        chunk_size: Tokens that the Mamba scan processes at a time.
        time_step_clamp: Lower clamp of the discretised time step. NVIDIA trains without one.
            transformers clamps its chunked scan (and not its single step) at `time_step_min`, so
            exported configurations say `time_step_min` 0.
    """

    hybrid_override_pattern: str = setting("", letters="".join(LAYER_KINDS))
    vocab_size: int = setting(4096, unit="tokens", at_least=1)
    hidden_size: int = setting(256, at_least=1)
    num_attention_heads: int = setting(4, unit="heads", at_least=1)
    num_key_value_heads: int = setting(2, unit="heads", at_least=1)
    head_dim: int = setting(64, at_least=1)
    mamba_num_heads: int = setting(8, unit="heads", at_least=1)
    mamba_head_dim: int = setting(64, at_least=1)
    ssm_state_size: int = setting(64, at_least=1)
    n_groups: int = setting(2, unit="groups", at_least=1)
    conv_kernel: int = setting(4, unit="tokens", at_least=1)
    chunk_size: int = setting(64, unit="tokens", at_least=1)
    intermediate_size: int = setting(1024, at_least=1)
    n_routed_experts: int = setting(8, unit="experts", at_least=1)
    num_experts_per_tok: int = setting(2, unit="experts", at_least=1)
    moe_intermediate_size: int = setting(256, at_least=1)
    moe_shared_expert_intermediate_size: int = setting(512, at_least=1)
    routed_scaling_factor: float = setting(2.5, above=0)
    layer_norm_epsilon: float = setting(1e-5, at_least=0)
    initializer_range: float = setting(0.02, at_least=0)
    time_step_min: float = setting(0.001, at_least=0)
    time_step_max: float = setting(0.1, above=0)
    time_step_floor: float = setting(1e-4, at_least=0)
    time_step_clamp: float = setting(0.0, at_least=0)
    max_position_embeddings: int = setting(262144, unit="tokens", at_least=1)

    @property
    def num_layers(self) -> int:
        """The number of layers of one tower."""
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner(self) -> int:
        """Channels of the Mamba mixer between its projections (`expand` is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim


@dataclass(frozen=True)
class InitConfig:
    """Where the initial weights come from.

    Attributes:
        backbone: A Hugging Face folder with a NemotronH, or with two towers: then their context
            tower is the backbone. null: random weights, keyed by seed and tensor name.
        denoiser: A two-tower folder, or an exported denoiser without its backbone, whose denoiser
            is trained further. The backbone is then the context tower in that folder, or the one
            that the folder points to, unless `backbone` names another one of the same shape. null:
            the denoiser starts as a copy of the backbone.
    """

    backbone: str | None = setting(None, free=True)
    denoiser: str | None = setting(None, free=True)


@dataclass(frozen=True)
class ConditioningConfig:
    """Conditioning of the denoiser on the noise level by adaLN-single.

    Attributes:
        initialisation: `identity`: the denoiser starts as the backbone. `released`: the tables are
            randn / sqrt(hidden size).
        frequencies: Width of the sinusoidal features of the noise level, half cosines and half
            sines.
        period: The longest period of the features.
        time_scale: Factor of the noise level before the features are computed.
        round_time_to_bf16: Round the noise level to bfloat16 before it is scaled.
        without: What the denoiser goes without, to measure what it is worth; such a denoiser has no
            export. `time`: it is told level 1 everywhere. `states`: its Mamba layers start each
            block from nothing. `aligned_attention`: all its attention layers read keys and values
            of the context tower's last attention layer.
    """

    initialisation: str = setting("identity", choices=("identity", "released"))
    frequencies: int = setting(256, at_least=2, multiple_of=2)
    period: float = setting(10000.0, above=0)
    time_scale: float = setting(1000.0, above=0)
    round_time_to_bf16: bool = setting(False, free=True)
    without: str = setting("nothing", choices=("nothing", "time", "states", "aligned_attention"))


@dataclass(frozen=True)
class NoiseConfig:
    """Absorbing diffusion with a linear schedule: a token is masked with probability t.

    t is the noise level.

    Attributes:
        block_size_tokens: Tokens of a block, which the denoiser predicts together. A recipe that
            does not say (or says -1) has the block size of the folder in `init`, or 16.
        mask_token_id: The token id that replaces a masked token. A recipe that does not say (or
            says -1) has the mask token of the folder in `init`, of its tokenizer or that of the
            data, or 3. Another id than theirs is refused.
        token_shift: A position of a block predicts the next token, as an autoregressive model does,
            not the token at the position. The block then reads the last token before it. A recipe
            that does not say (or says null) has what the folder in `init.denoiser` has, or false.
        time_per: What has one noise level: a `sequence` or a `block`.
        time_sampling: `uniform`: noise levels are independent. `stratified`: they are spread evenly
            over the range.
        time_min: Lowest noise level.
        time_max: Highest noise level.
        mask_counts: `random`: each token is masked by itself. `exact`: t s tokens of a block of s,
            rounded up or down at random. `at_least_one`: the same, but never none. Of conversations
            only tokens of answers count.
        late_bias: Of exact counts: how much more often later tokens of a block are masked. The odds
            of a token grow by the factor exp(late_bias (1 - t)) from one to the next.
        paired_draws: How the second draw of each pair follows from the first. `independent`: not at
            all. `mirrored`: from the random numbers 1 - u. `complementary`: also at the noise level
            at the other end of the range, so that the two masks complement each other.
        weighting: `masked_mean`: mean cross-entropy over masked positions. `elbo`: each masked
            position is weighted by 1 / t, which bounds the likelihood.
        report_buckets: Equal ranges of the noise level for which the loss is reported.
        draws_per_context: Noisy copies of each sequence that share one forward pass of the context
            tower.
        distillation: Share of the context tower's next-token distribution in the target of a masked
            position after which no token of its block is visible; the rest is the clean token. 0:
            the context tower gives no targets.
        distillation_elsewhere: The same share for the other masked positions.
        certainty: Weight of the entropy of the denoiser's distribution, which is added to the loss
            of a position whose most probable token is the right one.
        distance_decay: A masked position at distance d from the last visible token before it has
            the weight exp(-(d - 1) / distance_decay); 0: all have the same.
    """

    block_size_tokens: int = setting(16, unit="tokens", at_least=1)
    mask_token_id: int = setting(3, at_least=0)
    token_shift: bool | None = setting(False, free=True)
    time_per: str = setting("sequence", choices=("sequence", "block"))
    time_sampling: str = setting("uniform", choices=("uniform", "stratified"))
    time_min: float = setting(0.001, above=0, at_most=1)
    time_max: float = setting(1.0, above=0, at_most=1)
    mask_counts: str = setting("random", choices=("random", "exact", "at_least_one"))
    late_bias: float = setting(0.0, at_least=0)
    paired_draws: str = setting("independent", choices=("independent", "mirrored", "complementary"))
    weighting: str = setting("masked_mean", choices=("masked_mean", "elbo"))
    report_buckets: int = setting(5, unit="buckets", at_least=1, at_most=1000)
    draws_per_context: int = setting(1, unit="copies", at_least=1)
    distillation: float = setting(0.0, at_least=0, at_most=1)
    distillation_elsewhere: float = setting(0.0, at_least=0, at_most=1)
    certainty: float = setting(0.0, at_least=0)
    distance_decay: float = setting(0.0, unit="tokens", at_least=0)

    @property
    def distils(self) -> bool:
        """Whether the context tower gives targets."""
        return self.distillation > 0 or self.distillation_elsewhere > 0

    def for_validation(self) -> "NoiseConfig":
        """The same blocks, mask token and weighting, without what only changes how one trains."""
        masks = ("mask_counts", "late_bias", "paired_draws")
        losses = ("distillation", "distillation_elsewhere", "certainty", "distance_decay")
        defaults = NoiseConfig()
        return dataclasses.replace(self, **{name: getattr(defaults, name) for name in (*masks, *losses)})


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order.

    Attributes:
        folder: A prepared folder. With a blend: the folder of its corpora (empty: the folder of the
            blend file).
        blend: A blend file (YAML). Empty: the one corpus in `folder`.
        documents: `ignore` packs sequences across document boundaries, as the released model was
            trained. `respect` keeps documents apart and pads each one to a multiple of the block
            sizes of all phases.
        align_blocks: Of conversations that are kept apart: `grid` begins blocks with the
            conversation. `answer` begins them with each answer, as in generation: a conversation
            comes once for each of its answers, after padding that nothing sees.
        shuffle: `full` reads from all places of a corpus. `windowed` permutes runs of neighbouring
            sequences (each about as long as a shard) and mixes `shuffle_window_runs` of them at a
            time. `none` reads a corpus in its stored order.
        shuffle_run_tokens: Tokens of a run of `windowed`.
        shuffle_window_runs: Runs that `windowed` mixes at a time.
        damaged_shards: `stop` ends the run. `skip` keeps the place of a sequence that touches a
            damaged shard, does not score it, and counts it.
        verify_shards: Compare each shard with its checksum when a process first reads it. If false,
            only its size is compared (but `skip` always compares checksums). Turn it off for many
            shards that `twotower data verify` has checked.
        micro_batch_size: Sequences of one forward pass on one data-parallel rank.
        global_batch_size: Sequences of one optimizer step over all ranks.
        prefetch_batches: Optimizer steps whose data is read ahead.
        prefetch_workers: Threads that read ahead.
    """

    folder: str = setting("", free=True)
    blend: str = setting("", free=True)
    documents: str = setting("ignore", choices=("ignore", "respect"))
    align_blocks: str = setting("grid", choices=("grid", "answer"))
    shuffle: str = setting("full", choices=("full", "windowed", "none"))
    shuffle_run_tokens: int = setting(1 << 20, unit="tokens", at_least=1)
    shuffle_window_runs: int = setting(32, unit="runs", at_least=1)
    damaged_shards: str = setting("stop", choices=("stop", "skip"))
    verify_shards: bool = setting(True, free=True)
    sequence_length_tokens: int = setting(256, unit="tokens", at_least=2)
    micro_batch_size: int = setting(8, unit="sequences", at_least=1)
    global_batch_size: int = setting(8, unit="sequences", at_least=1)
    prefetch_batches: int = setting(2, unit="steps", at_least=1)
    prefetch_workers: int = setting(1, unit="threads", at_least=1, at_most=1024)


# Not frozen: OmegaConf would then refuse `phases.0.tokens=...` on the command line.
@dataclass
class PhaseConfig:
    """A part of the run with its own mixture, block size and learning-rate schedule.

    A setting that is null has the value in `noise`, `optimizer` or `schedule`.

    Attributes:
        name: Name of the phase, used once in a run.
        tokens: Length of the phase, rounded to complete global batches.
        mixture: A mixture of the blend. Empty: the one with the name of the phase.
    """

    name: str = setting("", free=True)
    tokens: int = setting(0, unit="tokens", at_least=0)
    mixture: str = setting("", free=True)
    block_size_tokens: int | None = setting(None, unit="tokens", at_least=1)
    learning_rate: float | None = setting(None, at_least=0)
    minimum_learning_rate: float | None = setting(None, at_least=0)
    warmup_tokens: int | None = setting(None, unit="tokens", at_least=0)
    decay_tokens: int | None = setting(None, unit="tokens", at_least=0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of Megatron.

    Attributes:
        learning_rate: The highest learning rate.
        weight_decay: Not applied to vectors and biases.
        clip_gradient_norm: The largest global gradient norm; 0: no clipping.
        distributed: Split the optimizer state over data-parallel ranks.
    """

    learning_rate: float = setting(1e-3, at_least=0)
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.95, at_least=0, below=1)
    epsilon: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.1, at_least=0)
    clip_gradient_norm: float = setting(1.0, at_least=0)
    distributed: bool = setting(False, free=True)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps of a run or of a phase.

    Attributes:
        kind: `wsd`: warm-up, constant rate, decay over the last `decay_steps`. `cosine`: decay from
            the warm-up to the end. `constant`: no decay.
        warmup_steps: The rate rises evenly to the highest one, which step `warmup_steps` has.
        decay_shape: Shape of the decay of `wsd`.
        minimum_learning_rate: The rate of the last step, if there is a decay.
    """

    kind: str = setting("wsd", choices=("wsd", "cosine", "constant"))
    warmup_steps: int = setting(20, unit="steps", at_least=0)
    decay_steps: int = setting(0, unit="steps", at_least=0)
    decay_shape: str = setting("linear", choices=("linear", "cosine"))
    minimum_learning_rate: float = setting(0.0, at_least=0)


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks divide the work. The remaining ranks are data parallel.

    Attributes:
        tensor: Ranks that split each layer.
        sequence: Split activations along the sequence between tensor-parallel layers.
        expert: Ranks that divide the experts of a layer.
        expert_tensor: Ranks that split each expert; 0: the number in `tensor`.
        pipeline: Pipeline stages. The layers of both towers are cut at the same places.
        pipeline_chunks: Model chunks of each pipeline rank; above 1 the schedule is interleaved.
        pipeline_layers: Layers of each of the pipeline x pipeline_chunks model chunks, in order.
            Empty: all have the same number.
        context: Ranks that split each sequence, between blocks.
        moe_dispatcher: How tokens reach their experts. `deepep` and `hybridep` are kernels of the
            package deep_ep.
        overlap_grad_reduce: Reduce the gradients of a bucket while the backward pass computes the
            next ones.
        overlap_param_gather: Gather updated parameters during the next forward pass (distributed
            optimizer).
        bucket_parameters: Parameters that are reduced or gathered at a time; 0: Megatron's choice.
        collective_timeout_minutes: A collective that waits this long for a rank ends the job. The
            watchdog (`train.hang_timeout_seconds`, `train.save_timeout_seconds`) must come first,
            because it names the rank.
        threads_per_rank: CPU threads of torch; 0: torch's choice.
        ranks: The number of ranks that the layout is made for; 0: any number.
        card: The GPU that `twotower plan` computes for.
    """

    tensor: int = setting(1, unit="ranks", at_least=1)
    sequence: bool = setting(False, free=True)
    expert: int = setting(1, unit="ranks", at_least=1)
    expert_tensor: int = setting(0, unit="ranks", at_least=0)
    pipeline: int = setting(1, unit="stages", at_least=1)
    pipeline_chunks: int = setting(1, unit="model chunks", at_least=1)
    # config/validation.py checks the list.
    pipeline_layers: list[int] = field(default_factory=list, metadata=FREE)
    context: int = setting(1, unit="ranks", at_least=1)
    moe_dispatcher: str = setting("alltoall", choices=("alltoall", "allgather", "deepep", "hybridep"))
    overlap_grad_reduce: bool = setting(False, free=True)
    overlap_param_gather: bool = setting(False, free=True)
    bucket_parameters: int = setting(0, unit="parameters", at_least=0)
    collective_timeout_minutes: int = setting(90, unit="minutes", at_least=1)
    threads_per_rank: int = setting(0, unit="threads", at_least=0, at_most=1024)
    ranks: int = setting(0, unit="ranks", at_least=0)
    card: str = setting("h100", choices=("h100", "h200", "b200", "a100"))

    @property
    def expert_tensor_ranks(self) -> int:
        """Ranks that split each expert."""
        return self.expert_tensor or self.tensor


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. A step is an optimizer step.

    Attributes:
        steps: Length of the run. A recipe may say 0: the sum of all phases, filled in by `resolve`.
        transformer_impl: Whose modules the layers consist of: `local` for Megatron's own,
            `transformer_engine`, or `auto`: Transformer Engine if it and a CUDA device are there
            and the precision is not fp32.
        precision: Of the trained tower. FP8 is used for products of projections and experts; the
            rest is as with bf16.
        context_precision: Of the frozen tower. `wide`: that of its parameters. FP8: its weights are
            stored in FP8 too.
        recompute_layers: Letters of layer kinds whose activations are recomputed in the backward
            pass.
        router_dtype: Precision of the scores of experts.
        router_bias_update_rate: Step of the selection biases that balance the experts; 0: none.
        sequence_aux_loss: Weight of the auxiliary loss that balances the experts of each sequence;
            in a denoiser those of each range of noise levels of a sequence.
        log_every_steps: Steps between log records.
        validate_every_steps: Steps between validations; 0: none.
        validation_sequences: Held-out sequences of a validation.
        checkpoint_every_steps: Steps between checkpoints; 0: only at the end.
        checkpoint_async: Write checkpoints during training, from a copy in host memory.
        keep_checkpoints: The number of newest checkpoints that stay. Those written while steps
            were skipped do not count.
        keep_every_steps: Checkpoints of multiples of this step stay too; 0: none.
        verify_checkpoints: Compare each file with its checksum before a run resumes from it.
        on_damaged_checkpoint: `stop`, or resume from the `previous` checkpoint.
        stop_after_nonfinite: A step whose loss or gradients are not finite is skipped. This number
            of consecutive skipped steps ends the run.
        hang_timeout_seconds: A rank that makes no progress for this long ends the job, with an
            error that names the rank; 0: never. Every micro-batch is progress.
        save_timeout_seconds: The same while a checkpoint is saved. What any rank writes or reads
            back is progress, the wait until a file is on disk is not; 0: never.
        collect_garbage_every_steps: Python's garbage collector runs after this number of steps, at
            the same step on all ranks; 0: whenever Python chooses, which differs between ranks.
        ledger: Record which samples every step consumed (`ledger/` in the run folder).
    """

    steps: int = setting(100, unit="steps", at_least=1)
    transformer_impl: str = setting("auto", choices=("auto", "local", "transformer_engine"))
    precision: str = setting("fp32", choices=PRECISIONS)
    context_precision: str = setting("wide", choices=CONTEXT_PRECISIONS)
    recompute_layers: str = setting("", letters="".join(LAYER_KINDS))
    router_dtype: str = setting("fp32", choices=("fp32", "fp64"))
    router_bias_update_rate: float = setting(1e-3, at_least=0)
    sequence_aux_loss: float = setting(0.0, at_least=0)
    log_every_steps: int = setting(10, unit="steps", at_least=1)
    validate_every_steps: int = setting(0, unit="steps", at_least=0)
    validation_sequences: int = setting(64, unit="sequences", at_least=1)
    checkpoint_every_steps: int = setting(0, unit="steps", at_least=0)
    checkpoint_async: bool = setting(True, free=True)
    keep_checkpoints: int = setting(2, unit="checkpoints", at_least=1)
    keep_every_steps: int = setting(0, unit="steps", at_least=0)
    verify_checkpoints: bool = setting(True, free=True)
    on_damaged_checkpoint: str = setting("stop", choices=("stop", "previous"))
    stop_after_nonfinite: int = setting(10, unit="steps", at_least=1)
    hang_timeout_seconds: int = setting(900, unit="seconds", at_least=0)
    save_timeout_seconds: int = setting(3600, unit="seconds", at_least=0)
    collect_garbage_every_steps: int = setting(100, unit="steps", at_least=0)
    ledger: bool = setting(False, free=True)


@dataclass(frozen=True)
class Fp8Config:
    """How FP8 is scaled, if `train.precision` or `train.context_precision` uses it.

    Attributes:
        format: `hybrid` is e4m3, and e5m2 for gradients.
        history_steps: Of fp8_delayed: a scale comes from the largest value of this number of
            forward passes.
        margin: Of fp8_delayed: the scale is lowered by 2 ** margin.
        first_layers_bf16: Layers at the start of both towers without FP8 (not with fp8_delayed).
        last_layers_bf16: Layers at the end of both towers without FP8 (not with fp8_delayed).
        router_padding: The router itself gives every expert a multiple of 16 tokens. If false, the
            tokens are padded by a copy.
    """

    format: str = setting("hybrid", choices=("hybrid", "e4m3"))
    history_steps: int = setting(1024, unit="forward passes", at_least=1)
    margin: int = setting(0, at_least=0)
    first_layers_bf16: int = setting(0, unit="layers", at_least=0)
    last_layers_bf16: int = setting(0, unit="layers", at_least=0)
    router_padding: bool = setting(False, free=True)


@dataclass(frozen=True)
class FusionConfig:
    """Kernels of Transformer Engine that combine several operations; unused without the package.

    Attributes:
        permutation: Of tokens to their experts and back.
        router: Choice and weights of experts, if `train.router_dtype` is fp32.
        gradient_accumulation: Add weight gradients directly to the fp32 sums.
        squared_relu: Of routed experts, with the weight of the token.
    """

    permutation: bool = setting(True, free=True)
    router: bool = setting(True, free=True)
    gradient_accumulation: bool = setting(True, free=True)
    squared_relu: bool = setting(True, free=True)


@dataclass(frozen=True)
class LoggingConfig:
    """Where figures are shown besides `metrics.jsonl`.

    Attributes:
        console: Print a table of figures.
        wandb: Mode of Weights & Biases. WANDB_MODE, WANDB_PROJECT and WANDB_NAME, if set in the
            environment, decide instead of this key and the next two.
        project: Project in Weights & Biases.
        name: Name of the run in Weights & Biases; null: its own choice.
    """

    console: bool = setting(True, free=True)
    wandb: str = setting("offline", choices=("offline", "online", "disabled"))
    project: str = setting("megatron-twotower", free=True)
    name: str | None = setting(None, free=True)


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        objective: `two_tower` trains a denoiser next to a frozen context tower. `ar` trains a
            backbone on the next token.
        seed: Seed of all random numbers.
        output: The run folder.
        resume: Resume from the newest checkpoint in the run folder. If false, a run folder in which
            a run has trained is an error.
        phases: The phases of the run, in order. Empty: one phase of `train.steps`.
    """

    objective: str = setting("two_tower", choices=("two_tower", "ar"))
    seed: int = setting(1234, at_least=0)
    output: str = setting("runs/default", free=True)
    resume: bool = setting(True, free=True)
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
    phases: list[PhaseConfig] = field(default_factory=list, metadata=FREE)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dataclasses as ("section.key", value) pairs."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value

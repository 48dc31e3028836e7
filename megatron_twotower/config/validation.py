"""What a configuration may say: choices, ranges and what must divide what, checked before anything is made."""

from collections.abc import Iterator

from megatron_twotower.common.errors import require
from megatron_twotower.config.precision import CONTEXT_PRECISIONS, FP8_MULTIPLE, FP8_SQUARE, PRECISIONS
from megatron_twotower.config.schema import LAYER_KINDS, ModelConfig, ParallelConfig, RunConfig, flatten, validate_model

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("two_tower", "ar"),
    "conditioning.initialisation": ("identity", "released"),
    "noise.time_per": ("sequence", "block"),
    "noise.time_sampling": ("uniform", "stratified"),
    "noise.weighting": ("masked_mean", "elbo"),
    "data.documents": ("ignore", "respect"),
    "data.shuffle": ("full", "windowed", "none"),
    "data.damaged_shards": ("stop", "skip"),
    "schedule.kind": ("wsd", "cosine", "constant"),
    "schedule.decay_shape": ("linear", "cosine"),
    "train.transformer_impl": ("auto", "local", "transformer_engine"),
    "train.precision": tuple(PRECISIONS),
    "train.context_precision": tuple(CONTEXT_PRECISIONS),
    "train.router_dtype": ("fp32", "fp64"),
    "train.on_damaged_checkpoint": ("stop", "previous"),
    "fp8.format": ("hybrid", "e4m3"),
    "parallel.moe_dispatcher": ("alltoall", "allgather", "deepep", "hybridep"),
    "parallel.card": ("h100", "h200", "b200", "a100"),
    "logging.wandb": ("offline", "online", "disabled"),
}

# Counts that must be at least this much.
MINIMA: dict[str, int] = {
    "noise.block_size_tokens": 1,
    "noise.report_buckets": 1,
    "noise.draws_per_context": 1,
    "data.sequence_length_tokens": 2,
    "data.micro_batch_size": 1,
    "data.global_batch_size": 1,
    "data.prefetch_batches": 1,
    "data.prefetch_workers": 1,
    "data.shuffle_run_tokens": 1,
    "data.shuffle_window_runs": 1,
    "parallel.tensor": 1,
    "parallel.expert": 1,
    "parallel.expert_tensor": 0,
    "parallel.pipeline": 1,
    "parallel.pipeline_chunks": 1,
    "parallel.context": 1,
    "parallel.bucket_parameters": 0,
    "parallel.threads_per_rank": 0,
    "parallel.ranks": 0,
    "train.steps": 1,
    "train.log_every_steps": 1,
    "train.validate_every_steps": 0,
    "train.checkpoint_every_steps": 0,
    "train.keep_checkpoints": 1,
    "train.keep_every_steps": 0,
    "train.stop_after_nonfinite": 1,
    "train.hang_timeout_seconds": 0,
    "fp8.history_steps": 1,
    "fp8.margin": 0,
    "fp8.first_layers_bf16": 0,
    "fp8.last_layers_bf16": 0,
    "schedule.warmup_steps": 0,
    "schedule.decay_steps": 0,
}


def validate(config: RunConfig, *, world_size: int) -> None:
    """Check every choice, range and divisibility of a resolved configuration.

    Raises:
        UserError: one line with the key, what was found and what was expected.
    """
    values = dict(flatten(config))
    for key, allowed in CHOICES.items():
        require(values[key] in allowed, f"{key}: found {values[key]!r}, expected one of {', '.join(allowed)}")
    for key, minimum in MINIMA.items():
        require(values[key] >= minimum, f"{key}: found {values[key]}, expected at least {minimum}")
    require(
        config.init.denoiser is None or config.objective == "two_tower",
        f"init.denoiser: found {config.init.denoiser} with objective {config.objective}, expected objective two_tower",
    )
    validate_model(config.model)
    _validate_noise(config)
    _validate_layout(config, world_size)
    _validate_precision(config)
    schedule, steps = config.schedule, config.train.steps
    require(
        schedule.warmup_steps + schedule.decay_steps <= steps and schedule.warmup_steps < steps,
        f"schedule.warmup_steps {schedule.warmup_steps} + schedule.decay_steps {schedule.decay_steps}: expected "
        f"at most train.steps {steps}, and a warm-up that ends before it",
    )
    lowest, highest = schedule.minimum_learning_rate, config.optimizer.learning_rate
    require(
        0 <= lowest <= highest,
        f"schedule.minimum_learning_rate: found {lowest}, expected between 0 and optimizer.learning_rate {highest}",
    )
    kinds = set(config.train.recompute_layers)
    require(
        kinds <= set(LAYER_KINDS),
        f"train.recompute_layers: found {config.train.recompute_layers!r}, expected letters of {''.join(LAYER_KINDS)}",
    )


def _validate_noise(config: RunConfig) -> None:
    noise, length = config.noise, config.data.sequence_length_tokens
    require(
        0 < noise.time_min <= noise.time_max <= 1,
        f"noise.time_min {noise.time_min}, noise.time_max {noise.time_max}: expected 0 < time_min <= time_max <= 1",
    )
    if config.objective != "two_tower":
        return
    require(
        length % noise.block_size_tokens == 0,
        f"data.sequence_length_tokens {length}: expected a multiple of "
        f"noise.block_size_tokens {noise.block_size_tokens}",
    )
    require(
        0 <= noise.mask_token_id < config.model.vocab_size,
        f"noise.mask_token_id: found {noise.mask_token_id}, expected less than vocab_size {config.model.vocab_size}",
    )


def _validate_layout(config: RunConfig, world_size: int) -> None:
    parallel = config.parallel
    require(
        parallel.ranks in (0, world_size),
        f"parallel.ranks: found {parallel.ranks}, expected the {world_size} ranks that were started, or 0",
    )
    require(
        parallel.context == 1,
        f"parallel.context: found {parallel.context}, expected 1 (context parallelism is not built: shorten sequences, "
        "or split them with parallel.tensor and parallel.sequence)",
    )
    dense = parallel.tensor * parallel.pipeline
    require(
        world_size % dense == 0,
        f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}: "
        f"does not divide {world_size} ranks",
    )
    experts = parallel.expert * parallel.expert_tensor_ranks * parallel.pipeline
    require(
        world_size % experts == 0,
        f"parallel.expert {parallel.expert} x parallel.expert_tensor {parallel.expert_tensor_ranks} x "
        f"parallel.pipeline {parallel.pipeline}: does not divide {world_size} ranks",
    )
    require(
        parallel.moe_dispatcher in ("alltoall", "allgather") or parallel.expert * parallel.expert_tensor_ranks > 1,
        f"parallel.moe_dispatcher: found {parallel.moe_dispatcher} with experts on one rank, expected alltoall, or "
        "parallel.expert above 1",
    )
    _validate_model_split(config)
    _validate_pipeline(config.model, parallel)
    _validate_micro_batches(config, world_size // dense)
    require(
        not parallel.overlap_param_gather or config.optimizer.distributed,
        "parallel.overlap_param_gather: found true with optimizer.distributed false, expected both",
    )
    require(
        not parallel.overlap_param_gather or parallel.overlap_grad_reduce,
        "parallel.overlap_param_gather: found true with parallel.overlap_grad_reduce false, expected both",
    )


def _validate_model_split(config: RunConfig) -> None:
    """Tensor and expert parallelism: every size divides."""
    parallel, model, length = config.parallel, config.model, config.data.sequence_length_tokens
    tensor, experts = parallel.tensor, "E" in model.hybrid_override_pattern
    split = {"vocab_size": tensor, "num_attention_heads": tensor, "num_key_value_heads": tensor, "n_groups": tensor}
    split |= {"mamba_num_heads": tensor, "intermediate_size": tensor, "n_routed_experts": parallel.expert}
    split |= {"moe_intermediate_size": parallel.expert_tensor_ranks, "moe_shared_expert_intermediate_size": tensor}
    for name, ranks in split.items():
        size = getattr(model, name)
        require(size % ranks == 0, f"model.{name} {size}: does not divide over {ranks} ranks")
    require(
        not parallel.sequence or tensor > 1,
        f"parallel.sequence: found true with parallel.tensor {tensor}, expected parallel.tensor above 1",
    )
    require(
        tensor == 1 or parallel.sequence or not experts,
        f"parallel.tensor {tensor}: expected parallel.sequence true for a pattern with MoE layers",
    )
    require(
        not parallel.sequence or length % tensor == 0,
        f"data.sequence_length_tokens {length}: expected a multiple of parallel.tensor {tensor}",
    )


def _validate_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Stages: there are as many stretches of layers as are asked for, and they hold all layers."""
    stages, chunks, lengths = parallel.pipeline, parallel.pipeline_chunks, list(parallel.pipeline_layers)
    require(
        chunks == 1 or stages > 1,
        f"parallel.pipeline_chunks: found {chunks} with parallel.pipeline {stages}, expected parallel.pipeline above 1",
    )
    wanted, layers = stages * chunks, model.num_layers
    cut = f"{wanted} stretches (parallel.pipeline {stages} x parallel.pipeline_chunks {chunks})"
    if not lengths:
        require(
            layers % wanted == 0,
            f"model.hybrid_override_pattern: {layers} layers do not divide into {cut}, expected a multiple, or "
            "parallel.pipeline_layers",
        )
        return
    require(
        len(lengths) == wanted and min(lengths) >= 1,
        f"parallel.pipeline_layers: found {lengths}, expected a number of layers for each of {cut}",
    )
    require(
        sum(lengths) == layers,
        f"parallel.pipeline_layers: found {sum(lengths)} layers in all, expected the {layers} of the model",
    )


def _validate_micro_batches(config: RunConfig, data_parallel: int) -> None:
    """Whole micro-batches on every rank; where there are stages, in validation too, for one shape must pass through."""
    data, parallel, train = config.data, config.parallel, config.train
    # The interleaved schedule deals micro-batches out to its chunks in rounds of one for each
    # stage.
    rounds = parallel.pipeline if parallel.pipeline_chunks > 1 else 1
    step = data.micro_batch_size * data_parallel * rounds
    product = f"data.micro_batch_size {data.micro_batch_size} x {data_parallel} data-parallel ranks"
    if rounds > 1:
        product += f" x {rounds} stages of an interleaved pipeline"
    counts = {"data.global_batch_size": data.global_batch_size}
    if parallel.pipeline > 1 and train.validate_every_steps:
        counts["train.validation_sequences"] = train.validation_sequences
    for key, count in counts.items():
        require(count % step == 0, f"{key} {count}: expected a multiple of {step} ({product})")


def _validate_precision(config: RunConfig) -> None:
    """FP8: who can serve it, which layers may stay out of it, and that every matrix has sides that it takes."""
    train, parallel, fp8 = config.train, config.parallel, config.fp8
    settings = {"train.precision": train.precision, "train.context_precision": train.context_precision}
    in_fp8 = [f"{key} {value}" for key, value in settings.items() if value.startswith("fp8")]
    require(
        train.context_precision == "wide" or (config.objective == "two_tower" and train.precision != "fp32"),
        f"train.context_precision: found {train.context_precision} with objective {config.objective} and "
        f"train.precision {train.precision}, expected objective two_tower and bf16 or an FP8 one, or wide",
    )
    if not in_fp8:
        return
    require(
        train.transformer_impl != "local",
        f"train.transformer_impl: found local with {in_fp8[0]}, expected transformer_engine or auto",
    )
    ends = fp8.first_layers_bf16 + fp8.last_layers_bf16
    require(
        not ends or train.precision != "fp8_delayed",
        f"fp8.first_layers_bf16 {fp8.first_layers_bf16}, fp8.last_layers_bf16 {fp8.last_layers_bf16}: expected 0 with "
        "train.precision fp8_delayed, whose scales are of all layers or none",
    )
    longest = config.model.num_layers // parallel.pipeline
    for key, count in (("first", fp8.first_layers_bf16), ("last", fp8.last_layers_bf16)):
        require(
            count <= longest,
            f"fp8.{key}_layers_bf16: found {count}, expected at most the {longest} layers of a pipeline stage",
        )
    require(
        not fp8.router_padding or parallel.moe_dispatcher != "allgather",
        "fp8.router_padding: found true with parallel.moe_dispatcher allgather, expected another or false",
    )
    for what, size in _fp8_sides(config):
        require(size % FP8_MULTIPLE == 0, f"{what}: expected a multiple of {FP8_MULTIPLE} with {in_fp8[0]}")
    tokens = config.data.sequence_length_tokens * config.data.micro_batch_size // parallel.tensor
    require(
        not (parallel.sequence and any(each.endswith("blockwise") for each in in_fp8)) or tokens % FP8_SQUARE == 0,
        f"data.sequence_length_tokens x data.micro_batch_size over {parallel.tensor} ranks is {tokens}: expected a "
        f"multiple of {FP8_SQUARE} with fp8_blockwise and parallel.sequence",
    )


def _fp8_sides(config: RunConfig) -> Iterator[tuple[str, int]]:
    """The sides of every matrix that one rank multiplies in FP8, and the tokens of a micro-batch, by what they are."""
    model, data, tensor = config.model, config.data, config.parallel.tensor
    group_states = 2 * model.n_groups * model.ssm_state_size
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    widths = {
        "M": {
            "width of in_proj of Mamba": (2 * model.mamba_inner + group_states + model.mamba_num_heads, tensor),
            "width of out_proj of Mamba": (model.mamba_inner, tensor),
        },
        "*": {
            "width of linear_qkv of attention": (heads * model.head_dim, tensor),
            "width of linear_proj of attention": (model.num_attention_heads * model.head_dim, tensor),
        },
        "E": {
            "model.moe_intermediate_size": (model.moe_intermediate_size, config.parallel.expert_tensor_ranks),
            "model.moe_shared_expert_intermediate_size": (model.moe_shared_expert_intermediate_size, tensor),
        },
        "-": {"model.intermediate_size": (model.intermediate_size, tensor)},
    }
    yield f"model.hidden_size {model.hidden_size}", model.hidden_size
    for kind, named in widths.items():
        if kind in model.hybrid_override_pattern:
            for name, (whole, ranks) in named.items():
                yield f"{name} {whole} over {ranks} ranks is {whole // ranks}", whole // ranks
    tokens = data.sequence_length_tokens * data.micro_batch_size
    yield f"data.sequence_length_tokens x data.micro_batch_size {tokens}", tokens

"""Checks of a resolved configuration before anything is built.

The accepted values of one setting are part of its field (`config/schema.py`). The functions below
are the rules between several settings, such as what must divide what.
"""

from collections.abc import Iterator

from megatron_twotower.common.errors import require
from megatron_twotower.config.context_split import num_stretches
from megatron_twotower.config.precision import FP8_MULTIPLE, FP8_SQUARE
from megatron_twotower.config.schema import LAYER_KINDS, ModelConfig, ParallelConfig, RunConfig
from megatron_twotower.config.setting import check_settings

# Megatron sums the counts of a global batch in 32 bits (megatron-core 0.16.1, schedules.py).
MOST_TOKENS = 2**31


def validate(config: RunConfig, *, world_size: int) -> None:
    """Check a resolved configuration.

    Args:
        config: The configuration, with its model filled in.
        world_size: The number of ranks.

    Raises:
        UserError: One line with the key, what was found and what was expected.
    """
    check_settings(config)
    require(config.output.strip() != "", "output: found nothing, expected the run folder")
    require(
        config.init.denoiser is None or config.objective == "two_tower",
        f"init.denoiser: found {config.init.denoiser} with objective {config.objective}, expected objective two_tower",
    )
    validate_model(config.model)
    _validate_noise(config)
    _validate_ablation(config)
    _validate_layout(config, world_size)
    _validate_precision(config)
    _validate_schedule(config)


def validate_model(model: ModelConfig) -> None:
    """Check the shape of a model: there are layers, and heads, groups and experts fit each other.

    Raises:
        UserError: One line with the key, what was found and what was expected.
    """
    unknown = set(model.hybrid_override_pattern) - set(LAYER_KINDS)
    require(
        not unknown and bool(model.hybrid_override_pattern),
        f"model.hybrid_override_pattern: found {model.hybrid_override_pattern!r}, "
        f"expected letters of {''.join(LAYER_KINDS)}",
    )
    divisors = (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups"))
    for total, part in divisors:
        a, b = getattr(model, total), getattr(model, part)
        require(a % b == 0, f"model.{total} {a}: expected a multiple of model.{part} {b}")
    require(
        1 <= model.num_experts_per_tok <= model.n_routed_experts,
        f"model.num_experts_per_tok: found {model.num_experts_per_tok}, "
        f"expected 1 to model.n_routed_experts {model.n_routed_experts}",
    )


def _validate_schedule(config: RunConfig) -> None:
    """The warm-up and the decay fit into the run, and the rates are in order."""
    schedule, steps = config.schedule, config.train.steps
    require(
        schedule.warmup_steps + schedule.decay_steps <= steps and schedule.warmup_steps < steps,
        f"schedule.warmup_steps {schedule.warmup_steps} + schedule.decay_steps {schedule.decay_steps}: expected "
        f"at most train.steps {steps}, and a warm-up that ends before it",
    )
    lowest, highest = schedule.minimum_learning_rate, config.optimizer.learning_rate
    require(
        lowest <= highest,
        f"schedule.minimum_learning_rate: found {lowest}, expected between 0 and optimizer.learning_rate {highest}",
    )


def _validate_noise(config: RunConfig) -> None:
    """Noise levels are in order; blocks divide sequences; the mask token is in the vocabulary."""
    noise, length = config.noise, config.data.sequence_length_tokens
    require(
        noise.time_min <= noise.time_max,
        f"noise.time_min {noise.time_min}, noise.time_max {noise.time_max}: expected 0 < time_min <= time_max <= 1",
    )
    if config.objective != "two_tower":
        return
    require(
        noise.paired_draws == "independent" or noise.draws_per_context % 2 == 0,
        f"noise.paired_draws: found {noise.paired_draws} with noise.draws_per_context {noise.draws_per_context}, "
        "expected an even number of draws",
    )
    biased = {
        "mask_counts at_least_one": noise.mask_counts == "at_least_one",
        f"late_bias {noise.late_bias}": noise.late_bias > 0,
        f"distance_decay {noise.distance_decay}": noise.distance_decay > 0,
    }
    found = next((name for name, is_set in biased.items() if is_set), None)
    require(
        noise.weighting != "elbo" or found is None,
        f"noise.{found}: found it with noise.weighting elbo, which then bounds nothing, expected masked_mean",
    )
    require(
        not noise.token_shift or config.data.align_blocks == "grid",
        f"noise.token_shift: found true with data.align_blocks {config.data.align_blocks}, expected grid: a block "
        "would have to begin with the last token before the answer",
    )
    stretches = num_stretches(config.parallel.context)
    divisor = f"noise.block_size_tokens {noise.block_size_tokens}"
    if stretches > 1:
        divisor += f" x {stretches} stretches of parallel.context {config.parallel.context} ranks"
    require(
        length % (noise.block_size_tokens * stretches) == 0,
        f"data.sequence_length_tokens {length}: expected a multiple of {divisor}",
    )
    require(
        noise.mask_token_id < config.model.vocab_size,
        f"noise.mask_token_id: found {noise.mask_token_id}, expected less than vocab_size {config.model.vocab_size}",
    )


def _validate_ablation(config: RunConfig) -> None:
    """The denoiser goes without something that it has, in a layout that can leave it out."""
    without, pattern = config.conditioning.without, config.model.hybrid_override_pattern
    kind = {"states": "M", "aligned_attention": "*"}.get(without)
    if kind is None:
        return
    shown = f"conditioning.without: found {without}"
    least = 2 if kind == "*" else 1  # the last of one attention layer is its own
    require(
        pattern.count(kind) >= least,
        f"{shown} with model.hybrid_override_pattern {pattern}, expected at least {least} of {kind}",
    )
    require(
        without != "states" or "M" not in config.train.recompute_layers,
        f"{shown} with train.recompute_layers {config.train.recompute_layers}, expected no M there",
    )
    require(
        without != "aligned_attention" or config.parallel.pipeline == 1,
        f"{shown} with parallel.pipeline {config.parallel.pipeline}, expected 1: a stage has its own layers only",
    )


def _validate_layout(config: RunConfig, world_size: int) -> None:
    """Parallel sizes divide the ranks, the model and the batches."""
    parallel = config.parallel
    require(
        parallel.ranks in (0, world_size),
        f"parallel.ranks: found {parallel.ranks}, expected the {world_size} ranks that were started, or 0",
    )
    dense = parallel.tensor * parallel.context * parallel.pipeline
    product = f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}"
    if parallel.context > 1:
        product += f" x parallel.context {parallel.context}"
    require(world_size % dense == 0, f"{product}: does not divide {world_size} ranks")
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
    for key in ("hang_timeout_seconds", "save_timeout_seconds"):
        seconds, minutes = getattr(config.train, key), parallel.collective_timeout_minutes
        require(
            seconds < 60 * minutes,
            f"parallel.collective_timeout_minutes {minutes}: expected more than train.{key} {seconds}, so that the "
            "watchdog names the rank before collectives end the job",
        )


def _validate_model_split(config: RunConfig) -> None:
    """Every size of the model divides over the ranks that split it."""
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
    stretches = num_stretches(config.parallel.context)
    require(
        length % stretches == 0,
        f"data.sequence_length_tokens {length}: expected a multiple of the {stretches} stretches of "
        f"parallel.context {parallel.context} ranks",
    )
    stretch = length // stretches
    require(
        stretches == 1 or stretch >= model.conv_kernel - 1,
        f"data.sequence_length_tokens {length}: found stretches of {stretch} for parallel.context {parallel.context} "
        f"ranks, expected at least {model.conv_kernel - 1} (model.conv_kernel - 1)",
    )
    of = "data.sequence_length_tokens" if stretches == 1 else f"a stretch of {stretches} of data.sequence_length_tokens"
    require(
        not parallel.sequence or stretch % tensor == 0,
        f"{of} {stretch}: expected a multiple of parallel.tensor {tensor}",
    )


def _validate_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    """The model chunks of the pipeline contain all layers."""
    stages, chunks, lengths = parallel.pipeline, parallel.pipeline_chunks, list(parallel.pipeline_layers)
    require(
        chunks == 1 or stages > 1,
        f"parallel.pipeline_chunks: found {chunks} with parallel.pipeline {stages}, expected parallel.pipeline above 1",
    )
    wanted, layers = stages * chunks, model.num_layers
    cut = f"{wanted} model chunks (parallel.pipeline {stages} x parallel.pipeline_chunks {chunks})"
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
    """Every rank has complete micro-batches.

    With several pipeline stages this applies to validation too: the stages exchange one shape.
    """
    data, parallel, train = config.data, config.parallel, config.train
    # The interleaved schedule passes one micro-batch for each stage through a model chunk, then
    # changes to the next chunk.
    rounds = parallel.pipeline if parallel.pipeline_chunks > 1 else 1
    step = data.micro_batch_size * data_parallel * rounds
    product = f"data.micro_batch_size {data.micro_batch_size} x {data_parallel} data-parallel ranks"
    if rounds > 1:
        product += f" x {rounds} stages of an interleaved pipeline"
    draws = config.noise.draws_per_context if config.objective == "two_tower" else 1
    tokens = data.global_batch_size * data.sequence_length_tokens * draws
    copies = f" x noise.draws_per_context {draws}" if draws > 1 else ""
    require(
        tokens < MOST_TOKENS,
        f"data.global_batch_size {data.global_batch_size} x data.sequence_length_tokens {data.sequence_length_tokens}"
        f"{copies}: found {tokens} tokens, expected fewer than {MOST_TOKENS}",
    )
    counts = {"data.global_batch_size": data.global_batch_size}
    if parallel.pipeline > 1 and train.validate_every_steps:
        counts["train.validation_sequences"] = train.validation_sequences
    for key, count in counts.items():
        require(count % step == 0, f"{key} {count}: expected a multiple of {step} ({product})")


def _validate_precision(config: RunConfig) -> None:
    """FP8 has an implementation, and matrices have the sides that it needs."""
    train, parallel, fp8 = config.train, config.parallel, config.fp8
    settings = {"train.precision": train.precision, "train.context_precision": train.context_precision}
    in_fp8 = [f"{key} {value}" for key, value in settings.items() if value.startswith("fp8")]
    require(
        train.context_precision == "wide" or (config.objective == "two_tower" and train.precision != "fp32"),
        f"train.context_precision: found {train.context_precision} with objective {config.objective} and "
        f"train.precision {train.precision}, expected objective two_tower with bf16 or FP8, or wide",
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
        "train.precision fp8_delayed, which scales all layers or none",
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
    ranks = parallel.tensor * parallel.context
    tokens = config.data.sequence_length_tokens * config.data.micro_batch_size // ranks
    require(
        not (parallel.sequence and any(each.endswith("blockwise") for each in in_fp8)) or tokens % FP8_SQUARE == 0,
        f"data.sequence_length_tokens x data.micro_batch_size over {ranks} ranks is {tokens}: expected a "
        f"multiple of {FP8_SQUARE} with fp8_blockwise and parallel.sequence",
    )


def _fp8_sides(config: RunConfig) -> Iterator[tuple[str, int]]:
    """Yield a description and the length of each side that FP8 multiplies on one rank.

    These are the sides of every matrix, and the tokens of a micro-batch.
    """
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
            for name, (size, ranks) in named.items():
                yield f"{name} {size} over {ranks} ranks is {size // ranks}", size // ranks
    tokens, context = data.sequence_length_tokens * data.micro_batch_size, config.parallel.context
    over = f" over {context} ranks is {tokens // context}" if context > 1 else ""
    yield f"data.sequence_length_tokens x data.micro_batch_size {tokens}{over}", tokens // context

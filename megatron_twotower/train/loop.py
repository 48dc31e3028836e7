"""The training loop: one optimizer step, validation, and the loop around them.

It knows no file format.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.context_split import stretches
from megatron_twotower.config.phases import Phase, phase_number
from megatron_twotower.config.schema import NoiseConfig, RunConfig
from megatron_twotower.data.dataset import skipped_sequences
from megatron_twotower.mcore import parallel
from megatron_twotower.model.towers import rows_between_stages
from megatron_twotower.train.losses import autoregressive_loss, masked_diffusion_loss, next_tokens
from megatron_twotower.train.metrics import Metrics, peak_memory_gib
from megatron_twotower.train.noise import corrupt
from megatron_twotower.train.optimizer import Outcome, guarded_step
from megatron_twotower.train.progress import TrainingProgress, damaged_on_all_ranks
from megatron_twotower.train.watchdog import SAVING
from megatron_twotower.types import Batch, LossReport

# The seed of the noise of validation is that of the run with these bits flipped.
VALIDATION_STREAM = 0x5EED


def _nothing() -> None:
    """Called where nobody asks whether the loop is alive."""


@dataclass(frozen=True)
class Trainer:
    """What one rank trains with."""

    config: RunConfig
    model: parallel.ModelChunks
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    groups: ProcessGroupCollection
    phases: tuple[Phase, ...]

    def in_phase_of(self, cursor: int) -> "Trainer":
        """Return the same with the noise of the phase that the sequence at `cursor` belongs to."""
        phase = self.phases[phase_number(self.phases, cursor)]
        return dataclasses.replace(self, config=dataclasses.replace(self.config, noise=phase.noise))


@dataclass(frozen=True)
class LoopHooks:
    """What the loop calls: where figures go, how state is saved, and when to stop early.

    Attributes:
        metrics: Receives the log records.
        save_checkpoint: Begins to save the state.
        finish_checkpoint: Records a save that is done; with `wait=True` waits for it.
        stop_requested: Whether the run shall end after this step; the same on all ranks.
        heartbeat: Receives what the loop does now.
        record_samples: Receives the micro-batches of every step, and the step.
        write_nonfinite_batch: Writes the micro-batches of a step that was not finite, and returns
            the file.
        count_corpus_tokens: Returns the tokens read of each corpus at a cursor; None with one
            corpus.
        collect_garbage: Receives the number of each step that is done.
    """

    metrics: Metrics
    save_checkpoint: Callable[[TrainingProgress], None]
    finish_checkpoint: Callable[..., None]
    stop_requested: Callable[[], bool]
    heartbeat: Callable[[str], None]
    record_samples: Callable[[Sequence[Batch], int], None]
    write_nonfinite_batch: Callable[[Sequence[Batch], int], str]
    count_corpus_tokens: Callable[[int], dict[str, int]] | None = None
    collect_garbage: Callable[[int], None] = lambda step: None


@dataclass(frozen=True)
class MicroBatch:
    """Clean sequences, and what determines their noise.

    Attributes:
        batch: The sequences.
        seed: Seed of the noise.
        times: (b, n) or (b, 1) float32 noise levels; None: levels are sampled.
    """

    batch: Batch
    seed: int
    times: Tensor | None = None


def stretches_of_rank(length: int, groups: ProcessGroupCollection) -> tuple[slice, ...]:
    """The positions that this rank has of each sequence of `length` positions."""
    return stretches(length, ranks=groups.cp.size(), rank=groups.cp.rank())


def ar_forward(
    chunk: Any, micro_batch: MicroBatch, config: RunConfig, groups: ProcessGroupCollection
) -> tuple[Tensor, LossReport | None]:
    """Run one model chunk of a backbone on a micro-batch; see `OBJECTIVES`."""
    length = config.data.sequence_length_tokens
    batch = next_tokens(micro_batch.batch, stretches_of_rank(length, groups)).to(device.device())
    hidden, tower = chunk(batch), chunk.module.tower
    return hidden, autoregressive_loss(tower, hidden, batch, groups) if tower.stage.last else None


def two_tower_forward(
    chunk: Any, micro_batch: MicroBatch, config: RunConfig, groups: ProcessGroupCollection
) -> tuple[Tensor, LossReport | None]:
    """Run one model chunk of both towers on a micro-batch; see `OBJECTIVES`."""
    noisy = corrupt(
        micro_batch.batch,
        config.noise,
        seed=micro_batch.seed,
        times=micro_batch.times,
        stretches=stretches_of_rank(config.data.sequence_length_tokens, groups),
    ).to(device.device())
    hidden, model = chunk(noisy), chunk.module
    if not model.tower.stage.last:
        return hidden, None
    teacher = None if noisy.teacher_shares is None else model.context
    return hidden, masked_diffusion_loss(model.tower, hidden, noisy, config.noise, groups, context=teacher)


# The forward pass of a model chunk returns the activations for the next stage and no report; on the
# last stage the final hidden states and the report of their loss.
OBJECTIVES = {"ar": ar_forward, "two_tower": two_tower_forward}


def _pack(report: LossReport) -> Tensor:
    """(2 + 2k,) float64: total, count, bucket sums, bucket counts."""
    head = torch.stack([report.total.detach().double(), report.count.double()])
    return torch.cat([head, report.bucket_sums.double(), report.bucket_counts.double()])


def _num_buckets(config: RunConfig) -> int:
    return config.noise.report_buckets if config.objective == "two_tower" else 1


def _no_sums(config: RunConfig) -> Tensor:
    """Packed sums without any step."""
    return torch.zeros(2 + 2 * _num_buckets(config), dtype=torch.float64, device=device.device())


def forward_backward(
    trainer: Trainer, micro_batches: Sequence[MicroBatch], *, forward_only: bool, alive: Callable[[], None] = _nothing
) -> Tensor:
    """Run micro-batches through Megatron's schedule.

    Args:
        trainer: What this rank trains with.
        micro_batches: Of this rank.
        forward_only: Whether to skip the backward pass.
        alive: Called at every micro-batch.

    Returns:
        The packed sums of this rank, zero on stages before the last.
    """
    config, objective = trainer.config, OBJECTIVES[trainer.config.objective]
    megatron = trainer.model.config

    def step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        alive()
        output, report = objective(chunk, next(iterator), config, trainer.groups)

        def loss(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert report is not None, "Megatron asks only the last stage"
            return total, report.count, _pack(report)

        return output if report is None else report.total, loss

    first = micro_batches[0]
    rows = rows_between_stages(
        config,
        sequences=len(first.batch.tokens),
        times=first.times,
        ranks=trainer.groups.tp.size() if megatron.sequence_parallel else 1,
    )
    reports = parallel.run_forward_backward(
        step, micro_batches, trainer.model, rows_between_stages=rows, groups=trainer.groups, forward_only=forward_only
    )
    return torch.stack([_no_sums(config), *reports]).sum(0)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    Attributes:
        sums: Packed sums of this rank.
        grad_norm: Gradient norm over all ranks, before clipping.
        outcome: Whether the step was taken, or why it was skipped.
    """

    sums: Tensor
    grad_norm: float
    outcome: Outcome

    @property
    def taken(self) -> bool:
        """Whether the step was taken."""
        return self.outcome is Outcome.TAKEN


def train_step(trainer: Trainer, batches: Sequence[Batch], *, alive: Callable[[], None] = _nothing) -> StepResult:
    """Take one optimizer step on this rank's micro-batches of a global batch.

    If the loss or a gradient is not finite on any rank, or if no rank has a position to learn from,
    no weight and no optimizer state changes, on all ranks. `alive` is called at every micro-batch.
    """
    trainer.schedule.step(1)
    trainer.model.train()
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    # Megatron changes the selection biases of its routers when it reduces gradients, before it is
    # known whether the step is finite.
    named = [item for chunk in trainer.model.chunks for item in chunk.named_buffers()]
    biases = [(buffer, buffer.clone()) for name, buffer in named if name.endswith("expert_bias")]
    micro_batches = [MicroBatch(batch, trainer.config.seed) for batch in batches]
    sums = forward_backward(trainer, micro_batches, forward_only=False, alive=alive)
    outcome, norm = guarded_step(trainer.optimizer, outcome=_usable(sums, trainer.config))
    if outcome is not Outcome.TAKEN:
        for buffer, before in biases:
            buffer.copy_(before)
    return StepResult(sums, norm, outcome)


def _usable(sums: Tensor, config: RunConfig) -> Tensor:
    """Return the `Outcome` that the sums of all ranks allow, () int, without waiting for it.

    A batch without a scored position has no gradient of the loss, and a step on it would be weight
    decay and momentum alone. The balance loss has a gradient as long as the loss has a count to
    divide by: with `elbo`, which counts all tokens, and not with `masked_mean`.
    """
    scored = sums[2 + _num_buckets(config) :].sum() > 0
    if config.train.sequence_aux_loss and "E" in config.model.hybrid_override_pattern:
        scored = sums[1] > 0
    not_finite, learns = parallel.any_rank_flag(torch.stack([~sums[0].isfinite(), scored]))
    return torch.where(not_finite, Outcome.NOT_FINITE, torch.where(learns, Outcome.TAKEN, Outcome.UNSCORED))


def validation_times(count: int, noise: NoiseConfig) -> Tensor:
    """Return noise levels that cover the range evenly, (count,) float32."""
    fractions = (torch.arange(count) + 0.5) / count
    return noise.time_min + fractions * (noise.time_max - noise.time_min)


@torch.no_grad()
def validate(trainer: Trainer, batches: Sequence[Batch], *, alive: Callable[[], None] = _nothing) -> dict[str, Any]:
    """Compute the loss of fixed sequences at fixed noise: the same figure on any layout.

    It is the loss of the clean tokens at random masks, whatever targets and masks of training are.

    Args:
        trainer: What this rank trains with.
        batches: This rank's micro-batches; `positions` count the validation sequences from 0.
        alive: Called at every micro-batch.
    """
    trainer.model.eval()
    noise = trainer.config.noise.for_validation()
    trainer = dataclasses.replace(trainer, config=dataclasses.replace(trainer.config, noise=noise))
    counts_load = trainer.config.objective == "two_tower"
    if counts_load:
        _count_by_noise(trainer)
    seed = trainer.config.seed ^ VALIDATION_STREAM
    times = validation_times(trainer.config.train.validation_sequences, noise)
    micro_batches = [MicroBatch(batch, seed, times[batch.positions].unsqueeze(-1)) for batch in batches]
    sums = forward_backward(trainer, micro_batches, forward_only=True, alive=alive)
    sums = parallel.sum_over_stages(sums, trainer.groups)
    figures = _figures(sums, _num_buckets(trainer.config))
    load = load_by_noise(_tokens_by_noise(trainer), trainer.config.parallel.expert) if counts_load else {}
    return {"tokens": figures.pop("scored_tokens"), **figures, **load}


def _count_by_noise(trainer: Trainer) -> None:
    """Let the routers count the tokens of each expert by noise level, from zero."""
    buckets, experts = _num_buckets(trainer.config), trainer.config.model.n_routed_experts
    for _, router in trainer.model.routers():
        router.tokens_by_noise = torch.zeros(buckets, experts, device=device.device())


def _tokens_by_noise(trainer: Trainer) -> Tensor:
    """What the routers of all ranks have counted: (layers, noise levels, experts) float64."""
    config = trainer.config
    shape = (len(config.model.hybrid_override_pattern), _num_buckets(config), config.model.n_routed_experts)
    counts = torch.zeros(shape, dtype=torch.float64, device=device.device())
    for layer, router in trainer.model.routers():
        assert router.tokens_by_noise is not None, "validation has made them"
        counts[layer] = router.tokens_by_noise
        router.tokens_by_noise = None
    return parallel.sum_over_ranks(counts).cpu()


def load_by_noise(tokens: Tensor, expert_ranks: int) -> dict[str, dict[str, float]]:
    """The load of the busiest expert, and of the busiest expert-parallel rank, over the mean.

    Of each noise level the largest of all layers.

    Args:
        tokens: (layers, noise levels, experts); zero for layers without experts.
        expert_ranks: The ranks that share the experts. Without others there is no load of ranks.
    """
    load: dict[str, dict[str, float]] = {}
    for name, each in zip(_bucket_names(tokens.shape[1]), tokens.unbind(1), strict=True):
        routed = each[each.sum(1) > 0]
        if not len(routed):
            continue
        load.setdefault("expert_load_by_noise", {})[name] = _max_over_mean(routed)
        if expert_ranks > 1:
            of_ranks = routed.unflatten(1, (expert_ranks, -1)).sum(2)
            load.setdefault("rank_load_by_noise", {})[name] = _max_over_mean(of_ranks)
    return load


def _max_over_mean(tokens: Tensor) -> float:
    """The largest ratio of all layers: (layers, experts or ranks)."""
    return (tokens.max(dim=1).values / tokens.mean(dim=1)).max().item()


def _bucket_names(buckets: int) -> list[str]:
    return [f"{i / buckets:.1f}-{(i + 1) / buckets:.1f}" for i in range(buckets)]


def _figures(sums: Tensor, buckets: int) -> dict[str, Any]:
    """Compute means from packed sums over all ranks.

    These are the trained loss, and the unweighted loss by noise level. Without anything to divide
    by there is no loss.
    """
    values = sums.tolist()
    total, count, by_level, scored = values[0], values[1], values[2 : 2 + buckets], values[2 + buckets :]
    by_noise = {name: s / n for name, s, n in zip(_bucket_names(buckets), by_level, scored, strict=True) if n}
    loss = {"loss": total / count} if count else {}
    return loss | {"scored_tokens": int(sum(scored)), "loss_by_noise": by_noise if buckets > 1 else {}}


def _data_figures(trainer: Trainer, progress: TrainingProgress, hooks: LoopHooks) -> dict[str, Any]:
    """Collect what was read: the phase, the tokens of each corpus, and what was skipped."""
    figures: dict[str, Any] = {}
    if trainer.config.phases:
        figures["phase"] = trainer.phases[phase_number(trainer.phases, progress.cursor - 1)].name
    if hooks.count_corpus_tokens is not None:
        figures["tokens_by_corpus"] = hooks.count_corpus_tokens(progress.cursor)
    if progress.nonfinite:
        figures["nonfinite_steps"] = progress.nonfinite
    if progress.unscored:
        figures["unscored_steps"] = progress.unscored
    if trainer.config.data.damaged_shards == "skip":
        figures["skipped_sequences"] = damaged_on_all_ranks(progress, trainer.groups)
    return figures


def _train_record(trainer: Trainer, progress: TrainingProgress, grad_norm: float, started: float) -> dict[str, Any]:
    """Compute the log record of the log window, over all ranks."""
    config, groups = trainer.config, trainer.groups
    # There are no sums if no step of the log window was finite.
    sums = _no_sums(config) if progress.sums is None else progress.sums
    figures = _figures(parallel.sum_over_stages(sums, groups), _num_buckets(config))
    if progress.sums is None:
        figures["loss"] = math.nan
    load = {}
    if progress.expert_tokens is not None:
        tokens = parallel.sum_over_ranks(progress.expert_tokens.double())
        mean = tokens.mean(dim=1).clamp(min=torch.finfo(tokens.dtype).tiny)  # a batch may be padding alone
        load = {"max_over_mean": (tokens.max(dim=1).values / mean).max().item()}
    now = time.perf_counter()
    length = config.data.sequence_length_tokens
    timed = progress.sequences - progress.sequences_before
    return {
        "kind": "train",
        "step": progress.step,
        **figures,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm,
        "tokens": progress.cursor * length,
        "tokens_per_second": timed * length / (now - progress.window_started),
        "expert_load": load,
        "memory_gib": peak_memory_gib(),
        "seconds": now - started,
    }


def _advance(
    trainer: Trainer, progress: TrainingProgress, batches: Sequence[Batch], cursor: int, result: StepResult
) -> None:
    """Count a step. One that is not finite has consumed its batch, but adds nothing to the sums."""
    progress.step += 1
    progress.sequences += cursor - progress.cursor
    progress.cursor = cursor
    progress.damaged_sequences += sum(map(skipped_sequences, batches))
    if result.outcome is Outcome.NOT_FINITE:
        progress.nonfinite += 1
        progress.consecutive_nonfinite += 1
        return
    if result.taken:
        progress.consecutive_nonfinite = 0
        progress.updates += 1
    else:
        progress.unscored += 1
    progress.sums = result.sums if progress.sums is None else progress.sums + result.sums
    tokens = trainer.model.expert_tokens
    if tokens is not None:
        progress.expert_tokens = tokens if progress.expert_tokens is None else progress.expert_tokens + tokens


def _check_finite(
    progress: TrainingProgress, result: StepResult, batches: Sequence[Batch], limit: int, hooks: LoopHooks
) -> None:
    """End the run if too many steps without interruption were not finite.

    Raises:
        UserError: `limit` steps without interruption had a loss or gradients that are not finite.
    """
    skipped = progress.consecutive_nonfinite
    if skipped >= limit:
        raise UserError(
            f"step {progress.step}: the loss or its gradients are not finite, {skipped} steps in a row "
            f"(gradient norm {result.grad_norm}); "
            f"the batch is in {hooks.write_nonfinite_batch(batches, progress.step)}"
        )


def train(
    trainer: Trainer,
    progress: TrainingProgress,
    stream: Iterator[tuple[list[Batch], int]],
    validation: Sequence[Batch],
    hooks: LoopHooks,
) -> bool:
    """Train from `progress` to the configured number of steps.

    Args:
        trainer: What this rank trains with.
        progress: How far the run is; updated in place.
        stream: This rank's micro-batches of each step, and the cursor after it.
        validation: This rank's validation micro-batches.
        hooks: What the loop calls.

    Returns:
        True when all steps are done, False when stopped early on request, with the state saved.

    Raises:
        UserError: Too many steps without interruption were not finite; all sequences of a record
            were in damaged shards; or a checkpoint cannot be written.
    """
    settings, started = trainer.config.train, time.perf_counter()

    def due(every: int) -> bool:
        return bool(every) and (progress.step % every == 0 or progress.step == settings.steps)

    def begins(activity: str) -> Callable[[], None]:
        """Report the activity, and return the function that reports it again."""
        hooks.heartbeat(activity)
        return lambda: hooks.heartbeat(activity)

    def run_validation() -> None:
        alive = begins(f"validation after step {progress.step}")
        figures = validate(trainer.in_phase_of(max(progress.cursor - 1, 0)), validation, alive=alive)
        hooks.metrics.log({"kind": "validation", "step": progress.step, **figures})
        progress.window_started = time.perf_counter()

    if progress.step == 0 and settings.validate_every_steps:
        run_validation()
    while progress.step < settings.steps:
        hooks.heartbeat(f"reading step {progress.step + 1}")
        batches, cursor = next(stream)
        alive = begins(f"step {progress.step + 1}")
        result = train_step(trainer.in_phase_of(progress.cursor), batches, alive=alive)
        _advance(trainer, progress, batches, cursor, result)
        hooks.record_samples(batches, progress.step)
        hooks.metrics.step_done(progress.step)
        hooks.collect_garbage(progress.step)
        if due(settings.log_every_steps):
            record = _train_record(trainer, progress, result.grad_norm, started)
            record |= _data_figures(trainer, progress, hooks)
            hooks.metrics.log(record)
            if record.get("skipped_sequences") == progress.sequences:
                raise UserError(
                    f"step {progress.step}: all {progress.sequences} sequences since the last record are in damaged "
                    "shards, expected some to train on (data.damaged_shards)"
                )
            progress.start_log_window()
        _check_finite(progress, result, batches, settings.stop_after_nonfinite, hooks)
        if due(settings.validate_every_steps):
            run_validation()
        stop = hooks.stop_requested()
        last = stop or progress.step == settings.steps
        hooks.heartbeat(f"{SAVING} after step {progress.step}")
        if last or due(settings.checkpoint_every_steps):
            hooks.save_checkpoint(progress)
        hooks.finish_checkpoint(progress, wait=last)
        if stop:
            return progress.step == settings.steps
    return True

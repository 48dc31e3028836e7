"""The composition root: a resolved configuration in, a run that is ready to go out."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Console

from megatron_twotower import __version__
from megatron_twotower.checkpoint.fp8_state import sharded_fp8_state
from megatron_twotower.checkpoint.optimizer_state import optimizer_shards
from megatron_twotower.checkpoint.sharding import sharded_optimizer, sharded_weights
from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.config import recipes
from megatron_twotower.config.phases import resolve_phases
from megatron_twotower.config.pipeline_stages import stages_of_rank
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.convert import hf_folder, initial_weights, load
from megatron_twotower.convert.tensors import TensorSource
from megatron_twotower.data.blend import BlendedDataset
from megatron_twotower.data.dataset import SequenceDataset, batches, global_batch, rank_slice, split_batch
from megatron_twotower.data.sources import check_unchanged, data_summary, open_training, open_validation
from megatron_twotower.doctor import one_line_summary
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.transformer_config import transformer_config
from megatron_twotower.model import parameter_map
from megatron_twotower.model.parameter_map import Entry
from megatron_twotower.model.towers import BackboneModel, TwoTower, build_context_tower
from megatron_twotower.plan.activations import bytes_by_kind
from megatron_twotower.train import ledger, loop, resume, signals
from megatron_twotower.train import progress as train_progress
from megatron_twotower.train.metrics import WandbSettings, open_metrics
from megatron_twotower.train.optimizer import build_optimizer, build_schedule
from megatron_twotower.train.watchdog import watching
from megatron_twotower.types import Batch


@dataclass(frozen=True)
class TrainedModel:
    """What trains on this rank, by stretch of layers, and the names of all parts of the whole.

    fingerprint: of the backbone it started from.
    """

    chunks: list[BackboneModel | TwoTower]
    entries: list[Entry]
    fingerprint: str | None

    @property
    def module(self) -> BackboneModel | TwoTower:
        """The one chunk of a rank whose stage is not interleaved."""
        (chunk,) = self.chunks
        return chunk

    def pieces(
        self, config: RunConfig, groups: ProcessGroupCollection, optimizer: MegatronOptimizer | None = None
    ) -> Iterator[ShardedTensor | ShardedObject]:
        """What a checkpoint holds of this rank: weights, what the optimizer keeps for them, and scales of FP8."""
        held = (
            {} if optimizer is None else optimizer_shards(optimizer, [p for c in self.chunks for p in c.parameters()])
        )
        for chunk in self.chunks:
            entries = parameter_map.entries_of_stage(self.entries, chunk.tower.stage)
            yield from sharded_weights(chunk, entries, config.model, groups)
            yield from sharded_optimizer(chunk, entries, config.model, groups, held)
            yield from sharded_fp8_state(chunk, config, groups)


def build_model(
    config: RunConfig, groups: ProcessGroupCollection, *, backbone_source: TensorSource | None = None
) -> TrainedModel:
    """Towers with their starting weights: from Hugging Face folders, or random for `ar` without one.

    Args:
        backbone_source: tensors to take in place of those that the configuration names.
    """
    megatron, model = transformer_config(config), config.model
    own = stages_of_rank(model, config.parallel, groups.pp.rank())
    backbone = config.init.backbone
    source = backbone_source or initial_weights.backbone_source(config)
    origin = hf_folder.fingerprint(backbone) if backbone else None
    if config.objective == "ar":
        entries, start = parameter_map.trained_backbone_entries(model), source
    else:
        entries = parameter_map.denoiser_entries(model, config.conditioning.frequencies)
        start = initial_weights.denoiser_source(config, source, fingerprint=origin)
    chunks: list[BackboneModel | TwoTower] = []
    for stage in own:
        chunk: BackboneModel | TwoTower
        if config.objective == "ar":
            chunk = BackboneModel(config, megatron, groups, stage)
        else:
            context = build_context_tower(config, megatron, groups, stage)
            frozen = parameter_map.entries_of_stage(parameter_map.backbone_entries(model), stage)
            load.load_weights(context, frozen, source, model=model, groups=groups)
            chunk = TwoTower(config, megatron, groups, context)
        trained = parameter_map.entries_of_stage(entries, stage)
        load.load_weights(chunk, trained, start, model=model, groups=groups)
        chunks.append(chunk)
    return TrainedModel(chunks, entries, origin)


def _validation_batches(config: RunConfig, groups: ProcessGroupCollection) -> list[Batch]:
    """This rank's micro-batches of held-out sequences, drawn from all of them, the same in every run of a seed."""
    if not config.train.validate_every_steps:
        return []
    count = config.train.validation_sequences
    source = open_validation(config, count)
    first, share = rank_slice(0, count, rank=groups.dp_cp.rank(), world=groups.dp_cp.size())
    return split_batch(global_batch(source, first=first, count=share), config.data.micro_batch_size)


def _stream(
    config: RunConfig, source: SequenceDataset | BlendedDataset, groups: ProcessGroupCollection, cursor: int
) -> Iterator[tuple[list[Batch], int]]:
    data = config.data
    return batches(
        source,
        cursor=cursor,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        rank=groups.dp_cp.rank(),
        world=groups.dp_cp.size(),
        workers=data.prefetch_workers,
        depth=data.prefetch_batches,
    )


def dry_run(config: RunConfig) -> str:
    """Build everything but the data, and say what a run would train. Takes no optimizer step."""
    validate(config, world_size=parallel.world_size())
    phases = resolve_phases(config)
    groups = parallel.initialise(config)
    model = build_model(config, groups)
    trained = sum(p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad)
    lines = [f"{config.objective}: {trained:,} trained parameters on this rank, {config.train.steps} steps"]
    for phase in phases if config.phases else ():
        tokens = phase.sequences * config.data.sequence_length_tokens
        block = f", blocks of {phase.noise.block_size_tokens}" if config.objective == "two_tower" else ""
        lines.append(f"phase {phase.name}: {phase.steps} steps, {tokens:,} tokens{block}")
    if config.objective == "two_tower" and config.parallel.pipeline == 1:
        kept = ", ".join(f"{kind} {count / 2**20:,.1f}" for kind, count in bytes_by_kind(config).items())
        lines.append(f"MiB kept between forward and backward, by kind of layer: {kept}")
    return "\n".join(lines)


def run_training(config: RunConfig) -> bool:
    """Train as configured, from the newest checkpoint of the output folder if there is one.

    Returns:
        True when all steps are done, False when a signal ended the run early, its state saved.
    """
    validate(config, world_size=parallel.world_size())
    phases = resolve_phases(config)
    stop = signals.StopSignal()  # first: a signal while all is made ready ends the run after its first step
    run, groups = Path(config.output), parallel.initialise(config)
    model = build_model(config, groups)
    point = resume.resume_point(run, config, fingerprint=model.fingerprint)
    parts = loop.Trainer(
        config=config,
        model=(wrapped := parallel.wrap(model.chunks, config, groups)),
        optimizer=(optimizer := build_optimizer(config, wrapped, groups)),
        schedule=build_schedule(config, optimizer),
        phases=phases,
        groups=groups,
    )

    def pieces() -> Iterator[ShardedTensor]:
        parts.model.gather_parameters()
        return model.pieces(config, groups, optimizer)

    progress, so_far = train_progress.Progress(), None
    if point is not None:
        so_far = run_folder.read_provenance(run).get(
            "data"
        )  # here, because no rank gets past the loading, to write it anew, before all are
        progress = resume.restore(point, parts, pieces)
        _check_cursor(config, progress)
    validation, source = _validation_batches(config, groups), open_training(config)
    if so_far:
        check_unchanged(data_summary(config, source), so_far, cursor=progress.cursor)
    stream = _stream(config, source, groups, progress.cursor)
    _write_run_files(run, config, model, source)

    logging = config.logging
    with (
        open_metrics(
            run,
            total_steps=config.train.steps,
            resume_step=progress.step,
            console=logging.console,
            wandb=WandbSettings(logging.wandb, logging.project, logging.name),
            config=dataclasses.asdict(config),
        ) as metrics,
        watching(limit_seconds=config.train.hang_timeout_seconds) as beat,
    ):
        keeper = resume.CheckpointHooks(run, parts, pieces, fingerprint=model.fingerprint, metrics=metrics)
        hooks = loop.Hooks(
            metrics=metrics,
            save=keeper.save,
            saved=keeper.saved,
            stop_requested=stop,
            beat=beat,
            consumed=ledger.ledger_writer(run, config, groups),
            keep_batch=ledger.nonfinite_batch_writer(run),
            tokens_by_corpus=tokens_by_corpus(config, source),
        )
        try:
            return loop.train(parts, progress, stream, validation, hooks)
        finally:
            keeper.close()


def _check_cursor(config: RunConfig, progress: train_progress.Progress) -> None:
    """Phases begin at a step for the schedule and at a sequence for the data: both must go on at one place."""
    if config.phases and progress.cursor != progress.step * config.data.global_batch_size:
        raise UserError(
            f"data.global_batch_size: found {config.data.global_batch_size}, expected the one of the checkpoint, "
            f"{progress.cursor / progress.step:g}, in a run with phases"
        )


def tokens_by_corpus(
    config: RunConfig, source: SequenceDataset | BlendedDataset
) -> Callable[[int], dict[str, int]] | None:
    """What a run has read of each corpus of its blend at a cursor; None where there is one corpus."""
    if isinstance(source, SequenceDataset):
        return None
    length = config.data.sequence_length_tokens
    return lambda cursor: {name: count * length for name, count in source.sequences_before(cursor).items()}


def _write_run_files(
    run: Path, config: RunConfig, model: TrainedModel, source: SequenceDataset | BlendedDataset
) -> None:
    if not parallel.is_main():
        return
    facts = run_folder.provenance(
        __version__,
        seed=config.seed,
        ranks=parallel.world_size(),
        backbone=config.init.backbone,
        fingerprint=model.fingerprint,
    )
    facts |= {"data": data_summary(config, source)}
    run_folder.write_start(run, config=recipes.to_yaml(config), facts=facts)
    if not config.logging.console:
        return
    start = config.init.backbone or f"random weights, seed {config.seed}"
    Console().print(f"[bold]{config.objective}[/bold] from {start}; {one_line_summary(config)}", highlight=False)

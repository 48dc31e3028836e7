"""A complete training run, built from a resolved configuration."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Console
from torch import Tensor

from megatron_twotower import __version__
from megatron_twotower.checkpoint import files as checkpoint_files
from megatron_twotower.checkpoint.files import ShardedState
from megatron_twotower.checkpoint.fp8_state import sharded_fp8_state
from megatron_twotower.checkpoint.sharding import sharded_optimizer, sharded_weights
from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.config import recipes
from megatron_twotower.config.idle import refuse_idle
from megatron_twotower.config.phases import resolve_phases
from megatron_twotower.config.pipeline_stages import stages_of_rank
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.convert import hf_folder, initial_weights, load
from megatron_twotower.convert.tensors import TensorSource
from megatron_twotower.data import mask_token
from megatron_twotower.data.blend import BlendedDataset
from megatron_twotower.data.dataset import SequenceDataset, batches, global_batch, rank_slice, split_batch
from megatron_twotower.data.sources import data_summary, open_training, open_validation, reading_only
from megatron_twotower.doctor import diagnose, one_line_summary
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.optimizer_state import optimizer_shards
from megatron_twotower.mcore.transformer_config import transformer_config
from megatron_twotower.model import parameter_map
from megatron_twotower.model.parameter_map import Entry
from megatron_twotower.model.towers import BackboneModel, TwoTower, build_context_tower
from megatron_twotower.plan.activations import bytes_by_kind
from megatron_twotower.train import checkpoints, ledger
from megatron_twotower.train.agreement import check_ranks_agree, own_run_folder
from megatron_twotower.train.garbage import collected_together
from megatron_twotower.train.loop import LoopHooks, Trainer, stretches_of_rank, train
from megatron_twotower.train.metrics import Metrics, open_metrics, wandb_settings
from megatron_twotower.train.optimizer import build_optimizer, build_schedule
from megatron_twotower.train.progress import TrainingProgress
from megatron_twotower.train.signals import StopSignal
from megatron_twotower.train.watchdog import SAVING, watching
from megatron_twotower.types import Batch

Dataset = SequenceDataset | BlendedDataset


@dataclass(frozen=True)
class TrainedModel:
    """The model chunks that train on this rank.

    Attributes:
        chunks: One module for each pipeline stage of this rank.
        entries: The parameter map of the model over all ranks.
        fingerprint: SHA-256 of the backbone that the run starts from; None for random weights.
    """

    chunks: list[BackboneModel | TwoTower]
    entries: list[Entry]
    fingerprint: str | None

    @property
    def module(self) -> BackboneModel | TwoTower:
        """The only model chunk of a rank whose pipeline is not interleaved."""
        (chunk,) = self.chunks
        return chunk

    def sharded_state(
        self, config: RunConfig, groups: ProcessGroupCollection, optimizer: MegatronOptimizer
    ) -> Iterator[ShardedTensor | ShardedObject]:
        """Yield what a checkpoint stores of this rank: weights, optimizer shards, FP8 scales."""
        shards = optimizer_shards(optimizer, [p for chunk in self.chunks for p in chunk.parameters()])
        for chunk in self.chunks:
            entries = parameter_map.entries_of_stage(self.entries, chunk.tower.stage)
            yield from sharded_weights(chunk, entries, config.model, groups)
            yield from sharded_optimizer(chunk, entries, config.model, groups, shards)
            yield from sharded_fp8_state(chunk, config, groups)


def backbone_fingerprint(config: RunConfig) -> str | None:
    """Return the SHA-256 of `init.backbone`; `None` without one. Rank 0 reads it, for all.

    `check_ranks_agree` has compared the copies that nodes may have.
    """
    backbone = config.init.backbone
    if not backbone:
        return None
    return parallel.from_main(lambda: hf_folder.fingerprint(backbone))


def denoiser_fingerprint(run: Path, config: RunConfig, *, backbone: str | None) -> str | None:
    """Return the SHA-256 of `init.denoiser`; `None` without one. The first rank calls this.

    A run that resumes keeps what it has written down: its denoiser is in the checkpoint, and the
    folder may be gone.

    Args:
        run: The run folder.
        config: The configuration of the run.
        backbone: The fingerprint of `init.backbone`, which may be the same folder.
    """
    denoiser = config.init.denoiser
    if denoiser is None or denoiser == config.init.backbone:
        return backbone if denoiser else None
    before = run_folder.read_provenance(run)
    if before.get("denoiser") == denoiser and before.get("denoiser_sha256"):
        return str(before["denoiser_sha256"])
    return hf_folder.fingerprint(denoiser) if Path(denoiser).is_dir() else None


def build_model(
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    backbone_source: TensorSource | None = None,
    fingerprint: str | None = None,
    resumed: bool = False,
) -> TrainedModel:
    """Build the towers with their initial weights, from Hugging Face folders or random for `ar`.

    Args:
        config: A resolved configuration.
        groups: Process groups of this rank.
        backbone_source: Tensors to use instead of those that the configuration names.
        fingerprint: That of the backbone, if it is known already.
        resumed: Whether a checkpoint follows. Then the weights that train are not read.
    """
    megatron, model = transformer_config(config), config.model
    source = backbone_source or initial_weights.backbone_source(config)
    fingerprint = fingerprint or backbone_fingerprint(config)
    entries = parameter_map.trained_entries(config)
    start: TensorSource | None = source
    if resumed:
        start = None
    elif config.objective == "two_tower":
        start = initial_weights.denoiser_source(config, source, fingerprint=fingerprint)
    chunks: list[BackboneModel | TwoTower] = []
    for stage in stages_of_rank(model, config.parallel, groups.pp.rank()):
        chunk: BackboneModel | TwoTower
        copies: dict[str, Tensor] = {}
        if config.objective == "ar":
            chunk = BackboneModel(config, megatron, groups, stage)
        else:
            context = build_context_tower(config, megatron, groups, stage)
            frozen = parameter_map.entries_of_stage(parameter_map.backbone_entries(model), stage)
            load.load_weights(context, frozen, source, model=model, groups=groups)
            chunk = TwoTower(config, megatron, groups, context)
            if config.init.denoiser is None and config.train.context_precision == "wide":
                # The denoiser starts as a copy of the context tower: each tensor is read once.
                copies = {f"tower.{name}": t for name, t in parameter_map.canonical_tensors(context).items()}
        trained = parameter_map.entries_of_stage(entries, stage)
        load.load_weights(chunk, trained, start, model=model, groups=groups, copies=copies)
        chunks.append(chunk)
    return TrainedModel(chunks, entries, fingerprint)


def dry_run(config: RunConfig) -> str:
    """Build everything but the data, take no step, and describe what a run would train."""
    validate(config, world_size=parallel.world_size())
    refuse_idle(config)
    phases = resolve_phases(config)
    groups = _join(config)
    _check_mask_token(config, resumed=False)
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
    """Train as configured, from the newest checkpoint of the run folder if there is one.

    Returns:
        True when all steps are done, False when a signal ended the run early, with its state saved.

    Raises:
        UserError: The configuration, the data, the weights or a checkpoint does not fit.
    """
    validate(config, world_size=parallel.world_size())
    refuse_idle(config)
    # From here on a signal ends the run after its first step.
    stop = StopSignal()
    run, groups = Path(config.output), _join(config)
    with own_run_folder(run) as check_lock:
        return _train_in(run, config, groups, stop=stop, check_lock=check_lock)


def _join(config: RunConfig) -> ProcessGroupCollection:
    """Connect all ranks, compare what they were started with, and create the parallel groups."""
    parallel.connect(config)
    check_ranks_agree(config)
    return parallel.initialise(config)


def _train_in(
    run: Path, config: RunConfig, groups: ProcessGroupCollection, *, stop: StopSignal, check_lock: Callable[[], None]
) -> bool:
    """Train in a folder that is this run's own; see `run_training`."""
    source = initial_weights.backbone_source(config)  # its headers; a wrong folder ends the run here
    fingerprint = backbone_fingerprint(config)
    resumed = parallel.from_main(lambda: _has_trained(run))
    _check_mask_token(config, resumed=resumed)
    checkpoint = checkpoints.find_checkpoint(run, config, fingerprint=fingerprint)
    validation, dataset = _validation_batches(config, groups), _training_data(config)
    _check_corpora(config, dataset, resumed=resumed)
    data = data_summary(config, dataset)
    # Before `restore`: the first rank writes provenance.json again after all ranks are restored.
    parallel.from_main(lambda: checkpoints.check_data(checkpoint, run, data))
    model = build_model(config, groups, backbone_source=source, fingerprint=fingerprint, resumed=checkpoint is not None)
    trainer = build_trainer(config, model, groups)
    sharded_state = state_of(trainer, model)
    progress = checkpoints.restore(checkpoint, trainer, sharded_state) if checkpoint else TrainingProgress()
    _check_cursor(config, progress)
    stream = _training_stream(config, dataset, groups, progress.cursor)
    _write_run_files(run, config, model, data)
    _print_summary(config, model.fingerprint)
    with contextlib.ExitStack() as resources:
        metrics = resources.enter_context(_open_metrics(run, config, progress))
        saver = checkpoints.CheckpointSaver(
            run,
            trainer,
            sharded_state,
            fingerprint=model.fingerprint,
            metrics=metrics,
            data=data,
            check_lock=check_lock,
        )
        limits = config.train.hang_timeout_seconds, config.train.save_timeout_seconds
        heartbeat = resources.enter_context(
            watching(limit_seconds=limits[0], save_limit_seconds=limits[1], work_done=saver.work_done)
        )
        collect_garbage = resources.enter_context(collected_together(config.train.collect_garbage_every_steps))
        hooks = LoopHooks(
            metrics=metrics,
            save_checkpoint=saver.save,
            finish_checkpoint=saver.finish,
            stop_requested=stop,
            heartbeat=heartbeat,
            record_samples=ledger.ledger_writer(run, config, groups),
            write_nonfinite_batch=ledger.nonfinite_batch_writer(run),
            count_corpus_tokens=_corpus_token_counter(config, dataset),
            collect_garbage=collect_garbage,
        )
        try:
            return train(trainer, progress, stream, validation, hooks)
        finally:
            heartbeat(f"{SAVING} what had begun")
            saver.close()


def _has_trained(run: Path) -> bool:
    """Whether a run folder has a checkpoint after its first step (an import has one before it)."""
    return any(folder != run_folder.checkpoint_folder(run, 0) for folder in checkpoint_files.find_checkpoints(run))


def _check_mask_token(config: RunConfig, *, resumed: bool) -> None:
    """Refuse a mask token that does not fit; of a run that has trained with it, only warn."""
    if config.objective != "two_tower":
        return
    try:
        parallel.from_main(lambda: mask_token.check_run(config))
    except UserError as error:
        if not resumed:
            raise
        if parallel.is_main():
            logging.getLogger(__name__).warning("the run continues as it began, although: %s", error)


def _check_corpora(config: RunConfig, dataset: Dataset, *, resumed: bool) -> None:
    """Refuse data that holds the mask token. The first rank reads it, for all."""
    if config.objective != "two_tower" or resumed:
        return
    parallel.from_main(lambda: mask_token.check_corpora(config, dataset))


def build_trainer(config: RunConfig, model: TrainedModel, groups: ProcessGroupCollection) -> Trainer:
    """Build the optimizer and the schedule of a model, and wrap it for data parallelism."""
    wrapped = parallel.wrap(model.chunks, config, groups)
    optimizer = build_optimizer(config, wrapped, groups)
    schedule = build_schedule(config, optimizer)
    return Trainer(config, wrapped, optimizer, schedule, groups, resolve_phases(config))


def state_of(trainer: Trainer, model: TrainedModel) -> ShardedState:
    """Return the function that yields what a checkpoint stores of this rank."""

    def sharded_state() -> Iterator[ShardedTensor | ShardedObject]:
        trainer.model.gather_parameters()
        return model.sharded_state(trainer.config, trainer.groups, trainer.optimizer)

    return sharded_state


def _check_cursor(config: RunConfig, progress: TrainingProgress) -> None:
    """The schedule counts the steps of a phase and the data its sequences: both must agree.

    Raises:
        UserError: The checkpoint of a run with phases has another global batch size.
    """
    if config.phases and progress.cursor != progress.step * config.data.global_batch_size:
        raise UserError(
            f"data.global_batch_size: found {config.data.global_batch_size}, expected the one of the checkpoint, "
            f"{progress.cursor / progress.step:g}, in a run with phases"
        )


def _validation_batches(config: RunConfig, groups: ProcessGroupCollection) -> list[Batch]:
    """Return this rank's micro-batches of held-out sequences; they depend on the seed."""
    if not config.train.validate_every_steps:
        return []
    count = config.train.validation_sequences
    dataset = parallel.checked_by_main(lambda examine: open_validation(config, count, examine=examine))
    first, share = rank_slice(0, count, rank=groups.dp.rank(), world=groups.dp.size())
    own = _read_by_rank(dataset, config, groups)
    return split_batch(global_batch(own, first=first, count=share), config.data.micro_batch_size)


def _read_by_rank(dataset: Dataset, config: RunConfig, groups: ProcessGroupCollection) -> Dataset:
    """Return what this rank reads of a dataset: of each sequence its own stretches."""
    return reading_only(dataset, stretches_of_rank(config.data.sequence_length_tokens, groups))


def _training_data(config: RunConfig) -> Dataset:
    """Open what the run trains on. The first rank examines the shards, for all."""
    return parallel.checked_by_main(lambda examine: open_training(config, examine=examine))


def _training_stream(
    config: RunConfig, dataset: Dataset, groups: ProcessGroupCollection, cursor: int
) -> Iterator[tuple[list[Batch], int]]:
    data = config.data
    return batches(
        _read_by_rank(dataset, config, groups),
        cursor=cursor,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        rank=groups.dp.rank(),
        world=groups.dp.size(),
        workers=data.prefetch_workers,
        depth=data.prefetch_batches,
    )


def _corpus_token_counter(config: RunConfig, dataset: Dataset) -> Callable[[int], dict[str, int]] | None:
    """Return the function from a cursor to the tokens read of each corpus; None with one corpus."""
    if isinstance(dataset, SequenceDataset):
        return None
    length = config.data.sequence_length_tokens
    return lambda cursor: {name: count * length for name, count in dataset.sequences_before(cursor).items()}


def _write_run_files(run: Path, config: RunConfig, model: TrainedModel, data: dict[str, Any]) -> None:
    """Write `config.yaml` and `provenance.json`, on the first rank."""
    if not parallel.is_main():
        return
    facts = run_folder.provenance(
        __version__,
        seed=config.seed,
        ranks=parallel.world_size(),
        backbone=config.init.backbone,
        fingerprint=model.fingerprint,
        denoiser=config.init.denoiser,
        denoiser_fingerprint=denoiser_fingerprint(run, config, backbone=model.fingerprint),
    )
    facts["data"] = data
    facts["roles"] = {role.role: role.implementation for role in diagnose(config)}
    run_folder.write_start(run, config=recipes.to_yaml(config), facts=facts)


def _print_summary(config: RunConfig, fingerprint: str | None) -> None:
    """Print what is trained, from which weights and on what, on the first rank."""
    if not parallel.is_main():
        return
    if other := initial_weights.other_context(config, fingerprint):
        logging.getLogger(__name__).warning("%s; it is trained with that of %s now", other, config.init.backbone)
    if config.logging.console:
        start = config.init.backbone or f"random weights, seed {config.seed}"
        summary = f"[bold]{config.objective}[/bold] from {start}; {one_line_summary()}"
        Console().print(summary, highlight=False, soft_wrap=True)


def _open_metrics(run: Path, config: RunConfig, progress: TrainingProgress) -> Metrics:
    logging = config.logging
    return open_metrics(
        run,
        total_steps=config.train.steps,
        resume_step=progress.step,
        console=logging.console,
        wandb=wandb_settings(logging, os.environ),
        config=dataclasses.asdict(config),
    )

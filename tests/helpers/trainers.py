"""Trainers as `run_training` builds them, and their checkpoints, without a run around them."""

import contextlib

from megatron_twotower.config.validation import validate
from megatron_twotower.mcore import parallel
from megatron_twotower.train import checkpoints
from megatron_twotower.train import run as train_run
from megatron_twotower.train.metrics import Metrics


@contextlib.contextmanager
def built_trainer(config):
    """Yield a trainer and its model on one rank."""
    validate(config, world_size=1)
    groups = parallel.initialise(config)
    try:
        model = train_run.build_model(config, groups)
        yield train_run.build_trainer(config, model, groups), model
    finally:
        parallel.shutdown()


def save(run, trainer, model, progress):
    """Save a checkpoint, and wait for it."""
    saver = checkpoints.CheckpointSaver(
        run,
        trainer,
        train_run.state_of(trainer, model),
        fingerprint=model.fingerprint,
        metrics=Metrics((), contextlib.ExitStack()),
        data={},
    )
    saver.save(progress)
    saver.finish(progress, wait=True)
    saver.close()


def restore(run, trainer, model):
    """Restore the newest checkpoint. Returns the progress."""
    found = checkpoints.find_checkpoint(run, trainer.config, fingerprint=model.fingerprint)
    return checkpoints.restore(found, trainer, train_run.state_of(trainer, model))

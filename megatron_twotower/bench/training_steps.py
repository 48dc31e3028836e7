"""Trainers for benchmarks, and their optimizer steps as timed cases.

The trainers are the real ones: Megatron's schedule and DDP, real modules with random weights,
random tokens, noise drawn in the step. The learning rate is zero, so that all steps start from the
same weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from megatron_twotower.bench.concatenated import ConcatenatedModel
from megatron_twotower.bench.gradient_variance import batch_of_epoch
from megatron_twotower.bench.measure import TimedCase
from megatron_twotower.common.device import device
from megatron_twotower.config.phases import resolve_phases
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.convert import initial_weights, load, tensors
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.mcore.transformer_config import transformer_config
from megatron_twotower.model import parameter_map
from megatron_twotower.train import loop
from megatron_twotower.train import run as train_run
from megatron_twotower.train.loop import Trainer
from megatron_twotower.train.losses import autoregressive_loss, masked_diffusion_loss, next_tokens
from megatron_twotower.train.noise import corrupt
from megatron_twotower.train.optimizer import build_optimizer, build_schedule
from megatron_twotower.types import Batch, Blocks

AR, TWO_TOWER, CONCATENATED = "ar", "two towers", "concatenated"
FORWARD_BACKWARD, UPDATE = "forward + backward", "update"


def build_trainer(
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    concatenated: bool = False,
    backbone_source: tensors.TensorSource | None = None,
) -> Trainer:
    """A trainer with its initial weights and a learning rate of zero.

    Args:
        concatenated: Train the concatenated baseline instead of the objective.
        backbone_source: Tensors to use instead of those that the configuration names.
    """
    if concatenated:
        module: Any = ConcatenatedModel(config, transformer_config(config), groups)
        entries = parameter_map.trained_backbone_entries(config.model)
        source = initial_weights.random_backbone(config.model, seed=0)
        load.load_weights(module, entries, source, model=config.model, groups=groups)
    else:
        module = train_run.build_model(config, groups, backbone_source=backbone_source).module
    wrapped = parallel.wrap([module], config, groups)
    optimizer = build_optimizer(config, wrapped, groups)
    wrapped.train()
    return Trainer(config, wrapped, optimizer, build_schedule(config, optimizer), groups, resolve_phases(config))


def build_trainers(config: RunConfig, groups: ProcessGroupCollection) -> dict[str, Trainer]:
    """AR and two towers of one backbone, and the concatenated baseline if the pattern allows it."""
    two_tower = dataclasses.replace(config, objective="two_tower")
    validate(two_tower, world_size=parallel.world_size())
    trainers = {
        AR: build_trainer(dataclasses.replace(config, objective="ar"), groups),
        TWO_TOWER: build_trainer(two_tower, groups),
    }
    if "M" not in config.model.hybrid_override_pattern:
        trainers[CONCATENATED] = build_trainer(two_tower, groups, concatenated=True)
    return trainers


def random_batch(config: RunConfig, *, length: int) -> Batch:
    """Random tokens: as many as a micro-batch of the recipe has, but at least one sequence."""
    count = max(1, config.data.micro_batch_size * config.data.sequence_length_tokens // length)
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(4, config.model.vocab_size, (count, length), generator=generator)
    return batch_of_epoch(tokens, 0)


def step_case(name: str, trainer: Trainer, batch: Batch) -> TimedCase:
    """One optimizer step in two parts."""

    def forward_backward() -> None:
        loop.forward_backward(trainer, [loop.MicroBatch(batch, trainer.config.seed)], forward_only=False)

    def update() -> None:
        trainer.optimizer.step()
        trainer.model.zero_grad_buffer()
        trainer.optimizer.zero_grad()

    return TimedCase(name, {FORWARD_BACKWARD: forward_backward, UPDATE: update})


def ar_step_in_parts(trainer: Trainer, batch: Batch) -> TimedCase:
    """An autoregressive step in parts. The head computes its gradients while its logits exist."""
    model, moved = trainer.model.only, next_tokens(batch).to(device())
    results: dict[str, Any] = {}

    def forward() -> None:
        results["hidden"] = model(moved)

    def head() -> None:
        loss = autoregressive_loss(model.module.tower, results.pop("hidden"), moved, trainer.groups)
        results["loss"] = loss.total

    return TimedCase(AR, {"forward": forward, "head + loss": head, "backward": lambda: results.pop("loss").backward()})


def two_tower_step_in_parts(trainer: Trainer, batch: Batch) -> TimedCase:
    """A two-tower step in parts.

    The part `context alone` repeats the context tower's forward pass, which `forward` includes.
    """
    model, config = trainer.model.only, trainer.config
    results: dict[str, Any] = {}

    def noise() -> None:
        results["batch"] = corrupt(batch, config.noise, seed=config.seed).to(device())

    @torch.no_grad()
    def context() -> None:
        tower, blocks = model.module.context, Blocks(config.noise.block_size_tokens)
        hidden = tower.embed(results["batch"].tokens)
        for layer in tower.layers.values():
            hidden, _ = layer(hidden, blocks)

    def forward() -> None:
        results["hidden"] = model(results["batch"])

    def head() -> None:
        loss = masked_diffusion_loss(
            model.module.tower, results.pop("hidden"), results.pop("batch"), config.noise, trainer.groups
        )
        results["loss"] = loss.total

    parts: dict[str, Callable[[], Any]] = {
        "noise": noise,
        "context alone": context,
        "forward": forward,
        "head + loss": head,
        "backward": lambda: results.pop("loss").backward(),
    }
    return TimedCase(TWO_TOWER, parts)

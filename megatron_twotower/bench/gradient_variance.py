"""Time of a step and variance of its gradient against the number of noise draws per context pass.

The gradient is the one that the optimizer receives, divided by the count of scored positions. Its
variance is the sum over all parameters, and has two sources: noise, over fresh noise for fixed
sequences, which more draws reduce; and data, over fresh sequences, which they do not.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_twotower.bench import measure
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.data.documents import VALIDATION, find_documents, read_text, split_documents
from megatron_twotower.data.tokenizer import load_tokenizer, text_encoder
from megatron_twotower.train.loop import MicroBatch, Trainer, forward_backward
from megatron_twotower.types import Batch

# The share of files that the shipped backbone was not trained on.
HOLDOUT = 0.05


def held_out_tokens(tokenizer: Path, *, count: int) -> Tensor:
    """The first held-out tokens of Python's standard library, (count,) int64.

    Raises:
        UserError: There are fewer tokens.
    """
    encode, found = text_encoder(load_tokenizer(tokenizer)), []
    documents = split_documents(find_documents(["python-stdlib"]), holdout_fraction=HOLDOUT)[VALIDATION]
    for document in documents:
        text = read_text(document)
        found += encode([text])[0] if text else []
        if len(found) >= count:
            return torch.tensor(found[:count])
    raise UserError(f"python-stdlib: found {len(found)} held-out tokens, expected at least {count}")


def batch_of_epoch(tokens: Tensor, epoch: int) -> Batch:
    """Sequences (b, l) as a batch of an epoch. Each epoch has the same text and other noise."""
    b = len(tokens)
    samples = torch.arange(b)
    return Batch(tokens, samples, torch.full((b,), epoch), samples + epoch * b)


def flat_gradient(trainer: Trainer, batch: Batch) -> Tensor:
    """The gradient of one step, flattened: (parameters,) float32."""
    trainer.model.zero_grad_buffer()
    forward_backward(trainer, [MicroBatch(batch, trainer.config.seed)], forward_only=False)
    return torch.cat([p.main_grad.flatten().clone() for p in trainer.model.only.parameters() if p.requires_grad])


def with_draws(trainer: Trainer, draws: int) -> Trainer:
    """The same trainer with another number of noise draws per context pass."""
    noise = dataclasses.replace(trainer.config.noise, draws_per_context=draws)
    return dataclasses.replace(trainer, config=dataclasses.replace(trainer.config, noise=noise))


def without_router_updates(config: RunConfig) -> RunConfig:
    """The configuration without updates of the router's biases.

    A step then changes only gradients.
    """
    return dataclasses.replace(config, train=dataclasses.replace(config.train, router_bias_update_rate=0.0))


def total_variance(gradients: Sequence[Tensor]) -> tuple[float, float]:
    """The unbiased variance summed over all entries, and its standard error.

    It needs at least two gradients.
    """
    count = len(gradients)
    mean = _mean(gradients)
    distances = [float((g.double() - mean).square().sum()) for g in gradients]
    scale = count / (count - 1)
    return scale * statistics.mean(distances), scale * statistics.stdev(distances) / math.sqrt(count)


def _mean(gradients: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(gradients[0], dtype=torch.float64)
    for each in gradients:
        total += each
    return total / len(gradients)


def measure_variance(
    trainer: Trainer, tokens: Tensor, *, draws: Sequence[int], seeds: int, on_gradient: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Measure one row for each number of draws.

    Args:
        trainer: A two-tower trainer whose steps change neither weights nor router biases.
        tokens: (seeds, b, l) int64. The first (b, l) get fresh noise again and again.
        draws: Numbers of noise draws per context. The first one is the reference.
        seeds: The number of gradients for each variance.
        on_gradient: Called after every gradient.
    """
    trainers = {count: with_draws(trainer, count) for count in draws}
    gradients: dict[int, list[Tensor]] = {count: [] for count in draws}
    seconds: dict[int, list[float]] = {count: [] for count in draws}
    flat_gradient(trainer, batch_of_epoch(tokens[0], seeds))  # a warm-up

    def timed_gradient(count: int, batch: Batch) -> Tensor:
        results: list[Tensor] = []
        elapsed = measure.elapsed_seconds(lambda: results.append(flat_gradient(trainers[count], batch)))
        seconds[count].append(elapsed)
        on_gradient()
        return results[0]

    for seed in range(seeds):
        for count in draws:
            gradients[count].append(timed_gradient(count, batch_of_epoch(tokens[0], seed)))
    noise = {count: total_variance(gradients.pop(count)) for count in draws}
    first = draws[0]
    fresh = [timed_gradient(first, batch_of_epoch(tokens[seed], seeds + 1 + seed)) for seed in range(seeds)]
    data = max(0.0, total_variance(fresh)[0] - noise[first][0])
    return variance_rows(noise, {count: statistics.median(found) for count, found in seconds.items()}, data=data)


def variance_rows(
    noise: Mapping[int, tuple[float, float]], seconds: Mapping[int, float], *, data: float
) -> list[dict[str, Any]]:
    """One row for each number of draws, relative to the first number.

    `cost_x_noise` and `cost_x_total` are relative cost times relative variance, of the noise alone
    and of noise and data. More draws pay where they are below 1.

    Args:
        noise: Variance of the noise and its standard error, by number of draws.
        seconds: Time of a step, by number of draws.
        data: Variance of the data.
    """
    first = next(iter(noise))
    rows = []
    for count, (variance, error) in noise.items():
        cost = seconds[count] / seconds[first]
        rows.append(
            {
                "draws": count,
                "seconds": seconds[count],
                "relative_cost": cost,
                "relative_cost_per_copy": cost * first / count,
                "noise_variance": variance,
                "noise_variance_error": error,
                "data_variance": data,
                "cost_x_noise": cost * variance / noise[first][0],
                "cost_x_total": cost * (variance + data) / (noise[first][0] + data),
            }
        )
    return rows

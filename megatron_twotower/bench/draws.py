"""What several noise draws per context pass cost and bring: time of a step, and variance of its gradient.

The gradient is what the optimizer would see, divided by the count of scored positions; its variance
is the sum over all parameters. `noise`: over fresh noise for fixed sequences, which more draws
lower. `data`: over fresh sequences, which they do not.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
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
    """The first `count` tokens of the held-out sources of Python's standard library, (count,) int64."""
    encode, found = text_encoder(load_tokenizer(tokenizer)), []
    documents = split_documents(find_documents(["python-stdlib"]), holdout_fraction=HOLDOUT)[VALIDATION]
    for document in documents:
        text = read_text(document)
        found += encode([text])[0] if text else []
        if len(found) >= count:
            return torch.tensor(found[:count])
    raise UserError(f"python-stdlib: found {len(found)} held-out tokens, expected at least {count}")


def numbered_batch(tokens: Tensor, number: int) -> Batch:
    """Sequences (b, l) as they would come the `number`-th time: the same text, fresh noise."""
    b = len(tokens)
    places = torch.arange(b)
    return Batch(tokens, places, torch.full((b,), number), places + number * b)


def gradient(parts: Trainer, batch: Batch) -> Tensor:
    """The gradient of one step, flattened: (parameters,) float32."""
    parts.model.zero_grad_buffer()
    forward_backward(parts, [MicroBatch(batch, parts.config.seed)], forward_only=False)
    return torch.cat([p.main_grad.flatten().clone() for p in parts.model.only.parameters() if p.requires_grad])


def with_draws(parts: Trainer, draws: int) -> Trainer:
    noise = dataclasses.replace(parts.config.noise, draws_per_context=draws)
    return dataclasses.replace(parts, config=dataclasses.replace(parts.config, noise=noise))


def total_variance(gradients: Sequence[Tensor]) -> tuple[float, float]:
    """The variance summed over all entries, from two samples or more, and its standard error."""
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


def draws_figures(
    parts: Trainer, tokens: Tensor, *, draws: Sequence[int], seeds: int, advance: Callable[[], Any]
) -> list[dict[str, Any]]:
    """One row for each number of draws.

    Args:
        parts: a two-tower trainer that leaves its weights and router biases alone.
        tokens: (seeds, b, l) int64; the first (b, l) is what noise is drawn for again and again.
        advance: called after every gradient.
    """
    sides = {count: with_draws(parts, count) for count in draws}
    found: dict[int, list[Tensor]] = {count: [] for count in draws}
    times: dict[int, list[float]] = {count: [] for count in draws}
    gradient(parts, numbered_batch(tokens[0], seeds))  # a warm-up

    def once(count: int, batch: Batch) -> Tensor:
        made: list[Tensor] = []
        times[count].append(measure.seconds(lambda: made.append(gradient(sides[count], batch))))
        advance()
        return made[0]

    for number in range(seeds):
        for count in draws:
            found[count].append(once(count, numbered_batch(tokens[0], number)))
    noise = {count: total_variance(found.pop(count)) for count in draws}
    first = draws[0]
    fresh = [once(first, numbered_batch(tokens[number], seeds + 1 + number)) for number in range(seeds)]
    data = max(0.0, total_variance(fresh)[0] - noise[first][0])
    return draws_rows(noise, {count: statistics.median(found) for count, found in times.items()}, data=data)


def draws_rows(
    noise: dict[int, tuple[float, float]], seconds: dict[int, float], *, data: float
) -> list[dict[str, Any]]:
    """Figures against the first number of draws. Variances of noise with standard errors, seconds of a step.

    cost_x_noise, cost_x_total: relative cost times relative variance, of the noise alone and with
    that of the data: below 1 where the draws pay.
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


def still(config: RunConfig) -> RunConfig:
    """A configuration whose steps change nothing but gradients: no update of the router's biases."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, router_bias_update_rate=0.0))

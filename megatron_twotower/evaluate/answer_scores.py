"""Scores of given answers after their contexts, for tasks that choose among answers.

Each function of `SCORE_FUNCTIONS` implements one scoring of `HarnessSettings`. It yields batch by
batch, so that the caller can show progress.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_twotower.evaluate.harness_settings import HarnessSettings
from megatron_twotower.evaluate.likelihood import ar_scores, bound_scores, mock_ar_scores
from megatron_twotower.generate.engine import pad_left
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

# Token ids of a context and of an answer.
ContextAnswer = tuple[list[int], list[int]]
# Log-probability of an answer in nats, and whether it is greedy: each of its tokens is the most
# probable one after the text before it.
Score = tuple[float, bool]
# The indices of a batch of pairs, and their scores.
ScoredBatch = tuple[list[int], list[Score]]


def _pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids on the right: ids (b, l) and the lengths of the rows (b,)."""
    length = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


def _row_scores(scores: Tensor, greedy: Tensor, lengths: Tensor) -> list[Score]:
    """The score of each row.

    Args:
        scores: (b, l) log-probability of each token.
        greedy: (b, l) bool, whether it is the most probable token.
        lengths: (b,) number of tokens of each row; later ones are padding.
    """
    scores, greedy = scores.cpu(), greedy.cpu()  # in one copy: else the host waits for every row
    return [
        (float(row[:length].double().sum()), bool(row_greedy[:length].all()))
        for row, row_greedy, length in zip(scores, greedy, lengths.tolist(), strict=True)
    ]


def padded_contexts(model: TwoTowerModel, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Contexts and their attention mask, on the device of the context tower."""
    ids, mask = pad_left(contexts)
    device = model.context_tower.device
    return ids.to(device), None if mask is None else mask.to(device)


def score_by_context_tower(
    model: TwoTowerModel, pairs: Sequence[ContextAnswer], settings: HarnessSettings, mask_id: int
) -> Iterator[ScoredBatch]:
    """Score by the context tower. It reads each context once and verifies all of its answers."""
    answers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        answers.setdefault(tuple(context), []).append(number)
    contexts = sorted(answers, key=len, reverse=True)
    for start in range(0, len(contexts), settings.batch_size):
        batch = contexts[start : start + settings.batch_size]
        cache = model.prefill(*padded_contexts(model, batch))
        for i in range(max(len(answers[context]) for context in batch)):
            # The i-th answer of each context; a context with fewer answers repeats its last one.
            numbers = [answers[context][min(i, len(answers[context]) - 1)] for context in batch]
            ids, lengths = _pad_right([pairs[number][1] or [0] for number in numbers])
            scores = _row_scores(*ar_scores(model, cache, ids), lengths)
            rows = [row for row, context in enumerate(batch) if i < len(answers[context])]
            yield (
                [numbers[row] for row in rows],
                [scores[row] if pairs[numbers[row]][1] else (0.0, True) for row in rows],
            )


def _batches(pairs: Sequence[ContextAnswer], batch_size: int) -> Iterator[list[int]]:
    """Indices of the pairs with an answer, in batches of similar context lengths."""
    order = sorted((i for i in range(len(pairs)) if pairs[i][1]), key=lambda i: -len(pairs[i][0]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def plan_batches(scoring: str, pairs: Sequence[ContextAnswer], batch_size: int) -> list[list[int]]:
    """The indices of pairs in the batches that a scoring makes of them, in their order.

    Each of them, scored by itself, is one batch again.
    """
    if scoring != "ar":
        return list(_batches(pairs, batch_size))
    answers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        answers.setdefault(tuple(context), []).append(number)
    contexts = sorted(answers, key=len, reverse=True)
    return [
        [number for context in contexts[start : start + batch_size] for number in answers[context]]
        for start in range(0, len(contexts), batch_size)
    ]


def score_by_bound(
    model: TwoTowerModel, pairs: Sequence[ContextAnswer], settings: HarnessSettings, mask_id: int
) -> Iterator[ScoredBatch]:
    """Score by a lower bound on the denoiser's log-likelihood. No answer is reported as greedy."""
    for numbers in _batches(pairs, settings.batch_size):
        cache = model.prefill(*padded_contexts(model, [pairs[i][0] for i in numbers]), for_denoiser=True)
        ids, lengths = _pad_right([pairs[i][1] for i in numbers])
        scores = bound_scores(
            model,
            cache,
            ids,
            lengths,
            block_size=settings.block_size or model.block_size,
            draws=settings.bound_draws,
            seed=settings.seed,
            mask_id=mask_id,
        )
        yield numbers, [(float(score), False) for score in scores]


def score_by_mock_ar(
    model: TwoTowerModel, pairs: Sequence[ContextAnswer], settings: HarnessSettings, mask_id: int
) -> Iterator[ScoredBatch]:
    """Score by the denoiser as a next-token model."""
    for numbers in _batches(pairs, settings.batch_size):
        contexts, mask = padded_contexts(model, [pairs[i][0] for i in numbers])
        ids, lengths = _pad_right([pairs[i][1] for i in numbers])
        # A context of one token has no text before its last token: the row is then padding only.
        cache = model.prefill(contexts[:, :-1], None if mask is None else mask[:, :-1])
        yield numbers, _row_scores(*mock_ar_scores(model, cache, contexts[:, -1:], ids), lengths)


# By the name of the scoring in `HarnessSettings`.
SCORE_FUNCTIONS: dict[
    str, Callable[[TwoTowerModel, Sequence[ContextAnswer], HarnessSettings, int], Iterator[ScoredBatch]]
] = {"ar": score_by_context_tower, "bound": score_by_bound, "mock_ar": score_by_mock_ar}

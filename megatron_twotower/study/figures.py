"""What the trainings of a study reached: means over seeds, and differences from the reference.

The figures are those of the last validation of each training: fixed held-out sequences at noise
levels that cover the range evenly, clean tokens as targets, whatever the arm trained with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from megatron_twotower.common.run_folder import METRICS_FILE, read_metrics
from megatron_twotower.plan.flops import step_flops
from megatron_twotower.study.design import Study, Training


@dataclass(frozen=True)
class Outcome:
    """The end of one training.

    Attributes:
        loss: Nats per masked token, over all noise levels.
        by_noise: The same by noise level.
        tokens: Clean tokens of the training.
        flops: Floating-point operations of the model (`plan.flops`).
    """

    loss: float
    by_noise: Mapping[str, float]
    tokens: int
    flops: float

    @property
    def bound(self) -> float:
        """Nats per token: a bound on the likelihood of held-out text.

        A masked position of a block at level t counts 1 / t in the bound, and a share t of the
        positions is masked: what is left is the mean over t of the loss of a masked position.
        """
        return fmean(self.by_noise.values())


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; `error` is its standard error, `None` for one seed."""

    value: float
    error: float | None
    count: int


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least one value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(fmean(values), error, len(values))


@dataclass(frozen=True)
class Row:
    """An arm with one share of the tokens, at one size.

    Attributes:
        loss, bound, by_noise: Means over the seeds that are done.
        difference: Of the loss from that of the reference, over the seeds that both have; `None` if
            there are none, or for the reference itself.
        flops: Relative to the reference; `None` without one.
    """

    size: str
    arm: str
    share: float
    loss: Mean
    bound: Mean
    by_noise: Mapping[str, Mean]
    difference: Mean | None
    flops: float | None


Outcomes = Mapping[tuple[str, str, float], Mapping[int, Outcome]]


def outcome(training: Training) -> Outcome | None:
    """What a training reached; `None` if it has not ended.

    Raises:
        UserError: Its `metrics.jsonl` is damaged.
    """
    file, config = training.folder / METRICS_FILE, training.config
    records = read_metrics(file) if file.is_file() else []
    last = [each for each in records if each.get("kind") == "validation" and each["step"] == config.train.steps]
    if not last:
        return None
    tokens = config.train.steps * config.data.global_batch_size * config.data.sequence_length_tokens
    return Outcome(last[-1]["loss"], last[-1]["loss_by_noise"], tokens, tokens * step_flops(config).model)


def outcomes(trainings: Sequence[Training]) -> dict[tuple[str, str, float], dict[int, Outcome]]:
    """The outcomes by size, arm and share, and then by seed, of the trainings that have ended."""
    found: dict[tuple[str, str, float], dict[int, Outcome]] = {}
    for training in trainings:
        if (end := outcome(training)) is not None:
            found.setdefault((training.size, training.arm, training.share), {})[training.seed] = end
    return found


def _reference(study: Study, found: Outcomes, size: str) -> Mapping[int, Outcome]:
    """The outcomes of the reference with its largest share, by seed."""
    return found.get((size, study.reference, max(study.arms[study.reference].shares)), {})


def rows(study: Study, found: Outcomes) -> list[Row]:
    """The table of a study, in the order of its file."""
    table = []
    for size in study.sizes:
        reference = _reference(study, found, size)
        for name, arm in study.arms.items():
            for share in arm.shares:
                ends = found.get((size, name, share), {})
                if not ends:
                    continue
                pairs = [ends[seed].loss - reference[seed].loss for seed in ends if seed in reference]
                levels = next(iter(ends.values())).by_noise
                flops = fmean(each.flops for each in reference.values()) if reference else None
                table.append(
                    Row(
                        size=size,
                        arm=name,
                        share=share,
                        loss=mean([each.loss for each in ends.values()]),
                        bound=mean([each.bound for each in ends.values()]),
                        by_noise={level: mean([each.by_noise[level] for each in ends.values()]) for level in levels},
                        difference=mean(pairs) if pairs and ends is not reference else None,
                        flops=fmean(each.flops for each in ends.values()) / flops if flops else None,
                    )
                )
    return table


def share_to_reach(goal: float, losses: Mapping[float, float]) -> float | None:
    """The share of the tokens at which an arm reaches a loss.

    Between two shares the loss is taken as linear in the logarithm of the share. Each is a complete
    training with its own schedule, so the interpolation is over trainings, not along one.

    Args:
        goal: The loss to reach.
        losses: The loss by share.

    Returns:
        `None` if no share reaches it; the smallest share if that does.
    """
    shares = sorted(losses)
    reached = [share for share in shares if losses[share] <= goal]
    if not reached:
        return None
    first = reached[0]
    earlier = shares[: shares.index(first)]
    if not earlier:
        return first
    before = earlier[-1]
    part = (losses[before] - goal) / (losses[before] - losses[first])
    return before * (first / before) ** part


def shares_to_reach_reference(study: Study, found: Outcomes, size: str, arm: str) -> dict[int, float | None]:
    """By seed, the share at which an arm has the reference's final loss of that seed."""
    result = {}
    for seed, goal in _reference(study, found, size).items():
        ends = {share: found.get((size, arm, share), {}).get(seed) for share in study.arms[arm].shares}
        losses = {share: end.loss for share, end in ends.items() if end is not None}
        if losses:
            result[seed] = share_to_reach(goal.loss, losses)
    return result

"""Pipeline stages: which layers stand where. Pure functions of the configuration.

The layers of both towers are cut into stretches at the same places. Without interleaving a pipeline
rank holds one stretch; with `parallel.pipeline_chunks` c it holds c of them, dealt out in turn, as
Megatron's interleaved schedule runs them: rank p has the stretches p, p + ranks, p + 2 ranks, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_twotower.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class PipelineStage:
    """A stretch of layers that one rank holds.

    number, count: its place among all stretches, in the order in which a token meets them. layers:
    by their number in the whole model.
    """

    number: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether it starts from tokens: embeddings and time conditioning are here."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it ends in the loss: final norm and head are here."""
        return self.number == self.count - 1


def whole_model(model: ModelConfig) -> PipelineStage:
    """All layers on one rank."""
    return PipelineStage(0, 1, range(model.num_layers))


def pipeline_stages(model: ModelConfig, parallel: ParallelConfig) -> tuple[PipelineStage, ...]:
    """All stretches in order: of the lengths that `parallel.pipeline_layers` gives, or of one length."""
    count = parallel.pipeline * parallel.pipeline_chunks
    lengths: Sequence[int] = parallel.pipeline_layers or [model.num_layers // count] * count
    ends = list(accumulate(lengths))
    assert len(lengths) == count and ends[-1] == model.num_layers, "validation.validate comes first"
    spans = zip(ends, lengths, strict=True)
    return tuple(PipelineStage(i, count, range(end - length, end)) for i, (end, length) in enumerate(spans))


def stages_of_rank(model: ModelConfig, parallel: ParallelConfig, rank: int) -> tuple[PipelineStage, ...]:
    """The stretches of one pipeline rank, one for each of its model chunks."""
    return pipeline_stages(model, parallel)[rank :: parallel.pipeline]

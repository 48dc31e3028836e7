"""Pipeline stages: which layers each pipeline rank has. Pure functions of the configuration.

The layers of both towers are cut into model chunks at the same places. Without interleaving a
pipeline rank has one model chunk. With `parallel.pipeline_chunks` c it has c of them, assigned as
Megatron's interleaved schedule runs them: rank p has the chunks p, p + ranks, p + 2 ranks, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_twotower.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class PipelineStage:
    """A range of layers that is one model chunk of one rank.

    With interleaving a pipeline rank has several of these. Megatron calls them virtual stages.

    Attributes:
        number: Index among all stages, in the order in which a token passes through them.
        count: The number of all stages.
        layers: Indices of the layers in the model over all ranks.
    """

    number: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether the stage starts from tokens: embeddings and time conditioning are here."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether the stage ends in the loss: final norm and head are here."""
        return self.number == self.count - 1


def whole_model(model: ModelConfig) -> PipelineStage:
    """Return the stage of a rank that has all layers."""
    return PipelineStage(0, 1, range(model.num_layers))


def pipeline_stages(model: ModelConfig, parallel: ParallelConfig) -> tuple[PipelineStage, ...]:
    """Return all stages in order, with the lengths in `parallel.pipeline_layers` or equal ones."""
    count = parallel.pipeline * parallel.pipeline_chunks
    lengths: Sequence[int] = parallel.pipeline_layers or [model.num_layers // count] * count
    ends = list(accumulate(lengths))
    assert len(lengths) == count and ends[-1] == model.num_layers, "validation.validate comes first"
    spans = zip(ends, lengths, strict=True)
    return tuple(PipelineStage(i, count, range(end - length, end)) for i, (end, length) in enumerate(spans))


def stages_of_rank(model: ModelConfig, parallel: ParallelConfig, rank: int) -> tuple[PipelineStage, ...]:
    """Return the stages of one pipeline rank, one for each of its model chunks."""
    return pipeline_stages(model, parallel)[rank :: parallel.pipeline]

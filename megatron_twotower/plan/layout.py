"""How many ranks share what, and what accelerators they are. Pure functions of a configuration."""

from dataclasses import dataclass

from megatron_twotower.config.schema import RunConfig

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """An accelerator, from its maker's data sheet: one direction of its links, for each card.

    memory_bytes: what an allocator can have. bf16_flops: dense. link: within a node; network:
    between nodes.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    per_node: int = 8


CARDS = {
    "a100": Card("A100 80GB", int(79.2 * GIB), 312e12, 300e9, 25e9),
    "h100": Card("H100 80GB SXM", int(79.2 * GIB), 989e12, 450e9, 50e9),
    "h200": Card("H200 141GB SXM", int(139.8 * GIB), 989e12, 450e9, 50e9),
    "b200": Card("B200 180GB", int(178.3 * GIB), 2250e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups that a world of ranks is cut into, as Megatron cuts it.

    sequence: ranks that a sequence is split over outside of the mixers: `tensor` with sequence
    parallelism, else 1.
    chunks: stretches of layers on each pipeline rank.
    """

    ranks: int
    tensor: int
    sequence: int
    expert: int
    expert_tensor: int
    pipeline: int
    chunks: int

    @property
    def data(self) -> int:
        """Ranks that hold the same dense parameters, and share their optimizer state if it is distributed."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """The same for the parameters of experts."""
        return self.ranks // (self.expert * self.expert_tensor * self.pipeline)


def layout_of(config: RunConfig, *, ranks: int) -> Layout:
    """The layout of a configuration that was validated for so many ranks."""
    parallel = config.parallel
    sequence = parallel.tensor if parallel.sequence else 1
    return Layout(
        ranks,
        parallel.tensor,
        sequence,
        parallel.expert,
        parallel.expert_tensor_ranks,
        parallel.pipeline,
        parallel.pipeline_chunks,
    )


def micro_batches(config: RunConfig, layout: Layout) -> int:
    """Micro-batches that a data-parallel rank takes in one step."""
    return config.data.global_batch_size // (config.data.micro_batch_size * layout.data)

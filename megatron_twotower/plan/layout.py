"""The sizes of the groups of ranks, and the accelerators. Pure functions of a configuration."""

from dataclasses import dataclass

from megatron_twotower.config.schema import ParallelConfig, RunConfig

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """An accelerator, from the data sheet of its maker.

    Attributes:
        name: Its name in tables.
        memory_bytes: The memory that an allocator can use.
        bf16_flops: The dense BF16 peak, in floating-point operations per second.
        link_bytes_per_second: The speed of its links within a node, in one direction.
        network_bytes_per_second: The speed of its network between nodes, in one direction.
        per_node: The number of accelerators in a node.
        fp8_in_any_order: Whether FP8 matrices are multiplied with the sums over rows or columns.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    per_node: int = 8
    fp8_in_any_order: bool = False


# By the values of `parallel.card`.
ACCELERATORS = {
    "a100": Accelerator("A100 80GB", int(79.2 * GIB), 312e12, 300e9, 25e9),
    "h100": Accelerator("H100 80GB SXM", int(79.2 * GIB), 989e12, 450e9, 50e9),
    "h200": Accelerator("H200 141GB SXM", int(139.8 * GIB), 989e12, 450e9, 50e9),
    "b200": Accelerator("B200 180GB", int(178.3 * GIB), 2250e12, 900e9, 50e9, fp8_in_any_order=True),
}


@dataclass(frozen=True)
class Layout:
    """The sizes of Megatron's groups of ranks.

    Attributes:
        ranks: All ranks.
        tensor: Tensor-parallel ranks.
        sequence: The tensor-parallel ranks that split a sequence between the mixers: `tensor` with
            sequence parallelism, else 1.
        context: Context-parallel ranks, which share a sequence.
        expert: Expert-parallel ranks.
        expert_tensor: The ranks that split each expert.
        pipeline: Pipeline ranks.
        chunks: The model chunks of each pipeline rank.
    """

    ranks: int
    tensor: int
    sequence: int
    context: int
    expert: int
    expert_tensor: int
    pipeline: int
    chunks: int

    @property
    def data(self) -> int:
        """Data-parallel ranks: each has sequences of its own, with its context-parallel ranks."""
        return self.ranks // (self.tensor * self.context * self.pipeline)

    @property
    def copies(self) -> int:
        """The ranks with the same dense parameters: data-parallel and context-parallel ones.

        Gradients are summed over them, and the distributed optimizer splits its state over them.
        """
        return self.data * self.context

    @property
    def expert_data(self) -> int:
        """Data-parallel ranks of the parameters of experts."""
        return self.ranks // (self.expert * self.expert_tensor * self.pipeline)


def layout_of(config: RunConfig, *, ranks: int) -> Layout:
    """The layout of a configuration that is valid for `ranks` ranks."""
    parallel = config.parallel
    return Layout(
        ranks=ranks,
        tensor=parallel.tensor,
        sequence=parallel.tensor if parallel.sequence else 1,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor_ranks,
        pipeline=parallel.pipeline,
        chunks=parallel.pipeline_chunks,
    )


def expert_load(parallel: ParallelConfig, imbalance: float) -> float:
    """The tokens of the busiest expert-parallel rank over the mean.

    A rank with all experts has all tokens whatever they choose, and no rank has more than all.

    Args:
        parallel: The layout.
        imbalance: The assumed value, for any number of expert-parallel ranks above 1.
    """
    return min(imbalance, float(parallel.expert))


def micro_batches(config: RunConfig, layout: Layout) -> int:
    """The number of micro-batches of a data-parallel rank in a step."""
    return config.data.global_batch_size // (config.data.micro_batch_size * layout.data)

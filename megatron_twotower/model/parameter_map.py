"""The table between Megatron's parameters and Hugging Face tensors.

An `Entry` is a row of the table. It has names, shapes, and how ranks split the parameter. All code
that moves weights reads this table: loading a backbone, exporting a model, sharding a checkpoint.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_twotower.config.pipeline_stages import PipelineStage
from megatron_twotower.config.schema import ModelConfig, RunConfig


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter or router bias, and the Hugging Face tensors that it is made of.

    Attributes:
        megatron_name: The name in the model, with the expert's index over all ranks.
        hf_names: The names of the Hugging Face tensors, without the prefix of the tower.
        shape: The shape over all ranks, in Megatron's layout.
        split_dim: The dimension that tensor-parallel ranks split; `None` if they do not split it.
        section_sizes: The sizes along `split_dim` of the sections of a fused parameter. Ranks split
            each section separately. Empty if the parameter is not fused.
        expert: The index over all ranks of the expert that it belongs to, or `None`.
        conversion: The key in `_CONVERSIONS` of how the Hugging Face tensors become the parameter.
    """

    megatron_name: str
    hf_names: tuple[str, ...]
    shape: tuple[int, ...]
    split_dim: int | None = None
    section_sizes: tuple[int, ...] = ()
    expert: int | None = None
    conversion: str = "plain"


def _join_qkv(tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Fuse q, k and v in Megatron's order: per kv head the rows of its queries, key and value."""
    grouped = [t.reshape(model.num_key_value_heads, -1, t.shape[-1]) for t in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    """The inverse of `_join_qkv`."""
    queries = model.num_attention_heads // model.num_key_value_heads * model.head_dim
    grouped = tensor.reshape(model.num_key_value_heads, -1, tensor.shape[-1])
    return [t.flatten(0, 1) for t in grouped.split([queries, model.head_dim, model.head_dim], dim=1)]


# conversion: (Hugging Face tensors -> parameter, parameter -> Hugging Face tensors)
_CONVERSIONS: dict[
    str, tuple[Callable[[Sequence[Tensor], ModelConfig], Tensor], Callable[[Tensor, ModelConfig], list[Tensor]]]
] = {
    "plain": (lambda tensors, _: tensors[0], lambda tensor, _: [tensor]),
    "conv": (lambda tensors, _: tensors[0].squeeze(1), lambda tensor, _: [tensor.unsqueeze(1)]),
    "qkv": (_join_qkv, _split_qkv),
}


def parameter_from_hf(entry: Entry, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Convert the Hugging Face tensors of an entry to its complete Megatron parameter."""
    return _CONVERSIONS[entry.conversion][0](tensors, model)


def hf_from_parameter(entry: Entry, parameter: Tensor, model: ModelConfig) -> list[Tensor]:
    """Convert the complete parameter to Hugging Face tensors, in the order of `hf_names`."""
    return _CONVERSIONS[entry.conversion][1](parameter, model)


def hf_shapes(entries: Iterable[Entry], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the Hugging Face tensors of some entries, in their order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        tensors = hf_from_parameter(entry, torch.empty(entry.shape, device="meta"), model)
        shapes |= dict(zip(entry.hf_names, (tuple(tensor.shape) for tensor in tensors), strict=True))
    return shapes


def _mamba(m: ModelConfig) -> Iterator[Entry]:
    inner, bc, heads = m.mamba_inner, m.n_groups * m.ssm_state_size, m.mamba_num_heads
    sections = (inner, inner, bc, bc, heads)
    yield Entry("in_proj.weight", ("in_proj.weight",), (sum(sections), m.hidden_size), 0, sections)
    channels = (inner, bc, bc)
    width = (sum(channels), m.conv_kernel)
    yield Entry("conv1d_weight", ("conv1d.weight",), width, 0, channels, conversion="conv")
    yield Entry("conv1d_bias", ("conv1d.bias",), (sum(channels),), 0, channels)
    for name in ("A_log", "D", "dt_bias"):
        yield Entry(name, (name,), (heads,), 0)
    yield Entry("norm_weight", ("norm.weight",), (inner,), 0)
    yield Entry("out_proj.weight", ("out_proj.weight",), (m.hidden_size, inner), 1)


def _attention(m: ModelConfig) -> Iterator[Entry]:
    queries = m.num_attention_heads * m.head_dim
    qkv = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    rows = queries + 2 * m.num_key_value_heads * m.head_dim
    yield Entry("linear_qkv.weight", qkv, (rows, m.hidden_size), 0, conversion="qkv")
    yield Entry("linear_proj.weight", ("o_proj.weight",), (m.hidden_size, queries), 1)


def _feed_forward(megatron: str, hf: str, hidden: int, width: int, expert: int | None = None) -> Iterator[Entry]:
    yield Entry(f"{megatron}.linear_fc1.weight", (f"{hf}up_proj.weight",), (width, hidden), 0, expert=expert)
    yield Entry(f"{megatron}.linear_fc2.weight", (f"{hf}down_proj.weight",), (hidden, width), 1, expert=expert)


def _experts(m: ModelConfig) -> Iterator[Entry]:
    yield Entry("moe.router.weight", ("gate.weight",), (m.n_routed_experts, m.hidden_size))
    yield Entry("moe.router.expert_bias", ("gate.e_score_correction_bias",), (m.n_routed_experts,))
    for e in range(m.n_routed_experts):
        names = f"moe.experts.local_experts.{e}", f"experts.{e}."
        yield from _feed_forward(*names, m.hidden_size, m.moe_intermediate_size, expert=e)
    shared = "moe.shared_experts", "shared_experts."
    yield from _feed_forward(*shared, m.hidden_size, m.moe_shared_expert_intermediate_size)


def _dense(m: ModelConfig) -> Iterator[Entry]:
    yield from _feed_forward("mlp", "", m.hidden_size, m.intermediate_size)


_MIXERS = {"M": _mamba, "*": _attention, "E": _experts, "-": _dense}


def _with_prefix(entry: Entry, prefix: str, hf_prefix: str = "") -> Entry:
    hf_names = tuple(f"{hf_prefix}{name}" for name in entry.hf_names)
    return replace(entry, megatron_name=f"{prefix}{entry.megatron_name}", hf_names=hf_names)


def tower_entries(model: ModelConfig, *, prefix: str, head: str) -> Iterator[Entry]:
    """The entries of a tower.

    Args:
        model: The architecture.
        prefix: The prefix of its Hugging Face tensors.
        head: The name of its Hugging Face head.
    """
    vocabulary = (model.vocab_size, model.hidden_size)
    yield Entry("embedding.weight", (f"{prefix}embeddings.weight",), vocabulary, 0)
    for i, kind in enumerate(model.hybrid_override_pattern):
        yield Entry(f"layers.{i}.norm.weight", (f"{prefix}layers.{i}.norm.weight",), (model.hidden_size,))
        for entry in _MIXERS[kind](model):
            yield _with_prefix(entry, f"layers.{i}.mixer.", f"{prefix}layers.{i}.mixer.")
    yield Entry("final_norm.weight", (f"{prefix}norm_f.weight",), (model.hidden_size,))
    yield Entry("output_layer.weight", (head,), vocabulary, 0)


def backbone_entries(model: ModelConfig) -> list[Entry]:
    """The entries of a plain NemotronH, with the names of the hub."""
    return list(tower_entries(model, prefix="backbone.", head="lm_head.weight"))


def trained_backbone_entries(model: ModelConfig) -> list[Entry]:
    """The entries of a plain NemotronH as a `BackboneModel`."""
    return [_with_prefix(entry, "tower.") for entry in backbone_entries(model)]


def context_entries(model: ModelConfig) -> list[Entry]:
    """The entries of the context tower in a two-tower folder."""
    return list(tower_entries(model, prefix="context_tower.", head="context_lm_head.weight"))


def context_name(hub: str) -> str:
    """The name in a two-tower folder of a backbone tensor with the name `hub`."""
    return "context_lm_head.weight" if hub == "lm_head.weight" else hub.replace("backbone.", "context_tower.", 1)


def denoiser_entries(model: ModelConfig, frequencies: int) -> list[Entry]:
    """The entries of what trains in a two-tower folder: denoiser, head and time conditioning."""
    hidden = model.hidden_size
    denoiser = tower_entries(model, prefix="denoiser_tower.", head="lm_head.weight")
    entries = [_with_prefix(entry, "tower.") for entry in denoiser]
    shapes = {
        "t_embedder.mlp.0": (hidden, frequencies),
        "t_embedder.mlp.2": (hidden, hidden),
        "t_block.1": (3 * hidden, hidden),
    }
    for name, shape in shapes.items():
        entries.append(Entry(f"conditioning.{name}.weight", (f"{name}.weight",), shape))
        entries.append(Entry(f"conditioning.{name}.bias", (f"{name}.bias",), shape[:1]))
    for i in range(model.num_layers):
        table = f"tower.layers.{i}.scale_shift_table"
        entries.append(Entry(table, (f"scale_shift_tables.{i}",), (3, hidden)))
    return entries


def trained_entries(config: RunConfig) -> list[Entry]:
    """The entries of what a run trains."""
    if config.objective == "ar":
        return trained_backbone_entries(config.model)
    return denoiser_entries(config.model, config.conditioning.frequencies)


# The modules outside the layers: those of the first stage, and those of the last.
_FIRST_STAGE, _LAST_STAGE = ("embedding", "conditioning"), ("final_norm", "output_layer")


def entries_of_stage(entries: Sequence[Entry], stage: PipelineStage) -> list[Entry]:
    """The entries whose parameters are on a pipeline stage. Each entry is on exactly one stage."""
    return [entry for entry in entries if _is_on_stage(entry.megatron_name, stage)]


def _is_on_stage(name: str, stage: PipelineStage) -> bool:
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) in stage.layers
    module = name.removeprefix("tower.").partition(".")[0]
    assert module in _FIRST_STAGE + _LAST_STAGE, name
    return stage.first if module in _FIRST_STAGE else stage.last


@dataclass(frozen=True)
class TensorNaming:
    """How a folder names the tensors that the table lists by their names on the hub.

    Attributes:
        prefix: Replaces `backbone.`.
        stacked: Whether one tensor has all experts of a layer, one per row.
    """

    prefix: str = "backbone."
    stacked: bool = False

    def locate(self, name: str) -> tuple[str, int | None]:
        """The name in the folder for a hub name.

        Returns:
            The tensor of the folder, and the row of it that has the name; `None` for all rows.
        """
        if name.startswith("backbone."):
            name = self.prefix + name.removeprefix("backbone.")
        before, experts, after = name.partition(".mixer.experts.")
        if not (self.stacked and experts):
            return name, None
        number, projection, _ = after.split(".", 2)
        return f"{before}{experts}{projection}", int(number)


# How a plain NemotronH names its tensors on the hub, and in memory in `transformers`.
TENSOR_NAMINGS = {"hub": TensorNaming(), "transformers": TensorNaming("model.", stacked=True)}


def folder_shapes(entries: Iterable[Entry], model: ModelConfig, naming: TensorNaming) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a folder that contains some entries."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in hf_shapes(entries, model).items():
        key, row = naming.locate(name)
        shapes[key] = shape if row is None else (model.n_routed_experts, *shape)
    return shapes


def stored_sections(entry: Entry) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of a checkpoint that store an entry: names, and shapes over all ranks.

    A fused parameter has one tensor for each of its sections, in order along `split_dim`.
    """
    if not entry.section_sizes:
        return [(entry.megatron_name, entry.shape)]
    axis = entry.split_dim or 0
    return [
        (f"{entry.megatron_name}.part{i}", (*entry.shape[:axis], size, *entry.shape[axis + 1 :]))
        for i, size in enumerate(entry.section_sizes)
    ]


def folder_entries(towers: Collection[str], model: ModelConfig, frequencies: int) -> list[Entry]:
    """The entries of a Hugging Face folder.

    Args:
        towers: The towers in the folder: "backbone", "context", "denoiser".
        model: The architecture.
        frequencies: The number of frequencies of the time conditioning.
    """
    of_tower = {
        "backbone": lambda: backbone_entries(model),
        "context": lambda: context_entries(model),
        "denoiser": lambda: denoiser_entries(model, frequencies),
    }
    return [entry for tower, entries in of_tower.items() if tower in towers for entry in entries()]


def shard(tensor: Tensor, entry: Entry, *, rank: int, ranks: int) -> Tensor:
    """A tensor-parallel rank's shard of the complete parameter; of each section its own part."""
    if entry.split_dim is None or ranks == 1:
        return tensor
    sections = tensor.split(list(entry.section_sizes) or [tensor.shape[entry.split_dim]], dim=entry.split_dim)
    return torch.cat([section.chunk(ranks, dim=entry.split_dim)[rank] for section in sections], dim=entry.split_dim)


# Transformer Engine's modules have two parameters in other places than the table: the norm is
# inside the projection after it, and the experts of a rank are weights of one module.
_CANONICAL = (
    (re.compile(r"\.mixer\.(?:in_proj|linear_qkv)\.layer_norm_weight$"), ".norm.weight"),
    (re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$"), r".experts.local_experts.\2.\1.weight"),
)


def canonical_name(name: str) -> str:
    """The name in the table, with local expert indices, of a parameter of any `LayerModules`."""
    for pattern, replacement in _CANONICAL:
        name = pattern.sub(replacement, name)
    return name


_PROJECTION = re.compile(
    r"layers\.(\d+)\.mixer\.(?:.*\.)?(?:in_proj|out_proj|linear_qkv|linear_proj|linear_fc[12])\.weight$"
)


def layer_of_projection(name: str) -> int | None:
    """The layer of a matrix that FP8 may multiply, by its name in the table.

    Returns:
        The index of the layer; `None` if `name` is not a projection of a mixer or expert.
    """
    found = _PROJECTION.search(name)
    return int(found[1]) if found else None


def canonical_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and router biases of a module, by their names in the table."""
    biases = {name: buffer for name, buffer in module.named_buffers() if name.endswith("expert_bias")}
    return {canonical_name(name): tensor for name, tensor in [*module.named_parameters(), *biases.items()]}


def name_on_rank(entry: Entry, *, experts: int, rank: int, ranks: int) -> str | None:
    """The name of an entry on an expert-parallel rank, where experts have local indices.

    Args:
        entry: The entry.
        experts: The number of experts over all ranks.
        rank: The expert-parallel rank.
        ranks: The number of expert-parallel ranks.

    Returns:
        The name; `None` if the entry's expert is on another rank.
    """
    if entry.expert is None:
        return entry.megatron_name
    owner, local = divmod(entry.expert, experts // ranks)
    if owner != rank:
        return None
    return entry.megatron_name.replace(f"local_experts.{entry.expert}.", f"local_experts.{local}.")

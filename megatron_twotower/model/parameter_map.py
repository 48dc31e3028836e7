"""One table between Megatron's parameters and Hugging Face's tensors: names, layouts, and how ranks split them.

Everything that moves weights reads this table: loading a backbone, exporting a model, sharding a
checkpoint.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_twotower.config.pipeline_stages import PipelineStage
from megatron_twotower.config.schema import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter (or router-bias buffer) and what it is made of.

    megatron: name in the model, with the expert's global index.
    hf: the Hugging Face tensors it holds, without the tower's prefix.
    shape: of the whole parameter, over all ranks, in Megatron's layout.
    split: dimension split over tensor-parallel ranks, or None where every rank has all of it.
    sections: sizes along `split` of what is split each by itself; empty for one section.
    expert: global index of the expert it belongs to, or None.
    layout: key of `LAYOUTS`, how the Hugging Face tensors become the parameter.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    split: int | None = None
    sections: tuple[int, ...] = ()
    expert: int | None = None
    layout: str = "plain"


def _join_qkv(tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """q, k, v rows -> Megatron's order: the queries of a kv head, its key, its value, then the next kv head's."""
    grouped = [t.reshape(model.num_key_value_heads, -1, t.shape[-1]) for t in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _part_qkv(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    queries = model.num_attention_heads // model.num_key_value_heads * model.head_dim
    grouped = tensor.reshape(model.num_key_value_heads, -1, tensor.shape[-1])
    return [t.flatten(0, 1) for t in grouped.split([queries, model.head_dim, model.head_dim], dim=1)]


# layout: (Hugging Face tensors -> parameter, parameter -> Hugging Face tensors)
LAYOUTS = {
    "plain": (lambda tensors, _: tensors[0], lambda tensor, _: [tensor]),
    "conv": (lambda tensors, _: tensors[0].squeeze(1), lambda tensor, _: [tensor.unsqueeze(1)]),
    "qkv": (_join_qkv, _part_qkv),
}


def hf_shapes(entries: Iterable[Entry], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors of some entries, with their shapes, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        parts = LAYOUTS[entry.layout][1](torch.empty(entry.shape, device="meta"), model)
        shapes |= dict(zip(entry.hf, (tuple(part.shape) for part in parts), strict=True))
    return shapes


def _mamba(m: ModelConfig) -> Iterator[Entry]:
    inner, bc, heads = m.mamba_inner, m.n_groups * m.ssm_state_size, m.mamba_num_heads
    parts = (inner, inner, bc, bc, heads)
    yield Entry("in_proj.weight", ("in_proj.weight",), (sum(parts), m.hidden_size), 0, parts)
    channels = (inner, bc, bc)
    width = (sum(channels), m.conv_kernel)
    yield Entry("conv1d_weight", ("conv1d.weight",), width, 0, channels, layout="conv")
    yield Entry("conv1d_bias", ("conv1d.bias",), (sum(channels),), 0, channels)
    for name in ("A_log", "D", "dt_bias"):
        yield Entry(name, (name,), (heads,), 0)
    yield Entry("norm_weight", ("norm.weight",), (inner,), 0)
    yield Entry("out_proj.weight", ("out_proj.weight",), (m.hidden_size, inner), 1)


def _attention(m: ModelConfig) -> Iterator[Entry]:
    queries = m.num_attention_heads * m.head_dim
    qkv = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    rows = queries + 2 * m.num_key_value_heads * m.head_dim
    yield Entry("linear_qkv.weight", qkv, (rows, m.hidden_size), 0, layout="qkv")
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


def _under(prefix: str, hf_prefix: str, entry: Entry) -> Entry:
    hf = tuple(f"{hf_prefix}{name}" for name in entry.hf)
    return Entry(f"{prefix}{entry.megatron}", hf, entry.shape, entry.split, entry.sections, entry.expert, entry.layout)


def tower_entries(model: ModelConfig, *, prefix: str, head: str) -> Iterator[Entry]:
    """The entries of a tower; `prefix` and `head` are its Hugging Face prefix and the name of its head."""
    vocabulary = (model.vocab_size, model.hidden_size)
    yield Entry("embedding.weight", (f"{prefix}embeddings.weight",), vocabulary, 0)
    for i, kind in enumerate(model.hybrid_override_pattern):
        yield Entry(f"layers.{i}.norm.weight", (f"{prefix}layers.{i}.norm.weight",), (model.hidden_size,))
        for entry in _MIXERS[kind](model):
            yield _under(f"layers.{i}.mixer.", f"{prefix}layers.{i}.mixer.", entry)
    yield Entry("final_norm.weight", (f"{prefix}norm_f.weight",), (model.hidden_size,))
    yield Entry("output_layer.weight", (head,), vocabulary, 0)


def backbone_entries(model: ModelConfig) -> list[Entry]:
    """A plain NemotronH, as the hub spells it."""
    return list(tower_entries(model, prefix="backbone.", head="lm_head.weight"))


def trained_backbone_entries(model: ModelConfig) -> list[Entry]:
    """A plain NemotronH as `BackboneModel` holds it."""
    return [_under("tower.", "", entry) for entry in backbone_entries(model)]


def context_entries(model: ModelConfig) -> list[Entry]:
    """The frozen half of a two-tower checkpoint."""
    return list(tower_entries(model, prefix="context_tower.", head="context_lm_head.weight"))


def context_name(hub: str) -> str:
    """The name in a two-tower checkpoint of a tensor of the backbone."""
    return "context_lm_head.weight" if hub == "lm_head.weight" else hub.replace("backbone.", "context_tower.", 1)


def denoiser_entries(model: ModelConfig, frequencies: int) -> list[Entry]:
    """The trained half of a two-tower checkpoint: tower, head and time conditioning."""
    hidden = model.hidden_size
    denoiser = tower_entries(model, prefix="denoiser_tower.", head="lm_head.weight")
    entries = [_under("tower.", "", entry) for entry in denoiser]
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


# What stands outside the layers: on the first stage, and on the last.
_FIRST_STAGE, _LAST_STAGE = ("embedding", "conditioning"), ("final_norm", "output_layer")


def entries_of_stage(entries: Sequence[Entry], stage: PipelineStage) -> list[Entry]:
    """The entries whose parameters a stretch of layers holds: every entry is on one stage."""
    return [entry for entry in entries if _is_on(entry.megatron, stage)]


def _is_on(name: str, stage: PipelineStage) -> bool:
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) in stage.layers
    part = name.removeprefix("tower.").partition(".")[0]
    assert part in _FIRST_STAGE + _LAST_STAGE, name
    return stage.first if part in _FIRST_STAGE else stage.last


@dataclass(frozen=True)
class TensorNaming:
    """How a folder spells what the table calls by its hub-style names.

    prefix: in place of `backbone.`. stacked: the experts of a layer are the rows of one tensor.
    """

    prefix: str = "backbone."
    stacked: bool = False

    def locate(self, name: str) -> tuple[str, int | None]:
        """The tensor of the folder that holds a name, and the row of it, or None where it is all of it."""
        if name.startswith("backbone."):
            name = self.prefix + name.removeprefix("backbone.")
        before, experts, after = name.partition(".mixer.experts.")
        if not (self.stacked and experts):
            return name, None
        number, projection, _ = after.split(".", 2)
        return f"{before}{experts}{projection}", int(number)


# A plain NemotronH on the hub, and as `transformers` holds it in memory.
TENSOR_NAMINGS = {"hub": TensorNaming(), "transformers": TensorNaming("model.", stacked=True)}


def folder_shapes(entries: Iterable[Entry], model: ModelConfig, naming: TensorNaming) -> dict[str, tuple[int, ...]]:
    """The tensors of a folder that holds some entries, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in hf_shapes(entries, model).items():
        key, row = naming.locate(name)
        shapes[key] = shape if row is None else (model.n_routed_experts, *shape)
    return shapes


def stored_sections(entry: Entry) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of a checkpoint that hold an entry, along `split`, and their shapes over all ranks."""
    if not entry.sections:
        return [(entry.megatron, entry.shape)]
    axis = entry.split or 0
    return [
        (f"{entry.megatron}.part{i}", (*entry.shape[:axis], size, *entry.shape[axis + 1 :]))
        for i, size in enumerate(entry.sections)
    ]


def folder_entries(towers: Collection[str], model: ModelConfig, frequencies: int) -> list[Entry]:
    """The entries of a folder that has some of the towers "backbone", "context" and "denoiser"."""
    of_tower = {
        "backbone": lambda: backbone_entries(model),
        "context": lambda: context_entries(model),
        "denoiser": lambda: denoiser_entries(model, frequencies),
    }
    return [entry for tower, entries in of_tower.items() if tower in towers for entry in entries()]


def shard(tensor: Tensor, entry: Entry, *, rank: int, ranks: int) -> Tensor:
    """This rank's part of a whole parameter."""
    if entry.split is None or ranks == 1:
        return tensor
    parts = tensor.split(list(entry.sections) or [tensor.shape[entry.split]], dim=entry.split)
    return torch.cat([part.chunk(ranks, dim=entry.split)[rank] for part in parts], dim=entry.split)


def joined(parts: Sequence[Tensor], entry: Entry) -> Tensor:
    """The whole parameter from the parts of all ranks, in their order: what `shard` took apart."""
    if entry.split is None or len(parts) == 1:
        return parts[0]
    sizes = [size // len(parts) for size in entry.sections] or [parts[0].shape[entry.split]]
    pieces = [part.split(sizes, dim=entry.split) for part in parts]
    return torch.cat([piece for group in zip(*pieces, strict=True) for piece in group], dim=entry.split)


# Where Transformer Engine's modules hold what the table has elsewhere: a norm inside the projection
# after it, and the experts of a rank as the weights of one module.
_CANONICAL = (
    (re.compile(r"\.mixer\.(?:in_proj|linear_qkv)\.layer_norm_weight$"), ".norm.weight"),
    (re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$"), r".experts.local_experts.\2.\1.weight"),
)


def canonical_name(name: str) -> str:
    """The name in the table of a parameter of either spec (`spec.py`), on its rank."""
    for pattern, replacement in _CANONICAL:
        name = pattern.sub(replacement, name)
    return name


_PROJECTION = re.compile(
    r"layers\.(\d+)\.mixer\.(?:.*\.)?(?:in_proj|out_proj|linear_qkv|linear_proj|linear_fc[12])\.weight$"
)


def layer_of_projection(name: str) -> int | None:
    """The layer that a matrix of a mixer or expert is in, by its name in the table: what FP8 multiplies. None for what
    is no such matrix."""
    found = _PROJECTION.search(name)
    return int(found[1]) if found else None


def canonical_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the router biases among the buffers, of a module of either spec, by their names in the table."""
    biases = {name: buffer for name, buffer in module.named_buffers() if name.endswith("expert_bias")}
    return {canonical_name(name): tensor for name, tensor in [*module.named_parameters(), *biases.items()]}


def local_expert_name(entry: Entry, *, experts: int, rank: int, ranks: int) -> str | None:
    """The name of an entry on an expert-parallel rank; None where its expert lives on another."""
    if entry.expert is None:
        return entry.megatron
    each = experts // ranks
    owner, local = divmod(entry.expert, each)
    if owner != rank:
        return None
    return entry.megatron.replace(f"local_experts.{entry.expert}.", f"local_experts.{local}.")

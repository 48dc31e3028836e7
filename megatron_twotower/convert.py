"""Weights between Hugging Face folders and Megatron modules, by the table in `names`."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_twotower.adaln import identity_state
from megatron_twotower.config import ConditioningConfig, ModelConfig
from megatron_twotower.corruption import keyed_uniform
from megatron_twotower.names import LAYOUTS, Entry, backbone_entries, local_expert_name, shard
from megatron_twotower.records import UserError

TensorSource = Callable[[str], Tensor]
SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class HfFolder:
    """The tensors of a Hugging Face folder by hub-style name, read one at a time.

    Reads hub-style NemotronH (`backbone.`, a tensor per expert), what `transformers` itself saves (`model.`, experts
    stacked in one tensor), and two-tower folders.
    """

    path: Path
    files: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path) -> "HfFolder":
        """
        Raises:
            UserError: no weights, an index that names a missing file, or a file that is not whole.
        """
        folder = Path(path)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = sorted(file.name for file in folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no *.safetensors found, expected a Hugging Face model folder")
        names: dict[str, str] = {}
        for file in files:
            try:
                with safe_open(folder / file, framework="pt") as reader:
                    names |= dict.fromkeys(reader.keys(), file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / file}: not a whole safetensors file ({error})") from error
        return cls(folder, names)

    def __call__(self, name: str) -> Tensor:
        """The tensor of that hub-style name.

        Raises:
            UserError: the folder has no such tensor.
        """
        for key, expert in _spellings(name):
            if key in self.files:
                with safe_open(self.path / self.files[key], framework="pt") as reader:
                    return reader.get_tensor(key) if expert is None else reader.get_slice(key)[expert]
        raise UserError(f"{self.path}: tensor {name} not found, expected it in a NemotronH folder")

    def unused(self, wanted: Iterable[str]) -> list[str]:
        """Tensors of the folder that none of the wanted names reads."""
        read = {key for name in wanted for key, _ in _spellings(name)}
        return sorted(set(self.files) - read)


def _spellings(name: str) -> Iterator[tuple[str, int | None]]:
    """Keys under which a folder may hold a tensor: (key, row of a stacked tensor or None)."""
    yield name, None
    native = name.replace("backbone.", "model.", 1)
    yield native, None
    before, experts, after = native.partition(".mixer.experts.")
    if experts:
        number, projection, _ = after.split(".", 2)
        yield f"{before}{experts}{projection}", int(number)


def random_backbone(model: ModelConfig, *, seed: int) -> TensorSource:
    """A fresh NemotronH: every tensor drawn by its own name, so that it is the same on every layout.

    Matrices are normal with `initializer_range`, those that write to the residual stream divided by sqrt(layers);
    Mamba starts as `transformers` starts it.
    """
    shapes: dict[str, torch.Size] = {}
    for entry in backbone_entries(model):
        whole = torch.empty(entry.shape, device="meta")
        shapes |= dict(zip(entry.hf, (t.shape for t in LAYOUTS[entry.layout][1](whole, model)), strict=True))

    def uniform(name: str, *, stream: int = 0) -> Tensor:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        count = math.prod(shapes[name])
        return keyed_uniform(seed, key, stream, torch.arange(count)).reshape(shapes[name])

    def normal(name: str) -> Tensor:
        radius = (-2 * (1 - uniform(name)).log()).sqrt()
        return radius * (2 * math.pi * uniform(name, stream=1)).cos()

    def source(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("A_log"):
            return torch.arange(1, shape[0] + 1).float().log()
        if name.endswith("dt_bias"):
            low, high = math.log(model.time_step_min), math.log(model.time_step_max)
            dt = (low + uniform(name) * (high - low)).exp().clamp(min=model.time_step_floor)
            return (dt + (-torch.expm1(-dt)).log()).float()
        if name.endswith(("conv1d.weight", "conv1d.bias")):
            bound = model.conv_kernel**-0.5
            return ((2 * uniform(name) - 1) * bound).float()
        if name.endswith("e_score_correction_bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        residual = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
        scale = model.initializer_range / (math.sqrt(model.num_layers) if residual else 1.0)
        return (normal(name) * scale).float()

    return source


def fresh_conditioning(model: ModelConfig, config: ConditioningConfig, *, seed: int) -> TensorSource:
    """Start of the time conditioning, under the released names: `identity` or `released`."""
    hidden = model.hidden_size
    fixed = identity_state(hidden, model.num_layers, config) if config.initialisation == "identity" else {}

    def source(name: str) -> Tensor:
        if name in fixed:
            return fixed[name]
        if name.endswith("bias"):
            return torch.zeros(3 * hidden if name.startswith("t_block") else hidden)
        fan_out = 3 if name.startswith("scale_shift") else 3 * hidden if name.startswith("t_block") else hidden
        shape = (fan_out, config.frequencies if name == "t_embedder.mlp.0.weight" else hidden)
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        first, second = (keyed_uniform(seed, key, i, torch.arange(math.prod(shape))) for i in (0, 1))
        normal = ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).reshape(shape).float()
        return normal * (hidden**-0.5 if name.startswith("scale_shift") else model.initializer_range)

    return source


def _targets(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and router biases: all that a checkpoint of weights must hold."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if name.endswith("expert_bias")}
    return dict(module.named_parameters()) | buffers


@torch.no_grad()
def load_weights(
    module: nn.Module, entries: Sequence[Entry], source: TensorSource, *, model: ModelConfig,
    groups: ProcessGroupCollection,
) -> None:  # fmt: skip
    """Fill every parameter of a module from named tensors, each rank its own part.

    Raises:
        UserError: a tensor is missing or has another shape.
        AssertionError: a parameter of the module is in no entry.
    """
    targets = _targets(module)
    for entry in entries:
        ep = groups.ep
        name = local_expert_name(entry, experts=model.n_routed_experts, rank=ep.rank(), ranks=ep.size())
        if name is None:
            continue
        target = targets.pop(name)
        whole = whole_parameter(entry, [source(hf) for hf in entry.hf], model)
        group = groups.tp if entry.expert is None else groups.expt_tp
        target.copy_(shard(whole, entry, rank=group.rank(), ranks=group.size()))
    assert not targets, f"parameters without an entry: {sorted(targets)}"


def whole_parameter(entry: Entry, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """Hugging Face tensors -> Megatron's layout, checked.

    Raises:
        UserError: the shape is not the configuration's.
    """
    expected = LAYOUTS[entry.layout][1](torch.empty(entry.shape, device="meta"), model)
    for name, tensor, like in zip(entry.hf, tensors, expected, strict=True):
        if tensor.shape != like.shape:
            raise UserError(f"tensor {name}: found shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    return LAYOUTS[entry.layout][0](tensors, model)


def hf_tensors(
    module: nn.Module, entries: Sequence[Entry], *, model: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of a module that one rank holds whole. Router biases stay fp32."""
    held = _targets(module)
    for entry in entries:
        wide = entry.megatron.endswith("expert_bias")
        for name, tensor in zip(entry.hf, LAYOUTS[entry.layout][1](held[entry.megatron].detach(), model), strict=True):
            yield name, tensor.to(torch.float32 if wide else dtype).contiguous()


def renamed_tensors(
    source: TensorSource, entries: Sequence[Entry], renamed: Sequence[Entry], *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors read under one tower's names and given under another's, one at a time."""
    for read, write in zip(entries, renamed, strict=True):
        for old, new in zip(read.hf, write.hf, strict=True):
            wide = new.endswith("e_score_correction_bias")
            yield new, source(old).to(torch.float32 if wide else dtype).contiguous()


def backbone_config_json(model: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a backbone trained here, for `transformers`.

    transformers >= 5.3 clamps the time step at `time_step_min` in one of its two paths; training does not. A value
    next to zero (it takes its logarithm) makes it agree.
    """
    fields = asdict(model)
    clamp = fields.pop("time_step_clamp")
    return fields | {
        "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "time_step_min": max(clamp, 1e-30),
        "num_hidden_layers": model.num_layers, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "use_conv_bias": True,
        "use_bias": False, "mlp_bias": False, "attention_bias": False, "mamba_proj_bias": False, "expand": 2,
        "tie_word_embeddings": False, "residual_in_fp32": False, "rescale_prenorm_residual": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def write_folder(
    output: Path, tensors: Iterable[tuple[str, Tensor]], *, config: Mapping[str, Any], files: Mapping[str, str],
    copies: Sequence[Path], shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a Hugging Face folder: safetensors shards with an index, `config.json` and what goes with them.

    All of it is written beside `output` first and renamed at the end: a folder is whole or not there.

    Args:
        files: further text files by name.
        copies: files to copy in.

    Raises:
        UserError: `output` exists.
    """
    if output.exists():
        raise UserError(f"{output}: exists, expected a folder that is not there yet")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weight_map, total = _write_shards(partial, tensors, shard_bytes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    texts = {"config.json": json.dumps(config, indent=2, sort_keys=True)}
    texts |= {"model.safetensors.index.json": json.dumps(index, indent=1, sort_keys=True)}
    for name, text in {**texts, **files}.items():
        (partial / name).write_text(text if text.endswith("\n") else text + "\n")
    for path in copies:
        shutil.copyfile(path, partial / path.name)
    os.replace(partial, output)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> tuple[dict[str, str], int]:
    """Fill one shard after another. Returns the weight map and the bytes of all tensors."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        path = folder / f"part-{len(shards) + 1:05d}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner reads
        shards.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if pending and size + count > shard_bytes:
            flush()
        pending[name] = tensor
        size, total = size + count, total + count
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"part-{i:05d}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    return weight_map, total


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the names and contents of a folder's configuration and weights: what it was started from."""
    digest = hashlib.sha256()
    for path in sorted([Path(folder) / "config.json", *Path(folder).glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()

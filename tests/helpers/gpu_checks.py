"""The checks of a GPU, as functions of a device: other tests run them on the CPU, at small widths.

Every operation and every kind of layer is compared with its reference implementation in float64,
value and all gradients, from the same rounded inputs. An error is the norm of the difference over
the norm of the expected tensor.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.models import build_two_tower, random_noisy_batch, tiny_config
from helpers.reference import block_by_block
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.model import parameter_map
from megatron_twotower.ops.attention import block_attention, block_attention_ref, causal_attention
from megatron_twotower.ops.convolution import block_history, causal_conv, seeded_block_conv, seeded_block_conv_ref
from megatron_twotower.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from megatron_twotower.ops.norm import gated_rms_norm, gated_rms_norm_ref, rms_norm, rms_norm_ref
from megatron_twotower.ops.scan import chunk_length, chunk_scan, scan_ref, stream_scan, two_stream_scan
from megatron_twotower.ops.scan import two_stream_scan_ref as slow_two_stream_scan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of operations. bfloat16 rounds the inputs of both implementations alike, but products, sums and
# outputs only of the fast one.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
BLOCK = 16


@dataclass(frozen=True)
class Widths:
    """A model, used for its widths, and the tokens of a sequence."""

    model: ModelConfig
    length: int


def widths(device: str) -> Widths:
    """The widths of the real model on a GPU; small ones of the same proportions on the CPU."""
    if device == "cuda":
        return Widths(load_recipe("bench_gpu").model, 256)
    model = load_recipe("bench_gpu", ["model=tiny"]).model
    return Widths(dataclasses.replace(model, conv_kernel=4, vocab_size=96, hidden_size=32), 64)


def report(name: str, **figures: object) -> None:
    """Append the figures of a test as one JSON line to a file.

    The file is TWOTOWER_GPU_REPORT, or runs/test-gpu.jsonl on a GPU; else nothing is written.
    """
    named = os.environ.get("TWOTOWER_GPU_REPORT")
    if named is None and not torch.cuda.is_available():
        return
    path = Path(named or "runs/test-gpu.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with open(path, "a") as file:
        file.write(json.dumps({"test": name, "device": where, "torch": torch.__version__} | figures) + "\n")


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm().clamp(min=1e-12)).item()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- operations ---


@dataclass(frozen=True)
class Operation:
    """A fast operation and its reference implementation, with the same arguments.

    Attributes:
        wide: Indices of the tensors that are float32 in every precision.
    """

    fast: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    wide: tuple[int, ...] = ()


def _stream(size: Widths, seed: int) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D of one stream."""
    m, p, g, d = (size.model.mamba_num_heads, size.model.mamba_head_dim, size.model.n_groups, size.model.ssm_state_size)
    x, B, C = (draw(1, size.length, *each, seed=seed + i) for i, each in enumerate(((m, p), (g, d), (g, d))))
    dt, A = 0.1 * F.softplus(draw(1, size.length, m, seed=seed + 3)), -draw(m, seed=seed + 4).exp()
    return x, dt, A, B, C, draw(m, seed=seed + 5)


def _rounded(tensor: Tensor, like: Tensor) -> Tensor:
    """Move a tensor of the clean stream to the device and precision of one of the noisy stream."""
    return tensor.to(like.device, like.dtype)


def _two_stream_scan(size: Widths) -> Operation:
    clean_x, clean_dt, clean_A, clean_B, clean_C, clean_D = _stream(size, 10)
    chunk = chunk_length(BLOCK, preferred=size.model.chunk_size)

    def clean(x: Tensor, dt: Tensor) -> dict[str, Tensor]:
        return {
            "clean_x": _rounded(clean_x, x),
            "clean_dt": _rounded(clean_dt, dt),
            "clean_A": _rounded(clean_A, dt),
            "clean_B": _rounded(clean_B, x),
        }

    def fast(x: Tensor, dt: Tensor, *others: Tensor) -> Tensor:
        of = clean(x, dt)
        with torch.no_grad():
            C, D = _rounded(clean_C, x), _rounded(clean_D, x)
            _, states, _ = chunk_scan(of["clean_x"], of["clean_dt"], of["clean_A"], of["clean_B"], C, D, chunk=chunk)
        return two_stream_scan(x, dt, *others, **of, states=states, block=BLOCK, chunk=chunk)

    def twin(x: Tensor, dt: Tensor, *others: Tensor) -> Tensor:
        return slow_two_stream_scan(x, dt, *others, **clean(x, dt), block=BLOCK)

    return Operation(fast, twin, _stream(size, 0), wide=(1, 2))


def _stream_scan(size: Widths) -> Operation:
    chunk = chunk_length(1, preferred=size.model.chunk_size)
    return Operation(
        lambda *own: stream_scan(*own, chunk=chunk), lambda *own: scan_ref(*own)[0], _stream(size, 0), wide=(1, 2)
    )


def _heads(size: Widths, seed: int) -> tuple[Tensor, ...]:
    model = size.model
    counts = (model.num_attention_heads, model.num_key_value_heads, model.num_key_value_heads)
    return tuple(draw(1, n, 2 * size.length, model.head_dim, seed=seed + i) for i, n in enumerate(counts))


def _block_attention(size: Widths) -> Operation:
    _, clean_key, clean_value = _heads(size, 10)

    def both(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda query, key, value: operation(
            query, key, value, clean_key=_rounded(clean_key, key), clean_value=_rounded(clean_value, key), block=BLOCK
        )

    return Operation(both(block_attention), both(block_attention_ref), _heads(size, 0))


def _causal_attention(size: Widths) -> Operation:
    def twin(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Blocks of one token, whose noisy stream is the clean stream."""
        return block_attention_ref(query, key, value, clean_key=key, clean_value=value, block=1)

    return Operation(causal_attention, twin, _heads(size, 0))


def _filtered(size: Widths) -> tuple[Tensor, ...]:
    channels = size.model.mamba_inner + 2 * size.model.n_groups * size.model.ssm_state_size
    taps = size.model.conv_kernel
    return draw(1, size.length, channels, seed=0), draw(channels, taps, seed=1), draw(channels, seed=2)


def _seeded_convolution(size: Widths) -> Operation:
    clean = draw(*_filtered(size)[0].shape, seed=10)

    def fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return seeded_block_conv(x, block_history(_rounded(clean, x), taps=weight.shape[1], block=BLOCK), weight, bias)

    def twin(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return seeded_block_conv_ref(x, _rounded(clean, x), weight, bias, block=BLOCK)

    return Operation(fast, twin, _filtered(size))


def _causal_convolution(size: Widths) -> Operation:
    def twin(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return seeded_block_conv_ref(x, torch.zeros_like(x), weight, bias, block=x.shape[1])

    return Operation(causal_conv, twin, _filtered(size))


def _norm(size: Widths) -> Operation:
    h = size.model.hidden_size
    return Operation(
        lambda *own: rms_norm(*own, 1e-5),
        lambda *own: rms_norm_ref(*own, 1e-5),
        (draw(size.length, 1, h, seed=0), 1 + 0.3 * draw(h, seed=1)),
    )


def _gated_norm(size: Widths) -> Operation:
    inner, groups = size.model.mamba_inner, size.model.n_groups
    tensors = (draw(1, size.length, inner, seed=0), draw(1, size.length, inner, seed=1), draw(inner, seed=2))
    return Operation(
        lambda y, z, weight: gated_rms_norm(y, z, weight.view(groups, -1), 1e-5),
        lambda y, z, weight: gated_rms_norm_ref(y, z, weight.view(groups, -1), 1e-5),
        tensors,
    )


def _head(size: Widths) -> Operation:
    targets = torch.arange(size.length) * 7 % size.model.vocab_size
    weights = (torch.arange(size.length) % 3 != 0).float()
    weight = draw(size.model.vocab_size, size.model.hidden_size, seed=1) * size.model.hidden_size**-0.5

    def both(operation: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda hidden, head: operation(hidden, head, targets.to(hidden.device), weights.to(hidden.device))[0]

    return Operation(
        both(linear_cross_entropy),
        both(linear_cross_entropy_ref),
        (draw(size.length, size.model.hidden_size, seed=0), weight),
    )


OPERATIONS: dict[str, Callable[[Widths], Operation]] = {
    "two-stream scan": _two_stream_scan,
    "scan of one stream": _stream_scan,
    "block attention": _block_attention,
    "causal attention": _causal_attention,
    "seeded convolution": _seeded_convolution,
    "causal convolution": _causal_convolution,
    "norm": _norm,
    "gated norm": _gated_norm,
    "head and loss": _head,
}


def operation_errors(name: str, *, device: str, precision: str) -> dict[str, float]:
    """The errors of the value, and of the gradient of each tensor by its index."""
    operation, dtype = OPERATIONS[name](widths(device)), DTYPES[precision]
    own = [
        tensor.to(device, torch.float32 if i in operation.wide else dtype).requires_grad_()
        for i, tensor in enumerate(operation.tensors)
    ]
    exact = [tensor.detach().double().requires_grad_() for tensor in own]
    got, want = operation.fast(*own), operation.twin(*exact)
    upstream = draw(*want.shape, seed=99).to(device, got.dtype)
    pairs = zip(
        torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, exact, upstream.double()), strict=True
    )
    return {"value": relative(got, want)} | {f"gradient {i}": relative(a, b) for i, (a, b) in enumerate(pairs)}


def clean_state_errors(*, device: str, precision: str) -> dict[str, float]:
    """The errors of the context tower's scan: y, the states at chunk starts, and the last state.

    It has no gradients.
    """
    size, dtype = widths(device), DTYPES[precision]
    own = [t.to(device, dtype if t.dim() == 4 else torch.float32) for t in _stream(size, 0)]
    chunk = chunk_length(BLOCK, preferred=size.model.chunk_size)
    with torch.no_grad():
        y, states, final = chunk_scan(*own, chunk=chunk)
        exact = [t.double() for t in own]
        want, last = scan_ref(*exact)
        errors = {"y": relative(y, want), "final state": relative(final, last)}
        for c in range(1, states.shape[1]):
            past = [t[:, : c * chunk] if t.dim() > 1 else t for t in exact]
            errors[f"state {c}"] = relative(states[:, c], scan_ref(*past)[1])
    return errors


def initial_state_errors(
    scan: Callable[..., tuple[Tensor, Tensor]], *, device: str, precision: str, chunk: int, tokens: int = 16
) -> dict[str, float]:
    """The errors of a scan of many short sequences with initial states: y, and the last state.

    The reference is the float64 recurrence.

    Args:
        scan: (x, dt, A, B, C, D, chunk, initial) -> y and the last state.
    """
    size, dtype, rows = widths(device), DTYPES[precision], 8
    streams = [_stream(dataclasses.replace(size, length=tokens), 20 * row) for row in range(rows)]
    x, dt, B, C = (torch.cat([stream[i] for stream in streams]) for i in (0, 1, 3, 4))
    own = [t.to(device, dtype if t.dim() == 4 else torch.float32) for t in (x, dt, streams[0][2], B, C, streams[0][5])]
    model = size.model
    shape = (rows, model.mamba_num_heads, model.mamba_head_dim, model.ssm_state_size)
    initial = 10 * draw(*shape, seed=7).to(device)
    with torch.no_grad():
        y, last = scan(*own, chunk, initial)
        want, state = scan_ref(*(t.double() for t in own), initial=initial.double())
    return {"y": relative(y, want), "final state": relative(last, state)}


# --- layers ---

# bfloat16 rounds between the parts of a layer, and a close choice of an expert may change.
LAYER_TOLERANCES = {"fp32": {"value": 1e-4, "gradients": 1e-3}, "bf16": {"value": 5e-2, "gradients": 1.5e-1}}


def layer_model(device: str) -> ModelConfig:
    """A model with the widths of the real one, but with a smaller vocabulary and fewer experts.

    The reference implementation computes in float64 on the CPU, expert by expert.
    """
    if device != "cuda":
        return tiny_config().model
    model = load_recipe("bench_gpu").model
    return dataclasses.replace(model, vocab_size=64, n_routed_experts=16, intermediate_size=4096)


def layer_errors(pattern: str, groups, *, device: str, precision: str) -> dict[str, float]:
    """Compare two towers of such layers with blocks that are computed one by one.

    Returns the errors of the logits, and of the gradients of all trained tensors by their kind.
    """
    config = tiny_config(pattern, block=BLOCK, length=4 * BLOCK, precision=precision)
    model = dataclasses.replace(layer_model(device), hybrid_override_pattern=pattern)
    config, dtype = dataclasses.replace(config, model=model), DTYPES[precision]
    towers, source = build_two_tower(config, groups, dtype=dtype)
    batch = random_noisy_batch(config, batch=1)
    logits = (towers(batch.to(torch.device(device))) @ towers.tower.output_layer.weight.t()).transpose(0, 1)[0]
    upstream = draw(*logits.shape, seed=5)
    (logits * upstream.to(device, dtype)).sum().backward()

    tensors = {
        name: source(name).to(dtype).double().requires_grad_(not name.startswith("context")) for name in source.shapes
    }
    rows = (batch.tokens[0], batch.noisy[0], batch.times[0])
    want = block_by_block(tensors.__getitem__, model, config.conditioning.frequencies, *rows, BLOCK)
    (want * upstream.to(dtype).double()).sum().backward()
    errors = {"value": relative(logits, want)}
    sums: dict[str, list[float]] = {}
    parameters = parameter_map.canonical_tensors(towers)
    for entry in parameter_map.denoiser_entries(model, config.conditioning.frequencies):
        gradient = parameters.pop(entry.megatron_name).grad
        if gradient is None:
            continue  # the router's selection bias has none
        parts = parameter_map.hf_from_parameter(entry, gradient.double().cpu(), model)
        for name, part in zip(entry.hf_names, parts, strict=True):
            exact = tensors[name].grad
            exact = torch.zeros_like(part) if exact is None else exact
            kind = "experts" if ".experts." in name else name.removesuffix(".weight").rpartition(".")[2]
            both = sums.setdefault(kind, [0.0, 0.0])
            both[0] += (part - exact).square().sum().item()
            both[1] += exact.square().sum().item()
    assert not parameters, f"tensors without an entry: {sorted(parameters)}"
    return errors | {f"gradient {kind}": (off / max(all_, 1e-20)) ** 0.5 for kind, (off, all_) in sums.items()}


def too_large(errors: dict[str, float], precision: str) -> dict[str, float]:
    limits = LAYER_TOLERANCES[precision]
    return {
        name: error
        for name, error in errors.items()
        if not error <= limits["value" if name == "value" else "gradients"]
    }

"""The command `bench ops`: time and peak memory of each two-stream operation against its baselines.

A shape is an operation at a sequence length, a block size, a dtype and the widths of a model. All
cases of a shape share their inputs and are timed forward and backward, alternating in one process.
Gradients go into what the denoiser trains. The first case of a shape is the operation of this
package ("ours"), which the others are compared with.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from megatron_twotower.bench import baselines, measure
from megatron_twotower.bench.measure import TimedCase
from megatron_twotower.bench.results import report
from megatron_twotower.common import device as common_device
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.ops.attention import block_attention
from megatron_twotower.ops.convolution import block_history, seeded_block_conv
from megatron_twotower.ops.cross_entropy import linear_cross_entropy
from megatron_twotower.ops.scan import (
    chunk_length,
    chunk_scan,
    two_stream_scan,
    two_stream_scan_torch,
    uses_triton_scan,
)

OURS = "ours"
MODEL, QUICK_MODEL = "nemotron_3_nano_30b_a3b", "tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Pairs of (lengths, block sizes) for each operation, used where no option gives them. The head has
# no blocks, which a size of 0 says.
DEFAULTS: dict[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    "scan": (((1024,), (4, 16, 32, 128)), ((4096, 8192), (4, 16, 128))),
    "attention": (((1024,), (4, 16, 32, 128)), ((4096,), (4, 16, 128)), ((8192,), (16,))),
    "head": (((1024, 4096), (0,)),),
    "convolution": (((4096,), (16,)),),
}
QUICK = {name: (((64,), (0,) if name == "head" else (8, 32)),) for name in DEFAULTS}


@dataclass(frozen=True)
class OperationShape:
    """What all cases of an operation share.

    Attributes:
        operation: A key of `CASES`.
        length: Sequence length in tokens.
        block: Block size in tokens; 0 for the head.
        dtype: fp32 or bf16.
        model: The model whose widths are used.
    """

    operation: str
    length: int
    block: int
    dtype: str
    model: ModelConfig


def _normal(*size: int, dtype: torch.dtype, trained: bool = False) -> Tensor:
    return torch.randn(*size, device=common_device.device()).to(dtype).requires_grad_(trained)


# --- the cases of each operation ---


def scan_inputs(shape: OperationShape, *, trained: bool) -> tuple[Tensor, ...]:
    """x, dt, A, B, C and D of one stream, in the range that a backbone has."""
    l, dtype, model, device = shape.length, DTYPES[shape.dtype], shape.model, common_device.device()
    m, p, g, d = model.mamba_num_heads, model.mamba_head_dim, model.n_groups, model.ssm_state_size
    x, B, C = (_normal(1, l, *size, dtype=dtype) for size in ((m, p), (g, d), (g, d)))
    dt, A = torch.rand(1, l, m, device=device) * 0.1, -torch.rand(m, device=device) - 0.1
    D = torch.ones(m, device=device)
    return tuple(tensor.requires_grad_(trained) for tensor in (x, dt, A, B, C, D))


def scan_cases(shape: OperationShape) -> Iterator[TimedCase]:
    """Scans of both streams.

    The part `clean` is the context tower's scan with its handoff, `noisy` is the denoiser's scan.
    """
    clean, noisy = (scan_inputs(shape, trained=trained) for trained in (False, True))
    grad, block = torch.randn_like(noisy[0]), shape.block
    chunk = chunk_length(block, preferred=shape.model.chunk_size)
    x, dt, A, B, _, _ = clean
    handoff: dict[str, Tensor] = {}

    def scan_clean(scan: Callable[..., tuple[Tensor, Tensor, Tensor]], tokens: int) -> None:
        with torch.no_grad():
            _, handoff["states"], _ = scan(*clean, chunk=tokens)

    def two_streams(scan: Callable[..., Tensor]) -> Callable[[], None]:
        own = {"clean_x": x, "clean_dt": dt, "clean_A": A, "clean_B": B, "block": block, "chunk": chunk}

        def run() -> None:
            torch.autograd.grad(scan(*noisy, **own, states=handoff.pop("states")), noisy, grad)

        return run

    def materialised(scan: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(scan(*noisy, states=handoff.pop("states"), block=block), noisy, grad)

        return run

    yield TimedCase(OURS, {"clean": lambda: scan_clean(chunk_scan, chunk), "noisy": two_streams(two_stream_scan)})
    if uses_triton_scan(x, B, block=block, chunk=chunk):
        in_torch = two_streams(two_stream_scan_torch)
        yield TimedCase("ours in torch", {"clean": lambda: scan_clean(chunk_scan, chunk), "noisy": in_torch})
    for name, scan in (
        ("state per block", baselines.scan_of_sequences),
        ("state per block, lean", baselines.scan_of_sequences_lean),
    ):
        yield TimedCase(name, {"clean": lambda: scan_clean(baselines.chunked_scan, block), "noisy": materialised(scan)})


def attention_cases(shape: OperationShape) -> Iterator[TimedCase]:
    """Attention of the noisy queries to clean and noisy keys."""
    l, model, dtype = shape.length, shape.model, DTYPES[shape.dtype]
    e = model.head_dim
    query = _normal(1, model.num_attention_heads, l, e, dtype=dtype, trained=True)
    key, value, clean_key, clean_value = (
        _normal(1, model.num_key_value_heads, l, e, dtype=dtype, trained=trained)
        for trained in (True, True, False, False)
    )
    grad, clean = torch.randn_like(query), {"clean_key": clean_key, "clean_value": clean_value}
    mask = baselines.dense_mask(l, shape.block, device=query.device)

    def ours() -> None:
        out = block_attention(query, key, value, **clean, block=shape.block)
        torch.autograd.grad(out, (query, key, value), grad)

    def dense() -> None:
        out = baselines.dense_mask_attention(query, key, value, **clean, mask=mask)
        torch.autograd.grad(out, (query, key, value), grad)

    yield TimedCase(OURS, {"all": ours})
    yield TimedCase("dense mask", {"all": dense})


def head_cases(shape: OperationShape) -> Iterator[TimedCase]:
    """The head and its loss, with half of the positions masked."""
    l, dtype, model, device = shape.length, DTYPES[shape.dtype], shape.model, common_device.device()
    hidden = _normal(l, model.hidden_size, dtype=dtype, trained=True)
    weight = (torch.randn(model.vocab_size, model.hidden_size, device=device) * model.initializer_range).to(dtype)
    weight.requires_grad_()
    targets = torch.randint(model.vocab_size, (l,), device=device)
    places = torch.randperm(l, device=device)[: l // 2].sort().values
    weights = torch.zeros(l, device=device).index_fill(0, places, 1.0)
    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: linear_cross_entropy(hidden[places], weight, targets[places], weights[places])[0],
        "all logits": lambda: baselines.full_logits_loss(hidden, weight, targets, weights),
        "logits of masked": lambda: baselines.gathered_logits_loss(hidden, weight, targets, places),
    }

    def forward_backward(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), (hidden, weight))

    for name, loss in losses.items():
        yield TimedCase(name, {"all": forward_backward(loss)})


def convolution_cases(shape: OperationShape) -> Iterator[TimedCase]:
    """The Mamba convolution of the noisy blocks, each after its clean history."""
    model = shape.model
    channels = model.mamba_inner + 2 * model.n_groups * model.ssm_state_size
    dtype, taps = DTYPES[shape.dtype], model.conv_kernel
    x, clean = (_normal(1, shape.length, channels, dtype=dtype, trained=trained) for trained in (True, False))
    weight, bias = _normal(channels, taps, dtype=dtype, trained=True), _normal(channels, dtype=dtype, trained=True)
    history, grad = block_history(clean, taps=taps, block=shape.block), torch.randn_like(x)

    def forward_backward(conv: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(conv(x, history, weight, bias), (x, weight, bias), grad)

    yield TimedCase(OURS, {"all": forward_backward(seeded_block_conv)})
    yield TimedCase("shifted copies", {"all": forward_backward(baselines.shifted_block_conv)})


CASES: dict[str, Callable[[OperationShape], Iterator[TimedCase]]] = {
    "scan": scan_cases,
    "attention": attention_cases,
    "head": head_cases,
    "convolution": convolution_cases,
}


def build_cases(shape: OperationShape) -> list[TimedCase]:
    """The cases of a shape. Their random inputs are the same in every call."""
    torch.manual_seed(0)
    return list(CASES[shape.operation](shape))


def estimated_bytes(shape: OperationShape, case: str) -> int:
    """Estimate from the shape of the memory that a case needs beyond its inputs.

    A case whose estimate exceeds the free memory is skipped. Reported peaks are measured.
    """
    model, l = shape.model, shape.length
    size = torch.finfo(DTYPES[shape.dtype]).bits // 8
    if shape.operation == "scan":
        state = 4 * model.mamba_inner * model.ssm_state_size
        saved = 5 * l * 4 * (model.mamba_inner + model.n_groups * model.ssm_state_size)
        return saved + (0 if case.startswith(OURS) else 4 * (l // shape.block) * state)
    if shape.operation == "attention":
        # On a CPU torch stores the mask as numbers, and no scores. On CUDA it may store the scores
        # of every head.
        scores = l * 2 * l * size * (1 if common_device.is_cpu() else 4 * model.num_attention_heads)
        return 2 * scores if case == "dense mask" else 16 * model.num_attention_heads * l * model.head_dim
    if shape.operation == "head":
        rows = {OURS: 512, "all logits": l}.get(case, l // 2)
        return (rows * 3 + 2 * model.hidden_size) * 4 * model.vocab_size
    return 12 * l * 4 * (model.mamba_inner + 2 * model.n_groups * model.ssm_state_size)


# --- measuring ---


def case_peak_bytes(shape: OperationShape, case: str, threads: int) -> int:
    """Extra peak memory of one case.

    The case first runs at a small length, so that libraries which are loaded once do not count.
    """
    torch.set_num_threads(threads)
    small = OperationShape(shape.operation, max(shape.block, 128), shape.block, shape.dtype, shape.model)
    for each in (small, shape):
        if each.operation == "head" and each is small:
            continue  # its weights alone are gigabytes
        (found,) = (found for found in build_cases(each) if found.name == case)
        peak = measure.extra_peak_bytes(found.run)
        del found
    return peak


def measure_shape(shape: OperationShape, *, repeats: int, budget_seconds: float, threads: int) -> list[dict[str, Any]]:
    """One row per case of a shape. `skipped` is the reason if the case did not run, else `None`."""
    cases, free = build_cases(shape), measure.fillable_bytes()
    needed = {case.name: estimated_bytes(shape, case.name) for case in cases}
    fitting = [case for case in cases if needed[case.name] <= free]
    times = measure.time_cases(fitting, repeats=repeats, budget_seconds=budget_seconds)
    names = [case.name for case in cases]
    del cases, fitting  # frees the inputs: the new process builds its own
    rows: list[dict[str, Any]] = []
    for name in names:
        row = {"operation": shape.operation, "length": shape.length, "block": shape.block, "dtype": shape.dtype}
        row |= {"case": name, "skipped": None}
        if name in times:
            peak = measure.in_new_process(case_peak_bytes, shape, name, threads, preload=__name__)
            row |= times[name].summary() | {"extra_peak_bytes": peak}
        else:
            row["skipped"] = f"needs about {needed[name] / 2**30:.0f} GiB"
        rows.append(row)
    return rows


def add_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a shape, each baseline with its results over ours.

    These are `time_ratio`, `stage_ratios` and `memory_ratio`.
    """
    ours = rows[0]
    if ours["skipped"]:
        return list(rows)
    return [row if row["skipped"] or row is ours else row | _ratios(row, ours) for row in rows]


def _ratios(row: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    parts = {name: seconds / ours["stage_seconds"][name] for name, seconds in row["stage_seconds"].items()}
    return {
        "time_ratio": row["median_seconds"] / ours["median_seconds"],
        "stage_ratios": parts,
        "memory_ratio": row["extra_peak_bytes"] / max(ours["extra_peak_bytes"], 1),
    }


def select_shapes(
    *,
    operations: Sequence[str],
    lengths: Sequence[int],
    blocks: Sequence[int],
    dtype: str,
    model: ModelConfig,
    quick: bool,
) -> list[OperationShape]:
    """The shapes to measure: the product of the given values, with defaults for empty ones.

    Raises:
        UserError: A length is not a multiple of a block size.
    """
    shapes, defaults = [], QUICK if quick else DEFAULTS
    for name in operations or defaults:
        for default_lengths, default_blocks in defaults[name]:
            for length in lengths or default_lengths:
                for block in (0,) if name == "head" else blocks or default_blocks:
                    shapes.append(OperationShape(name, length, block, dtype, model))
    for shape in shapes:
        if shape.block and shape.length % shape.block:
            raise UserError(f"--length: found {shape.length}, expected a multiple of --block {shape.block}")
    return list(dict.fromkeys(shapes))


def run(
    output: Path,
    *,
    operations: Sequence[str] = (),
    lengths: Sequence[int] = (),
    blocks: Sequence[int] = (),
    dtype: str = "fp32",
    repeats: int = 7,
    budget_seconds: float = 10.0,
    threads: int,
    quick: bool = False,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `ops.json` and `ops.png` to `output`.

    Args:
        operations: Keys of `CASES`; all if empty.
        lengths: Sequence lengths in tokens; those of `DEFAULTS` if empty.
        blocks: Block sizes in tokens; those of `DEFAULTS` if empty.
        repeats: See `measure.time_cases`.
        budget_seconds: See `measure.time_cases`; for each shape.
        quick: Tiny sizes, which only show that the command works.
    """
    from megatron_twotower.common import plots

    console = console or wide_console()
    widths = QUICK_MODEL if quick else MODEL
    model = load_recipe("bench_step", [f"model={widths}"]).model
    shapes = select_shapes(operations=operations, lengths=lengths, blocks=blocks, dtype=dtype, model=model, quick=quick)
    rows: list[dict[str, Any]] = []
    with measure.torch_threads(threads):
        for shape in track(shapes, description="measuring", console=console, transient=True):
            rows += add_ratios(measure_shape(shape, repeats=repeats, budget_seconds=budget_seconds, threads=threads))
        results = {"machine": machine(), "model": widths, "rows": rows}
    title = f"two-stream operations, forward + backward, {dtype}, widths of {widths}"
    picture = plots.operations(rows, theme=plots.LIGHT)
    report(output, "ops", results, tables=[ops_table(rows, title=title)], console=console, picture=picture)


def ops_table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """A line for each case, and the shape in the first line of its cases."""
    headings = ("operation", "L", "S", "case", "seconds", "fastest", "rounds", "of ours")
    return plain_table(title, (*headings, "by part", "peak MiB", "of ours"), [_table_row(row) for row in rows], left=4)


def _table_row(row: dict[str, Any]) -> list[str]:
    first = (row["operation"], f"{row['length']}", f"{row['block'] or '-'}") if row["case"] == OURS else ("",) * 3
    if row["skipped"]:
        return [*first, row["case"], f"skipped: {row['skipped']}"]
    is_baseline = "time_ratio" in row
    ratios = row["stage_ratios"] if is_baseline else {}
    return [
        *first,
        row["case"],
        f"{row['median_seconds']:.3f}",
        f"{row['minimum_seconds']:.3f}",
        f"{row['rounds']}",
        f"{row['time_ratio']:.2f} x" if is_baseline else "",
        " ".join(f"{name} {ratio:.2f} x" for name, ratio in ratios.items()) if len(ratios) > 1 else "",
        f"{row['extra_peak_bytes'] / 2**20:,.0f}",
        f"{row['memory_ratio']:.2f} x" if is_baseline else "",
    ]

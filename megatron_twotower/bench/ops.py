"""Each two-stream operation against its rivals, forward and backward: time by turns in one process, and peak memory.

A shape is an operation at a length, a block size and the widths of a model; its cases share their
inputs. Gradients go into what the denoiser trains. The first case of a shape is ours, and the
others are compared with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from megatron_twotower.bench import baselines, measure
from megatron_twotower.bench.measure import Case
from megatron_twotower.common import device as common_device
from megatron_twotower.common import machine, tables
from megatron_twotower.common.errors import UserError
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
# What is measured where no flag says otherwise: (lengths, blocks) of each operation. A block of 0:
# it has none.
DEFAULTS: dict[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    "scan": (((1024,), (4, 16, 32, 128)), ((4096, 8192), (4, 16, 128))),
    "attention": (((1024,), (4, 16, 32, 128)), ((4096,), (4, 16, 128)), ((8192,), (16,))),
    "head": (((1024, 4096), (0,)),),
    "convolution": (((4096,), (16,)),),
}
QUICK = {name: (((64,), (0,) if name == "head" else (8, 32)),) for name in DEFAULTS}


@dataclass(frozen=True)
class Shape:
    """What the cases of one group share. dtype: fp32 or bf16. model: whose widths count."""

    operation: str
    length: int
    block: int
    dtype: str
    model: ModelConfig


def _normal(*size: int, dtype: torch.dtype, trained: bool = False) -> Tensor:
    return torch.randn(*size, device=common_device.device()).to(dtype).requires_grad_(trained)


# --- the cases of each operation ----------------------------------------------------------------------------------


def scan_inputs(shape: Shape, *, trained: bool) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D of one stream, in the range of a backbone's."""
    l, dtype, model, device = shape.length, DTYPES[shape.dtype], shape.model, common_device.device()
    m, p, g, d = model.mamba_num_heads, model.mamba_head_dim, model.n_groups, model.ssm_state_size
    x, B, C = (_normal(1, l, *size, dtype=dtype) for size in ((m, p), (g, d), (g, d)))
    dt, A = torch.rand(1, l, m, device=device) * 0.1, -torch.rand(m, device=device) - 0.1
    D = torch.ones(m, device=device)
    return tuple(tensor.requires_grad_(trained) for tensor in (x, dt, A, B, C, D))


def scan_cases(shape: Shape) -> Iterator[Case]:
    """Stage `clean`: the context tower's scan with all that is handed on; `noisy`: the denoiser's."""
    clean, noisy = (scan_inputs(shape, trained=trained) for trained in (False, True))
    grad, block = torch.randn_like(noisy[0]), shape.block
    chunk = chunk_length(block, preferred=shape.model.chunk_size)
    x, dt, A, B, _, _ = clean
    held: dict[str, Tensor] = {}

    def hand_on(scan: Callable[..., tuple[Tensor, Tensor, Tensor]], tokens: int) -> None:
        with torch.no_grad():
            _, held["states"], _ = scan(*clean, chunk=tokens)

    def two_streams(scan: Callable[..., Tensor]) -> Callable[[], None]:
        own = {"clean_x": x, "clean_dt": dt, "clean_A": A, "clean_B": B, "block": block, "chunk": chunk}

        def run() -> None:
            torch.autograd.grad(scan(*noisy, **own, states=held.pop("states")), noisy, grad)

        return run

    def materialised(scan: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(scan(*noisy, states=held.pop("states"), block=block), noisy, grad)

        return run

    yield Case(OURS, {"clean": lambda: hand_on(chunk_scan, chunk), "noisy": two_streams(two_stream_scan)})
    if uses_triton_scan(x, B, block=block, chunk=chunk):
        in_torch = two_streams(two_stream_scan_torch)
        yield Case("ours in torch", {"clean": lambda: hand_on(chunk_scan, chunk), "noisy": in_torch})
    for name, scan in (
        ("state per block", baselines.scan_of_sequences),
        ("state per block, lean", baselines.scan_of_sequences_lean),
    ):
        yield Case(name, {"clean": lambda: hand_on(baselines.chunked_scan, block), "noisy": materialised(scan)})


def attention_cases(shape: Shape) -> Iterator[Case]:
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

    yield Case(OURS, {"all": ours})
    yield Case("dense mask", {"all": dense})


def head_cases(shape: Shape) -> Iterator[Case]:
    """Half of the positions are masked."""
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

    def both_ways(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), (hidden, weight))

    for name, loss in losses.items():
        yield Case(name, {"all": both_ways(loss)})


def convolution_cases(shape: Shape) -> Iterator[Case]:
    model = shape.model
    channels = model.mamba_inner + 2 * model.n_groups * model.ssm_state_size
    dtype, taps = DTYPES[shape.dtype], model.conv_kernel
    x, clean = (_normal(1, shape.length, channels, dtype=dtype, trained=trained) for trained in (True, False))
    weight, bias = _normal(channels, taps, dtype=dtype, trained=True), _normal(channels, dtype=dtype, trained=True)
    history, grad = block_history(clean, taps=taps, block=shape.block), torch.randn_like(x)

    def both_ways(conv: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(conv(x, history, weight, bias), (x, weight, bias), grad)

    yield Case(OURS, {"all": both_ways(seeded_block_conv)})
    yield Case("shifted copies", {"all": both_ways(baselines.shifted_block_conv)})


CASES: dict[str, Callable[[Shape], Iterator[Case]]] = {
    "scan": scan_cases,
    "attention": attention_cases,
    "head": head_cases,
    "convolution": convolution_cases,
}


def cases_of(shape: Shape) -> list[Case]:
    torch.manual_seed(0)
    return list(CASES[shape.operation](shape))


def needed_bytes(shape: Shape, name: str) -> int:
    """About what a case needs beyond its inputs: what must not exceed the free memory. From shapes; peaks measured."""
    model, l = shape.model, shape.length
    size = torch.finfo(DTYPES[shape.dtype]).bits // 8
    if shape.operation == "scan":
        state = 4 * model.mamba_inner * model.ssm_state_size
        kept = 5 * l * 4 * (model.mamba_inner + model.n_groups * model.ssm_state_size)
        return kept + (0 if name.startswith(OURS) else 4 * (l // shape.block) * state)
    if shape.operation == "attention":
        # On a CPU torch keeps the mask as numbers, and no scores; elsewhere it may keep the scores
        # of every head.
        scores = l * 2 * l * size * (1 if common_device.is_cpu() else 4 * model.num_attention_heads)
        return 2 * scores if name == "dense mask" else 16 * model.num_attention_heads * l * model.head_dim
    if shape.operation == "head":
        rows = {OURS: 512, "all logits": l}.get(name, l // 2)
        return (rows * 3 + 2 * model.hidden_size) * 4 * model.vocab_size
    return 12 * l * 4 * (model.mamba_inner + 2 * model.n_groups * model.ssm_state_size)


# --- measuring ----------------------------------------------------------------------------------------------------


def peak_of(shape: Shape, name: str, threads: int) -> int:
    """Extra peak memory of one case, after the same at a small length, which loads what is loaded once."""
    torch.set_num_threads(threads)
    small = Shape(shape.operation, max(shape.block, 128), shape.block, shape.dtype, shape.model)
    for each in (small, shape):
        if each.operation == "head" and each is small:
            continue  # its weights alone are gigabytes
        (case,) = (case for case in cases_of(each) if case.name == name)
        peak = measure.extra_peak_bytes(case.run)
        del case
    return peak


def rows_of(shape: Shape, *, repeats: int, budget_seconds: float, threads: int) -> list[dict[str, Any]]:
    """Figures of every case of a shape; `skipped` says why where a case was not run."""
    cases, free = cases_of(shape), measure.fillable_bytes()
    needed = {case.name: needed_bytes(shape, case.name) for case in cases}
    fitting = [case for case in cases if needed[case.name] <= free]
    times = measure.in_turns(fitting, repeats=repeats, budget_seconds=budget_seconds)
    names = [case.name for case in cases]
    del cases, fitting  # the inputs: a process of its own makes them again
    rows: list[dict[str, Any]] = []
    for name in names:
        row = {"operation": shape.operation, "length": shape.length, "block": shape.block, "dtype": shape.dtype}
        row |= {"case": name, "skipped": None}
        if name in times:
            peak = measure.apart(peak_of, shape, name, threads, preload=__name__)
            row |= times[name].figures() | {"extra_peak_bytes": peak}
        else:
            row["skipped"] = f"needs about {needed[name] / 2**30:.0f} GiB"
        rows.append(row)
    return rows


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rival's row with its figures over ours: `time_ratio`, `stage_ratios`, `memory_ratio`."""
    ours = rows[0]
    found = []
    for row in rows:
        if row["skipped"] or row is ours or ours["skipped"]:
            found.append(row)
            continue
        stages = {name: value / ours["stage_seconds"][name] for name, value in row["stage_seconds"].items()}
        found.append(
            row
            | {
                "time_ratio": row["median_seconds"] / ours["median_seconds"],
                "stage_ratios": stages,
                "memory_ratio": row["extra_peak_bytes"] / max(ours["extra_peak_bytes"], 1),
            }
        )
    return found


def shapes(
    *,
    operations: Sequence[str],
    lengths: Sequence[int],
    blocks: Sequence[int],
    dtype: str,
    model: ModelConfig,
    quick: bool,
) -> list[Shape]:
    """What to measure: the product of what is given, the defaults of each operation for what is not.

    Raises:
        UserError: a length that is not a multiple of a block.
    """
    found, defaults = [], QUICK if quick else DEFAULTS
    for name in operations or defaults:
        for default_lengths, default_blocks in defaults[name]:
            for length in lengths or default_lengths:
                for block in (0,) if name == "head" else blocks or default_blocks:
                    found.append(Shape(name, length, block, dtype, model))
    for shape in found:
        if shape.block and shape.length % shape.block:
            raise UserError(f"--length: found {shape.length}, expected a multiple of --block {shape.block}")
    return list(dict.fromkeys(found))


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
    """Measure, print a table, and write `ops.json` and `ops.png` to `output`."""
    from megatron_twotower.common import plots

    console = console or tables.wide_console()
    widths = QUICK_MODEL if quick else MODEL
    model = load_recipe("bench_step", [f"model={widths}"]).model
    wanted = shapes(operations=operations, lengths=lengths, blocks=blocks, dtype=dtype, model=model, quick=quick)
    rows: list[dict[str, Any]] = []
    with measure.torch_threads(threads):
        for shape in track(wanted, description="measuring", console=console, transient=True):
            rows += with_ratios(rows_of(shape, repeats=repeats, budget_seconds=budget_seconds, threads=threads))
        facts = machine.machine()
    title = f"two-stream operations, forward + backward, {dtype}, widths of {widths}"
    console.print(table(rows, title=title))
    console.print(machine.machine_line(facts), highlight=False)
    picture = plots.operations(rows, theme=plots.LIGHT)
    measure.write_files(output, "ops", {"machine": facts, "model": widths, "rows": rows}, picture)
    console.print(f"{output / 'ops.json'}, {output / 'ops.png'}", highlight=False)


def table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("operation", "L", "S", "case"):
        made.add_column(heading, justify="right" if len(heading) == 1 else "left")
    for heading in ("seconds", "fastest", "rounds", "of ours", "by stage", "peak MiB", "of ours"):
        made.add_column(heading, justify="right")
    for row in rows:
        where = (row["operation"], f"{row['length']}", f"{row['block'] or '-'}") if row["case"] == OURS else ("",) * 3
        if row["skipped"]:
            made.add_row(*where, row["case"], f"skipped: {row['skipped']}")
            continue
        stages, compared = row["stage_seconds"], "time_ratio" in row
        parts = row["stage_ratios"] if compared else {}
        made.add_row(
            *where,
            row["case"],
            f"{row['median_seconds']:.3f}",
            f"{row['minimum_seconds']:.3f}",
            f"{row['rounds']}",
            f"{row['time_ratio']:.2f} x" if compared else "",
            " ".join(f"{name} {ratio:.2f} x" for name, ratio in parts.items()) if len(stages) > 1 else "",
            f"{row['extra_peak_bytes'] / 2**20:,.0f}",
            f"{row['memory_ratio']:.2f} x" if compared else "",
            end_section=False,
        )
    return made

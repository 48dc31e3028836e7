"""The command `bench prefill`: time and peak memory of reading a prompt, against its length.

Every case runs in a process of its own. On a CPU, times are those that its threads computed: other
processes do not change them. Apart from attention the time is linear in the length, and
apart from the cache the memory does not grow with it, unless the prompt is read at once.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_twotower.bench import measure
from megatron_twotower.bench.results import report
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.generate.engine import default_devices, load
from megatron_twotower.hf.modeling_nemotron_h_twotower import Attention, ContextCache, KeyValueCache, MambaState
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model


@dataclass(frozen=True)
class PrefillOptions:
    """What to measure.

    Attributes:
        lengths: Tokens of the prompt, which is random.
        chunk_sizes: Positions that are read at a time; 0 for the complete prompt.
        repeats: Counted rounds of each case, after one that is not counted.
    """

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    chunk_sizes: tuple[int, ...] = (Model.prefill_chunk_size,)
    repeats: int = 3


QUICK = PrefillOptions(lengths=(64, 128), chunk_sizes=(32, 0), repeats=1)


def cache_bytes(cache: ContextCache) -> int:
    """The bytes of a cache in use, without room for later text."""
    tensors: list[torch.Tensor | None] = []
    for state in cache.context:
        if isinstance(state, KeyValueCache):
            tensors += state.views()
        elif isinstance(state, MambaState):
            tensors += [state.conv, state.ssm]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def case(folder: Path, length: int, chunk_size: int, repeats: int, threads: int) -> dict[str, Any]:
    """Time and memory of one case.

    The layers of attention are timed apart, in rounds of their own, because that waits for the
    device after each layer.
    """
    device = default_devices()[0]
    # In bfloat16 some CPUs have no matrix products but slow ones.
    model, _ = load(folder, dtype=torch.float32 if device == "cpu" else None, device=device)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    size, spent = chunk_size or length, dict[str, float]()

    def prefill() -> ContextCache:
        return model.prefill(ids, chunk_size=size)

    with measure.torch_threads(threads):
        model.prefill(ids[:, :size], chunk_size=size)
        memory = measure.extra_peak_bytes(prefill)
        seconds = [_seconds(prefill) for _ in range(repeats)]
        spent = _seconds_in_attention(model, prefill)
    return {
        "length": length,
        "chunk_size": chunk_size,
        "seconds": statistics.median(seconds),
        "attention_share": spent["attention"] / sum(spent.values()),
        "peak_bytes": memory,
        "cache_bytes": cache_bytes(prefill()),
    }


def _clock() -> float:
    return time.process_time() if default_devices()[0] == "cpu" else time.perf_counter()


def _seconds(work: Callable[[], Any]) -> float:
    measure.synchronize()
    started = _clock()
    work()
    measure.synchronize()
    return _clock() - started


def _seconds_in_attention(model: Model, prefill: Any) -> dict[str, float]:
    """Seconds of one prefill in layers of attention, and in others."""
    spent, started = defaultdict[str, float](float), [0.0]

    def before(*_: Any) -> None:
        measure.synchronize()
        started[0] = _clock()

    def after(layer: Any, *_: Any) -> None:
        measure.synchronize()
        kind = "attention" if isinstance(layer.mixer, Attention) else "others"
        spent[kind] += _clock() - started[0]

    with measure.hooked(model.context_tower.layers, before=before, after=after):
        prefill()
    return {"attention": spent["attention"], "others": spent["others"]}


def measured(folder: Path, options: PrefillOptions, *, threads: int) -> Iterator[dict[str, Any]]:
    """All cases, each in a new process."""
    for length in options.lengths:
        for chunk_size in options.chunk_sizes:
            yield measure.in_new_process(
                case, folder, length, chunk_size, options.repeats, threads, preload="megatron_twotower.bench.prefill"
            )


def run(output: Path, *, model: Path, options: PrefillOptions, threads: int, console: Console | None = None) -> None:
    """Measure, print a table, and write `prefill.json` to `output`.

    Raises:
        UserError: The folder is not a two-tower model.
    """
    load(model)  # a folder that cannot be loaded is an error before anything is measured
    rows = list(measured(model, options, threads=threads))
    results = {"machine": machine(), "model": str(model), "cases": rows}
    report(output, "prefill", results, tables=[table(rows)], console=console or wide_console())


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each case."""
    cells = []
    for row in rows:
        others = row["seconds"] * (1 - row["attention_share"])
        cells.append(
            (
                f"{row['length']:,}",
                f"{row['chunk_size']:,}" if row["chunk_size"] else "all",
                f"{row['seconds']:,.2f}",
                f"{row['seconds'] - others:,.2f}",
                f"{others / row['length'] * 1e6:,.1f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['cache_bytes'] / 2**20:,.0f}",
            )
        )
    headings = ("tokens", "at a time", "seconds", "in attention", "others, µs/token", "peak, MiB", "cache, MiB")
    return plain_table("reading a prompt", headings, cells, left=0)

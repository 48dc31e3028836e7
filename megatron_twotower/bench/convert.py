"""How fast weights are converted, against `cp` of the same bytes in the same run.

A NemotronH of random numbers is written to a temporary folder; every way then reads and writes the
same tensors, in turns, from a warm page cache, and ends with the bytes on the disk (`cp` too is
followed by an fsync of its files). What is measured is the program and the disk under the folder,
not a model.
"""

import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_twotower.bench.measure import Case, extra_peak_bytes, in_turns, write_files
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine, machine_line
from megatron_twotower.common.tables import wide_console
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.convert import export, hf_folder, import_run, model_card
from megatron_twotower.convert.tensors import PIECE_BYTES, LazyTensor
from megatron_twotower.model.parameter_map import backbone_entries, hf_shapes

MIB = 2**20
# Nano's kinds of layers at a third of its width; how many there are follows from the size asked
# for.
_SHAPE = ModelConfig(
    vocab_size=16384,
    hidden_size=1024,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=32,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=768,
    moe_shared_expert_intermediate_size=1536,
)
_UNIT = "MEM*E"


@dataclass(frozen=True)
class Settings:
    """size_mib: of the model, at least. repeats: rounds after one that is not counted, budget_seconds for all."""

    size_mib: int = 1024
    repeats: int = 5
    budget_seconds: float = 120.0


def run(
    output: Path, *, folder: Path | None = None, settings: Settings = Settings(), console: Console | None = None
) -> None:
    """Measure, print a table, and write `convert.json` to `output`.

    Args:
        folder: where to write and read; the system's folder for temporary files if left out.
    """
    with tempfile.TemporaryDirectory(prefix="twotower-bench-", dir=folder) as temporary:
        figures = measure(Path(temporary), settings)
    _print(figures, console or wide_console())
    write_files(output, "convert", figures, None)


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """Of each way: seconds, bytes per second, the ratio to `cp`, and memory at its peak beyond what it began with."""
    model = sized(settings.size_mib * MIB)
    free, needed = shutil.disk_usage(folder).free, 4 * weight_bytes(model)
    if free < needed:
        raise UserError(f"{folder}: found {free / 2**30:.1f} GiB free, expected {needed / 2**30:.1f} for the benchmark")
    source = folder / "source"
    write_random(source, model)
    import_run.import_folder(source, folder / "run")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    ways = _ways(source, folder / "run", folder / "out")
    times = in_turns(
        [Case(name, {"all": way}) for name, way in ways.items()],
        repeats=settings.repeats,
        budget_seconds=settings.budget_seconds,
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, found in times.items():
        figures = found.figures()
        peak = None if name == "cp" else extra_peak_bytes(ways[name])
        rows[name] = figures | {"bytes_per_second": size / figures["median_seconds"], "extra_peak_bytes": peak}
    for row in rows.values():
        row["times_cp"] = row["median_seconds"] / rows["cp"]["median_seconds"]
    tensors = len(hf_shapes(backbone_entries(model), model))
    return {"bytes": size, "tensors": tensors, "ways": rows, "machine": machine()}


def sized(size: int) -> ModelConfig:
    """A model of at least so many bytes in bfloat16."""
    model = dataclasses.replace(_SHAPE, hybrid_override_pattern=_UNIT)
    while weight_bytes(model) < size:
        model = dataclasses.replace(model, hybrid_override_pattern=model.hybrid_override_pattern + _UNIT)
    return model


def weight_bytes(model: ModelConfig) -> int:
    return 2 * sum(torch.Size(shape).numel() for shape in hf_shapes(backbone_entries(model), model).values())


def write_random(folder: Path, model: ModelConfig) -> None:
    """A hub-style folder of one block of random numbers over and over."""
    block = torch.randn(PIECE_BYTES // 2).bfloat16()

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        count = torch.Size(shape).numel()

        def pieces() -> Iterator[Tensor]:
            for start in range(0, count, len(block)):
                yield block[: min(len(block), count - start)]

        return LazyTensor(torch.bfloat16, shape, pieces)

    tensors = {name: lazy(shape) for name, shape in hf_shapes(backbone_entries(model), model).items()}
    config = model_card.backbone_config_json(model, dtype=torch.bfloat16)
    hf_folder.write_folder(folder, tensors, config=config, files={}, copies=[])


def _ways(source: Path, run: Path, out: Path) -> dict[str, Callable[[], Any]]:
    def fresh(way: Callable[[], Any]) -> Callable[[], Any]:
        def work() -> None:
            shutil.rmtree(out, ignore_errors=True)
            way()

        return work

    def cp() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", str(source), str(out)], check=True)
        for path in out.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    stacked, wide = export.ExportOptions(style="transformers"), export.ExportOptions(dtype=torch.float16)
    return {
        "cp": fresh(cp),
        "fingerprint alone": lambda: hf_folder.fingerprint(source),
        "import": fresh(lambda: import_run.import_folder(source, out)),
        "export a run": fresh(lambda: export.export(run, out)),
        "hub to transformers": fresh(lambda: export.export(source, out, options=stacked)),
        "bf16 to fp16": fresh(lambda: export.export(source, out, options=wide)),
    }


def _print(figures: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{figures['bytes'] / 2**30:.2f} GiB in {figures['tensors']:,} tensors", title_justify="left")
    for name in ("way", "seconds", "GB/s", "time against cp", "extra peak memory, MiB"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, row in figures["ways"].items():
        peak = "" if row["extra_peak_bytes"] is None else f"{row['extra_peak_bytes'] / MIB:,.0f}"
        table.add_row(
            name, f"{row['median_seconds']:.2f}", f"{row['bytes_per_second'] / 1e9:.2f}", f"{row['times_cp']:.2f}", peak
        )
    console.print(table)
    console.print(f"medians; {machine_line(figures['machine'])}", highlight=False)

"""The command `bench convert`: conversion of weights against `cp` of the same bytes.

A NemotronH of random numbers is written to a temporary folder. Every conversion then reads and
writes the same tensors, alternating in one run, from a warm page cache, and ends with the bytes on
the disk (`cp` is followed by an fsync of its files). The results describe the program and the disk
of the folder, not a model.
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

from megatron_twotower.bench.measure import TimedCase, extra_peak_bytes, time_cases
from megatron_twotower.bench.results import report
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.convert import export, hf_folder, import_run, model_card
from megatron_twotower.convert.tensors import PIECE_BYTES, LazyTensor
from megatron_twotower.model.parameter_map import backbone_entries, hf_shapes

MIB = 2**20
# Nano's kinds of layers at a third of its width. The number of layers follows from the size.
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
_PATTERN_UNIT = "MEM*E"


@dataclass(frozen=True)
class ConvertOptions:
    """What to measure.

    Attributes:
        size_mib: The least size of the model in bfloat16.
        repeats: See `measure.time_cases`.
        budget_seconds: See `measure.time_cases`; for all conversions together.
    """

    size_mib: int = 1024
    repeats: int = 5
    budget_seconds: float = 120.0


def run(
    output: Path,
    *,
    folder: Path | None = None,
    options: ConvertOptions = ConvertOptions(),
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `convert.json` to `output`.

    Args:
        folder: Where to write and read; the system's folder for temporary files if `None`.
    """
    with tempfile.TemporaryDirectory(prefix="twotower-bench-", dir=folder) as temporary:
        results = measure_conversions(Path(temporary), options)
    report(output, "convert", results, tables=[conversions_table(results)], console=console or wide_console())


def measure_conversions(folder: Path, options: ConvertOptions) -> dict[str, Any]:
    """Seconds, bytes per second, the ratio to `cp` and the extra peak memory of each conversion.

    Raises:
        UserError: The disk of the folder is too full.
    """
    model = model_of_size(options.size_mib * MIB)
    free, needed = shutil.disk_usage(folder).free, 4 * weight_bytes(model)
    if free < needed:
        raise UserError(f"{folder}: found {free / 2**30:.1f} GiB free, expected {needed / 2**30:.1f} for the benchmark")
    source = folder / "source"
    write_random(source, model)
    import_run.import_folder(source, folder / "run")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    conversions = _conversions(source, folder / "run", folder / "out")
    times = time_cases(
        [TimedCase(name, {"all": work}) for name, work in conversions.items()],
        repeats=options.repeats,
        budget_seconds=options.budget_seconds,
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, found in times.items():
        summary = found.summary()
        peak = None if name == "cp" else extra_peak_bytes(conversions[name])
        rows[name] = summary | {"bytes_per_second": size / summary["median_seconds"], "extra_peak_bytes": peak}
    for row in rows.values():
        row["times_cp"] = row["median_seconds"] / rows["cp"]["median_seconds"]
    tensors = len(hf_shapes(backbone_entries(model), model))
    return {"bytes": size, "tensors": tensors, "ways": rows, "machine": machine()}


def model_of_size(size: int) -> ModelConfig:
    """The smallest model of at least `size` bytes in bfloat16."""
    model = dataclasses.replace(_SHAPE, hybrid_override_pattern=_PATTERN_UNIT)
    while weight_bytes(model) < size:
        pattern = model.hybrid_override_pattern + _PATTERN_UNIT
        model = dataclasses.replace(model, hybrid_override_pattern=pattern)
    return model


def weight_bytes(model: ModelConfig) -> int:
    """The size of all weights in bfloat16."""
    return 2 * sum(torch.Size(shape).numel() for shape in hf_shapes(backbone_entries(model), model).values())


def write_random(folder: Path, model: ModelConfig) -> None:
    """Write a folder in the hub's style whose tensors repeat one block of random numbers."""
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


def _conversions(source: Path, run: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """What is timed. All but the fingerprint write to `out`, which they first remove."""

    def fresh(conversion: Callable[[], Any]) -> Callable[[], Any]:
        def work() -> None:
            shutil.rmtree(out, ignore_errors=True)
            conversion()

        return work

    def cp() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", str(source), str(out)], check=True)
        for path in out.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    stacked, half = export.ExportOptions(style="transformers"), export.ExportOptions(dtype=torch.float16)
    return {
        "cp": fresh(cp),
        "fingerprint alone": lambda: hf_folder.fingerprint(source),
        "import": fresh(lambda: import_run.import_folder(source, out)),
        "export a run": fresh(lambda: export.export(run, out)),
        "hub to transformers": fresh(lambda: export.export(source, out, options=stacked)),
        "bf16 to fp16": fresh(lambda: export.export(source, out, options=half)),
    }


def conversions_table(results: dict[str, Any]) -> Table:
    """A line for each conversion."""
    rows = [
        (
            name,
            f"{row['median_seconds']:.2f}",
            f"{row['bytes_per_second'] / 1e9:.2f}",
            f"{row['times_cp']:.2f}",
            "" if row["extra_peak_bytes"] is None else f"{row['extra_peak_bytes'] / MIB:,.0f}",
        )
        for name, row in results["ways"].items()
    ]
    return plain_table(
        f"{results['bytes'] / 2**30:.2f} GiB in {results['tensors']:,} tensors, medians",
        ("conversion", "seconds", "GB/s", "time against cp", "extra peak memory, MiB"),
        rows,
        left=1,
    )

"""Run by `test_export.py` in its own process: converts a model larger than its memory limit."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from helpers import hf_folders
from megatron_twotower.bench.measure import extra_peak_bytes
from megatron_twotower.convert import export, hf_folder, import_run, model_card
from megatron_twotower.convert.tensors import LazyTensor
from megatron_twotower.model import parameter_map

MIB = 2**20
ALLOWED = 48 * MIB
# Eight MoE layers of twenty experts, 3 MiB for each of their two matrices, and 8 for embedding and
# head.
MODEL = dataclasses.replace(
    hf_folders.MODEL,
    hybrid_override_pattern="MEEEE*EEEE-",
    hidden_size=1024,
    vocab_size=4096,
    n_routed_experts=20,
    moe_intermediate_size=1536,
    moe_shared_expert_intermediate_size=1536,
    intermediate_size=2048,
)


def main(folder: Path) -> None:
    block = torch.randn(MIB).bfloat16()

    def tensor(shape: tuple[int, ...]) -> LazyTensor:
        count = torch.Size(shape).numel()
        return LazyTensor(torch.bfloat16, shape, lambda: (block[: min(MIB, count - i)] for i in range(0, count, MIB)))

    shapes = parameter_map.hf_shapes(parameter_map.backbone_entries(MODEL), MODEL)
    tensors = {name: tensor(shape) for name, shape in shapes.items()}
    config = model_card.backbone_config_json(MODEL, dtype=torch.bfloat16)
    hf_folder.write_folder(folder / "source", tensors, config=config, files={}, copies=[])
    hf_folders.write(folder / "small", "hub")  # what is imported and cached on the way
    import_run.import_folder(folder / "small", folder / "small-run")
    export.export(folder / "small-run", folder / "small-again")
    style = export.ExportOptions(style="transformers")
    work = {
        "import": lambda: import_run.import_folder(folder / "source", folder / "run"),
        "export": lambda: export.export(folder / "run", folder / "again"),
        "folder to folder": lambda: export.export(folder / "source", folder / "stacked", options=style),
    }
    figures = {name: extra_peak_bytes(each) for name, each in work.items()}
    sizes = [tensor.nbytes for tensor in tensors.values()]
    print(json.dumps(figures | {"bytes": sum(sizes), "largest": max(sizes), "allowed": ALLOWED}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

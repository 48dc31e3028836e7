"""The commands of `convert`: import and export of weights."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command, Group
from megatron_twotower.cli.options import add_number, add_options, arguments_for, option


def _add_folders(parser: argparse.ArgumentParser, *, source: str, of: str) -> None:
    parser.add_argument("--from", dest="source", type=Path, required=True, help=source)
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--backbone", type=Path, help=f"folder of the backbone of {of}, if it moved")


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_folders(
        parser, source="Hugging Face folder: a NemotronH, two towers, or a denoiser alone", of="a denoiser alone"
    )


def _import(arguments: argparse.Namespace) -> int:
    from megatron_twotower.common.progress import bytes_bar
    from megatron_twotower.convert.import_run import import_folder

    with bytes_bar("importing") as progress:
        config = import_folder(arguments.source, arguments.to, backbone=arguments.backbone, progress=progress)
    print(
        f"{arguments.to}: imported from {arguments.source}, objective {config.objective}; continue with\n"
        f"  twotower train recipe={arguments.to}/config.yaml data.folder=... train.steps=..."
    )
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_folders(
        parser, source="output folder of a training run, or a Hugging Face folder", of="a run or a denoiser alone"
    )
    parser.add_argument(
        "--what",
        choices=("two_tower", "context", "denoiser"),
        help="what to write; all there is if left out; two_tower of a backbone alone: with an untrained denoiser",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of the tensors; each as it is stored if left out"
    )
    parser.add_argument(
        "--style",
        choices=("hub", "transformers"),
        help="names of a plain NemotronH: one tensor per expert (hub) or stacked; those of the source, or hub",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder of a tokenizer whose entries are some of the model's: it keeps these alone",
    )
    add_number(parser, "--step", help="step of the checkpoint; the newest if left out", at_least=0)
    add_number(
        parser,
        "--average",
        help="checkpoints, up to that step, whose trained weights are averaged",
        default=1,
        at_least=1,
    )


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from megatron_twotower.common.progress import bytes_bar
    from megatron_twotower.convert.export import ExportOptions, export

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    options = ExportOptions(
        what=arguments.what,
        dtype=dtypes[arguments.dtype],
        style=arguments.style,
        step=arguments.step,
        average=arguments.average,
        backbone=arguments.backbone,
        tokenizer=arguments.tokenizer,
    )
    with bytes_bar("exporting") as progress:
        what = export(arguments.source, arguments.to, options=options, progress=progress)
    print(f"{arguments.to}: {what} exported from {arguments.source}")
    return 0


WRITTEN_KIND = option("how numbers are kept", "--quantize", choices=("int8", "int4", "fp8"), required=True)


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.cli.generate import QUANTIZATION
    from megatron_twotower.generate.quantization import Quantization

    parser.add_argument("--from", dest="source", type=Path, required=True, help="two-tower Hugging Face folder")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    add_options(parser, Quantization, {**QUANTIZATION, "kind": WRITTEN_KIND})
    parser.add_argument("--device", default="cpu", help="where to quantise; int4 is written for that kind of device")


def _quantize(arguments: argparse.Namespace) -> int:
    from megatron_twotower.cli.generate import QUANTIZATION
    from megatron_twotower.generate.quantization import Quantization
    from megatron_twotower.generate.quantized_folder import quantize_folder

    chosen = Quantization(**arguments_for(QUANTIZATION, arguments))
    before, after = quantize_folder(arguments.source, arguments.to, chosen, device=arguments.device)
    print(f"{arguments.to}: {arguments.source} in {chosen.kind}; weights {before:,} -> {after:,} bytes")
    return 0


GROUP = Group(
    "convert",
    "move weights to and from Hugging Face",
    (
        Command(
            "import",
            "make a training run from a Hugging Face folder, with verified weights",
            ("twotower convert import --from models/two-tower --to runs/continued",),
            _add_import,
            _import,
            interrupted_by_sigterm=True,
        ),
        Command(
            "export",
            "write a run's checkpoint, or a converted folder, for Hugging Face",
            ("twotower convert export --from runs/twotower --to runs/model",),
            _add_export,
            _export,
            interrupted_by_sigterm=True,
        ),
        Command(
            "quantize",
            "write a two-tower folder with weights of eight or four bits (extra `quantize`)",
            ("twotower convert quantize --from runs/model --to runs/model-int8 --quantize int8",),
            _add_quantize,
            _quantize,
            interrupted_by_sigterm=True,
        ),
    ),
)

"""A two-tower folder with quantised weights, which every command but `convert` reads as it is."""

import shutil
from pathlib import Path

from megatron_twotower.common.errors import require
from megatron_twotower.common.files import atomic_folder
from megatron_twotower.config.hf_config import POINTER_FILE
from megatron_twotower.convert.hf_folder import INDEX_FILE
from megatron_twotower.generate.engine import load
from megatron_twotower.generate.quantization import Quantization, weight_bytes


def quantize_folder(source: Path, output: Path, chosen: Quantization, *, device: str = "cpu") -> tuple[int, int]:
    """Write a two-tower folder with quantised weights, which every command reads.

    Args:
        source: Two-tower Hugging Face folder, not quantised.
        output: The new folder.
        chosen: What to quantise.
        device: Where. Weights of the kind int4 can only be used on the kind of device where they
            were quantised.

    Returns:
        The bytes of the weights before and after.

    Raises:
        UserError: See `engine.load`; or `output` exists.
    """
    require(not output.exists(), f"{output}: exists, expected a folder that is not there yet")
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    model, _ = load(source, device=device, quantization=chosen)
    with atomic_folder(output, size=before) as partial:
        model.save_pretrained(partial)
        for path in source.iterdir():  # the tokenizer's files, as they are
            of_weights = path.suffix == ".safetensors" or path.name in (INDEX_FILE, POINTER_FILE)
            if path.is_file() and not of_weights and not (partial / path.name).exists():
                shutil.copyfile(path, partial / path.name)
    return before, weight_bytes(model)

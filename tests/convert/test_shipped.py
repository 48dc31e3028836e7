"""The shipped two-tower models, as a user exports them from `recipes/models`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_twotower.cli import main
from megatron_twotower.config.recipes import recipes_folder

FOLDERS = sorted(path for path in (recipes_folder() / "models").iterdir() if path.is_dir())
PROMPT = "def read(path):\n    with open(path"


def test_all_of_them_are_small():
    sizes = {path: path.stat().st_size for folder in FOLDERS for path in folder.iterdir()}
    assert len(FOLDERS) == 2 and sum(sizes.values()) < 40e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_model_writes_with_both_towers(folder, tmp_path):
    home = tmp_path / "model"
    assert main.main(["convert", "export", "--from", str(folder), "--to", str(home), "--dtype", "fp32"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(home, trust_remote_code=True).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = model.generate_ar(prompt, 32)
    assert torch.equal(model.generate_speculative(prompt, 32), written)
    # A denoiser that has learned nothing drafts nothing that its context tower would write.
    assert model.last_generation.accepted >= 8

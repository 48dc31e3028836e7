"""The model in recipes/models has the figures in its README."""

import pytest
import torch

from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.evaluate.speed_quality import text_quality
from megatron_twotower.generate.engine import load

PROMPTS = (
    "import os\nimport sys\n\ndef main(argv):\n    if len(argv) ",
    "class Node:\n    def __init__(self, name, value):\n        self.name = ",
    '    def close(self):\n        """Close the file.',
    "for i in range(len(self._items)):\n            ",
)


@pytest.fixture(scope="module")
def shipped():
    return load(recipes_folder() / "models" / "bytes", dtype=torch.float32)


@pytest.mark.parametrize(("threshold", "least"), [(0.8, 1.8), pytest.param(0.5, 2.2, marks=pytest.mark.slow)])
def test_the_denoiser_on_bytes_commits_several_tokens_in_a_forward_pass(shipped, threshold, least):
    model, tokenizer = shipped
    passes, agreement = 0, []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert ids.shape[1] == len(prompt), "a token is a byte"
        text = model.generate_mask_diffusion(ids, 96, confidence_threshold=threshold)
        passes += model.last_generation.passes
        agreement.append(text_quality(model, text, ids.shape[1], model.generate_ar(ids, 96)[0, -96:])["agreement"])
    assert 96 * len(PROMPTS) / passes > least
    assert sum(agreement) / len(agreement) > 0.8

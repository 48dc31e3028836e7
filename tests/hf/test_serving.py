"""The server of transformers with an exported folder, as docs/generation.md starts it."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed)
pytest.importorskip("transformers.cli.serve")
pytestmark = pytest.mark.slow

PROMPT, NEW, END = "def alpha(beta):", 24, 7
DOCS = Path(__file__).parents[2] / "docs" / "generation.md"


@pytest.fixture(scope="module")
def server(two_tower_folder, tmp_path_factory):
    """The address of a server, started by the lines of the docs."""
    home = tmp_path_factory.mktemp("server")
    lines = re.search(r"    # serve.py.*?Serve\(.*?\n", DOCS.read_text(), re.DOTALL)
    (home / "serve.py").write_text(dedent(lines[0]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, home / "serve.py", two_tower_folder, str(port)]
    with (home / "log").open("w") as log, subprocess.Popen(words, env=own, stdout=log, stderr=log) as process:
        try:
            for _ in range(240):
                assert process.poll() is None, (home / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.terminate()


def answer(address, folder, **fields):
    body = json.dumps({"model": str(folder), "prompt": PROMPT} | fields).encode()
    request = urllib.request.Request(address, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.read().decode()


def chosen(**fields):
    return json.dumps({"max_new_tokens": NEW, "eos_token_id": END} | fields)


@pytest.fixture(scope="module")
def expected(two_tower_folder):
    """The texts of AR and of mask diffusion."""
    model = AutoModelForCausalLM.from_pretrained(two_tower_folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(two_tower_folder, trust_remote_code=True)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.set_num_threads(1)
    texts = (
        model.generate_ar(ids, NEW, eos_token_id=END),
        model.generate_mask_diffusion(ids, NEW, confidence_threshold=0.1, eos_token_id=END),
    )
    return [tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True) for text in texts]


def test_completions_are_the_text_of_the_context_tower(server, two_tower_folder, expected):
    found = json.loads(answer(server, two_tower_folder, generation_config=chosen()))
    assert found["choices"][0]["text"] == expected[0]
    assert found["object"] == "text_completion" and found["model"] == str(two_tower_folder)


def test_completions_by_mask_diffusion(server, two_tower_folder, expected):
    config = chosen(custom_generate="mask_diffusion", confidence_threshold=0.1)
    found = json.loads(answer(server, two_tower_folder, generation_config=config))
    assert found["choices"][0]["text"] == expected[1] != expected[0]
    streamed = answer(server, two_tower_folder, generation_config=config, stream=True)
    parts = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == expected[1]
    assert len(parts) > 3


def test_a_wrong_argument_is_an_error_and_the_server_goes_on(server, two_tower_folder, expected):
    with pytest.raises(urllib.error.HTTPError, match="500"):
        answer(server, two_tower_folder, generation_config=chosen(custom_generate="contrastive"))
    found = json.loads(answer(server, two_tower_folder, generation_config=chosen()))
    assert found["choices"][0]["text"] == expected[0]

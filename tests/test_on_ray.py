"""Commands on a Ray of several nodes: the bytes of one process, whatever is killed when."""

import contextlib
import importlib.util
import json
import subprocess
import sys

import pytest

from helpers.corpora import content, make_tokenizer, texts, write_records, write_tree
from helpers.ray_nodes import Trouble, cluster
from megatron_twotower.common.files import partial_path
from megatron_twotower.data.prepare import prepare
from megatron_twotower.generate import prompt_file
from megatron_twotower.generate.distil import DistilSettings, distil
from megatron_twotower.generate.engine import GenerationSettings
from megatron_twotower.generate.prompt_file import BatchingSettings

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")

PREPARE = """
import json, sys
from pathlib import Path
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.data import prepare, repeats

repeats.DOCUMENTS_AT_ONCE = 300
address, settings = sys.argv[1], json.loads(sys.argv[2])
paths = {name: Path(settings.pop(name)) for name in ("tokenizer", "output")}
prepare.prepare(**settings, **paths, engine=EngineSettings("ray", address=address))
"""
SMALL = {"holdout_fraction": 0.2, "shard_tokens": 1500, "unit_bytes": 3000}
OTHER = {"provenance.json"}

GENERATION = GenerationSettings(max_new_tokens=12, block_size=4, temperature=1.0, seed=5)
BATCHING = BatchingSettings(batch_size=3, window_batches=4)
TEXTS = DistilSettings(sequences=60, prompt_tokens=8, new_tokens=12, batch_size=3)
WORDS = ("alpha", "beta", "gamma", "delta", "count")


@pytest.fixture(scope="module")
def nodes():
    with cluster(nodes=2) as found:
        yield found


def started(*words):
    """A function that starts a command in a process of its own, with a file for its errors."""
    return lambda said: subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=said)


def grows(folder, pattern):
    """A function that says whether files have changed since it was last asked."""
    seen = set()

    def begun():
        found = set()
        with contextlib.suppress(FileNotFoundError):  # what is finished is moved
            found = {(path.name, path.stat().st_size) for path in folder.glob(pattern)}
        new = found - seen
        seen.update(found)
        return bool(new)

    return begun


# --- preparing ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Text files, lines that are cut, one gzip that is not, and parquet; with repeated texts."""
    root = write_tree(tmp_path_factory.mktemp("mixed"), count=20)
    sizes = {"a.jsonl": 700, "b.jsonl.gz": 300, "c.parquet": 150}
    for number, (name, count) in enumerate(sizes.items()):
        write_records(root / "records" / name, texts(count, start=100 * number))
    return root


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    samples = [path.read_text() for path in sorted(source.glob("package*/*.py"))]
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", samples)


@pytest.fixture(scope="module")
def prepared(source, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "out"
    prepare([str(source)], tokenizer=tokenizer, output=output, **SMALL)
    return content(output, leave_out=OTHER)


def prepare_with_kills(nodes, source, tokenizer, output, *, seed, kinds, most):
    trouble = Trouble(*nodes, seed=seed)
    settings = {"inputs": [str(source)], "tokenizer": str(tokenizer), "output": str(output), **SMALL}
    start = started("-c", PREPARE, nodes[0].address, json.dumps(settings))
    trouble.finish(start, output, begun=grows(partial_path(output), "*/*.json"), kinds=kinds, most=most)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return trouble.kills


# --- generating ---


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [" ".join(WORDS[(number + i) % 5] for i in range(1 + (7 * number) % 11)) for number in range(90)]
    path.write_text("".join(json.dumps({"id": number, "prompt": line}) + "\n" for number, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def generated(two_tower_folder, prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("generated") / "out.jsonl"
    settings = {"mode": "mask_diffusion", "settings": GENERATION, "batching": BATCHING}
    prompt_file.run(two_tower_folder, prompts=prompts, output=output, **settings)
    return output.read_bytes()


def generate_with_kills(nodes, folder, prompts, output, *, seed, kinds, most):
    trouble = Trouble(*nodes, seed=seed)
    words = ["generate", "--model", folder, "--prompts", prompts, "--output", output, "--batch-size", "3"]
    words += ["--max-new-tokens", "12", "--block-size", "4", "--temperature", "1", "--seed", "5"]
    words += ["--engine", "ray", "--address", nodes[0].address, "--device", "cpu"]
    start = started("-c", GENERATE, *map(str, words))
    trouble.finish(start, output, begun=grows(output.parent, "*.partial"), kinds=kinds, most=most)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return trouble.kills


# The command, with a smaller window than its own.
GENERATE = """
import sys
from megatron_twotower.cli import main
from megatron_twotower.generate import prompt_file

class Batching(prompt_file.BatchingSettings):
    def __init__(self, batch_size: int = 16):
        super().__init__(batch_size, 4)

prompt_file.BatchingSettings = Batching
sys.exit(main.main(sys.argv[1:]))
"""


# --- tests ---


@pytest.mark.slow
def test_prepared_and_generated_on_two_nodes_with_a_worker_and_a_node_killed(
    nodes, source, tokenizer, prepared, two_tower_folder, prompts, generated, tmp_path
):
    """One test, because a cluster takes long to start."""
    output = tmp_path / "prepared" / "out"
    output.parent.mkdir()
    kills = prepare_with_kills(nodes, source, tokenizer, output, seed=1, kinds=("worker", "node"), most=2)
    assert content(output, leave_out=OTHER) == prepared and sum(kills.values())
    output = tmp_path / "generated" / "out.jsonl"
    output.parent.mkdir()
    kills = generate_with_kills(nodes, two_tower_folder, prompts, output, seed=1, kinds=("worker",), most=1)
    assert output.read_bytes() == generated and sum(kills.values())


@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(20))
def test_preparing_with_kills_at_random_moments(seed, nodes, source, tokenizer, prepared, tmp_path):
    kinds = ("worker", "worker", "node", "driver")
    kills = prepare_with_kills(nodes, source, tokenizer, tmp_path / "out", seed=seed, kinds=kinds, most=5)
    assert content(tmp_path / "out", leave_out=OTHER) == prepared
    print("kills", kills)


@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(10))
def test_generating_with_kills_at_random_moments(seed, nodes, two_tower_folder, prompts, generated, tmp_path):
    kinds = ("worker", "worker", "node", "driver")
    output = tmp_path / "out.jsonl"
    kills = generate_with_kills(nodes, two_tower_folder, prompts, output, seed=seed, kinds=kinds, most=4)
    assert output.read_bytes() == generated
    print("kills", kills)


@pytest.mark.cluster
def test_distilling_on_a_cluster(nodes, two_tower_folder, tiny_data, tmp_path):
    distil(two_tower_folder, tiny_data, tmp_path / "here", TEXTS)
    output = tmp_path / "there" / "out"
    words = ["distil", "--model", two_tower_folder, "--data", tiny_data, "--output", output, "--sequences", "60"]
    words += ["--prompt-tokens", "8", "--new-tokens", "12", "--batch-size", "3"]
    words += ["--engine", "ray", "--address", nodes[0].address]
    start = started("-m", "megatron_twotower", *map(str, words))
    begun = grows(output.parent, "*.partial/parts/*")
    Trouble(*nodes, seed=3).finish(start, output, begun=begun, kinds=("worker", "driver"), most=3)
    assert content(output, leave_out=OTHER) == content(tmp_path / "here", leave_out=OTHER)

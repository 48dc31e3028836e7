"""Preparing on a Ray of several nodes: the bytes of one process, whatever is killed when."""

import importlib.util
import json
import subprocess
import sys

import pytest

from helpers.corpora import content, make_tokenizer, texts, write_records, write_tree
from helpers.ray_nodes import Trouble, cluster
from megatron_twotower.data.prepare import prepare

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")

DRIVER = """
import json, sys
from pathlib import Path
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.data import prepare, repeats

repeats.DOCUMENTS_AT_ONCE = 300
settings = json.loads(sys.argv[1])
engine = EngineSettings("ray", address=settings.pop("address"))
paths = {name: Path(settings.pop(name)) for name in ("tokenizer", "output")}
prepare.prepare(**settings, **paths, engine=engine)
"""
SMALL = {"holdout_fraction": 0.2, "shard_tokens": 1500, "unit_bytes": 3000}
OTHER = {"provenance.json"}


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
def expected(source, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "out"
    prepare([str(source)], tokenizer=tokenizer, output=output, **SMALL)
    return content(output, leave_out=OTHER)


@pytest.fixture(scope="module")
def nodes():
    with cluster(nodes=2) as found:
        yield found


def driver(address, source, tokenizer, output):
    """Starts the command in a process of its own."""
    settings = {"inputs": [str(source)], "tokenizer": str(tokenizer), "output": str(output), **SMALL}
    words = [sys.executable, "-c", DRIVER, json.dumps(settings | {"address": address})]
    return lambda: subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def parts_begun(output):
    """Whether there are parts that were not there at the last call."""
    seen = set()

    def begun():
        found = {path.name for path in output.with_name("out.partial").glob("*/*.json")}
        new = found - seen
        seen.update(found)
        return bool(new)

    return begun


def kill_until_done(nodes, source, tokenizer, output, *, seed, kinds, most):
    trouble = Trouble(*nodes, seed=seed)
    start = driver(nodes[0].address, source, tokenizer, output)
    trouble.finish(start, begun=parts_begun(output), kinds=kinds, most=most)
    return trouble.kills


def test_a_killed_worker_and_a_killed_node_change_nothing(nodes, source, tokenizer, expected, tmp_path):
    kinds = ("worker", "node")
    kills = kill_until_done(nodes, source, tokenizer, tmp_path / "out", seed=1, kinds=kinds, most=2)
    assert content(tmp_path / "out", leave_out=OTHER) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sum(kills.values())


@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_moments_change_nothing(seed, nodes, source, tokenizer, expected, tmp_path):
    kinds = ("worker", "worker", "node", "driver")
    kills = kill_until_done(nodes, source, tokenizer, tmp_path / "out", seed=seed, kinds=kinds, most=5)
    assert content(tmp_path / "out", leave_out=OTHER) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    print("kills", kills)

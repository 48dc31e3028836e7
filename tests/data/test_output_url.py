"""Output at a URL: the bytes of a folder, whatever is killed when; and inputs there.

The stores are fsspec's: memory (one process), files, and, with moto and s3fs, an S3 here.
"""

import functools
import http.server
import importlib.util
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from helpers.corpora import content, texts, write_records, write_tree
from helpers.ray_nodes import set_up_own_ray
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import planned_shards, remote
from megatron_twotower.data import prepare as preparing
from megatron_twotower.data.documents import cut_units, find_documents, read_records, read_unit
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.shards import Corpus

SMALL = {"holdout_fraction": 0.2, "shard_tokens": 1500, "unit_bytes": 3000}
OTHER = {"provenance.json"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = write_tree(tmp_path_factory.mktemp("source"), count=20)
    for number, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.parquet")):
        write_records(root / "records" / name, texts(100, start=60 * number))
    return root


@pytest.fixture(scope="module")
def expected(source, small_tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "out"
    prepare([str(source)], tokenizer=small_tokenizer, output=output, **SMALL)
    return content(output, leave_out=OTHER)


@pytest.fixture
def memory():
    """The store in memory, empty."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def found_at(url):
    """Name to bytes of the files at a URL, but for those that name paths."""
    store, root = fsspec.core.url_to_fs(url)
    store.invalidate_cache()
    names = {path.removeprefix(root.rstrip("/")).lstrip("/"): path for path in store.find(root)}
    return {name: store.cat_file(path) for name, path in names.items() if name not in OTHER}


@pytest.fixture
def arguments(source, small_tokenizer, tmp_path):
    return {"inputs": [str(source)], "tokenizer": small_tokenizer, "workspace": tmp_path / "work", **SMALL}


def test_output_in_a_store_has_the_bytes_of_a_folder(arguments, expected, memory, tmp_path):
    prepare(**arguments, output="memory://bucket/data/")
    assert found_at("memory://bucket/data") == expected
    assert not list((tmp_path / "work").iterdir())
    assert Corpus.open("memory://bucket/data/train").total_tokens > 0
    with pytest.raises(UserError, match=r"memory://bucket/data: found \d+ files, expected none"):
        prepare(**arguments, output="memory://bucket/data")
    memory.pipe_file("/bucket/data/train/shard-99999.tar", b"of an earlier one")
    prepare(**arguments, output="memory://bucket/data", overwrite=True)
    assert found_at("memory://bucket/data") == expected
    memory.rm("/bucket/data/train/index.json")
    with pytest.raises(UserError, match=r"bucket/data: found no train/index.json in it, expected an earlier prepared"):
        prepare(**arguments, output="memory://bucket/data", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_a_copy_loses_nothing(overwrite, arguments, expected, memory, tmp_path, monkeypatch):
    """Killed before every sixth copy and after every sixth, of shards and of what follows them."""
    if overwrite:
        prepare(**arguments | {"shard_tokens": 700}, output="memory://bucket/data")
    copied, put = [], remote.put

    def killed(path, url):
        copied.append(url)
        if len(copied) % 6 == 0 and len(copied) < 100:
            raise KeyboardInterrupt
        put(path, url)
        if len(copied) % 6 == 3 and len(copied) < 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(remote, "put", killed)
    kills = 0
    while not (memory.exists("/bucket/data/train/index.json") and len(copied) >= 100):
        try:
            prepare(**arguments, output="memory://bucket/data", overwrite=overwrite)
        except KeyboardInterrupt:
            kills += 1
    assert kills == 33 and sum(url.endswith("summary.json") for url in copied) > 1
    assert found_at("memory://bucket/data") == expected
    assert not list((tmp_path / "work").iterdir())


def test_the_index_comes_last(arguments, memory, monkeypatch):
    order, put = [], remote.put
    monkeypatch.setattr(remote, "put", lambda path, url: (order.append(url), put(path, url)))
    prepare(**arguments, output="memory://bucket/data")
    assert order[-1] == "memory://bucket/data/train/index.json"


def test_output_of_workers_at_a_url_of_files(arguments, expected, tmp_path):
    url = f"file://{tmp_path}/far/data"
    prepare(**arguments, output=url, engine=EngineSettings(workers=2))
    assert found_at(url) == expected


def test_a_store_that_workers_do_not_share_is_found(arguments, memory):
    message = r"memory://bucket/data/\w+/shard-00000.tar: found no such file, expected \d+ bytes, which a worker has"
    with pytest.raises(UserError, match=message):
        prepare(**arguments, output="memory://bucket/data", engine=EngineSettings(workers=2))
    assert not memory.exists("/bucket/data/train/index.json")


def test_mistakes_are_one_line(arguments, memory, tmp_path):
    bare = {name: value for name, value in arguments.items() if name != "workspace"}
    cases = [
        (bare, "memory://bucket/data", "memory://bucket/data: found no workspace, expected a folder"),
        (arguments, str(tmp_path / "out"), "workspace: found .* with an output that is a path"),
        (arguments, "https://host/data", "https://host/data: found https, expected a store that can be written to"),
        (arguments, "nothing://host/data", "nothing://host/data: needs a package that is not installed"),
    ]
    for given, output, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            prepare(**given, output=output)
        assert "\n" not in str(caught.value)


def test_a_shard_that_cannot_be_copied_ends_the_run_and_is_written_later(
    arguments, expected, memory, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0)
    with monkeypatch.context() as broken:
        broken.setattr(memory, "put_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(
            UserError, match=r"memory://bucket/data/\w+/shard-00000.tar: cannot be written in 3 attempts"
        ):
            prepare(**arguments, output="memory://bucket/data")
    begun = []
    monkeypatch.setattr(preparing, "write_part", lambda task: begun.append(task))
    prepare(**arguments, output="memory://bucket/data")
    assert found_at("memory://bucket/data") == expected and not begun


def test_another_output_is_not_resumed(arguments, memory, monkeypatch):
    """Shards that are at one URL would be missing at the other."""
    write = planned_shards.write_planned_shard

    def second(task):
        if task.shard.number:
            raise KeyboardInterrupt
        return write(task)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_planned_shard", second)
        with pytest.raises(KeyboardInterrupt):
            prepare(**arguments, output="memory://bucket/data")
    with pytest.raises(UserError, match="an interrupted run with output memory://bucket/data, expected memory://other"):
        prepare(**arguments, output="memory://other/data")
    memory.pipe_file("/other/data/letters.txt", b"of somebody")
    with pytest.raises(UserError, match=r"memory://other/data: found no train/index.json in it"):
        prepare(**arguments, output="memory://other/data", overwrite=True)
    assert memory.exists("/other/data/letters.txt")


# --- an S3 of this machine ---

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def s3():
    """The address of an S3; with it in the environment, this process and its workers use it."""
    for name in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install 'moto[server,s3]' s3fs): no S3 is tried")
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**keys, "AWS_ENDPOINT_URL": url}.items():
                patch.setenv(name, value)
            fsspec.filesystem("s3").mkdir("bucket")
            yield url
        server.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_inputs_and_output_in_an_s3(engine, s3, arguments, source, expected, tmp_path, monkeypatch):
    """By the command, and by workers in processes of their own."""
    store = fsspec.filesystem("s3")
    store.put(f"{source}/", f"bucket/{engine}/texts/", recursive=True)
    texts_at, url = f"s3://bucket/{engine}/texts", f"s3://bucket/{engine}/data"
    if engine == "ray":
        if importlib.util.find_spec("ray") is None:
            pytest.skip("needs ray")
        set_up_own_ray(monkeypatch)
        prepare(**arguments | {"inputs": [texts_at]}, output=url, engine=EngineSettings("ray", workers=2))
    else:
        whole = SMALL | {"unit_bytes": 8 << 20}
        prepare([str(source)], tokenizer=arguments["tokenizer"], output=tmp_path / "whole", **whole)
        words = ["--input", texts_at, "--tokenizer", arguments["tokenizer"], "--output", url, "--workers", "2"]
        words += ["--workspace", arguments["workspace"], "--holdout", "0.2", "--shard-tokens", "1500"]
        command = [sys.executable, "-m", "megatron_twotower", "data", "prepare", *map(str, words)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        expected = content(tmp_path / "whole", leave_out=OTHER)
    assert found_at(url) == expected
    record = json.loads(store.cat_file(f"bucket/{engine}/data/provenance.json"))["record_files"]
    assert sorted(name.rpartition("/")[2] for name in record) == ["a.jsonl", "b.jsonl.gz", "c.parquet"]
    with pytest.raises(UserError, match=f"{url}: found .* files, expected none"):
        prepare(**arguments, output=url)


def test_errors_of_a_store_are_one_line(arguments, source, memory, tmp_path, monkeypatch):
    class Refused(Exception):
        """As botocore's and aiohttp's, which are no OSError."""

    def refuse(*_, **__):
        raise Refused("token\nhas expired")

    memory.put(f"{source}/", "/bucket/texts/", recursive=True)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "isdir", refuse)
        with pytest.raises(UserError, match=r"memory://bucket/texts: cannot be read \(token has expired\)$"):
            prepare(**arguments | {"inputs": ["memory://bucket/texts"]}, output="memory://bucket/data")
    assert not (tmp_path / "work").exists()
    found = find_documents(["memory://bucket/texts"])
    units = cut_units(found, holdout_fraction=0.0, text_field="text", unit_bytes=1 << 20)
    monkeypatch.setattr(memory, "_open", refuse)
    for unit in units:
        message = rf"{unit.files[0].path}: cannot be read \(token has expired\)$"
        with pytest.raises(UserError, match=message):
            list(read_unit(unit, text_field="text", advance=lambda _: None))
        with pytest.raises(UserError, match=message):
            list(read_records(unit, fields=("text",), advance=lambda _: None))


# --- files of a web server ---


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Gives parts of files, as servers of data do."""

    def do_HEAD(self):
        self._answer(with_content=False)

    def do_GET(self):
        self._answer(with_content=True)

    def _answer(self, *, with_content):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(found[1]), int(found[2] or len(data) - 1) + 1) if found else (0, len(data))
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data[begin:end])))
        self.end_headers()
        if with_content:
            self.wfile.write(data[begin:end])

    def log_message(self, *_):
        pass


def test_files_of_a_web_server_are_read_by_workers(source, small_tokenizer, tmp_path):
    pytest.importorskip("aiohttp")
    files = [source / "records" / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    prepare(list(map(str, files)), tokenizer=small_tokenizer, output=tmp_path / "local", **SMALL)
    handler = functools.partial(Ranges, directory=str(source))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/records/{path.name}" for path in files]
        prepare(urls, tokenizer=small_tokenizer, output=tmp_path / "far", engine=EngineSettings(workers=2), **SMALL)
        server.shutdown()
    assert content(tmp_path / "far", leave_out=OTHER) == content(tmp_path / "local", leave_out=OTHER)

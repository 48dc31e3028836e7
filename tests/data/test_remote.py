"""Shards at URLs: fetched once, checked, kept in a bounded cache; what cannot be read is named."""

import http.server
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from helpers.corpora import make_tokenizer, texts, write_records
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import remote, shards
from megatron_twotower.data.blend import split_folder
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.shards import Corpus, checksum


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    tokenizer = make_tokenizer(folder / "tokenizer", texts())
    write_records(folder / "a.jsonl", texts(300))
    prepare([str(folder / "a.jsonl")], tokenizer=tokenizer, output=folder / "out", shard_tokens=2000)
    return folder / "out"


@pytest.fixture
def served(prepared, monkeypatch):
    """A web server on `prepared`: its URL, the requested paths, and its handler.

    The handler answers 503 to the next `jammed` requests.
    """
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        jammed = 0

        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(prepared))

        def do_GET(self):
            asked.append(self.path)
            if "cut-off" in self.path:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nnot all of it")
            elif Handler.jammed > 0:
                Handler.jammed -= 1
                self.send_error(503, "jammed")
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.001)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked, Handler
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The cache folder of every test."""
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def copies(cache):
    return [path for path in (cache / "shards").rglob("*") if path.is_file() and not path.suffix]


def test_urls_are_told_from_paths_and_joined():
    for url in ("http://host/x", "pipe:cat x", "s3://bucket/x", "gs://b", "hf://x"):
        assert remote.is_url(url)
    for path in ("/data/x", "data", "./a:b", "c:data"):
        assert not remote.is_url(path)
    assert remote.join("http://host/train", "index.json") == "http://host/train/index.json"
    assert remote.join("http://host/train/", "index.json") == "http://host/train/index.json"
    assert remote.join("pipe:cat /data/{file}", "a.tar") == "pipe:cat /data/a.tar"
    assert remote.join("http://host/{file}?key=1", "a.tar") == "http://host/a.tar?key=1"
    assert remote.join("http://host/train", "http://other/a.tar") == "http://other/a.tar"


@pytest.mark.parametrize("kind", ["http", "pipe", "file"])
def test_a_remote_corpus_reads_as_the_local_one(kind, prepared, served, cache):
    urls = {"http": served[0], "pipe": f"pipe:cat '{prepared}/{{file}}'", "file": f"file://{prepared}"}
    url = split_folder(urls[kind], "train")
    local, far = Corpus.open(prepared / "train"), Corpus.open(url)
    assert not (cache / "shards").exists()  # nothing but the index so far
    assert len(far.shards) > 3
    assert (far.tokens(0, far.total_tokens) == local.tokens(0, local.total_tokens)).all()
    assert far.folder == url and far.starts.tolist() == local.starts.tolist()
    assert [far.check_shard(number) for number in range(len(far.shards))] == [None] * len(far.shards)
    if kind == "http":
        assert served[1] == [
            f"/train/{name}"
            for name in ("index.json", "starts.npy", "offsets.npy", *(shard.file for shard in local.shards))
        ]
        Corpus.open(url).tokens(0, 100)
        assert served[1][len(local.shards) + 3 :] == ["/train/index.json"]  # the rest is in the cache


def test_shards_of_a_local_index_may_be_at_urls(prepared, served, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("starts.npy", "offsets.npy"):
        (folder / name).write_bytes((prepared / "train" / name).read_bytes())
    index = (prepared / "train" / "index.json").read_text()
    (folder / "index.json").write_text(index.replace('"file":"', f'"file":"{served[0]}/train/'))
    local, far = Corpus.open(prepared / "train"), Corpus.open(folder)
    assert (far.tokens(0, far.total_tokens) == local.tokens(0, local.total_tokens)).all()


def test_the_cache_is_bounded_and_what_was_dropped_is_fetched_again(prepared, served, monkeypatch, cache):
    monkeypatch.setattr(shards, "CACHED_SHARDS", 2)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    corpus = Corpus.open(f"{served[0]}/train")
    expected = Corpus.open(prepared / "train")
    for _ in range(2):
        for number in range(len(corpus.shards)):
            start = int(corpus.first_tokens[number])
            assert (corpus.tokens(start, 50) == expected.tokens(start, 50)).all()
            assert len(copies(cache)) <= 2
    assert len(served[1]) == 3 + 2 * len(corpus.shards)


def test_a_failed_request_is_repeated(served):
    url, asked, handler = served
    handler.jammed = remote.ATTEMPTS - 1
    assert Corpus.open(f"{url}/train").total_tokens > 0
    assert asked.count("/train/index.json") == remote.ATTEMPTS


def test_a_url_that_cannot_be_read_is_named_in_one_line(served, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.001)
    url, asked, _ = served
    for bad, reason in (
        (f"{url}/nowhere", "HTTP Error 404"),
        ("http://127.0.0.1:1/train", "refused"),
        ("pipe:cat /no/such/{file}", ""),
        ("pipe:echo half of it; exit 3 #{file}", ""),
        ("nosuch://host/train", ""),
        (f"{url}/with space", "control characters"),
        (f"{url}/cut-off", "IncompleteRead"),
    ):
        with pytest.raises(UserError, match="cannot be read in 3 attempts") as caught:
            Corpus.open(bad)
        message = str(caught.value)
        assert message.startswith(remote.join(bad, "index.json")) and reason in message and "\n" not in message
    assert asked.count("/nowhere/index.json") == remote.ATTEMPTS
    with pytest.raises(UserError, match="not a valid index"):
        Corpus.open("pipe:echo {{ #{file}")


def test_a_missing_package_is_named_in_one_line_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(remote.time, "sleep", None)  # no second attempt
    with pytest.raises(UserError, match=r"^s3://bucket/train/index\.json: s3 needs a package .*\bs3fs\b") as caught:
        Corpus.open("s3://bucket/train")
    assert "\n" not in str(caught.value)


def test_any_file_system_of_fsspec_can_be_read(prepared):
    memory = fsspec.filesystem("memory")
    try:
        memory.put(f"{prepared}/train", "/bucket/train", recursive=True)
        local, far = Corpus.open(prepared / "train"), Corpus.open("memory://bucket/train")
        assert (far.tokens(0, far.total_tokens) == local.tokens(0, local.total_tokens)).all()
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_remote_shard_that_is_damaged_or_missing_is_named(prepared, served, cache):
    url = f"{served[0]}/train"
    corpus = Corpus.open(url)
    shard = prepared / "train" / corpus.shards[1].file
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-100] + b"x" * 100)
        start = int(corpus.first_tokens[1])
        with pytest.raises(UserError, match=rf"{url}/shard-00001\.tar: cannot be read in 3 attempts \(found sha256"):
            corpus.tokens(start, 1)
        assert "found sha256" in corpus.check_shard(1)
        shard.unlink()
        assert "HTTP Error 404" in Corpus.open(url).check_shard(1)
        assert corpus.check_shard(0) is None
    finally:
        shard.write_bytes(whole)
    assert not list((cache / "shards").rglob("*.partial"))


def test_a_copy_in_the_cache_is_named_by_its_checksum(tmp_path, cache):
    (tmp_path / "file").write_bytes(b"some bytes")
    sha256 = checksum(tmp_path / "file")
    path = remote.fetch(f"pipe:cat {tmp_path}/file", sha256=sha256, folder=cache)
    assert path.name == sha256 and path.read_bytes() == b"some bytes"
    os.utime(path, (0, 0))
    again = remote.fetch("pipe:false", sha256=sha256, folder=cache)  # not asked
    assert again == path and path.stat().st_mtime > 0


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("TWOTOWER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remote.cache_folder() == tmp_path / "megatron_twotower"
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "mine"))
    assert remote.cache_folder() == tmp_path / "mine"


def test_a_copy_that_several_threads_want_is_fetched_once(tmp_path, cache):
    """By threads here; the lock is one of files, which processes share too."""
    (tmp_path / "file").write_bytes(b"some bytes")
    url, sha256 = f"pipe:echo asked >> {tmp_path}/asked; sleep 0.2; cat {tmp_path}/file", checksum(tmp_path / "file")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: remote.fetch(url, sha256=sha256, folder=cache), range(8)))
    assert {path.read_bytes() for path in found} == {b"some bytes"}
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_different_shards_are_fetched_at_the_same_time(prepared, tmp_path, monkeypatch):
    """By the threads that read ahead: the network would not be used otherwise."""
    both, fetch = threading.Barrier(2, timeout=20), remote.fetch

    def waiting(url, **arguments):
        if url.endswith(".tar"):
            both.wait()
        return fetch(url, **arguments)

    monkeypatch.setattr(remote, "fetch", waiting)
    for verify in (False, True):
        monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / str(verify)))
        corpus = Corpus.open(f"file:{prepared}/train", verify_shards=verify)
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(corpus.tokens, corpus.first_tokens[:2].tolist(), (5, 5))
            assert [len(tokens) for tokens in found] == [5, 5]


def test_a_copy_that_another_process_removed_is_fetched_again(prepared, monkeypatch):
    fetch, gone = remote.fetch, []

    def removed_at_once(url, **arguments):
        path = fetch(url, **arguments)
        if url.endswith(".tar") and not gone:
            gone.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(remote, "fetch", removed_at_once)
    assert len(Corpus.open(f"file:{prepared}/train").tokens(0, 9)) == 9 and gone
    assert remote._mark_used(gone[0])
    gone[0].unlink()
    assert not remote._mark_used(gone[0]) and not gone[0].exists(), "no empty file in its place"


def test_trimming_keeps_the_newest(tmp_path):
    for number in range(5):
        (tmp_path / str(number)).write_bytes(b"")
        os.utime(tmp_path / str(number), (number, number))
    for name in ("old.partial", "new.partial", "00.lock"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / "old.partial", (0, 0))
    mapped = np.memmap(tmp_path / "map", dtype=np.uint8, mode="w+", shape=(10,))
    os.utime(tmp_path / "map", (-1, -1))
    remote.trim(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.lock", "3", "4", "new.partial"]
    assert mapped.sum() == 0  # a map of a removed file stays good

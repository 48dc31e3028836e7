"""The safetensors format, against the library that defines it."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_twotower.common.errors import UserError
from megatron_twotower.convert import tensors as module
from megatron_twotower.convert.tensors import LazyTensor, read_header, stack, write_safetensors


def held(tensor):
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: iter((tensor.flatten(),)))


@pytest.fixture
def some():
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 3, 4)}
    wide = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {
        **wide,
        "d": wide["b"].bfloat16(),
        "e": wide["a"].half(),
        "f": wide["c"].double(),
        "g": torch.tensor(2.5),
        "h": torch.arange(5),
        "i": torch.zeros(0, 4),
        "j": wide["b"] > 0,
    }


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path, some):
    write_safetensors(tmp_path / "ours", {name: held(tensor) for name, tensor in some.items()})
    theirs = load_file(tmp_path / "ours")
    save_file(some, tmp_path / "theirs", metadata={"format": "pt"})
    spans = read_header(tmp_path / "theirs")
    assert theirs.keys() == spans.keys() == some.keys()
    for name, tensor in some.items():
        assert theirs[name].dtype == spans[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor) and torch.equal(spans[name].read(), tensor), name
        assert torch.equal(spans[name].lazy().read(), tensor), name


def test_every_tensor_is_aligned(tmp_path, some):
    write_safetensors(tmp_path / "ours", {name: held(some[name]) for name in sorted(some, reverse=True)})
    for name, span in read_header(tmp_path / "ours").items():
        assert span.offset % span.dtype.itemsize == 0, name


def test_a_large_tensor_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 64)
    whole = torch.randn(10, 33)
    save_file({"x": whole}, tmp_path / "file")
    lazy = read_header(tmp_path / "file")["x"].lazy()
    for made in (lazy, lazy.to(torch.bfloat16), stack([lazy, lazy]).to(torch.float16)):
        pieces = list(made.pieces())
        assert max(piece.nbytes for piece in pieces) <= 64 and {piece.dtype for piece in pieces} == {made.dtype}
    assert torch.equal(lazy.to(torch.bfloat16).read(), whole.bfloat16())
    assert torch.equal(stack([lazy, lazy]).read(), torch.stack([whole, whole]))


def test_rows_are_read_alone(tmp_path):
    whole = torch.randn(4, 3, 2)
    save_file({"x": whole}, tmp_path / "file")
    span = read_header(tmp_path / "file")["x"]
    for number in range(4):
        assert torch.equal(span.row(number).read(), whole[number])


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"\xff" * 40, "too short"),
        (header(b"{not json}"), "property name"),
        (header(json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()), "header counts"),
        (
            header(json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()) + b"8" * 8,
            "agree",
        ),
        (
            header(json.dumps({"x": {"dtype": "F4", "shape": [3], "data_offsets": [0, 12]}}).encode()),
            "unknown dtype F4",
        ),
        (header(b'{"x": {}}'), "data_offsets"),
        (header(b"[]"), ""),
    ],
)
def test_a_file_that_is_not_whole_is_one_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=f"file: not a whole safetensors file .*{message}"):
        read_header(tmp_path / "file")


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    save_file({"x": torch.zeros(100)}, tmp_path / "file")
    span = read_header(tmp_path / "file")["x"]
    with open(tmp_path / "file", "rb+") as file:
        file.truncate(span.offset + 40)
    with pytest.raises(UserError, match="ended while it was read"):
        span.read()

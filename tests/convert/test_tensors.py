"""The safetensors format, against the library that defines it."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_twotower.common.errors import UserError
from megatron_twotower.convert import tensors as module
from megatron_twotower.convert.tensors import LazyTensor, file_tensors, stack, write_safetensors


def write(path, tensors):
    lazy = {name: LazyTensor(t.dtype, tuple(t.shape), lambda t=t: iter((t.flatten(),))) for name, t in tensors.items()}
    sizes = []
    write_safetensors(path, lazy, on_bytes=sizes.append)
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())


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
    write(tmp_path / "ours", some)
    theirs = load_file(tmp_path / "ours")
    save_file(some, tmp_path / "theirs", metadata={"format": "pt"})
    found = file_tensors(tmp_path / "theirs")
    assert theirs.keys() == found.keys() == some.keys()
    for name, tensor in some.items():
        assert theirs[name].dtype == found[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor) and torch.equal(found[name].read(), tensor), name
        assert torch.equal(found[name].lazy().read(), tensor), name


def test_every_tensor_is_aligned(tmp_path, some):
    write(tmp_path / "ours", {name: some[name] for name in sorted(some, reverse=True)})
    content = (tmp_path / "ours").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, tensor in some.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0, name


def test_pieces_of_a_large_tensor_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 64)
    values = torch.randn(10, 33)
    save_file({"x": values}, tmp_path / "file")
    lazy = file_tensors(tmp_path / "file")["x"].lazy()
    for made in (lazy, lazy.to(torch.bfloat16), stack([lazy, lazy]).to(torch.float16)):
        pieces = list(made.pieces())
        assert max(piece.nbytes for piece in pieces) <= 64 and {piece.dtype for piece in pieces} == {made.dtype}
    assert torch.equal(lazy.to(torch.bfloat16).read(), values.bfloat16())
    assert torch.equal(stack([lazy, lazy]).read(), torch.stack([values, values]))


def test_a_row_is_read_alone(tmp_path):
    values = torch.randn(4, 3, 2)
    save_file({"x": values}, tmp_path / "file")
    tensor = file_tensors(tmp_path / "file")["x"]
    for row in range(4):
        assert torch.equal(tensor.at(row).read(), values[row])
        assert torch.equal(tensor.at(row).lazy().read(), values[row])


def test_a_change_of_a_tensor_does_not_change_the_file(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    file_tensors(tmp_path / "file")["x"].read().fill_(1.0)
    assert (tmp_path / "file").read_bytes() == before


def header(*tensors, data=b""):
    """A file of tensors (dtype, shape, begin, end)."""
    items = {f"x{i}": {"dtype": d, "shape": s, "data_offsets": [a, b]} for i, (d, s, a, b) in enumerate(tensors)}
    return sized(json.dumps(items).encode()) + data


def sized(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too small"),
        (b"\xff" * 40, "too large"),
        (sized(b"{not json}"), "invalid JSON"),
        (header(("F32", [3], 0, 12)), "not fully covered"),
        (header(("F32", [3], 0, 12), data=b"8" * 7), "not fully covered"),
        (header(("F32", [3], 0, 12), data=b"8" * 13), "not fully covered"),
        (header(("F32", [3], 0, 8), data=b"8" * 8), "invalid shape"),
        (header(("F32", [3], 0, 12), ("F32", [3], 4, 16), data=b"8" * 16), "invalid offset for tensor `x1`"),
        (header(("F4", [24], 0, 12), data=b"8" * 12), "x0 has the unknown dtype F4"),
        (header(("Q9", [3], 0, 12), data=b"8" * 12), "unknown variant `Q9`"),
        (sized(b'{"x": {}}'), "missing field"),
        (sized(b"[]"), ""),
    ],
)
def test_a_file_that_is_not_complete_is_one_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=f"file: not a complete safetensors file .*{message}") as raised:
        file_tensors(tmp_path / "file")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_truncated_or_removed_before_it_is_read_is_one_line(tmp_path):
    save_file({"x": torch.zeros(100)}, tmp_path / "file")
    tensor = file_tensors(tmp_path / "file")["x"]
    os.truncate(tmp_path / "file", 200)
    with pytest.raises(UserError, match=r"file: not a complete safetensors file .*not fully covered"):
        tensor.read()
    (tmp_path / "file").unlink()
    with pytest.raises(UserError, match=r"file: not a complete safetensors file .*No such file"):
        tensor.read()

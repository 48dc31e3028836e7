"""`convert export --tokenizer`: a model that keeps some of its entries."""

import json
import shutil

import pytest
import torch

from helpers.hf_folders import write
from megatron_twotower.cli import main
from megatron_twotower.data.tokenizer import SMALLEST_VOCABULARY, load_tokenizer, train_tokenizer
from megatron_twotower.generate import engine


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    train_tokenizer(["any text"], vocab_size=SMALLEST_VOCABULARY, output=folder)
    return folder


@pytest.fixture(scope="module")
def turned_tokenizer(byte_tokenizer, tmp_path_factory):
    """The bytes with their ids in the other direction, the special tokens included."""
    folder = shutil.copytree(byte_tokenizer, tmp_path_factory.mktemp("turned") / "tokenizer")
    found = json.loads((folder / "tokenizer.json").read_text())
    last = SMALLEST_VOCABULARY - 1
    found["model"]["vocab"] = {spelling: last - number for spelling, number in found["model"]["vocab"].items()}
    for token in found["added_tokens"]:
        token["id"] = last - token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    return folder


def export(source, target, *words):
    return main.main(["convert", "export", "--from", str(source), "--to", str(target), *map(str, words)])


@pytest.mark.parametrize("kind", ["byte_tokenizer", "turned_tokenizer"])
def test_both_towers_are_the_same_functions_of_the_entries_that_they_keep(kind, two_tower_folder, tmp_path, request):
    tokenizer = request.getfixturevalue(kind)
    assert export(two_tower_folder, tmp_path / "new", "--tokenizer", tokenizer) == 0
    (old, old_tokenizer), (new, new_tokenizer) = engine.load(two_tower_folder), engine.load(tmp_path / "new")
    own, vocabulary = old_tokenizer.get_vocab(), new_tokenizer.get_vocab()
    assert vocabulary == load_tokenizer(tokenizer).get_vocab() and new.config.vocab_size == SMALLEST_VOCABULARY
    old_id = torch.tensor([own[spelling] for spelling, _ in sorted(vocabulary.items(), key=lambda item: item[1])])
    ids = torch.tensor([new_tokenizer.encode("def f(x):\n    return x")])
    torch.testing.assert_close(new(ids).logits, old(old_id[ids]).logits[..., old_id], rtol=1e-4, atol=1e-5)
    blocks = []
    for model, prompt, mask in ((new, ids, new.mask_token_id), (old, old_id[ids], old.mask_token_id)):
        block = torch.full((1, 4), mask)
        blocks.append(model.denoise_block(block, torch.tensor([1.0]), model.prefill(prompt, for_denoiser=True)))
    torch.testing.assert_close(blocks[0], blocks[1][..., old_id], rtol=1e-4, atol=1e-5)
    assert old_id[new.mask_token_id] == old.mask_token_id
    assert old_id[list(new.eos_token_ids)].tolist() == list(old.eos_token_ids)


def test_a_plain_backbone_of_either_style(tiny_backbone, tiny_data, byte_tokenizer, tmp_path):
    backbone = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    for path in (tiny_data / "tokenizer").iterdir():
        shutil.copy(path, backbone)
    rows = {}
    for style in ("hub", "transformers"):
        assert export(backbone, tmp_path / style, "--tokenizer", byte_tokenizer, "--style", style) == 0
        config = json.loads((tmp_path / style / "config.json").read_text())
        assert config["vocab_size"] == SMALLEST_VOCABULARY
        assert (
            main.main(["convert", "import", "--from", str(tmp_path / style), "--to", str(tmp_path / f"{style}-run")])
            == 0
        )
        rows[style] = (tmp_path / style / "tokenizer.json").read_bytes()
    assert rows["hub"] == rows["transformers"] == (byte_tokenizer / "tokenizer.json").read_bytes()


def test_what_cannot_be_kept_is_refused(two_tower_folder, byte_tokenizer, tmp_path, capsys):
    def refused(source, tokenizer, *words):
        capsys.readouterr()
        assert export(source, tmp_path / "out", "--tokenizer", tokenizer, *words) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    more = shutil.copytree(byte_tokenizer, tmp_path / "more")
    found = json.loads((more / "tokenizer.json").read_text())
    changes = {
        "found 1 entries that": found["model"]["vocab"] | {"zzz": 260},
        "found 259 entries, expected 260, one of each id": {
            spelling: number for spelling, number in found["model"]["vocab"].items() if number != 259
        }
        | {"!": 259},
    }
    for message, entries in changes.items():
        (more / "tokenizer.json").write_text(json.dumps(found | {"model": found["model"] | {"vocab": entries}}))
        assert message in refused(two_tower_folder, more)
    assert "to export a denoiser alone" in refused(two_tower_folder, byte_tokenizer, "--what", "denoiser")
    assert "found no tokenizer, expected one for" in refused(write(tmp_path / "hub", "hub"), byte_tokenizer)
    folder = shutil.copytree(two_tower_folder, tmp_path / "other-eos")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300]}))
    assert "eos_token_id: found 300, which has no entry" in refused(folder, byte_tokenizer)

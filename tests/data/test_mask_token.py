"""A mask token that clean text can hold is refused, with the ids that can be used."""

import dataclasses
import json
import logging
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.runs import settings, train
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.data import mask_token, sources
from megatron_twotower.data.mask_token import can_stand_in_text, unused_id
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.tokenizer import load_tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(folder, *, plain=(), special=(), names=None, vocab=None):
    """A byte-level BPE tokenizer whose ids 0 to 255 are bytes, 256 a merge, 257 no merge gives."""
    a, b = BYTES[:2]
    entries = {piece: i for i, piece in enumerate([*BYTES, a + b, "unreached"])} | (vocab or {})
    tokenizer = Tokenizer(models.BPE(entries, [(a, b)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens(list(plain))
    tokenizer.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names or {})).save_pretrained(folder)
    return folder


def test_what_of_byte_level_bpe_can_stand_in_text(tmp_path):
    special = ["<|end|>", "<|mask|>"]
    opened = load_tokenizer(byte_level(tmp_path, plain=["<think>"], special=special, names={"eos_token": "<|end|>"}))
    ids = {name: opened.convert_tokens_to_ids(name) for name in (*special, "<think>", "unreached")}
    assert ids == {"<think>": 258, "<|end|>": 259, "<|mask|>": 260, "unreached": 257}
    in_text = {token: can_stand_in_text(opened, token) for token in (0, 255, 256, 257, 258, 259, 260, 261)}
    assert in_text == {0: True, 255: True, 256: True, 257: False, 258: True, 259: False, 260: False, 261: False}
    assert unused_id(opened, 300) == 261
    assert unused_id(opened, 261) == 260, "a special token that nothing names"
    assert unused_id(opened, 261, taken=[260]) is None


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"<unk>": 0, "word": 1, "<mask>": 2}, unk_token="<unk>"),
        models.WordPiece({"<unk>": 0, "word": 1, "<mask>": 2}, unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("word", -1.0), ("<mask>", -2.0)], unk_id=0),
    ],
    ids=["word level", "word piece", "unigram"],
)
def test_what_of_other_models_can_stand_in_text(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken("<end>"), AddedToken("<unk>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    opened = load_tokenizer(tmp_path)
    found = [can_stand_in_text(opened, token) for token in (0, 1, 2, 3, 4)]
    assert found == [True, True, True, False, False], "what is unknown, entries, and no special token"


# --- commands ---


def own_prepared(folder, **tokenizer):
    """A prepared folder of text with many zeros (`0`), and the ids of a tokenizer of this file."""
    folder.mkdir()
    (folder / "texts").mkdir()
    for number in range(8):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} costs 100 to 200000 of 3000.\n" * 40)
    byte_level(folder / "tokenizer", **tokenizer)
    prepare([str(folder / "texts")], tokenizer=folder / "tokenizer", output=folder / "data", holdout_fraction=0.3)
    return folder / "data"


END = {"special": ["<|end|>"], "names": {"eos_token": "<|end|>"}}
ZERO = BYTES.index("0")


def run_of(tmp_path, data, backbone, *extra):
    return load_recipe("tiny", settings(data, tmp_path / "run", backbone, *extra))


def write_generation(backbone, tmp_path, **fields):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps(fields))
    return copy


def test_a_run_refuses_an_ordinary_token_and_says_the_way_out(tmp_path, tiny_backbone):
    data = own_prepared(tmp_path / "own", **END)
    backbone = write_generation(tiny_backbone, tmp_path, eos_token_id=[2, 258])
    with pytest.raises(
        UserError, match=r"noise.mask_token_id: found 15, which is '0' of .*tokenizer and stands in text"
    ):
        train("tiny", *settings(data, tmp_path / "run", backbone, f"noise.mask_token_id={ZERO}"))
    with pytest.raises(
        UserError, match=r"found 3, which is .* expected an id that no clean text has: 259 is unused, or"
    ):
        train("tiny", *settings(data, tmp_path / "run", backbone))
    with pytest.raises(UserError, match=r"found 258, which is '<\|end\|>' .* and ends documents"):
        mask_token.check_run(run_of(tmp_path, data, backbone, "noise.mask_token_id=258"))
    assert not (tmp_path / "run").exists()
    mask_token.check_run(run_of(tmp_path, data, backbone, "noise.mask_token_id=259"))


def test_a_run_that_has_begun_goes_on_with_a_warning(tmp_path, tiny_data, tiny_backbone, monkeypatch, caplog):
    short = ["train.validate_every_steps=0", "schedule.warmup_steps=0"]
    run = settings(tiny_data, tmp_path / "run", tiny_backbone, *short)
    assert train("tiny", *run, "train.steps=1")
    monkeypatch.setattr(mask_token, "can_stand_in_text", lambda *_: True)
    with caplog.at_level(logging.WARNING):
        assert train("tiny", *run, "train.steps=2")
    assert "the run continues as it began, although: noise.mask_token_id: found 3" in caplog.text
    with pytest.raises(UserError, match=r"noise.mask_token_id: found 3"):
        train("tiny", *run, "train.steps=2", f"output={tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("said", "setting", "message"),
    [
        ({"mask_token_id": 450}, [], "found 450, but the mask token of .*tokenizer is 3, expected the same"),
        ({}, ["noise.mask_token_id=450"], "found 450, but the mask token of .*tokenizer is 3"),
        ({"mask_token_id": 450}, ["noise.mask_token_id=3"], "found 3, but the mask token of .*copy is 450"),
        ({"eos_token_id": [7, 8]}, [], r"copy: found eos_token_id 7, 8, but documents of .* end with 2, expected it"),
    ],
)
def test_a_run_refuses_what_disagrees(tmp_path, tiny_data, tiny_backbone, said, setting, message):
    backbone = write_generation(tiny_backbone, tmp_path, **said)
    with pytest.raises(UserError, match=message) as raised:
        mask_token.check_run(run_of(tmp_path, tiny_data, backbone, *setting))
    assert "\n" not in str(raised.value)


def test_data_that_holds_the_mask_token_is_refused(tmp_path, tiny_data, tiny_backbone):
    config = run_of(tmp_path, tiny_data, tiny_backbone)
    source = sources.open_training(config)
    mask_token.check_corpora(config, source)
    held = int(source.corpus.tokens(0, 1)[0])
    for token, message in ((held, f"found the mask token, {held}, in clean text"), (2, "found EOS 2 at every")):
        with pytest.raises(UserError, match=message):
            noise = dataclasses.replace(config.noise, mask_token_id=token)
            mask_token.check_corpora(dataclasses.replace(config, noise=noise), source)


def test_preparing_refuses_a_named_mask_token_that_text_spells(tmp_path):
    names = END["names"] | {"mask_token": "<think>"}
    data = own_prepared(tmp_path / "good", special=["<|end|>", "<think>"], names=names)
    assert data.is_dir()
    (tmp_path / "good" / "tokenizer" / "generation_config.json").write_text(json.dumps({"mask_token_id": 259}))
    texts, tokenizer = str(tmp_path / "good" / "texts"), byte_level(tmp_path / "bad", **END)
    (tokenizer / "generation_config.json").write_text(json.dumps({"mask_token_id": ZERO}))
    with pytest.raises(UserError, match=r"mask_token_id: found 15, which is '0' of .*bad and stands in text"):
        prepare([texts], tokenizer=tokenizer, output=tmp_path / "out")
    spelled = byte_level(tmp_path / "spelled", plain=["<think>"], **END)
    (spelled / "generation_config.json").write_text(json.dumps({"mask_token_id": 258}))
    with pytest.raises(
        UserError, match=r"found 258, which is '<think>' of .*spelled and stands in text, expected an id"
    ):
        prepare([texts], tokenizer=spelled, output=tmp_path / "out")
    (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    with pytest.raises(UserError, match=r"found eos_token_id 7, but the EOS of tokenizer_config.json has id 258"):
        prepare([texts], tokenizer=tokenizer, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()

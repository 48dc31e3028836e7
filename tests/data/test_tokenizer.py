"""Tokenizers: trained here, opened anywhere, exact on any text."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_twotower.common.errors import UserError
from megatron_twotower.data.tokenizer import (
    SMALLEST_VOCABULARY,
    accepted_fingerprints,
    load_tokenizer,
    rebuilt_class,
    text_encoder,
    tokenizer_fingerprint,
    train_tokenizer,
)

SOURCE = '''\
class Counter:
    """Counts what it is given."""

    def __init__(self, start_value=0):
        self.total_value = start_value

    def __call__(self, value, *, times=1):
        for _ in range(times):
            if value is not None:
                self.total_value += value
        return self.total_value
'''
TEXTS = [SOURCE, SOURCE.replace("value", "amount"), SOURCE.replace("Counter", "Adder")]
VOCABULARY = 340


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    train_tokenizer(TEXTS, vocab_size=VOCABULARY, output=folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def random_text(seed, length=300):
    """Characters of every plane except surrogates, with control characters and rare spaces."""
    generator = random.Random(seed)
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x2000, 0x2070), (0x3000, 0xD800), (0xE000, 0x10FFFF)]
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(length))


def test_special_tokens_have_the_first_ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<unk>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<mask>", 3)
    assert tokenizer.clean_up_tokenization_spaces is False  # older versions of transformers rewrite text by it
    assert len(tokenizer) == VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS,
        "",
        " ",
        " a  b   c\t\td \n \n\n\t x\r\n  y\rz",
        "don 't do this , or that . It 's \"so\" !",  # what clean_up_tokenization_spaces would rewrite
        "naïve Ünïcode, 日本語のテキスト, 🙂🏳️‍🌈, e\u0301, \ufeff, \u2028\u00a0\x00\x0c",
        *(random_text(seed) for seed in range(20)),
    ],
)
def test_text_comes_back_exactly_and_without_unknowns(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(token >= 4 for token in ids)  # neither <unk> nor anything added
    assert text_encoder(tokenizer)([text]) == [ids]


def test_a_line_break_and_its_indentation_are_one_token(tmp_path):
    train_tokenizer(TEXTS, vocab_size=1000, output=tmp_path / "full")  # every merge the texts hold
    tokenizer = load_tokenizer(tmp_path / "full")
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode(SOURCE)]
    assert tokens.count("\n        ") + tokens.count("\n\n        ") >= 2
    assert "\n            " in tokens
    assert "self" in tokens and ".total_value" in tokens and " __init__" in tokens


def test_a_special_token_in_a_text_is_only_its_characters(tokenizer):
    text = "if token == '<mask>': return '</s>' # <s><unk>"
    assert 3 in tokenizer.encode(text)  # what the ordinary call does
    (ids,) = text_encoder(tokenizer)([text])
    assert min(ids) >= 4
    assert tokenizer.decode(ids) == text
    assert 3 in tokenizer.encode("<mask>")  # and the caller's tokenizer still does


def test_text_that_utf8_cannot_encode_is_refused_in_one_line(tokenizer):
    with pytest.raises(UserError, match=r"found half of a surrogate pair in 'a\\udcff', expected text"):
        text_encoder(tokenizer)(["fine", "a\udcff"])


def test_the_encoder_neither_cuts_nor_pads(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    short, long = text_encoder(tokenizer)(["a", SOURCE])
    assert len(short) == 1
    assert load_tokenizer(folder).decode(long) == SOURCE


def test_training_is_deterministic_in_another_process(folder, tmp_path):
    program = (
        "import json, sys; from pathlib import Path; from megatron_twotower.data.tokenizer import train_tokenizer; "
        f"train_tokenizer(iter(json.load(sys.stdin)), vocab_size={VOCABULARY}, output=Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "again")]
    subprocess.run(command, input=json.dumps(TEXTS), text=True, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


# --- exact to tokenizer.json ---

# Other pieces than those of GPT-2, Qwen2, GPT-NeoX or Llama: digits, indentation, words with a dot.
SPLIT_TEXT = "don't  add 12345 to self.total_value\n        if x:\t <mask> </s> é日本"
CLASSES = (
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizer",
    "CodeGenTokenizer",
    "LlamaTokenizer",
    "GemmaTokenizer",
    "NoSuchTokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    None,
)


@pytest.fixture(scope="module")
def plain(folder):
    """The ids that tokenizer.json alone gives."""
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.encode_special_tokens = True
    return lambda text: file.encode(text, add_special_tokens=False).ids


def changed(folder, target, *, files=None, added=(), **config):
    """A copy of a tokenizer with other values in tokenizer_config.json, and other files."""
    shutil.copytree(folder, target)
    found = json.loads((target / "tokenizer_config.json").read_text()) | config
    found = {key: value for key, value in found.items() if value is not None}
    whole = json.loads((target / "tokenizer.json").read_text())
    whole["added_tokens"] += added
    for name, content in {"tokenizer_config.json": found, "tokenizer.json": whole, **(files or {})}.items():
        (target / name).write_text(json.dumps(content))
    return target


def added_token(content, token_id=None, **flags):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False} | flags
    return {"content": content, **({} if token_id is None else {"id": token_id}), **flags}


@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_those_of_the_file_whatever_class_its_configuration_names(name, folder, plain, tmp_path):
    other = changed(folder, tmp_path / "other", tokenizer_class=name, add_prefix_space=True)
    opened = load_tokenizer(other)
    assert text_encoder(opened)([SPLIT_TEXT, SOURCE]) == [plain(SPLIT_TEXT), plain(SOURCE)]
    assert opened.decode(plain(SPLIT_TEXT)) == SPLIT_TEXT
    assert (opened.eos_token_id, opened.mask_token_id, len(opened)) == (2, 3, VOCABULARY)
    assert tokenizer_fingerprint(other) == hashlib.sha256((other / "tokenizer.json").read_bytes()).hexdigest()
    exact = name in (None, "PreTrainedTokenizerFast", "TokenizersBackend")
    assert rebuilt_class(other) == (None if exact else name)


def test_every_class_that_transformers_builds_anew_is_known(folder, plain, tmp_path):
    """What AutoTokenizer changes must be among the names that `rebuilt_class` reports."""
    found = set()
    for name in CLASSES:
        other = changed(folder, tmp_path / str(name), tokenizer_class=name)
        ids = text_encoder(AutoTokenizer.from_pretrained(str(other), local_files_only=True))([SPLIT_TEXT])[0]
        if ids != plain(SPLIT_TEXT):
            found.add(name)
            assert rebuilt_class(other) == name
    assert {"GPT2Tokenizer", "Qwen2Tokenizer"} <= found


def test_a_file_for_other_releases_is_not_read(folder, plain, tmp_path):
    train_tokenizer(["other words"], vocab_size=300, output=tmp_path / "old")
    file = json.loads((tmp_path / "old" / "tokenizer.json").read_text())
    names = ["tokenizer.4.0.0.json", "tokenizer.json"]
    other = changed(folder, tmp_path / "other", fast_tokenizer_files=names, files={names[0]: file})
    assert text_encoder(load_tokenizer(other))([SPLIT_TEXT]) == [plain(SPLIT_TEXT)]


def test_added_tokens_are_those_of_the_file(folder, tmp_path):
    """What other files say of such a token does not change where it is found in a text."""
    own = [added_token("<call>", VOCABULARY)]
    found = text_encoder(load_tokenizer(changed(folder, tmp_path / "own", added=own)))(["a  <call>  b"])
    token = {str(VOCABULARY): added_token("<call>", lstrip=True, rstrip=True)}
    other = changed(folder, tmp_path / "other", added=own, added_tokens_decoder=token)
    assert text_encoder(load_tokenizer(other))(["a  <call>  b"]) == found
    assert VOCABULARY in found[0]
    for number, more in enumerate(
        (
            {"added_tokens_decoder": {str(VOCABULARY): added_token("<new>")}},
            {"files": {"added_tokens.json": {"<new>": 9}}},
        )
    ):
        lost = changed(folder, tmp_path / f"lost{number}", **more)
        with pytest.raises(UserError, match=r"lost\d: found an added token '<new>' that tokenizer\.json does not have"):
            load_tokenizer(lost)


def test_a_token_that_only_the_configuration_calls_special_is_text_and_counts_in_the_fingerprint(folder, tmp_path):
    own = [added_token("<end>", VOCABULARY)]
    ordinary = changed(folder, tmp_path / "ordinary", added=own)
    special = changed(folder, tmp_path / "special", added=own, eos_token="<end>")
    assert (ordinary / "tokenizer.json").read_bytes() == (special / "tokenizer.json").read_bytes()
    ids = [text_encoder(load_tokenizer(each))(["a<end>"])[0] for each in (ordinary, special)]
    assert VOCABULARY in ids[0] and VOCABULARY not in ids[1]
    assert load_tokenizer(special).eos_token_id == VOCABULARY
    assert tokenizer_fingerprint(ordinary) != tokenizer_fingerprint(special)
    alone = hashlib.sha256((special / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer_fingerprint(ordinary) == alone
    # Older data has the fingerprint of the file alone, which stays accepted.
    assert accepted_fingerprints(special, exact_ids=False) == (tokenizer_fingerprint(special), alone)
    assert accepted_fingerprints(special, exact_ids=True) == (tokenizer_fingerprint(special),)


def test_the_fingerprint_follows_a_file_that_changes(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = tokenizer_fingerprint(copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    os.utime(copy / "tokenizer.json", ns=(1, 1))
    assert tokenizer_fingerprint(copy) != before


def test_the_fingerprint_is_that_of_the_file_and_tells_tokenizers_apart(folder, tmp_path):
    expected = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer_fingerprint(folder) == expected
    train_tokenizer(TEXTS, vocab_size=VOCABULARY - 1, output=tmp_path / "other")
    assert tokenizer_fingerprint(tmp_path / "other") != expected


def test_a_text_too_short_for_the_vocabulary_gives_a_smaller_one(tmp_path):
    train_tokenizer(["ab ab ab"], vocab_size=1000, output=tmp_path / "tiny")
    tokenizer = load_tokenizer(tmp_path / "tiny")
    assert SMALLEST_VOCABULARY < len(tokenizer) < SMALLEST_VOCABULARY + 5
    assert tokenizer.decode(tokenizer.encode("zürich")) == "zürich"


def test_other_files_of_the_folder_survive_and_nothing_half_written_stays(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"weights")
    train_tokenizer(TEXTS, vocab_size=300, output=target)
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert len(load_tokenizer(target)) == 300

    def broken():
        yield SOURCE
        raise RuntimeError("the disk is gone")

    before = (target / "tokenizer.json").read_bytes()
    with pytest.raises(Exception, match="the disk is gone"):
        train_tokenizer(broken(), vocab_size=310, output=target)
    assert (target / "tokenizer.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_user_errors_name_what_was_found_and_expected(folder, tmp_path):
    with pytest.raises(UserError, match="vocab_size 259: expected at least 260"):
        train_tokenizer(TEXTS, vocab_size=259, output=tmp_path / "small")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: found a file, expected a folder"):
        train_tokenizer(TEXTS, vocab_size=300, output=tmp_path / "file")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for function in (load_tokenizer, tokenizer_fingerprint):
        with pytest.raises(UserError, match=r"empty: no tokenizer\.json there"):
            function(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    whole = (folder / "tokenizer.json").read_text()
    for content in ("{}", "not json", whole[: len(whole) // 2]):
        (tmp_path / "broken" / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read") as caught:
            load_tokenizer(tmp_path / "broken")
        assert "\n" not in str(caught.value)

"""Hugging Face tokenizers: train one, open one, and encode documents with it.

Ids 0 to 3 of a tokenizer trained here are `<unk>` (also padding), `<s>`, `</s>` and `<mask>`. Ids 4
to 259 are the 256 bytes, so no text ever needs `<unk>`.

The ids of a text are those of tokenizer.json, in every release of transformers. AutoTokenizer gives
others: for some names in `tokenizer_class` it rebuilds the pre-tokenizer, and which names these
are depends on the release (5.3: LlamaTokenizer and others; 5.24: GPT2Tokenizer, Qwen2Tokenizer,
GPTNeoXTokenizer, CodeGenTokenizer and others).
"""

import functools
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import write_file
from megatron_twotower.common.text import is_unicode
from megatron_twotower.config.hf_config import read_object
from megatron_twotower.config.special_tokens import token_ids

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# Files next to tokenizer.json that transformers reads tokens from.
_TOKEN_FILES = (TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json")
# With this `tokenizer_class` every release of transformers takes tokenizer.json as it is.
EXACT_CLASS = "PreTrainedTokenizerFast"
_EXACT_CLASSES = (None, EXACT_CLASS, "TokenizersBackend")
_NOT_SPECIAL = re.compile(rb'"special"\s*:\s*false')

# The pieces that merges never cross. They are chosen for source code. A line break includes the
# indentation after it, so that a new level is one token. A word includes the space or dot before it
# and its underscores. Digits are in groups of three, punctuation marks in runs.
_PIECES = "|".join(
    (
        r"(?:\r?\n[ \t]*)+",
        r"[ .]?[\p{L}_]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}_]+",
        r"[ \t]+(?=[ \t])",  # the last space of a run belongs to the word after it
        r"\s",
    )
)
# 24 bytes are enough for a line break and five levels of indentation. Without the limit, a line of
# eighty `=` would take an entry.
_LONGEST_TOKEN_BYTES = 24


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, output: Path) -> None:
    """Train byte-level BPE on `texts` and save it in Hugging Face form in the folder `output`.

    The same texts in the same order give the same bytes. Text that is too short for `vocab_size`
    entries gives fewer. `encode` adds no special token, and `decode(encode(text))` is `text` for
    any Unicode text. Other files in `output` stay.

    Raises:
        UserError: `vocab_size` is too small for the special tokens and the bytes, `output` is a
            file, or it cannot be written.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size}: expected at least {SMALLEST_VOCABULARY} (4 special tokens and 256 bytes)"
        )
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: found a file, expected a folder to save a tokenizer in")
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=_LONGEST_TOKEN_BYTES,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer=trainer)
    unk, bos, eos, mask = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token=unk,
        pad_token=unk,
        bos_token=bos,
        eos_token=eos,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # tokenizer.json makes a folder a tokenizer, so it is written last.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == TOKENIZER_FILE):
            write_file(output / file.name, file.read_bytes())


def _tokenizer_file(folder: Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected a Hugging Face tokenizer")
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no {TOKENIZER_FILE} there, expected a Hugging Face tokenizer")
    return file


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Open the tokenizer in `folder`, from local files only.

    It encodes text as tokenizer.json does. The other files name its special tokens and its chat
    template.

    Raises:
        UserError: The folder or its tokenizer.json is missing or cannot be read, or another file
            adds an ordinary token that tokenizer.json does not have.
    """
    return _load(_tokenizer_file(folder))[0]


def _load(file: Path) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """The tokenizer of a tokenizer.json, and the tokens that only other files call special."""
    folder = file.parent
    try:
        plain = Tokenizer.from_file(str(file))
        # The class is named, so that no other class rebuilds the tokenizer. So is the file,
        # because `fast_tokenizer_files` of tokenizer_config.json may name another one.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, tokenizer_file=str(file)
        )
    except Exception as error:  # the Rust parser raises plain `Exception`
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as a Hugging Face tokenizer ({reason})") from error
    backend, made_special = tokenizer.backend_tokenizer, []
    backend.normalizer, backend.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    own = plain.get_added_tokens_decoder()
    for token_id, token in backend.get_added_tokens_decoder().items():
        if token_id not in own:
            if not token.special:
                raise UserError(
                    f"{folder}: found an added token {token.content!r} that {TOKENIZER_FILE} does not have, expected "
                    f"ordinary tokens in {TOKENIZER_FILE} (`save_pretrained` of the tokenizer writes them there)"
                )
        elif repr(token) != repr(own[token_id]):  # transformers took what another file says of it
            if token.special and not own[token_id].special:
                made_special.append(token.content)
                own[token_id].special = True
            backend.add_tokens([own[token_id]])
    return tokenizer, made_special


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the files of a tokenizer, its chat template included, into the new folder `target`."""
    target.mkdir(exist_ok=True)
    for name in (*_TOKEN_FILES, TEMPLATE_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256, in hex, of what decides the ids of a text: equal fingerprints mean equal ids.

    That is tokenizer.json and, if there are any, the tokens that only another file calls special
    (`text_encoder` encodes their spelling as characters).

    Raises:
        UserError: The folder or its tokenizer.json is missing.
    """
    return accepted_fingerprints(folder, exact_ids=True)[0]


def accepted_fingerprints(folder: Path, *, exact_ids: bool) -> tuple[str, ...]:
    """The fingerprints of data whose ids are those of the tokenizer in `folder`.

    Args:
        exact_ids: False for data prepared before ids were those of tokenizer.json in every release
            of transformers. The fingerprint of such data is the SHA-256 of tokenizer.json alone.

    Raises:
        UserError: The folder or its tokenizer.json is missing.
    """
    file = _tokenizer_file(folder)
    times = [path.stat().st_mtime_ns if (path := file.with_name(name)).is_file() else 0 for name in _TOKEN_FILES]
    found = _fingerprints(file.resolve(), tuple(times))
    return found[:1] if exact_ids else found


def check_same_ids(folder: Path, other: Path) -> None:
    """Refuse two models whose tokenizers give an id other meanings; a folder without one passes.

    Special tokens may have other names: a post-trained model names some that its base reserves.

    Raises:
        UserError: A token is another one.
    """
    files = [Path(each) / TOKENIZER_FILE for each in (folder, other)]
    if not all(file.is_file() for file in files):
        return
    found = [read_object(file) for file in files]
    ours, theirs = (
        {token_id: text for text, token_id in token_ids(each, file).items()}
        for each, file in zip(found, files, strict=True)
    )
    special = {token["id"] for each in found for token in each.get("added_tokens") or () if token["special"]}
    differing = sorted(
        each for each in ours.keys() & theirs.keys() if ours[each] != theirs[each] and each not in special
    )
    if differing:
        first = differing[0]
        raise UserError(
            f"{folder}: found {ours[first]!r} as id {first}, expected {theirs[first]!r}, as in {other} (and "
            f"{len(differing) - 1} others)"
        )


def rebuilt_class(folder: Path) -> str | None:
    """The name in tokenizer_config.json by which some release of transformers changes the ids.

    Data that was prepared before `exact_ids` with such a tokenizer may hold other ids than
    tokenizer.json gives. None if the name changes nothing.
    """
    try:
        name = json.loads((folder / CONFIG_FILE).read_bytes()).get("tokenizer_class")
    except (AttributeError, OSError, ValueError):
        return None
    return None if name in _EXACT_CLASSES else str(name)


def check_tokenizer(folder: Path, fingerprint: str, *, exact_ids: bool, data: Path | str) -> str:
    """Refuse a model whose tokenizer is not that of the data. Returns the model's fingerprint.

    Args:
        folder: The folder of the model.
        fingerprint: That of the data.
        exact_ids: As in `accepted_fingerprints`.
        data: The folder of the data, for the error.

    Raises:
        UserError: The tokenizers differ, or the folder has none.
    """
    accepted = accepted_fingerprints(folder, exact_ids=exact_ids)
    if fingerprint not in accepted:
        raise UserError(
            f"{folder}: found a tokenizer with sha256 {accepted[0]}, expected that of {data}, {fingerprint}"
        )
    return accepted[0]


@functools.lru_cache(maxsize=64)
def _fingerprints(file: Path, times: tuple[int, ...]) -> tuple[str, str]:
    """The fingerprint, and the SHA-256 of tokenizer.json alone.

    Args:
        times: Part of the cache key, because the files may change.
    """
    content = file.read_bytes()
    digest = hashlib.sha256(content)
    alone = digest.hexdigest()
    # To load a large tokenizer takes seconds. Most have only special tokens among those added.
    if _NOT_SPECIAL.search(content) and (made_special := _load(file)[1]):
        digest.update(json.dumps(sorted(made_special)).encode())
    return digest.hexdigest(), alone


def text_encoder(
    tokenizer: PreTrainedTokenizerFast, *, recognised: Collection[str] = ()
) -> Callable[[Sequence[str]], list[list[int]]]:
    """A function from texts to the token ids of each; nothing is added, cut or padded.

    A special token that a text spells out ("<mask>" in a source file) is encoded as its characters:
    clean text must never contain the mask token or end early.

    The function raises a `UserError` for text that UTF-8 cannot encode.

    Args:
        recognised: Special tokens whose spelling becomes their ids nevertheless, as in a rendered
            chat template.
    """
    # A copy, because the settings below would change the tokenizer of the caller.
    whole = tokenizer.backend_tokenizer.to_str()
    if recognised:
        parts = json.loads(whole)
        for token in parts["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in recognised
        whole = json.dumps(parts)
    plain = Tokenizer.from_str(whole)
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            for text in texts:
                if not is_unicode(text):
                    raise UserError(f"found half of a surrogate pair in {text[:60]!r}, expected text") from error
            raise

    return encode

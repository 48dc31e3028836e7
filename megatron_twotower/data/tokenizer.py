"""Hugging Face tokenizers: train one, open one, and encode documents with it.

Ids 0 to 3 of a tokenizer trained here are `<unk>` (also padding), `<s>`, `</s>` and `<mask>`. Ids 4
to 259 are the 256 bytes, so no text ever needs `<unk>`.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, NemotronHConfig, PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import write_file
from megatron_twotower.config.hf_config import TWO_TOWER_MODEL_TYPE

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
TOKENIZER_FILE = "tokenizer.json"

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


def _model_config(folder: Path) -> NemotronHConfig | None:
    """What a tokenizer's class may depend on: None for the folder's own configuration.

    A two-tower folder gets that of one tower. transformers would ask whether to run the code of the
    folder, which a tokenizer does not need.
    """
    file = folder / "config.json"
    two_towers = file.is_file() and json.loads(file.read_text()).get("model_type") == TWO_TOWER_MODEL_TYPE
    return NemotronHConfig() if two_towers else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Open the tokenizer in `folder`, from local files only.

    Raises:
        UserError: The folder or its tokenizer.json is missing, or is not a fast tokenizer.
    """
    file = _tokenizer_file(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), config=_model_config(file.parent), local_files_only=True
        )
    except Exception as error:  # the Rust parser raises plain `Exception`
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as a Hugging Face tokenizer ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{folder}: found a {type(tokenizer).__name__}, expected a fast tokenizer (tokenizer.json)")
    return tokenizer


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256, in hex, of the tokenizer.json in `folder`. Equal fingerprints mean equal ids.

    Raises:
        UserError: The folder or its tokenizer.json is missing.
    """
    return hashlib.sha256(_tokenizer_file(folder).read_bytes()).hexdigest()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[Sequence[str]], list[list[int]]]:
    """A function from texts to the token ids of each; nothing is added, cut or padded.

    A special token that a text spells out ("<mask>" in a source file) is encoded as its characters:
    clean text must never contain the mask token or end early.
    """
    # A copy, because the settings below would change the tokenizer of the caller.
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    return encode

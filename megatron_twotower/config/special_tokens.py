"""What a Hugging Face folder says of its special tokens and of its blocks.

`generation_config.json` says it, else `config.json`, else the files of the tokenizer. What is said
twice must agree. Nothing here imports `transformers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.config.hf_config import GENERATION_FILE, read_object

# The mask token and the block size of the released checkpoint, where nothing names any.
RELEASED_MASK_TOKEN_ID, RELEASED_BLOCK_SIZE = 3, 16
TOKENIZER_FILE = "tokenizer.json"
# Files that name the special tokens of a tokenizer; the second is of older releases.
_NAMES_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class SpecialTokens:
    """What a folder says; None or empty where it says nothing.

    Attributes:
        mask_token_id: The id that stands for a masked token.
        block_size: Tokens of a block, for generation and for further training.
        trained_block_sizes: All block sizes that the denoiser was trained with.
        eos_token_ids: Each of them ends a text.
    """

    mask_token_id: int | None = None
    block_size: int | None = None
    trained_block_sizes: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()


def read_special_tokens(folder: str | Path) -> SpecialTokens:
    """Read what a folder says.

    As in `transformers`, EOS of `generation_config.json` replaces that of `config.json`.

    Raises:
        UserError: A file cannot be read, a value is not an id, or two files disagree.
    """
    home = Path(folder)
    generation, config = (read_object(home / name) for name in (GENERATION_FILE, "config.json"))
    eos_file = GENERATION_FILE if generation.get("eos_token_id") is not None else "config.json"
    eos = _ids(generation if eos_file == GENERATION_FILE else config, "eos_token_id", home / eos_file)
    block_size = _said_once(home, generation, config, "block_size", least=1)
    sizes = _ids(generation, "trained_block_sizes", home / GENERATION_FILE, least=1)
    mask_token_id = _said_once(home, generation, config, "mask_token_id")
    names, named = _named_ids(home)
    mask, own_eos = named.get("mask_token"), named.get("eos_token")
    require(
        mask is None or mask_token_id in (None, mask),
        f"{home}: found mask_token_id {mask_token_id} in {GENERATION_FILE} or config.json, but the mask token of "
        f"{names} has id {mask}, expected the same",
    )
    require(
        own_eos is None or not eos or own_eos in eos,
        f"{home / eos_file}: found eos_token_id {', '.join(map(str, eos))}, but the EOS of {names} has id {own_eos}, "
        f"expected it among them (eos_token_id of {GENERATION_FILE} may be a list)",
    )
    return SpecialTokens(
        mask if mask_token_id is None else mask_token_id,
        block_size,
        sizes or ((block_size,) if block_size else ()),
        eos or (() if own_eos is None else (own_eos,)),
    )


def _said_once(
    home: Path, generation: Mapping[str, Any], config: Mapping[str, Any], key: str, *, least: int = 0
) -> int | None:
    """The number of a field that either file may have; None if no file has it."""
    values = {
        name: ids
        for name, found in ((GENERATION_FILE, generation), ("config.json", config))
        if (ids := _ids(found, key, home / name, least=least))
    }
    said = sorted({each for ids in values.values() for each in ids})
    require(
        len(said) < 2, f"{home}: {key}: found {' and '.join(map(str, said))} in {' and '.join(values)}, expected one"
    )
    return said[0] if said else None


def _ids(found: Mapping[str, Any], key: str, path: Path, *, least: int = 0) -> tuple[int, ...]:
    """The numbers of a field, which has one or a list; none if it is left out or null."""
    value = found.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    fits = all(isinstance(each, int) and not isinstance(each, bool) and each >= least for each in ids)
    require(fits, f"{path}: {key}: found {value!r}, expected whole numbers from {least} on")
    return tuple(dict.fromkeys(ids))


def _named_ids(home: Path) -> tuple[str, dict[str, int]]:
    """The file that names the mask token and EOS of a tokenizer, and their ids.

    A name that is not in `tokenizer.json` is left out.
    """
    for file in _NAMES_FILES:
        found = read_object(home / file)
        # A token is its text, or an object with the text in `content`.
        texts = {key: found.get(key) for key in ("mask_token", "eos_token")}
        names = {key: text.get("content") if isinstance(text, dict) else text for key, text in texts.items()}
        names = {key: text for key, text in names.items() if isinstance(text, str)}
        if names and (home / TOKENIZER_FILE).is_file():
            ids = token_ids(read_object(home / TOKENIZER_FILE), home / TOKENIZER_FILE)
            return file, {key: ids[text] for key, text in names.items() if text in ids}
    return "", {}


def token_ids(tokenizer: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The ids of all tokens of a parsed `tokenizer.json`, by their text.

    Raises:
        UserError: It has no vocabulary.
    """
    try:
        vocabulary = tokenizer["model"]["vocab"]
        # The vocabulary of Unigram is a list of pieces with their scores.
        pieces = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
        return {**pieces, **{each["content"]: each["id"] for each in tokenizer.get("added_tokens") or ()}}
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: found no vocabulary ({error!r}), expected a Hugging Face tokenizer") from error

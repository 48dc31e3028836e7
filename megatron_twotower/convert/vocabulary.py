"""A model with the vocabulary of another tokenizer: its entries are some of the model's own.

With fewer entries, such as those of one language or the bytes alone, embeddings and heads are
smaller and text has more tokens. The model must be trained further: it has hardly seen text in
these entries.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.convert.tensors import PIECE_BYTES, LazyTensor
from megatron_twotower.data.tokenizer import load_tokenizer

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
_NAMED = 3


def rows_of_entries(tokenizer: Path, source: Path) -> list[int]:
    """The id in `source` of each entry of `tokenizer`: that with the same spelling.

    Args:
        tokenizer, source: Folders of tokenizers.

    Raises:
        UserError: `source` lacks an entry, or an id of `tokenizer` has none.
    """
    vocabulary, own = load_tokenizer(tokenizer).get_vocab(), load_tokenizer(source).get_vocab()
    if lacking := sorted(spelling for spelling in vocabulary if spelling not in own):
        first = ", ".join(map(repr, lacking[:_NAMED]))
        raise UserError(
            f"{tokenizer}: found {len(lacking)} entries that {source} lacks ({first}), expected some of its entries"
        )
    spelling_of = {number: spelling for spelling, number in vocabulary.items()}
    if len(spelling_of) != max(spelling_of) + 1:
        raise UserError(
            f"{tokenizer}: found {len(spelling_of)} entries, expected {max(spelling_of) + 1}, one of each id"
        )
    return [own[spelling_of[number]] for number in range(len(spelling_of))]


def with_rows(tensors: Mapping[str, LazyTensor], rows: list[int]) -> dict[str, LazyTensor]:
    """Tensors of towers, with these rows of their embeddings and heads."""
    ends = ("embeddings.weight", "lm_head.weight")
    return {name: _rows(tensor, rows) if name.endswith(ends) else tensor for name, tensor in tensors.items()}


def _rows(tensor: LazyTensor, rows: list[int]) -> LazyTensor:
    def pieces() -> Iterator[Tensor]:
        yield from tensor.read()[rows].flatten().split(PIECE_BYTES // tensor.dtype.itemsize)

    return LazyTensor(tensor.dtype, (len(rows), *tensor.shape[1:]), pieces)


def with_new_ids(settings: Mapping[str, Any], rows: list[int], *, source: str) -> dict[str, Any]:
    """Settings of a folder whose special tokens have their new ids.

    Args:
        source: Where the settings are from, for errors.

    Raises:
        UserError: A special token has no entry any more.
    """
    new_id = {old: new for new, old in enumerate(rows)}
    found = dict(settings)
    for key in _TOKEN_KEYS:
        value = settings.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if lacking := [each for each in ids if each not in new_id]:
            raise UserError(f"{source}: {key}: found {lacking[0]}, which has no entry in the other tokenizer")
        new = [new_id[each] for each in ids]
        found[key] = new if isinstance(value, list) else new[0]
    return found

"""The command `twotower data verify`: checks all of prepared data."""

import functools
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import CorpusProgress, OnCorpusProgress
from megatron_twotower.common.workers import count, local_engine
from megatron_twotower.data import remote
from megatron_twotower.data.blend import prepared_folders, split_folder
from megatron_twotower.data.shards import INDEX_FILE, SCORED_SUFFIX, TOKENS_SUFFIX, Corpus, array_members, checksum
from megatron_twotower.data.tokenizer import accepted_fingerprints, load_tokenizer, text_encoder

_DOCUMENTS_ENCODED_AGAIN = 8  # of a shard


@dataclass(frozen=True)
class _Check:
    """A shard to check.

    Attributes:
        split: The folder or URL of its split.
        tokenizer: The folder of the tokenizer to compare ids with; None for a corpus whose ids are
            known to be exact, and for one at a URL.
    """

    split: str
    shard: int
    tokenizer: Path | None


def verify(
    data: str,
    *,
    tokenizer: Path | None = None,
    folder: str | None = None,
    workers: int = 1,
    progress: OnCorpusProgress = lambda _: None,
) -> list[str]:
    """Check every corpus; print how much was checked, and return one line for every fault.

    Checked are the index and its arrays, the size and checksum of each shard, the index against the
    tar, ids against the vocabulary, BOS and EOS, what is scored of conversations, the totals, and
    that all data is from one tokenizer: that of its folder, and `tokenizer` if given. A few
    documents of each shard that an older version prepared are decoded and encoded again: their ids
    may not be those of tokenizer.json (`Corpus.exact_ids`).

    Args:
        data, folder: As in `blend.prepared_folders`.
        workers: Processes.
    """
    problems: list[str] = []
    checks: list[_Check] = []
    total_tokens = 0
    given = {} if tokenizer is None else {str(tokenizer): accepted_fingerprints(tokenizer, exact_ids=False)}
    _open.cache_clear()  # it remembers faults, which may be repaired since
    for prepared in dict.fromkeys(prepared_folders(data, folder=folder).values()):
        totals = _read_totals(prepared, problems)
        for split in totals:
            try:
                corpus = Corpus.open(split_folder(prepared, split), damaged="skip")
            except UserError as error:
                problems.append(str(error))
                continue
            problems += _index_problems(corpus, totals[split])
            own = _own_tokenizer(prepared, problems)
            problems += _tokenizer_problems(corpus, {**own, **given})
            given.setdefault(str(corpus.folder), (corpus.tokenizer_fingerprint,) * 2)
            known = corpus.exact_ids or not any(corpus.tokenizer_fingerprint in each for each in own.values())
            compared = None if known else Path(prepared) / "tokenizer"
            checks += [_Check(str(corpus.folder), number, compared) for number in range(len(corpus.shards))]
            total_tokens += corpus.total_tokens

    def on_count(amounts: Sequence[int]) -> None:
        documents, _, tokens = amounts
        progress(CorpusProgress("verifying", tokens, total_tokens, documents, tokens))

    with local_engine(workers) as engine:
        faults = dict(engine(shard_problems, checks, on_count=on_count))
    problems += [fault for check in checks for fault in faults[check]]
    problems = list(dict.fromkeys(problems))
    print(f"{data}: {len(checks)} shards checked, {len(problems)} faults found")
    return problems


def _read_totals(prepared: str, problems: list[str]) -> dict[str, Any]:
    """The totals by split, as `prepare` returned them; nothing if there is no summary."""
    name = remote.join(prepared, "summary.json") if remote.is_url(prepared) else str(Path(prepared) / "summary.json")
    try:
        summary = json.loads(remote.read(name) if remote.is_url(name) else Path(name).read_bytes())
        return dict(summary["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(str(error) if isinstance(error, UserError) else f"{name}: not a summary ({error})")
        return {}


def _own_tokenizer(prepared: str, problems: list[str]) -> dict[str, tuple[str, ...]]:
    if remote.is_url(prepared):
        return {}
    folder = Path(prepared) / "tokenizer"
    try:
        return {str(folder): accepted_fingerprints(folder, exact_ids=False)}
    except UserError as error:
        problems.append(str(error))
        return {}


def _tokenizer_problems(corpus: Corpus, others: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """A line for each of `others` that is another tokenizer.

    Args:
        others: By name, the fingerprint for exact ids, then that for older data.
    """
    for name, fingerprints in others.items():
        if corpus.tokenizer_fingerprint not in (fingerprints[:1] if corpus.exact_ids else fingerprints):
            yield (
                f"{corpus.folder}: found tokens of tokenizer {corpus.tokenizer_fingerprint[:12]}, expected those of "
                f"{name}, {fingerprints[0][:12]}"
            )


def _index_problems(corpus: Corpus, totals: dict[str, Any]) -> Iterator[str]:
    found = (corpus.documents, corpus.total_tokens, corpus.total_bytes, corpus.total_characters)
    expected = tuple(totals.get(key) for key in ("documents", "tokens", "bytes", "characters"))
    if found != expected:
        yield f"{corpus.folder}/{INDEX_FILE}: found documents, tokens, bytes, characters {found}, expected {expected}"
    if isinstance(corpus.folder, Path):
        for name, sha256 in corpus.arrays.items():
            if (digest := checksum(corpus.folder / name)) != sha256:
                yield f"{corpus.folder / name}: found sha256 {digest}, expected {sha256}"


@functools.lru_cache(maxsize=4)
def _open(split: str) -> Corpus:
    return Corpus.open(split if remote.is_url(split) else Path(split), damaged="skip")


def shard_problems(check: _Check) -> list[str]:
    """What is wrong with a shard: one line of damage, or one line for each kind of wrong id."""
    corpus = _open(check.split)
    if problem := corpus.check_shard(check.shard):
        return [problem]
    path = corpus.local_shard(check.shard)
    name = remote.join(check.split, corpus.shards[check.shard].file)
    first, last = (int(one) for one in corpus.first_documents[check.shard : check.shard + 2])
    lengths = np.diff(corpus.starts[first : last + 1])
    places = [(TOKENS_SUFFIX, corpus.offsets, corpus.dtype)]
    if corpus.scored_offsets is not None:
        places.append((SCORED_SUFFIX, corpus.scored_offsets, np.dtype(bool)))
    for suffix, offsets, dtype in places:
        expected = [
            (f"{number:09d}", int(offset), (int(length), dtype))
            for number, offset, length in zip(range(first, last), offsets[first:last], lengths, strict=True)
        ]
        try:
            found = list(array_members(path, suffix))
        except (OSError, ValueError, tarfile.TarError) as error:
            return [f"{name}: not a tar of token arrays ({error})"]
        for in_tar, in_index in itertools.zip_longest(found, expected):
            if in_tar != in_index:
                return [
                    f"{name}: found (document, offset, (tokens, dtype)) {in_tar} of {suffix}, expected {in_index} of "
                    f"{INDEX_FILE}"
                ]
    problems = [*_id_problems(corpus, first, last, name), *_mask_problems(corpus, first, last, name)]
    if check.tokenizer and not problems:
        problems = list(_other_ids(corpus, first, last, name, check.tokenizer))
    count(last - first, 0, corpus.shards[check.shard].tokens)
    return problems


def _id_problems(corpus: Corpus, first: int, last: int, name: str) -> Iterator[str]:
    ends = {"BOS": (0, corpus.bos_token_id), "EOS": (-1, corpus.eos_token_id)}
    for number in range(first, last):
        ids = corpus.document(number)
        if not len(ids):
            yield f"{name}: found no ids in document {number}, expected some"
            return
        if (largest := int(ids.max())) >= corpus.vocab_size:
            yield f"{name}: found id {largest} in document {number}, expected less than {corpus.vocab_size}"
            return
        for mark, (place, token) in ends.items():
            if token is not None and ids[place] != token:
                yield f"{name}: found id {ids[place]} where document {number} has its {mark}, expected {token}"
                return


def _mask_problems(corpus: Corpus, first: int, last: int, name: str) -> Iterator[str]:
    """A line if the mask of a conversation scores nothing, or not a turn up to its end."""
    for number in range(first, last):
        scored = corpus.scored_document(number)
        if scored is None:
            return
        if not scored.any():
            yield f"{name}: found nothing scored in document {number}, expected some of it"
            return
        ids, ends = corpus.document(number), np.flatnonzero(scored & ~np.append(scored[1:], False))
        if wrong := [int(each) for each in ids[ends] if int(each) not in corpus.turn_ends]:
            yield (
                f"{name}: found a scored turn that ends with id {wrong[0]} in document {number}, expected one of "
                f"{', '.join(map(str, corpus.turn_ends))}"
            )
            return


def _other_ids(corpus: Corpus, first: int, last: int, name: str, tokenizer: Path) -> Iterator[str]:
    """A line if a document has other ids than the tokenizer gives for its text."""
    decode, encode = _codec(tokenizer)
    begin, end = int(corpus.bos_token_id is not None), int(corpus.eos_token_id is not None)
    for number in range(first, last, -(-(last - first) // _DOCUMENTS_ENCODED_AGAIN)):
        ids = corpus.document(number).tolist()
        ids = ids[begin : len(ids) - end]
        again = encode([decode(ids)])[0]
        # A tokenizer that changes text cannot be compared in this way.
        if again != ids and decode(again) == decode(ids):
            yield (
                f"{name}: found ids in document {number} that are not those of {tokenizer} for its text: an older "
                "version prepared it with a tokenizer that transformers had rebuilt; prepare the data again"
            )
            return


@functools.lru_cache(maxsize=1)
def _codec(tokenizer: Path) -> tuple[Callable[[Sequence[int]], str], Callable[[Sequence[str]], list[list[int]]]]:
    opened = load_tokenizer(tokenizer)
    return functools.partial(opened.backend_tokenizer.decode, skip_special_tokens=False), text_encoder(opened)

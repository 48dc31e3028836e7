"""`twotower data inspect` and `twotower data verify`: what prepared data holds, and whether all of it is right."""

import functools
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import CorpusProgress, OnCorpusProgress
from megatron_twotower.data import remote
from megatron_twotower.data.blend import Blend, split_folder
from megatron_twotower.data.shards import INDEX_FILE, TRAIN, VALIDATION, Corpus, checksum, token_members
from megatron_twotower.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_twotower.data.workers import count, unordered

_DOCUMENTS_MEASURED = 1 << 24  # lengths held at a time; of a larger corpus, the first ones
_SHOWN_BLOCKS = 12
_BAR_CHARACTERS = 40


def roots(data: str, *, folder: str | None = None) -> dict[str, str]:
    """Name and prepared folder (path or URL) of each corpus of `data`, which is one itself, or a blend file.

    folder: where the corpora of a blend are, as `data.folder` of a recipe; beside the blend file if
    left out.
    """
    if Path(data).suffix in (".yaml", ".yml"):
        blend = Blend.open(data, root=folder)
        return {corpus.name: corpus.folder for phase in blend.phases for corpus in phase.corpora}
    if folder is not None:
        raise UserError(f"{data}: found no .yaml with --folder {folder}, expected a blend file")
    if not remote.is_url(data) and not any((Path(data) / part / INDEX_FILE).is_file() for part in (TRAIN, VALIDATION)):
        raise UserError(f"{data}: found no {TRAIN}/{INDEX_FILE}, expected a prepared folder, its URL or a blend file")
    return {Path(data).resolve().name if not remote.is_url(data) else data: data}


# --- inspect ------------------------------------------------------------------------------------------------------


def inspect(
    data: str,
    *,
    split: str,
    samples: int,
    block_size: int,
    picture: Path,
    tokenizer: Path | None = None,
    folder: str | None = None,
) -> None:
    """Print counts, lengths, and documents with their block boundaries, of every corpus; draw the lengths.

    tokenizer: to decode with; that of the prepared folder if left out, and without any, ids are
    shown. folder: as in `roots`.
    Errors: `UserError` for what cannot be opened.
    """
    if block_size < 1:
        raise UserError(f"block_size {block_size}: expected at least 1")
    console = Console(highlight=False)
    places = roots(data, folder=folder)
    corpora = {name: Corpus.open(split_folder(place, split)) for name, place in places.items()}
    lengths = {name: document_lengths(corpus) for name, corpus in corpora.items()}
    edges = length_edges(max((int(one.max()) for one in lengths.values() if len(one)), default=1))
    histograms = {name: np.histogram(one, bins=edges)[0].tolist() for name, one in lengths.items()}
    for name, corpus in corpora.items():
        console.print(_counts(name, corpus, lengths[name]))
        console.print(text_histogram(histograms[name], edges), markup=False, soft_wrap=True)
        console.print(_blocks(corpus, block_size), markup=False, soft_wrap=True)
        opened = _tokenizer(tokenizer, places[name])
        for number in spread(corpus.documents, samples):
            console.print(Text(f"\ndocument {number:,}: {document_name(corpus, number)}", style="bold"))
            console.print(sample(corpus, number, block_size=block_size, tokenizer=opened), soft_wrap=True)
        console.print()
    total = sum(corpus.documents for corpus in corpora.values())
    picture.write_bytes(
        plots.length_histogram(
            histograms,
            edges=edges,
            title="Document lengths",
            subtitle=f"{total:,} documents of {data}, {split}",
            theme=plots.LIGHT,
        )
    )
    console.print(f"{picture}: the lengths as a picture", markup=False, soft_wrap=True)


def document_lengths(corpus: Corpus) -> np.ndarray:
    """(documents,) int64 tokens in each, of the first 16 million."""
    return np.diff(corpus.starts[: _DOCUMENTS_MEASURED + 1])


def length_edges(longest: int) -> list[int]:
    """Powers of two from 1 past the longest."""
    return [1 << power for power in range(max(longest, 1).bit_length() + 1)]


def spread(documents: int, samples: int) -> list[int]:
    """Up to `samples` document numbers, evenly over all."""
    return sorted({documents * place // samples for place in range(samples)}) if documents else []


def text_histogram(counts: Sequence[int], edges: Sequence[int]) -> str:
    """One line a bin, bars relative to the fullest; empty bins at both ends are left out."""
    full = [place for place, count in enumerate(counts) if count]
    if not full:
        return "no documents"
    lines = []
    for place in range(full[0], full[-1] + 1):
        bar = "█" * round(_BAR_CHARACTERS * counts[place] / max(counts))
        lines.append(f"{edges[place]:>10,} to {edges[place + 1] - 1:>10,} tokens {counts[place]:>12,} {bar}")
    return "\n".join(lines)


def _counts(name: str, corpus: Corpus, lengths: np.ndarray) -> Table:
    table = Table(title=name, show_header=False, title_justify="left", title_style="bold")
    middle = [int(np.quantile(lengths, part)) for part in (0.5, 0.9, 0.99)] if len(lengths) else [0, 0, 0]
    rows = {
        "documents": f"{corpus.documents:,}",
        "tokens": f"{corpus.total_tokens:,}",
        "text": f"{corpus.total_bytes:,} bytes, {corpus.total_bytes / max(corpus.total_tokens, 1):.2f} a token",
        "shards": f"{len(corpus.shards):,}, {sum(shard.bytes for shard in corpus.shards):,} bytes",
        "vocabulary": f"{corpus.vocab_size:,} ids as {corpus.dtype}, tokenizer {corpus.tokenizer_fingerprint[:12]}",
        "documents begin, end": f"BOS {corpus.bos_token_id}, EOS {corpus.eos_token_id}",
        "tokens in a document": f"median {middle[0]:,}, 90% up to {middle[1]:,}, 99% up to {middle[2]:,}",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _blocks(corpus: Corpus, block_size: int) -> str:
    """What the boundaries of documents do to blocks, ignored and respected."""
    starts = corpus.starts[: _DOCUMENTS_MEASURED + 1]
    tokens = int(starts[-1])
    inner = starts[1:-1][starts[1:-1] % block_size != 0]
    straddling = len(np.unique(inner // block_size))
    blocks = -(-tokens // block_size)
    padding = int((-np.diff(starts) % block_size).sum())
    return (
        f"blocks of {block_size} tokens: {100 * straddling / max(blocks, 1):.2f}% hold a boundary between documents; "
        f"kept apart, padding is {100 * padding / max(tokens + padding, 1):.2f}% of all positions"
    )


def sample(corpus: Corpus, number: int, *, block_size: int, tokenizer: PreTrainedTokenizerFast | None) -> Text:
    """The first blocks of a document, decoded, `|` where blocks of the stream (boundaries ignored) meet."""
    ids, start = corpus.document(number), int(corpus.starts[number])
    cuts = [0, *range(-start % block_size or block_size, len(ids), block_size), len(ids)]
    shown = Text()
    for begin, end in itertools.islice(itertools.pairwise(cuts), _SHOWN_BLOCKS):
        block = ids[begin:end].tolist()
        shown.append("|" if begin else "", style="bold red")
        shown.append(tokenizer.decode(block) if tokenizer else " ".join(map(str, block)))
    return shown.append(" …" if len(cuts) - 1 > _SHOWN_BLOCKS else "", style="bold red")


def document_name(corpus: Corpus, number: int) -> str:
    """What the shard calls a document: the file, or file and line, it was prepared from."""
    shard = corpus.shard_of(int(corpus.starts[number]))
    with tarfile.open(corpus.local_shard(shard), mode="r:") as tar:
        for member in tar:
            if member.name == f"{number:09d}.json" and (stream := tar.extractfile(member)):
                return str(json.load(stream)["name"])
    return "without a name"


def _tokenizer(given: Path | None, root: str) -> PreTrainedTokenizerFast | None:
    if given is not None:
        return load_tokenizer(given)
    return None if remote.is_url(root) else load_tokenizer(Path(root) / "tokenizer")


# --- verify -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Check:
    """A shard to check. split: folder or URL of the split it is in."""

    split: str
    shard: int


def verify(
    data: str,
    *,
    tokenizer: Path | None = None,
    folder: str | None = None,
    workers: int = 1,
    progress: OnCorpusProgress = lambda _: None,
) -> list[str]:
    """Every fault of every corpus, one line each; prints how much was checked. folder: as in `roots`.

    Checked: index and arrays, size and checksum of each shard, the index against the tar, ids
    against the vocabulary, BOS and EOS, the totals, and that all data is of one tokenizer: that of
    its folder, and `tokenizer` if given.
    """
    problems: list[str] = []
    checks: list[_Check] = []
    total = 0
    given = {} if tokenizer is None else {str(tokenizer): tokenizer_fingerprint(tokenizer)}
    _open.cache_clear()  # what was found before may have been mended
    for root in dict.fromkeys(roots(data, folder=folder).values()):
        summary = _read_summary(root, problems)
        for split in summary:
            try:
                corpus = Corpus.open(split_folder(root, split), damaged="skip")
            except UserError as error:
                problems.append(str(error))
                continue
            problems += _index_problems(corpus, summary[split])
            problems += _tokenizer_problems(corpus, {**_own_tokenizer(root, problems), **given})
            given.setdefault(str(corpus.folder), corpus.tokenizer_fingerprint)
            checks += [_Check(str(corpus.folder), number) for number in range(len(corpus.shards))]
            total += corpus.total_tokens

    def on_count(counts: Sequence[int]) -> None:
        documents, _, tokens = counts
        progress(CorpusProgress("verifying", tokens, total, documents, tokens))

    faults = dict(unordered(shard_problems, checks, workers=workers, on_count=on_count))
    problems += [fault for check in checks for fault in faults[check]]
    problems = list(dict.fromkeys(problems))
    print(f"{data}: {len(checks)} shards checked, {len(problems)} faults found")
    return problems


def _read_summary(root: str, problems: list[str]) -> dict[str, Any]:
    """Totals by split, as `prepare` returned them."""
    name = remote.join(root, "summary.json") if remote.is_url(root) else str(Path(root) / "summary.json")
    try:
        summary = json.loads(remote.read(name) if remote.is_url(name) else Path(name).read_bytes())
        return dict(summary["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(str(error) if isinstance(error, UserError) else f"{name}: not a summary ({error})")
        return {}


def _own_tokenizer(root: str, problems: list[str]) -> dict[str, str]:
    if remote.is_url(root):
        return {}
    folder = Path(root) / "tokenizer"
    try:
        return {str(folder): tokenizer_fingerprint(folder)}
    except UserError as error:
        problems.append(str(error))
        return {}


def _tokenizer_problems(corpus: Corpus, others: dict[str, str]) -> Iterator[str]:
    for name, fingerprint in others.items():
        if fingerprint != corpus.tokenizer_fingerprint:
            yield (
                f"{corpus.folder}: found tokens of tokenizer {corpus.tokenizer_fingerprint[:12]}, expected those of "
                f"{name}, {fingerprint[:12]}"
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
    """What is wrong with a shard: at most one line of damage, else one for each kind of disagreement."""
    corpus = _open(check.split)
    if fault := corpus.check_shard(check.shard):
        return [fault]
    path = corpus.local_shard(check.shard)
    name = remote.join(check.split, corpus.shards[check.shard].file)
    first, last = (int(one) for one in corpus.first_documents[check.shard : check.shard + 2])
    lengths = np.diff(corpus.starts[first : last + 1])
    expected = [
        (f"{number:09d}", int(offset), (int(length), corpus.dtype))
        for number, offset, length in zip(range(first, last), corpus.offsets[first:last], lengths, strict=True)
    ]
    try:
        found = list(token_members(path))
    except (OSError, ValueError, tarfile.TarError) as error:
        return [f"{name}: not a tar of token arrays ({error})"]
    for one, other in itertools.zip_longest(found, expected):
        if one != other:
            return [f"{name}: found (document, offset, (tokens, dtype)) {one}, expected {other} of {INDEX_FILE}"]
    problems = list(_id_problems(corpus, first, last, name))
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

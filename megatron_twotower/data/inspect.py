"""The command `twotower data inspect`: shows what prepared data contains."""

import itertools
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import remote
from megatron_twotower.data.blend import prepared_folders, split_folder
from megatron_twotower.data.documents import printable
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import load_tokenizer

_DOCUMENTS_MEASURED = 1 << 24  # of a larger corpus, only the first documents are measured
_TOKENS_MEASURED = 1 << 24  # whose masks are counted
_SHOWN_BLOCKS = 12
SCORED_STYLE = "green"
_BAR_CHARACTERS = 40


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
    """Print counts, lengths and sample documents of every corpus, and draw the lengths.

    Args:
        data, folder: As in `blend.prepared_folders`.
        samples: Documents to print of each corpus, with their block boundaries.
        picture: The image file to write.
        tokenizer: Decodes the samples. If None, the tokenizer of the prepared folder decodes them;
            at a URL, ids are printed.

    Raises:
        UserError: Something cannot be opened, or `block_size` is below 1.
    """
    if block_size < 1:
        raise UserError(f"block_size {block_size}: expected at least 1")
    console = Console(highlight=False)
    folders = prepared_folders(data, folder=folder)
    corpora = {name: Corpus.open(split_folder(prepared, split)) for name, prepared in folders.items()}
    lengths = {name: document_lengths(corpus) for name, corpus in corpora.items()}
    edges = length_edges(max((int(one.max()) for one in lengths.values() if len(one)), default=1))
    histograms = {name: np.histogram(one, bins=edges)[0].tolist() for name, one in lengths.items()}
    for name, corpus in corpora.items():
        console.print(_counts(name, corpus, lengths[name]))
        console.print(text_histogram(histograms[name], edges), markup=False, soft_wrap=True)
        console.print(_blocks(corpus, block_size), markup=False, soft_wrap=True)
        opened = _tokenizer(tokenizer, folders[name])
        for number in evenly_spaced(corpus.documents, samples):
            console.print(Text(f"\ndocument {number:,}: {document_name(corpus, number)}", style="bold"))
            console.print(decoded_blocks(corpus, number, block_size=block_size, tokenizer=opened), soft_wrap=True)
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
    """(documents,) int64 tokens of each document, of the first 16 million."""
    return np.diff(corpus.starts[: _DOCUMENTS_MEASURED + 1])


def length_edges(longest: int) -> list[int]:
    """The edges of the bins: powers of two from 1 to the first one above the longest length."""
    return [1 << power for power in range(max(longest, 1).bit_length() + 1)]


def evenly_spaced(documents: int, samples: int) -> list[int]:
    """Up to `samples` document numbers at equal distances."""
    return sorted({documents * place // samples for place in range(samples)}) if documents else []


def text_histogram(counts: Sequence[int], edges: Sequence[int]) -> str:
    """A histogram with one line a bin; bars are relative to the fullest bin.

    Empty bins at both ends are left out.
    """
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
    if corpus.scored_offsets is not None:
        measured = min(corpus.total_tokens, _TOKENS_MEASURED)
        scored = corpus.scored(0, measured)
        share = 0.0 if scored is None else float(scored.mean())
        turns = ", ".join(map(str, corpus.turn_ends))
        rows["conversations"] = (
            f"{100 * share:.1f}% of the first {measured:,} tokens are scored; turns end with {turns}"
        )
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _blocks(corpus: Corpus, block_size: int) -> str:
    """The effect of document boundaries on blocks, with boundaries ignored and respected."""
    starts = corpus.starts[: _DOCUMENTS_MEASURED + 1]
    tokens = int(starts[-1])
    inner = starts[1:-1][starts[1:-1] % block_size != 0]
    straddling = len(np.unique(inner // block_size))
    blocks = -(-tokens // block_size)
    padding = int((-np.diff(starts) % block_size).sum())
    what = "padding is" if corpus.scored_offsets is None else "repeated ends of turns are"
    return (
        f"blocks of {block_size} tokens: {100 * straddling / max(blocks, 1):.2f}% contain a document boundary; "
        f"with documents kept apart, {what} {100 * padding / max(tokens + padding, 1):.2f}% of all positions"
    )


def decoded_blocks(corpus: Corpus, number: int, *, block_size: int, tokenizer: PreTrainedTokenizerFast | None) -> Text:
    """The first blocks of a document, decoded, with `|` between blocks.

    What is scored of a conversation is green; its blocks are those of the conversation alone. The
    blocks of a text are those of the stream with document boundaries ignored.
    """
    ids, scored = corpus.document(number), corpus.scored_document(number)
    offset = block_size if scored is not None else -int(corpus.starts[number]) % block_size or block_size
    cuts = [0, *range(offset, len(ids), block_size), len(ids)]
    shown = Text()
    for begin, end in itertools.islice(itertools.pairwise(cuts), _SHOWN_BLOCKS):
        shown.append("|" if begin else "", style="bold red")
        for low, high, is_scored in _runs(scored, begin, end):
            part = ids[low:high].tolist()
            text = tokenizer.decode(part) if tokenizer else " ".join(map(str, part))
            shown.append(text, style=SCORED_STYLE if is_scored else "")
    return shown.append(" …" if len(cuts) - 1 > _SHOWN_BLOCKS else "", style="bold red")


def _runs(scored: np.ndarray | None, begin: int, end: int) -> list[tuple[int, int, bool]]:
    """(first, last, whether scored) of the runs of equal positions from `begin` to `end`."""
    if scored is None:
        return [(begin, end, False)]
    edges = [begin, *(np.flatnonzero(np.diff(scored[begin:end])) + begin + 1).tolist(), end]
    return [(low, high, bool(scored[low])) for low, high in itertools.pairwise(edges)]


def document_name(corpus: Corpus, number: int) -> str:
    """The name of a document in its shard: the file, or file and line, of its text."""
    shard = corpus.shard_of(int(corpus.starts[number]))
    with tarfile.open(corpus.local_shard(shard), mode="r:") as tar:
        for member in tar:
            if member.name == f"{number:09d}.json" and (stream := tar.extractfile(member)):
                return printable(json.load(stream)["name"])
    return "without a name"


def _tokenizer(given: Path | None, folder: str) -> PreTrainedTokenizerFast | None:
    if given is not None:
        return load_tokenizer(given)
    return None if remote.is_url(folder) else load_tokenizer(Path(folder) / "tokenizer")

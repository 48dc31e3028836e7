"""Writes a prepared folder of documents whose ids are known, such as text that a model wrote."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.common.files import write_file
from megatron_twotower.data.shards import INDEX_VERSION, Sample, Shard, ShardArrays, ids_dtype, write_index, write_shard
from megatron_twotower.data.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_fingerprint

SHARD_TOKENS = 1_000_000


def write_corpus(
    folder: Path,
    splits: Mapping[str, Iterable[tuple[str, np.ndarray]]],
    *,
    vocab_size: int,
    tokenizer: Path,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a prepared folder (see `shards`).

    Args:
        folder: A folder that is empty, or in which a run with the same arguments was interrupted.
        splits: Name and ids (n,) of each document, by split.
        vocab_size: Above all ids. A model may have more entries than its tokenizer.
        tokenizer: The folder of the tokenizer of the ids.
        provenance: The content of `provenance.json`.

    Returns:
        The summary, as `data prepare` writes it. No document counts as left out.
    """
    copy_tokenizer(tokenizer, folder / "tokenizer")
    opened = load_tokenizer(tokenizer)
    header: dict[str, Any] = {
        "version": INDEX_VERSION,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "exact_ids": True,
        "dtype": ids_dtype(vocab_size),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    summary: dict[str, Any] = {**header, "splits": {}}
    for split, documents in splits.items():
        totals = Counter(documents=0, tokens=0, bytes=0, characters=0)

        def samples(documents: Iterable[tuple[str, np.ndarray]], totals: Counter[str]) -> Iterator[Sample]:
            for name, ids in documents:
                text = opened.decode(ids.tolist(), skip_special_tokens=True)
                size = len(text.encode())
                totals.update(documents=1, tokens=len(ids), bytes=size, characters=len(text))
                yield Sample(name, size, ids.astype(header["dtype"]))

        (folder / split).mkdir(exist_ok=True)
        shards, arrays = _write_shards(folder / split, samples(documents, totals))
        write_index(folder / split, header={**header, **totals, "left_out": {}}, shards=shards, arrays=arrays)
        summary["splits"][split] = {**totals, "left_out": {}, "shards": len(shards)}
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_file(folder / "provenance.json", json.dumps(provenance, indent=2) + "\n")
    return summary


def _write_shards(folder: Path, samples: Iterable[Sample]) -> tuple[list[Shard], list[ShardArrays]]:
    """Write shards of up to `SHARD_TOKENS`, or of one longer document."""
    shards: list[Shard] = []
    arrays: list[ShardArrays] = []
    written = 0
    for batch in _batches(samples):
        path = folder / f"shard-{len(shards):05d}.tar"
        sha256, found = write_shard(path, batch, first=written)
        tokens = int(found.lengths.sum())
        shards.append(Shard(path.name, path.stat().st_size, sha256, len(batch), tokens))
        arrays.append(found)
        written += len(batch)
    return shards, arrays


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    tokens = 0
    for sample in samples:
        if batch and tokens + len(sample.tokens) > SHARD_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(sample)
        tokens += len(sample.tokens)
    if batch:
        yield batch

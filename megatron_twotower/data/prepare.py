"""Text -> a prepared folder (see `shards`), by worker processes, in three stages that a killed run goes on from.

1. Every unit of the input is tokenised to a part. 2. It is decided which documents stay, in which
split and in which shard. 3. The shards are written from the parts; a part's ids are removed once
the shards that need them are there.

Stage 2 sees the parts in the order of the units and nothing else, so the result does not depend on
the number of workers, nor on how often the run was killed. Memory: stage 2 holds 18 bytes a
document of all of the input (16 of them its digest; none without deduplication) and a table of the
shards; a worker holds a megabyte of text, or the longest one, and its ids. Files of text are listed
in memory, some hundred bytes each. Disk: parts are about as large as shards.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_twotower import __version__
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import CorpusProgress, OnCorpusProgress
from megatron_twotower.data import workers, workspace
from megatron_twotower.data.documents import SUFFIXES, TRAIN, VALIDATION, Unit, cut_units, find_documents
from megatron_twotower.data.parts import (
    FIRST_FAULTS,
    ShardTask,
    UnitTask,
    part_path,
    read_part,
    read_planned_shard,
    shard_arrays,
    write_part,
    write_planned_shard,
)
from megatron_twotower.data.selection import Selection, lines_before, select
from megatron_twotower.data.shards import INDEX_FILE, INDEX_VERSION, Shard, write_index
from megatron_twotower.data.tokenizer import TOKENIZER_FILE, load_tokenizer, tokenizer_fingerprint

_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_MARKS = ("none", "document")
_LINES_BEFORE_STOPPING = 100_000


@dataclass(frozen=True)
class Settings:
    """What decides the result beside the input and the tokenizer."""

    holdout_fraction: float
    shard_tokens: int
    text_field: str
    min_tokens: int
    max_tokens: int | None
    deduplicate: bool
    bos: str
    eos: str
    suffixes: tuple[str, ...]
    unit_bytes: int


def prepare(
    inputs: Sequence[str],
    *,
    tokenizer: Path,
    output: Path,
    holdout_fraction: float = 0.05,
    shard_tokens: int = 1_000_000,
    overwrite: bool = False,
    text_field: str = "text",
    max_malformed: float = 0.001,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    deduplicate: bool = True,
    bos: str = "none",
    eos: str = "document",
    suffixes: Sequence[str] = SUFFIXES,
    workers: int = 1,
    unit_bytes: int = 8 << 20,
    progress: OnCorpusProgress | None = None,
) -> dict[str, Any]:
    """Tokenise `inputs` into the folder `output` (see `shards`) and return its summary.

    inputs: files and folders of text or records, or `python-stdlib` (`documents.find_documents`). A
    record's text is its field (column) `text_field`; one that breaks its format is counted, and
    more of them than `max_malformed` stop the run: a share of all records below 1, a number of them
    from 1 on. With `bos` or `eos` "document" every document begins or ends with the tokenizer's BOS
    or EOS id, with "none" not.

    Left out and counted: a file that is not UTF-8; text that is empty, that repeats another (unless
    not `deduplicate`; the held-out copy stays), or has fewer than `min_tokens` or more than
    `max_tokens` ids. Held out: a file of text by its name (`documents.split_documents`), a record
    by its text: when the SHA-256, read as a fraction, is below `holdout_fraction`, however the
    input is cut into files. A shard takes documents up to `shard_tokens` tokens, or one longer
    document. The same inputs give the same bytes for any number of `workers` (1: this process).

    An interrupted run leaves OUTPUT.partial, and goes on from there when it is called again with
    the same settings.

    Errors: `UserError` for a missing input or tokenizer, input without text, a value out of range,
    too many malformed records, a disk that is full, OUTPUT.partial of other settings, or an
    `output` that exists; with `overwrite` an earlier prepared folder (and OUTPUT.partial) is
    replaced, and nothing else ever is. `output` is as it was then.
    """
    output = Path(output)
    settings = Settings(
        holdout_fraction=holdout_fraction,
        shard_tokens=shard_tokens,
        text_field=text_field,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        deduplicate=deduplicate,
        bos=bos,
        eos=eos,
        suffixes=tuple(suffixes),
        unit_bytes=unit_bytes,
    )
    _check_settings(settings, workers=workers, max_malformed=max_malformed)
    workspace.check_output(output, mark=f"{TRAIN}/{INDEX_FILE}", overwrite=overwrite)
    vocabulary = _vocabulary(Path(tokenizer), settings)
    documents = find_documents(inputs, suffixes=suffixes)
    units = cut_units(documents, holdout_fraction=holdout_fraction, text_field=text_field, unit_bytes=unit_bytes)
    asked = _identity(inputs, units, settings, vocabulary)
    with workspace.resuming(output, plan=asked, overwrite=overwrite) as partial:
        job = _Job(partial, units, Path(tokenizer), settings, vocabulary, workers, progress or (lambda _: None))
        abouts = _write_parts(job, max_malformed=max_malformed)
        plan = select(
            partial,
            units,
            abouts,
            holdout_fraction=holdout_fraction,
            deduplicate=deduplicate,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            shard_tokens=shard_tokens,
            marks=(vocabulary.bos_token_id is not None) + (vocabulary.eos_token_id is not None),
        )
        if not plan.totals[TRAIN]["documents"]:
            workspace.drop(partial)
            found = f"{_what_was_found(plan)} in {len(documents)} files"
            raise UserError(f"{' '.join(inputs)}: found {found}, expected text to train on")
        summary = _write_data(job, plan, faults=_faults(units, abouts))
        _write_provenance(job, inputs=inputs, abouts=abouts)
        workspace.replace(output)
    return summary


# --- before anything is written -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    vocab_size: int
    tokenizer_fingerprint: str
    dtype: str
    bos_token_id: int | None
    eos_token_id: int | None


def _vocabulary(tokenizer: Path, settings: Settings) -> _Vocabulary:
    opened = load_tokenizer(tokenizer)
    wanted = {"bos": (settings.bos, opened.bos_token_id), "eos": (settings.eos, opened.eos_token_id)}
    for name, (mark, token) in wanted.items():
        if mark == "document" and token is None:
            raise UserError(
                f"{tokenizer}: names no {name}_token, expected one in tokenizer_config.json (or {name} none)"
            )
    vocab_size = max(opened.get_vocab().values()) + 1
    return _Vocabulary(
        vocab_size=vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        bos_token_id=opened.bos_token_id if settings.bos == "document" else None,
        eos_token_id=opened.eos_token_id if settings.eos == "document" else None,
    )


def _check_settings(settings: Settings, *, workers: int, max_malformed: float) -> None:
    least = {
        "shard_tokens": (settings.shard_tokens, 1),
        "min_tokens": (settings.min_tokens, 1),
        "unit_bytes": (settings.unit_bytes, 1),
        "max_malformed": (max_malformed, 0),
        "workers": (workers, 1),
    }
    for name, (found, minimum) in least.items():
        if not found >= minimum:  # nor what is not a number
            raise UserError(f"{name} {found}: expected at least {minimum}")
    if settings.max_tokens is not None and settings.max_tokens < settings.min_tokens:
        raise UserError(f"max_tokens {settings.max_tokens}: expected at least min_tokens {settings.min_tokens}")
    for name, mark in (("bos", settings.bos), ("eos", settings.eos)):
        if mark not in _MARKS:
            raise UserError(f"{name} {mark}: expected one of {', '.join(_MARKS)}")


def _identity(
    inputs: Sequence[str], units: Sequence[Unit], settings: Settings, vocabulary: _Vocabulary
) -> dict[str, Any]:
    """What an interrupted run must have in common with this one."""
    files = hashlib.sha256()
    for unit in units:
        for document in unit.files:
            changed = document.path.stat().st_mtime_ns
            files.update(repr((document, unit.split, unit.begin, unit.end, unit.size, changed)).encode())
    return {
        "index_version": INDEX_VERSION,
        "inputs": list(inputs),
        **dataclasses.asdict(settings),
        **dataclasses.asdict(vocabulary),
        "files_sha256": files.hexdigest(),
    }


# --- tokenising ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    folder: Path
    units: Sequence[Unit]
    tokenizer: Path
    settings: Settings
    vocabulary: _Vocabulary
    workers: int
    report: OnCorpusProgress


def _write_parts(job: _Job, *, max_malformed: float) -> list[dict[str, Any]]:
    """What write_part returned of every unit, now or in an interrupted run."""
    abouts = [read_part(job.folder, number) for number in range(len(job.units))]
    missing = [number for number, about in enumerate(abouts) if about is None]
    tasks = (
        UnitTask(
            number,
            job.units[number],
            job.folder,
            job.tokenizer,
            job.vocabulary.tokenizer_fingerprint,
            job.settings.text_field,
            job.vocabulary.dtype,
        )
        for number in missing
    )
    total = sum(unit.size for unit in job.units)
    finished = [about for about in abouts if about is not None]
    before = (
        sum(about["documents"] for about in finished),
        total - sum(job.units[number].size for number in missing),
        sum(about["tokens"] for about in finished),
    )

    def on_count(counts: Sequence[int]) -> None:
        documents, done, tokens = (old + new for old, new in zip(before, counts, strict=True))
        job.report(CorpusProgress("tokenising", min(done, total), total, documents, tokens))

    on_count((0, 0, 0))
    limit = _MalformedLimit(max_malformed)
    limit.check(job.units, abouts)
    for task, about in workers.unordered(write_part, tasks, workers=job.workers, on_count=on_count):
        abouts[task.number] = about
        limit.check(job.units, abouts)
    limit.check(job.units, abouts, last=True)
    return [about for about in abouts if about is not None]


class _MalformedLimit:
    """Stops at too many malformed records. It looks at units in order, so that it stops alike for any workers."""

    def __init__(self, most: float) -> None:
        self.most, self.unit, self.lines, self.malformed = most, 0, 0, 0

    def check(self, units: Sequence[Unit], abouts: Sequence[dict[str, Any] | None], *, last: bool = False) -> None:
        while self.unit < len(abouts) and (about := abouts[self.unit]) is not None:
            self.unit += 1
            if units[self.unit - 1].split is None:
                self.lines += about["lines"]
                self.malformed += about["left_out"].get("malformed", 0)
        most = self.most if self.most >= 1 else self.most * self.lines
        # A share of the first few lines says little.
        if self.malformed > most and (last or self.most >= 1 or self.lines >= _LINES_BEFORE_STOPPING):
            done = [about for about in abouts[: self.unit] if about is not None]
            first = _faults(units[: self.unit], done)[0]
            raise UserError(
                f"{first}: first of {self.malformed} malformed records in {self.lines}, expected at most "
                f"{self.most:g} (max_malformed)"
            )


def _faults(units: Sequence[Unit], abouts: Sequence[dict[str, Any]]) -> list[str]:
    """The first malformed records, `path:line: reason`."""
    faults = []
    for unit, before, about in zip(units, lines_before(units, abouts), abouts, strict=True):
        faults += [f"{unit.files[0].path}:{before + line + 1}: {reason}" for line, reason in about["faults"]]
        if len(faults) >= FIRST_FAULTS:
            break
    return faults[:FIRST_FAULTS]


# --- writing ------------------------------------------------------------------------------------------------------


def _write_data(job: _Job, plan: Selection, *, faults: Sequence[str]) -> dict[str, Any]:
    """Write shards, indices, tokenizer and summary in `data`; return the summary."""
    data, vocabulary = job.folder / "data", job.vocabulary
    for split in plan.splits:
        (data / split).mkdir(exist_ok=True)
    tasks = [
        ShardTask(shard, job.folder, vocabulary.dtype, vocabulary.bos_token_id, vocabulary.eos_token_id)
        for shard in plan.shards
    ]
    shards = _write_shards(job, plan, tasks)
    header = {
        "version": INDEX_VERSION,
        "holdout_fraction": job.settings.holdout_fraction,
        **dataclasses.asdict(vocabulary),
    }
    splits = {}
    for split in plan.splits:
        here = [number for number, task in enumerate(tasks) if task.shard.split == split]
        totals = {**plan.totals[split], "left_out": dict(sorted(plan.left_out[split].items()))}
        write_index(
            data / split,
            header={**header, **totals},
            shards=[shards[number] for number in here],
            arrays=(shard_arrays(tasks[number]) for number in here),
        )
        splits[split] = {**totals, "shards": len(here)}
    (data / "tokenizer").mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (job.tokenizer / name).is_file():
            shutil.copyfile(job.tokenizer / name, data / "tokenizer" / name)
    summary = {**header, "splits": splits, "malformed": list(faults)}
    (data / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _write_shards(job: _Job, plan: Selection, tasks: Sequence[ShardTask]) -> list[Shard]:
    """Write what is missing of the planned shards, and remove the ids of parts that no shard needs any more."""
    shards = [read_planned_shard(task) for task in tasks]
    total = sum(totals["tokens"] for totals in plan.totals.values())
    before = (sum(shard.documents for shard in shards if shard), 0, sum(shard.tokens for shard in shards if shard))

    def on_count(counts: Sequence[int]) -> None:
        documents, _, tokens = (old + new for old, new in zip(before, counts, strict=True))
        job.report(CorpusProgress("writing", tokens, total, documents, tokens))

    places = {(task.shard.split, task.shard.number): place for place, task in enumerate(tasks)}
    missing = [task for task, shard in zip(tasks, shards, strict=True) if shard is None]
    waiting = Counter(span.part for task in missing for span in task.shard.spans)
    for part in range(len(job.units)):
        if part not in waiting:
            part_path(job.folder, part, ".ids").unlink(missing_ok=True)
    on_count((0, 0, 0))
    for task, shard in workers.unordered(write_planned_shard, missing, workers=job.workers, on_count=on_count):
        shards[places[task.shard.split, task.shard.number]] = shard
        for span in task.shard.spans:
            waiting[span.part] -= 1
            if not waiting[span.part]:
                part_path(job.folder, span.part, ".ids").unlink(missing_ok=True)
    return [shard for shard in shards if shard is not None]


def _what_was_found(plan: Selection) -> str:
    """Why there is nothing to train on: what was held out, and what was left out by reason."""
    found = plan.left_out[TRAIN] + plan.left_out[VALIDATION] + Counter(held_out=plan.totals[VALIDATION]["documents"])
    return ", ".join(f"{count} {reason}" for reason, count in sorted(found.items())) or "nothing"


def _write_provenance(job: _Job, *, inputs: Sequence[str], abouts: Sequence[dict[str, Any]]) -> None:
    """What the data was prepared from: the only file that names paths."""
    files: dict[str, dict[str, Any]] = {}
    texts = Counter(files=0, bytes=0)
    for unit, about in zip(job.units, abouts, strict=True):
        if unit.split is not None:
            texts.update(files=len(unit.files), bytes=unit.size)
            continue
        file = files.setdefault(str(unit.files[0].path), {"bytes": 0, "records": 0, "malformed": 0})
        file["bytes"] += unit.size
        file["records"] += about["lines"]
        file["malformed"] += about["left_out"].get("malformed", 0)
    provenance = {
        "inputs": list(inputs),
        "tokenizer": str(job.tokenizer),
        "settings": dataclasses.asdict(job.settings),
        "versions": {"megatron_twotower": __version__, "tokenizers": version("tokenizers"), "numpy": version("numpy")},
        "text_files": texts,
        "record_files": files,
    }
    (job.folder / "data" / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")

"""Makes a prepared folder (see `shards`) from text, in three stages, each done by any workers.

1. Every unit of the input is tokenised to a part.
2. `selection` decides which documents stay, in which split and in which shard.
3. The shards are written from the parts. The ids of a part are removed once all shards that need
   them are written.

A killed run resumes from its finished parts, groups and shards. Stage 2 reads the parts in the
order of the units and nothing else, so the result does not depend on the workers (their number, the
machines that they are on), or on how often the run was killed.

Memory: stage 2 needs some 150 MB in each worker, however many documents there are, and in this
process a table of the shards. A worker needs a megabyte of text, or the longest text, and its ids.
The list of text files needs some hundred bytes a file. Disk: parts are about as large as shards,
and stage 2 adds 26 bytes a document.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_twotower import __version__
from megatron_twotower.common import engines
from megatron_twotower.common.engines import ONE_PROCESS, EngineSettings, Needs
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import CorpusProgress, OnCorpusProgress
from megatron_twotower.common.workers import Engine
from megatron_twotower.config.special_tokens import read_special_tokens
from megatron_twotower.data import repeats
from megatron_twotower.data import workspace as workspaces
from megatron_twotower.data.conversations import MESSAGE_FIELDS, is_conversation, open_template
from megatron_twotower.data.documents import SUFFIXES, TRAIN, VALIDATION, PassedOver, Unit, cut_units, find_inputs
from megatron_twotower.data.installed_packages import Package
from megatron_twotower.data.mask_token import check_mask_token
from megatron_twotower.data.parts import FIRST_FAULTS, UnitTask, read_part, remove_ids, write_part
from megatron_twotower.data.planned_shards import ShardTask, read_planned_shard, shard_arrays, write_planned_shard
from megatron_twotower.data.selection import PASSES, Rules, Selection, lines_before, select
from megatron_twotower.data.shards import (
    CONVERSATIONS_VERSION,
    INDEX_FILE,
    INDEX_VERSION,
    Shard,
    ids_dtype,
    write_index,
)
from megatron_twotower.data.tokenizer import (
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
)

_BOS_AND_EOS_CHOICES = ("none", "document")
_LINES_BEFORE_STOPPING = 100_000  # a share of malformed records among fewer lines says little


@dataclass(frozen=True)
class Settings:
    """What decides the result, in addition to the input and the tokenizer."""

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
    chat: bool
    chat_template: str | None


def prepare(
    inputs: Sequence[str],
    *,
    tokenizer: Path,
    output: str | Path,
    workspace: Path | None = None,
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
    chat: bool = False,
    chat_template: Path | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    engine: EngineSettings = ONE_PROCESS,
    unit_bytes: int = 8 << 20,
    progress: OnCorpusProgress | None = None,
) -> dict[str, Any]:
    """Tokenise `inputs` into the folder `output` (see `shards`) and return its summary.

    The same inputs give the same bytes with any `engine`. An interrupted run leaves
    OUTPUT.partial, and resumes from there when it is called again with the same settings.

    Left out and counted are files that are not UTF-8, and texts that are empty, that repeat another
    text, or that are too short or too long. What is passed over in a folder is counted and named.
    A shard takes documents up to `shard_tokens` tokens, or one longer document.

    Args:
        inputs: Files and folders of text or records, URLs of such, `python-stdlib` or
            `python-packages` (`documents.find_documents`).
        output: The folder, or its URL. At a URL each shard is complete or absent, and the index of
            the training split is written last.
        workspace: For an output at a URL, the folder in which NAME.partial is made.
        holdout_fraction: The share of held-out texts. A text is held out if its hash, as a fraction
            of the largest hash, is below it. The hash of a text file is the SHA-256 of its name
            (`documents.split_documents`). The hash of a record is that of its text, so it does not
            matter how records are cut into files.
        overwrite: Replace an earlier prepared folder, and OUTPUT.partial. Nothing else is ever
            replaced.
        text_field: The field (column) of a record with its text.
        max_malformed: How many records may have the wrong format: below 1 a share of all records,
            from 1 on a number. More stop the run.
        min_tokens, max_tokens: Limits of the length of a text in ids.
        deduplicate: Leave out a text that repeats another. The held-out copy stays.
        bos, eos: With "document", each document begins or ends with the tokenizer's BOS or EOS id;
            with "none" it does not. Conversations have those of their template.
        chat: The records are conversations (`conversations`). What is scored is stored with the
            ids.
        chat_template: A file with the template for them, in place of that of the tokenizer.
        suffixes: Of the text files in a folder.
        engine: Who does the work. With Ray, inputs, tokenizer and output are at paths that all
            nodes share, or inputs and output at URLs.
        unit_bytes: Input that one worker reads at a time.

    Raises:
        UserError: An input or the tokenizer is missing or cannot be read, there is no text to train
            on, a value is out of range, too many records are malformed, the disk is full,
            OUTPUT.partial is from other settings, `output` exists, or the engine cannot start.
            `output` is then unchanged.
    """
    place = workspaces.place_of(output, workspace)
    settings = Settings(
        holdout_fraction=holdout_fraction,
        shard_tokens=shard_tokens,
        text_field=text_field,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        deduplicate=deduplicate,
        bos="none" if chat else bos,
        eos="none" if chat else eos,
        suffixes=tuple(suffixes),
        unit_bytes=unit_bytes,
        chat=chat,
        chat_template=None if chat_template is None else _read_template(chat_template),
    )
    _check_settings(settings, max_malformed=max_malformed)
    place.check(mark=_MARK, overwrite=overwrite)
    vocabulary = _vocabulary(Path(tokenizer), settings)
    is_record = is_conversation if chat else None
    text_field = MESSAGE_FIELDS[0] if chat else text_field
    found = find_inputs(inputs, suffixes=suffixes, text_field=text_field, is_record=is_record)
    documents = found.documents
    units = cut_units(
        documents, holdout_fraction=holdout_fraction, text_field=text_field, unit_bytes=unit_bytes, is_record=is_record
    )
    template = open_template(Path(tokenizer), settings.chat_template).digest if chat else None
    request = _request(inputs, units, settings, vocabulary) | {"template_sha256": template} | place.request
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(workspaces.resuming(place.partial, request=request, overwrite=overwrite))
        needs = Needs(files=(partial / workspaces.REQUEST_FILE, Path(tokenizer) / TOKENIZER_FILE))
        run = stack.enter_context(engines.started(engine, needs))
        job = _Job(partial, units, Path(tokenizer), settings, vocabulary, run, progress or (lambda _: None), place.url)
        part_counts = _write_parts(job, max_malformed=max_malformed)
        selection = _select(job, part_counts)
        if not selection.totals[TRAIN]["documents"]:
            workspaces.discard(partial)
            what = f"{_what_was_found(selection)} in {len(documents)} files"
            raise UserError(f"{' '.join(inputs)}: found {what}, expected text to train on")
        conversations = _conversations(part_counts) if chat else None
        summary, shards = _write_data(
            job,
            selection,
            faults=_faults(units, part_counts),
            passed_over=found.passed_over,
            conversations=conversations,
        )
        _write_provenance(job, inputs=inputs, packages=found.packages, part_counts=part_counts)
        place.finish(mark=_MARK, written=shards)
    return summary


_MARK = f"{TRAIN}/{INDEX_FILE}"  # makes a folder a prepared one


# --- checks ---


@dataclass(frozen=True)
class _Vocabulary:
    vocab_size: int
    tokenizer_fingerprint: str
    exact_ids: bool
    dtype: str
    bos_token_id: int | None
    eos_token_id: int | None


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a chat template") from error


def _vocabulary(tokenizer: Path, settings: Settings) -> _Vocabulary:
    opened, said = load_tokenizer(tokenizer), read_special_tokens(tokenizer)
    if said.mask_token_id is not None:
        check_mask_token(
            tokenizer,
            said.mask_token_id,
            vocab_size=max(opened.get_vocab().values()) + 1,
            key="mask_token_id",
            eos_ids=said.eos_token_ids,
            tokenizer=opened,
        )
    ids = {"bos": (settings.bos, opened.bos_token_id), "eos": (settings.eos, opened.eos_token_id)}
    for name, (choice, token) in ids.items():
        if choice == "document" and token is None:
            raise UserError(
                f"{tokenizer}: names no {name}_token, expected one in tokenizer_config.json (or {name} none)"
            )
    vocab_size = max(opened.get_vocab().values()) + 1
    return _Vocabulary(
        vocab_size=vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        exact_ids=True,
        dtype=ids_dtype(vocab_size),
        bos_token_id=opened.bos_token_id if settings.bos == "document" else None,
        eos_token_id=opened.eos_token_id if settings.eos == "document" else None,
    )


def _check_settings(settings: Settings, *, max_malformed: float) -> None:
    least = {
        "shard_tokens": (settings.shard_tokens, 1),
        "min_tokens": (settings.min_tokens, 1),
        "unit_bytes": (settings.unit_bytes, 1),
        "max_malformed": (max_malformed, 0),
    }
    for name, (found, minimum) in least.items():
        if not found >= minimum:  # true for NaN
            raise UserError(f"{name} {found}: expected at least {minimum}")
    if settings.max_tokens is not None and settings.max_tokens < settings.min_tokens:
        raise UserError(f"max_tokens {settings.max_tokens}: expected at least min_tokens {settings.min_tokens}")
    for name, choice in (("bos", settings.bos), ("eos", settings.eos)):
        if choice not in _BOS_AND_EOS_CHOICES:
            raise UserError(f"{name} {choice}: expected one of {', '.join(_BOS_AND_EOS_CHOICES)}")


def _request(
    inputs: Sequence[str], units: Sequence[Unit], settings: Settings, vocabulary: _Vocabulary
) -> dict[str, Any]:
    """What must be the same in an interrupted run for this one to resume it."""
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
        "documents_at_once": repeats.DOCUMENTS_AT_ONCE,
        "files_sha256": files.hexdigest(),
    }


# --- tokenising ---


@dataclass(frozen=True)
class _Job:
    folder: Path
    units: Sequence[Unit]
    tokenizer: Path
    settings: Settings
    vocabulary: _Vocabulary
    engine: Engine
    report: OnCorpusProgress
    url: str | None


def _write_parts(job: _Job, *, max_malformed: float) -> list[dict[str, Any]]:
    """What `write_part` returned for every unit, now or in an interrupted run."""
    found = [read_part(job.folder, number) for number in range(len(job.units))]
    missing = [number for number, counts in enumerate(found) if counts is None]
    # Units that could not be cut come first, the largest one before the others, so that no worker
    # is left alone with one at the end.
    missing.sort(key=lambda number: -max(job.units[number].size, job.settings.unit_bytes))
    tasks = (
        UnitTask(
            number,
            job.units[number],
            job.folder,
            job.tokenizer,
            job.vocabulary.tokenizer_fingerprint,
            job.settings.text_field,
            job.vocabulary.dtype,
            job.settings.chat,
            job.settings.chat_template,
        )
        for number in missing
    )
    total = sum(unit.size for unit in job.units)
    finished = [counts for counts in found if counts is not None]
    before = (
        sum(counts["documents"] for counts in finished),
        total - sum(job.units[number].size for number in missing),
        sum(counts["tokens"] for counts in finished),
    )

    def on_count(amounts: Sequence[int]) -> None:
        documents, done, tokens = (old + new for old, new in zip(before, amounts, strict=True))
        job.report(CorpusProgress("tokenising", min(done, total), total, documents, tokens))

    on_count((0, 0, 0))
    limit = _MalformedLimit(max_malformed)
    limit.check(job.units, found)
    for task, counts in job.engine(write_part, tasks, on_count=on_count):
        found[task.number] = counts
        limit.check(job.units, found)
    limit.check(job.units, found, last=True)
    return [counts for counts in found if counts is not None]


class _MalformedLimit:
    """Stops at too many malformed records.

    It looks at units in order, so it stops at the same record for any number of workers.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.unit, self.lines, self.malformed = limit, 0, 0, 0

    def check(self, units: Sequence[Unit], found: Sequence[dict[str, Any] | None], *, last: bool = False) -> None:
        """Add the units that are finished since the last call, up to the first unfinished one.

        Raises:
            UserError: There are too many malformed records.
        """
        while self.unit < len(found) and (counts := found[self.unit]) is not None:
            self.unit += 1
            if units[self.unit - 1].split is None:
                self.lines += counts["lines"]
                self.malformed += counts["left_out"].get("malformed", 0)
        limit = self.limit if self.limit >= 1 else self.limit * self.lines
        if self.malformed > limit and (last or self.limit >= 1 or self.lines >= _LINES_BEFORE_STOPPING):
            finished = [counts for counts in found[: self.unit] if counts is not None]
            first = _faults(units[: self.unit], finished)[0]
            raise UserError(
                f"{first}: first of {self.malformed} malformed records in {self.lines}, expected at most "
                f"{self.limit:g} (max_malformed)"
            )


def _faults(units: Sequence[Unit], part_counts: Sequence[dict[str, Any]]) -> list[str]:
    """The first malformed records, `path:line: reason`."""
    faults = []
    for unit, before, counts in zip(units, lines_before(units, part_counts), part_counts, strict=True):
        faults += [f"{unit.files[0].path}:{before + line + 1}: {reason}" for line, reason in counts["faults"]]
        if len(faults) >= FIRST_FAULTS:
            break
    return faults[:FIRST_FAULTS]


# --- deciding ---


def _select(job: _Job, part_counts: Sequence[dict[str, Any]]) -> Selection:
    total = PASSES * sum(counts["documents"] for counts in part_counts)

    def on_count(amounts: Sequence[int]) -> None:
        job.report(CorpusProgress("selecting", amounts[0], total, amounts[0] // PASSES, 0))

    settings, vocabulary = job.settings, job.vocabulary
    return select(
        job.folder,
        job.units,
        part_counts,
        rules=Rules(settings.holdout_fraction, settings.deduplicate, settings.min_tokens, settings.max_tokens),
        shard_tokens=settings.shard_tokens,
        added_ids=(vocabulary.bos_token_id is not None) + (vocabulary.eos_token_id is not None),
        engine=job.engine,
        on_count=on_count,
    )


# --- writing ---


def _conversations(part_counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an index says of conversations: the ids that end their scored turns."""
    return {"turn_ends": sorted({token for counts in part_counts for token in counts["turn_ends"]})}


def _write_data(
    job: _Job,
    selection: Selection,
    *,
    faults: Sequence[str],
    passed_over: PassedOver,
    conversations: dict[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write shards, indices, tokenizer and summary into `data`, or the shards to a URL.

    Returns:
        The summary, and the sizes in bytes of the shards by name.
    """
    data, vocabulary = job.folder / "data", job.vocabulary
    if job.url is not None:
        workspaces.clear_url(job.url, job.folder)
    for split in selection.splits:
        (data / split).mkdir(exist_ok=True)
    tasks = [
        ShardTask(
            shard,
            job.folder,
            vocabulary.dtype,
            vocabulary.bos_token_id,
            vocabulary.eos_token_id,
            conversations is not None,
            None if job.url is None else f"{job.url}/{shard.split}",
        )
        for shard in selection.shards
    ]
    shards = _write_shards(job, selection, tasks)
    header = {
        "version": INDEX_VERSION if conversations is None else CONVERSATIONS_VERSION,
        "holdout_fraction": job.settings.holdout_fraction,
        **dataclasses.asdict(vocabulary),
        **({} if conversations is None else {"conversations": conversations}),
    }
    splits = {}
    for split in selection.splits:
        own = [number for number, task in enumerate(tasks) if task.shard.split == split]
        totals = {**selection.totals[split], "left_out": dict(sorted(selection.left_out[split].items()))}
        write_index(
            data / split,
            header={**header, **totals},
            shards=[shards[number] for number in own],
            arrays=(shard_arrays(tasks[number]) for number in own),
        )
        splits[split] = {**totals, "shards": len(own)}
    copy_tokenizer(job.tokenizer, data / "tokenizer")
    if job.settings.chat_template is not None:
        (data / "tokenizer" / TEMPLATE_FILE).write_text(job.settings.chat_template)
    summary = {
        **header,
        "splits": splits,
        "malformed": list(faults),
        "passed_over": {"counts": dict(sorted(passed_over.counts.items())), "first": passed_over.first},
    }
    (data / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary, {f"{task.shard.split}/{shard.file}": shard.bytes for task, shard in zip(tasks, shards, strict=True)}


def _write_shards(job: _Job, selection: Selection, tasks: Sequence[ShardTask]) -> list[Shard]:
    """Write the planned shards that are missing; remove the ids of parts that no shard needs."""
    shards = [read_planned_shard(task) for task in tasks]
    total = sum(totals["tokens"] for totals in selection.totals.values())
    before = (sum(shard.documents for shard in shards if shard), 0, sum(shard.tokens for shard in shards if shard))

    def on_count(amounts: Sequence[int]) -> None:
        documents, _, tokens = (old + new for old, new in zip(before, amounts, strict=True))
        job.report(CorpusProgress("writing", tokens, total, documents, tokens))

    places = {(task.shard.split, task.shard.number): place for place, task in enumerate(tasks)}
    missing = [task for task, shard in zip(tasks, shards, strict=True) if shard is None]
    needed_by = Counter(source.part for task in missing for source in task.shard.ranges)
    for part in range(len(job.units)):
        if part not in needed_by:
            remove_ids(job.folder, part)
    on_count((0, 0, 0))
    for task, shard in job.engine(write_planned_shard, missing, on_count=on_count):
        shards[places[task.shard.split, task.shard.number]] = shard
        for source in task.shard.ranges:
            needed_by[source.part] -= 1
            if not needed_by[source.part]:
                remove_ids(job.folder, source.part)
    return [shard for shard in shards if shard is not None]


def _what_was_found(selection: Selection) -> str:
    """The reasons why there is nothing to train on: how many texts were held out or left out."""
    found = (
        selection.left_out[TRAIN]
        + selection.left_out[VALIDATION]
        + Counter(held_out=selection.totals[VALIDATION]["documents"])
    )
    return ", ".join(f"{count} {reason}" for reason, count in sorted(found.items())) or "nothing"


def _write_provenance(
    job: _Job, *, inputs: Sequence[str], packages: Sequence[Package], part_counts: Sequence[dict[str, Any]]
) -> None:
    """Write what the data was prepared from. No other file names paths."""
    files: dict[str, dict[str, Any]] = {}
    texts = Counter(files=0, bytes=0)
    for unit, counts in zip(job.units, part_counts, strict=True):
        if unit.split is not None:
            texts.update(files=len(unit.files), bytes=unit.size)
            continue
        file = files.setdefault(str(unit.files[0].path), {"bytes": 0, "records": 0, "malformed": 0})
        file["bytes"] += unit.size
        file["records"] += counts["lines"]
        file["malformed"] += counts["left_out"].get("malformed", 0)
    provenance: dict[str, Any] = {
        "inputs": list(inputs),
        "tokenizer": str(job.tokenizer),
        "settings": dataclasses.asdict(job.settings),
        "versions": {"megatron_twotower": __version__, "tokenizers": version("tokenizers"), "numpy": version("numpy")},
        "text_files": texts,
        "record_files": files,
    }
    if packages:
        provenance["packages"] = [package.description() for package in packages]
    (job.folder / "data" / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")

"""Bulk text: the prompts of a file, continued in batches, as JSON lines in the same order.

Prompts of like length go into one batch, chosen within a window of a few hundred neighbours, so
that little padding is computed and no more than a window is held. Every finished batch is one line
of OUTPUT.partial, on disk before the next one starts: a run that was killed goes on behind it, with
the same text as if it had never stopped. At the end the rows take their places, and OUTPUT appears
whole.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_file, partial_path
from megatron_twotower.common.progress import stage_bars
from megatron_twotower.data.tokenizer import text_encoder
from megatron_twotower.generate.engine import (
    GenerationSettings,
    check_mode,
    decode,
    default_devices,
    load,
    mask_token_id,
    place,
    write,
)
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

VERSION = 1
JSON_LINES = (".jsonl", ".ndjson")
# What a row of the output holds beside the fields of its prompt.
WRITTEN_FIELDS = ("text", "new_tokens", "finish_reason")
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class BulkSettings:
    """batch_size: prompts written at a time. window_batches: among so many batches of neighbours, like lengths meet."""

    batch_size: int = 16
    window_batches: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "window_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected at least 1")

    @property
    def window(self) -> int:
        return self.batch_size * self.window_batches


@dataclass(frozen=True)
class Tally:
    """How far a bulk run is: prompts done and in all; of this process: new tokens, seconds, and computed positions of
    prompts, padding included, and those that were text."""

    done: int
    total: int
    new_tokens: int
    seconds: float
    computed: int
    text: int

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / max(self.seconds, 1e-9)

    @property
    def padding(self) -> float:
        return 1 - self.text / max(self.computed, 1)


Report = Callable[[Tally], None]


# --- prompts ------------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a prompts file, each with a `prompt`: lines of text, or JSON lines (by the file's suffix).

    Raises: UserError: with file and line: an empty prompt, a line that is no JSON object, a field
        that the output needs.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                yield _record(line.rstrip("\r\n"), where=f"{path}:{number}", json_lines=path.suffix in JSON_LINES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}), expected a text file of prompts") from error


def _record(line: str, *, where: str, json_lines: bool) -> dict[str, Any]:
    record: Any = {"prompt": line}
    if json_lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            found = f"{error.msg}, column {error.colno}"
            raise UserError(f"{where}: not valid JSON ({found}), expected an object with a field 'prompt'") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f"{where}: found {line[:60]!r}, expected a JSON object with a text field 'prompt'")
        for name in WRITTEN_FIELDS:
            if name in record:
                raise UserError(f"{where}: found a field {name!r}, which the output writes, expected another name")
    if not record["prompt"]:
        raise UserError(f"{where}: found an empty prompt, expected at least one token")
    return record


def survey(path: Path) -> tuple[int, str]:
    """How many prompts a file has, all of them checked, and its SHA-256."""
    count = sum(1 for _ in read_prompts(path))
    if not count:
        raise UserError(f"{path}: found no prompt, expected one on each line")
    with open(path, "rb") as stream:
        return count, hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class PromptBatch:
    """Prompts written together. number: of the run. places: of the prompts in the file. ids: of each prompt."""

    number: int
    places: list[int]
    records: list[dict[str, Any]]
    ids: list[list[int]]


def batches(
    path: Path, encode: Callable[[Sequence[str]], list[list[int]]], bulk: BulkSettings
) -> Iterator[PromptBatch]:
    """All batches of a file, in their order. Longest first within a window: what does not fit fails at once."""
    prompts = enumerate(read_prompts(path))
    number = 0
    while window := list(islice(prompts, bulk.window)):
        ids = encode([record["prompt"] for _, record in window])
        for (position, record), own in zip(window, ids, strict=True):
            if not own:
                raise UserError(f"{path}:{position + 1}: found {record['prompt']!r}, expected at least one token")
        order = sorted(range(len(window)), key=lambda i: -len(ids[i]))
        for start in range(0, len(order), bulk.batch_size):
            chosen = order[start : start + bulk.batch_size]
            yield PromptBatch(
                number, [window[i][0] for i in chosen], [window[i][1] for i in chosen], [ids[i] for i in chosen]
            )
            number += 1


# --- writing ------------------------------------------------------------------------------------------------------


def padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Prompts (b, l) with padding on the left, and their attention mask; None where all are of one length."""
    longest = max(map(len, ids))
    rows = torch.tensor([[0] * (longest - len(row)) + list(row) for row in ids])
    lengths = torch.tensor([[len(row)] for row in ids])
    mask = torch.arange(longest) >= longest - lengths
    return rows, None if bool(mask.all()) else mask.long()


def _seed(seed: int, number: int) -> int:
    """A batch's own seed, so that its text does not depend on what this process has written before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def write_batch(
    model: Model, tokenizer: PreTrainedTokenizerFast, batch: PromptBatch, *, mode: str, settings: GenerationSettings
) -> list[dict[str, Any]]:
    """Rows of the output, in the batch's order."""
    ids, mask = padded(batch.ids)
    device = model.context_tower.device
    output, _ = write(
        model,
        ids.to(device),
        mode=mode,
        settings=replace(settings, seed=_seed(settings.seed, batch.number)),
        mask_id=mask_token_id(tokenizer),
        eos_id=tokenizer.eos_token_id,
        attention_mask=None if mask is None else mask.to(device),
    )
    rows = []
    for record, new in zip(batch.records, output[:, ids.shape[1] :].cpu(), strict=True):
        ends = (new == tokenizer.eos_token_id).nonzero()
        kept = new[: int(ends[0]) + 1] if len(ends) else new
        reason = "stop" if len(ends) else "length"
        rows.append(record | dict(zip(WRITTEN_FIELDS, (decode(tokenizer, kept), len(kept), reason), strict=True)))
    return rows


# --- the journal --------------------------------------------------------------------------------------------------


def model_mark(folder: Path) -> str:
    """A hash that changes with a model: its configuration, tokenizer, and of each weight file the size and both ends.

    The whole of the weights is not read: that would take minutes for a large model, at every start.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            stream.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


@contextlib.contextmanager
def journal(path: Path, plan: dict[str, Any]) -> Iterator[tuple[IO[bytes], int]]:
    """A file with the plan on its first line and a finished batch on each further one, and how many those are.

    Raises:
        UserError: it is of another plan, or another run is at work on it.
    """
    with open(path, "a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: in use, expected no other run of this command") from error
        stream.seek(0)
        whole = lines = 0
        for line in stream:
            if not line.endswith(b"\n"):
                break  # torn when the run was killed
            if lines == 0:
                _check_plan(path, json.loads(line), plan)
            whole, lines = whole + len(line), lines + 1
        stream.truncate(whole)
        stream.seek(whole)
        if lines == 0:
            append(stream, plan)
        empty = stream.tell()
        try:
            yield stream, max(0, lines - 1)
        except UserError:
            if lines <= 1 and os.fstat(stream.fileno()).st_size == empty:
                path.unlink()  # a mistake, found at the first batch
            raise


def _check_plan(path: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    for name in plan:
        if found.get(name) != plan[name]:
            raise UserError(
                f"{path}: found an interrupted run with {name} {found.get(name)}, expected {plan[name]}; "
                "repeat that run as it was, or remove the file"
            )


def append(stream: IO[bytes], entry: dict[str, Any]) -> None:
    stream.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    stream.flush()
    os.fsync(stream.fileno())


def rows_in_order(stream: IO[bytes], window_batches: int) -> Iterator[dict[str, Any]]:
    """The rows of all batches at the places of their prompts; no more than a window is held."""
    stream.seek(0)
    next(stream)  # the plan
    while window := list(islice(stream, window_batches)):
        rows = [pair for line in window for pair in json.loads(line)["rows"]]
        yield from (row for _, row in sorted(rows, key=lambda pair: pair[0]))


# --- all of it ----------------------------------------------------------------------------------------------------


def write_all(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Path,
    output: Path,
    *,
    mode: str,
    settings: GenerationSettings,
    bulk: BulkSettings,
    plan: dict[str, Any],
    report: Report,
) -> Tally:
    """Continue every prompt of a file. `plan` holds all that decides the text, and `prompts`, how many there are.

    Raises: UserError: an interrupted run of another plan, a setting out of range, an output that
        cannot be written.
    """
    tally = Tally(0, plan["prompts"], 0, 0.0, 0, 0)
    with journal(partial_path(output), plan) as (stream, finished):
        for batch in batches(prompts, text_encoder(tokenizer), bulk):
            done = tally.done + len(batch.ids)
            if batch.number < finished:
                tally = replace(tally, done=done)
                continue
            started = time.perf_counter()
            rows = write_batch(model, tokenizer, batch, mode=mode, settings=settings)
            append(stream, {"batch": batch.number, "rows": list(zip(batch.places, rows, strict=True))})
            lengths = [len(ids) for ids in batch.ids]
            tally = Tally(
                done,
                tally.total,
                tally.new_tokens + sum(row["new_tokens"] for row in rows),
                tally.seconds + time.perf_counter() - started,
                tally.computed + max(lengths) * len(lengths),
                tally.text + sum(lengths),
            )
            report(tally)
        with atomic_file(output) as partial, open(partial, "w", encoding="utf-8") as target:
            for row in rows_in_order(stream, bulk.window_batches):
                target.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial_path(output).unlink()
    return tally


def run(
    folder: str | Path,
    *,
    prompts: Path,
    output: Path,
    mode: str,
    settings: GenerationSettings,
    bulk: BulkSettings,
    devices: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """The command `generate --prompts`: a bar while it writes, and a line of figures. Returns the exit status.

    Raises: UserError: before the model is loaded for an unknown mode, a prompt that cannot be used,
        or an output that exists; see also `write_all`.
    """
    check_mode(mode)
    if not output.parent.is_dir():
        raise UserError(f"{output}: cannot be written, expected a file in a folder that exists")
    if output.exists() and not partial_path(output).exists():
        raise UserError(f"{output}: exists already, expected a file that does not")
    count, sha256 = survey(prompts)
    model, tokenizer = load(folder)
    place(model, devices or default_devices())
    plan = {
        "version": VERSION,
        "prompts": count,
        "prompts_sha256": sha256,
        "model": model_mark(Path(folder)),
        "mode": mode,
        **asdict(settings),
        **asdict(bulk),
    }
    with stage_bars() as bars:

        def report(tally: Tally) -> None:
            speed = f"{tally.tokens_per_second:,.0f} tokens/s"
            bars("prompts", tally.done, tally.total, f"{tally.done:,} done, {tally.new_tokens:,} tokens, {speed}")

        tally = write_all(
            model, tokenizer, prompts, output, mode=mode, settings=settings, bulk=bulk, plan=plan, report=report
        )
    (console or Console()).print(
        f"{output}: {count:,} prompts; {tally.new_tokens:,} new tokens in {tally.seconds:.1f} s "
        f"({tally.tokens_per_second:,.0f} tokens/s), {tally.padding:.1%} of the prompts' positions were padding",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0

"""The command `evaluate --data` on conversations: the answers of the held-out ones.

Of each conversation the last answer is scored and generated, after the text before it. Blocks begin
with the answer, as in generation. It does not need Megatron.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import write_file
from megatron_twotower.common.machine import machine, machine_line
from megatron_twotower.common.progress import OnProgress, silent, stage_bars
from megatron_twotower.common.tables import number, plain_table, wide_console, with_error
from megatron_twotower.data.documents import VALIDATION
from megatron_twotower.data.inspect import evenly_spaced
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import check_tokenizer
from megatron_twotower.evaluate.answer_scores import SCORE_FUNCTIONS, ContextAnswer
from megatron_twotower.evaluate.harness_settings import HarnessSettings
from megatron_twotower.evaluate.held_out import EvaluationSettings
from megatron_twotower.evaluate.likelihood import BATCH_ROWS, ar_scores, ratio
from megatron_twotower.generate.engine import (
    GenerationSettings,
    decode,
    default_devices,
    end_of_text,
    eos_token_ids,
    generate_ids,
    load,
    pad_left,
    warn_of_larger_blocks,
)
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

# Settings of texts that answers have no use for.
_OF_TEXTS = (
    "sequence_length_tokens",
    "threshold",
    "block_sizes",
    "steps",
    "every",
    "prompts",
    "prompt_tokens",
    "samples",
)


def has_conversations(data: str | Path) -> bool:
    """Whether a prepared folder holds conversations.

    Raises:
        UserError: It is no prepared folder, or has nothing held out.
    """
    return Corpus.open(Path(data) / VALIDATION).scored_offsets is not None


def held_out_answers(corpus: Corpus, count: int) -> list[ContextAnswer]:
    """The last answers of `count` conversations at equal distances, and the text before each."""
    found = []
    for place in evenly_spaced(corpus.documents, count):
        ids, scored = corpus.document(place).tolist(), corpus.scored_document(place)
        assert scored is not None and scored[-1], "conversations end with their last answer"
        others = np.flatnonzero(~scored)
        begin = int(others[-1]) + 1 if len(others) else 0
        if begin:  # an answer to nothing cannot be generated
            found.append((ids[:begin], ids[begin:]))
    return found


# --- figures ---


@dataclass
class _Written:
    """What was generated, summed over answers."""

    exact: list[bool]
    chosen_by_ar: int = 0
    new_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0

    def row(self, mode: str, threshold: float | None, sampler: str | None = None) -> dict[str, Any]:
        share = sum(self.exact) / len(self.exact)
        return {
            "mode": mode,
            "confidence_threshold": threshold,
            "sampler": sampler,
            "exact_match": share,
            "exact_match_stderr": math.sqrt(share * (1 - share) / max(len(self.exact) - 1, 1)),
            "agreement": self.chosen_by_ar / self.new_tokens,
            "tokens_per_pass": self.new_tokens / self.passes,
            "new_tokens": self.new_tokens,
            "passes": self.passes,
            "seconds": self.seconds,
        }


@torch.no_grad()
def write_answers(
    model: TwoTowerModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[ContextAnswer],
    *,
    mode: str,
    settings: GenerationSettings,
) -> _Written:
    """Generate an answer after each context, and compare its text with the given answer.

    An answer is exact if it has the same text and ends. The tokens that the context tower would
    choose after the same text are counted too.
    """
    written, eos_ids = _Written([]), eos_token_ids(model, tokenizer)
    order = sorted(range(len(pairs)), key=lambda place: -len(pairs[place][0]))
    for start in range(0, len(order), BATCH_ROWS):
        rows = [pairs[place] for place in order[start : start + BATCH_ROWS]]
        ids, mask = pad_left([context for context, _ in rows])
        device = model.context_tower.device
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        output, stats = generate_ids(model, ids, mode=mode, settings=settings, eos_id=eos_ids, attention_mask=mask)
        new = output[:, ids.shape[1] :]
        _, is_chosen = ar_scores(model, model.prefill(ids, mask), new)
        for (_, answer), own, chosen in zip(rows, new.cpu(), is_chosen.cpu(), strict=True):
            end = end_of_text(own.tolist(), eos_ids)
            kept = own if end is None else own[: end + 1]
            same = decode(tokenizer, kept, eos_ids=eos_ids) == decode(tokenizer, torch.tensor(answer), eos_ids=eos_ids)
            written.exact.append(end is not None and same)
            written.chosen_by_ar += int(chosen[: len(kept)].sum())
            written.new_tokens += len(kept)
        written.passes, written.seconds = written.passes + stats.row_passes, written.seconds + stats.seconds
    return written


def answer_nats(
    model: TwoTowerModel, pairs: Sequence[ContextAnswer], settings: EvaluationSettings, scoring: str
) -> tuple[float | None, float | None, int]:
    """Nats per token of the answers, their standard error, and the number of tokens."""
    sums, counts = torch.zeros(len(pairs), dtype=torch.float64), torch.tensor([len(answer) for _, answer in pairs])
    own = HarnessSettings(
        scoring=scoring,
        batch_size=BATCH_ROWS,
        block_size=settings.block_size_tokens,
        bound_draws=settings.bound_draws,
        seed=settings.seed,
    )
    for places, scores in SCORE_FUNCTIONS[scoring](model, pairs, own, model.mask_token_id):
        for place, (score, _) in zip(places, scores, strict=True):
            sums[place] = -score
    return ratio(sums, counts)


def evaluate(
    folder: str | Path, data: str | Path, *, settings: EvaluationSettings, progress: OnProgress = silent
) -> dict[str, Any]:
    """Measure an exported folder on the held-out conversations of a prepared folder.

    Args:
        folder: Two-tower Hugging Face folder.
        data: Prepared data folder, in the tokenizer of the model.
        settings: What to measure: `sequences` conversations, answers of up to `new_tokens` tokens.
        progress: Called with the progress of each stage.

    Returns:
        The figures, ready for JSON.

    Raises:
        UserError: No two-tower folder, data of another tokenizer, or a setting of texts.
    """
    started, default = time.perf_counter(), EvaluationSettings()
    for name in _OF_TEXTS:
        if getattr(settings, name) != getattr(default, name):
            raise UserError(f"{name}: found {getattr(settings, name)} for conversations, which do not use it")
    corpus = Corpus.open(Path(data) / VALIDATION)
    pairs = held_out_answers(corpus, settings.sequences)
    if len(pairs) < 2:
        raise UserError(f"{data}: found {len(pairs)} held-out conversations, expected at least 2")
    model, tokenizer = load(folder, device=default_devices()[0])
    sha256 = check_tokenizer(Path(folder), corpus.tokenizer_fingerprint, exact_ids=corpus.exact_ids, data=data)
    warn_of_larger_blocks(model, settings.block_size_tokens)
    block = settings.block_size_tokens or model.block_size
    settings = replace(settings, block_size_tokens=block)
    rules: list[tuple[float | None, str | None]] = [(None, None), *((each, None) for each in settings.thresholds)]
    rules += [(None, each) for each in settings.samplers]
    stages = 2 + len(rules)
    found: dict[str, Any] = {}
    for done, (name, scoring) in enumerate((("ar_loss", "ar"), ("diffusion_bound", "bound")), start=1):
        mean, stderr, tokens = answer_nats(model, pairs, settings, scoring)
        found |= {name: mean, f"{name}_stderr": stderr, f"{name}_tokens": tokens}
        progress("answers", done, stages)
    rows = []
    for threshold, sampler in rules:
        mode = "ar" if threshold is None and sampler is None else "mask_diffusion"
        own = GenerationSettings(settings.new_tokens, block_size=block, steps_per_block=block, sampler=sampler)
        own = own if threshold is None else replace(own, confidence_threshold=threshold)
        rows.append(write_answers(model, tokenizer, pairs, mode=mode, settings=own).row(mode, threshold, sampler))
        progress("answers", 2 + len(rows), stages)
    unused = (*_OF_TEXTS, "levels")
    return {
        **found,
        "answers": rows,
        "conversations": len(pairs),
        "model": str(folder),
        "data": str(data),
        "tokenizer_sha256": sha256,
        "settings": {name: value for name, value in asdict(settings).items() if name not in unused},
        "machine": machine(),
        "device": str(model.context_tower.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }


# --- the command ---


def answers_table(found: dict[str, Any]) -> Table:
    """A row for AR, for every threshold and for every sampler."""
    rows = [
        [
            row["sampler"] or (row["mode"] if row["mode"] == "ar" else f"threshold {row['confidence_threshold']:g}"),
            with_error(100 * row["exact_match"], 100 * row["exact_match_stderr"]),
            number(100 * row["agreement"], 1),
            number(row["tokens_per_pass"]),
            number(row["new_tokens"] / row["seconds"], 1),
        ]
        for row in found["answers"]
    ]
    headings = ["", "exact %", "agree %", "tokens/pass", "tokens/s"]
    return plain_table(f"answers to {found['conversations']} held-out conversations", headings, rows, left=1)


def run(
    folder: str | Path,
    *,
    data: str | Path,
    output: str | Path,
    settings: EvaluationSettings,
    console: Console | None = None,
) -> None:
    """Run the command: measure with progress bars, write a JSON file, print tables.

    Raises:
        UserError: See `evaluate`; then nothing is written.
    """
    with stage_bars() as progress:
        found = evaluate(folder, data, settings=settings, progress=progress)
    write_file(Path(output), (json.dumps(found, indent=1) + "\n").encode())
    console = console or wide_console()
    losses = [
        (name, with_error(found[key], found[f"{key}_stderr"]), f"{found[f'{key}_tokens']:,}")
        for name, key in (("AR, context tower", "ar_loss"), ("diffusion bound", "diffusion_bound"))
    ]
    console.print(plain_table("held-out answers", ("", "nats per token", "tokens"), losses, left=1))
    console.print(answers_table(found))
    console.print(machine_line(found["machine"]), highlight=False)

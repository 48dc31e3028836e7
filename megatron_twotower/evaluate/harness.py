"""A two-tower folder as a model of lm-evaluation-harness, in every mode, and the tasks of a recipe run with it.

Importing this module registers the name `twotower` there. It needs the extra `eval`.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine
from megatron_twotower.common.progress import silent, stage_bars
from megatron_twotower.data.tokenizer import text_encoder
from megatron_twotower.evaluate.likelihood import ar_scores, bound_scores, mock_ar_scores
from megatron_twotower.evaluate.task_recipes import HarnessTask
from megatron_twotower.generate.engine import MODES, GenerationSettings, default_devices, load, mask_token_id, write

# What a context and a continuation of token ids come to: log-probability, and whether greedy
# writing gives it.
Pair = tuple[list[int], list[int]]
Score = tuple[float, bool]
# Numbers of pairs, and the score of each.
Scored = Iterator[tuple[list[int], list[Score]]]


@dataclass(frozen=True)
class HarnessSettings:
    """How a model answers.

    mode: how text is written. scoring: `ar`, by the context tower; `bound`, a lower bound on the
    denoiser's likelihood from `bound_draws` draws of noise for each block; `mock_ar`, by the
    denoiser as a next-token model.
    max_length_tokens: of context and answer together, what is longer loses its beginning; None for
    the model's own.
    max_new_tokens: of an answer, where the task does not say. The rest: see `GenerationSettings`.
    """

    mode: str = "mask_diffusion"
    scoring: str = "ar"
    batch_size: int = 8
    max_length_tokens: int | None = None
    max_new_tokens: int = 256
    block_size: int = 16
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    draft_steps: int = 1
    bound_draws: int = 16
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, found, choices in (("mode", self.mode, MODES), ("scoring", self.scoring, SCORINGS)):
            if found not in choices:
                raise UserError(f"{name}: found {found!r}, expected one of {', '.join(choices)}")
        for name in ("batch_size", "max_new_tokens", "bound_draws", "block_size", "steps_per_block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected at least 1")


# --- what a task asks for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """How an answer is to be written: the `generation_kwargs` of a task. until: strings that end it."""

    until: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def wanted(asked: Mapping[str, Any]) -> Wanted:
    """From a task's own spelling.

    Raises:
        UserError: what these modes do not do.
    """
    known = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(asked.keys() - known):
        raise UserError(f"generation_kwargs: found {', '.join(unknown)}, expected of {', '.join(sorted(known))}")
    until = asked.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    most = asked.get("max_gen_toks", asked.get("max_new_tokens"))
    sampled = asked.get("do_sample", asked.get("temperature", 0.0) > 0)
    if not sampled:
        return Wanted(until, most)
    return Wanted(until, most, asked.get("temperature", 1.0), asked.get("top_k"), asked.get("top_p"))


def cut(text: str, until: Sequence[str]) -> str | None:
    """The text before the first of the strings that end it; None where none does."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


# --- the model ----------------------------------------------------------------------------------------------------


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (b, l)."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (b, l) and lengths (b,)."""
    length = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


def _read_off(scores: Tensor, greedy: Tensor, lengths: Tensor) -> list[Score]:
    """From scores and marks (b, l) of each token, of which the first `lengths` count."""
    scores, greedy = scores.cpu(), greedy.cpu()  # all at once: else every row is waited for
    return [
        (float(row[:length].double().sum()), bool(marks[:length].all()))
        for row, marks, length in zip(scores, greedy, lengths.tolist(), strict=True)
    ]


@register_model("twotower")
class TwoTower(TemplateLM):
    """A two-tower folder, for lm-evaluation-harness.

    Args:
        pretrained: the folder.
        batch_size: rows at a time.
        device: where the model stands; CUDA where there is some.
        the others: see `HarnessSettings`.

    Attributes:
        passes, new_tokens, seconds: of what was written so far; passes are summed over rows.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        mode: str = "mask_diffusion",
        scoring: str = "ar",
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        block_size: int = 16,
        steps_per_block: int = 16,
        confidence_threshold: float = 0.8,
        draft_steps: int = 1,
        bound_draws: int = 16,
        seed: int = 1234,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None or str(batch_size).startswith("auto"):
            raise UserError("batch_size: found auto or a max_batch_size, expected a number")
        self.settings = HarnessSettings(
            mode,
            scoring,
            int(batch_size),
            max_length,
            int(max_gen_toks),
            int(block_size),
            int(steps_per_block),
            float(confidence_threshold),
            int(draft_steps),
            int(bound_draws),
            int(seed),
        )
        self._device = torch.device(device or default_devices()[0])
        self.model, self.tokenizer = load(pretrained, device=self._device)
        self._encode = text_encoder(self.tokenizer)
        self.mask_id = mask_token_id(self.tokenizer)
        self.max_length = self.settings.max_length_tokens or int(self.model.config.max_position_embeddings)
        self.passes, self.new_tokens, self.seconds = 0, 0, 0.0

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.eos_token_id
        if found is None:
            raise UserError("tokenizer: found no end-of-text token, expected one to begin texts without a context")
        return int(found)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids with nothing added: special tokens that are spelled out are characters like others."""
        return self._encode([string])[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError("tokenizer: found no chat template, expected one to apply; leave it out for a base model")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    # --- scoring

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[Score]:
        scores = self.score([(context, answer) for _, context, answer in requests], quiet=disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts behind the end-of-text token; each in windows, if it is that long."""
        pairs, owner = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self.score(pairs, quiet=disable_tqdm), strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def score(self, pairs: Sequence[Pair], *, quiet: bool = False) -> list[Score]:
        """Every answer behind its context, as `scoring` says, in the order given.

        A bound does not tell what greedy writing gives: its second value is False throughout.

        Raises:
            UserError: an answer longer than `max_length`.
        """
        for _, answer in pairs:
            if len(answer) > self.max_length:
                raise UserError(f"an answer of {len(answer)} tokens: expected at most max_length, {self.max_length}")
        # A token of the context stays, whatever the length, and the last token of an answer is read
        # by nobody.
        kept = [(context[-max(1, self.max_length + 1 - len(answer)) :], answer) for context, answer in pairs]
        found: list[Score] = [(0.0, True)] * len(kept)
        group = SCORINGS[self.settings.scoring]
        done = 0
        with nullcontext(silent) if quiet else stage_bars() as progress:
            for numbers, scores in group(self, kept):
                for number, score in zip(numbers, scores, strict=True):
                    found[number] = score
                done += len(numbers)
                progress(f"scoring, {self.settings.scoring}", done, len(kept))
        return found

    # --- writing

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [wanted(request.args[1]) for request in requests]
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        texts = [""] * len(requests)
        done = 0
        with nullcontext(silent) if disable_tqdm else stage_bars() as progress:
            for kind in dict.fromkeys(asked):
                # Rows of one batch are about of one length.
                numbers = [i for i in range(len(asked)) if asked[i] == kind]
                numbers.sort(key=lambda i: -len(prompts[i]))
                for start in range(0, len(numbers), self.settings.batch_size):
                    batch = numbers[start : start + self.settings.batch_size]
                    written = self.write([prompts[i] for i in batch], kind)
                    for number, text in zip(batch, written, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    done += len(batch)
                    progress(f"writing, {self.settings.mode}", done, len(requests))
        return texts

    def write(self, prompts: Sequence[list[int]], kind: Wanted) -> list[str]:
        """Continue prompts of any lengths. What a row is cut at is looked for every few blocks, and rows that have
        ended leave the batch; greedy text is the same as if all were written at once."""
        most = kind.max_new_tokens or self.settings.max_new_tokens
        if most >= self.max_length:
            raise UserError(f"an answer of {most} tokens: expected less than max_length, {self.max_length}")
        rows = [prompt[-(self.max_length - most) :] for prompt in prompts]
        new: list[list[int]] = [[] for _ in rows]
        texts: list[str | None] = [None] * len(rows)
        # Whole blocks, so that they stand where they would without a pause.
        stride, turn = self.settings.block_size * max(1, 64 // self.settings.block_size), 0
        while left := [i for i in range(len(rows)) if texts[i] is None]:
            count = min(stride, most - stride * turn)
            for i, ids in zip(left, self._some([rows[i] + new[i] for i in left], kind, count, turn), strict=True):
                ended = self.tokenizer.eos_token_id in ids
                new[i] += ids[: ids.index(self.tokenizer.eos_token_id)] if ended else ids
                text = self.tokenizer.decode(new[i], skip_special_tokens=True)
                texts[i] = cut(text, kind.until)
                if texts[i] is None and (ended or len(new[i]) >= most):
                    texts[i] = text
            turn += 1
        return [text for text in texts if text is not None]

    def _some(self, rows: Sequence[list[int]], kind: Wanted, count: int, turn: int) -> list[list[int]]:
        """`count` tokens, or up to EOS and it, behind each row."""
        ids, mask = _pad_left(rows, self.model.context_tower.device)
        own = self.settings
        settings = GenerationSettings(
            count,
            own.block_size,
            own.steps_per_block,
            own.confidence_threshold,
            kind.temperature,
            kind.top_k,
            own.seed + turn,
            kind.top_p,
            own.draft_steps,
        )
        written, stats = write(
            self.model,
            ids,
            mode=own.mode,
            settings=settings,
            mask_id=self.mask_id,
            eos_id=self.tokenizer.eos_token_id,
            attention_mask=mask,
        )
        self.passes, self.new_tokens = self.passes + stats.row_passes, self.new_tokens + stats.new_tokens
        self.seconds += stats.seconds
        return written[:, ids.shape[1] :].tolist()


# --- ways of scoring: each yields numbers of pairs and their scores -------------------------------------------------


def _by_context_tower(lm: TwoTower, pairs: Sequence[Pair]) -> Scored:
    """Every context is read once, and all its answers are verified behind it."""
    answers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        answers.setdefault(tuple(context), []).append(number)
    contexts = sorted(answers, key=len, reverse=True)
    for start in range(0, len(contexts), lm.settings.batch_size):
        batch = contexts[start : start + lm.settings.batch_size]
        cache = lm.model.prefill(*_pad_left(batch, lm.model.context_tower.device))
        for turn in range(max(len(answers[context]) for context in batch)):
            numbers = [answers[context][min(turn, len(answers[context]) - 1)] for context in batch]
            ids, lengths = _pad_right([pairs[number][1] or [0] for number in numbers])
            scores = _read_off(*ar_scores(lm.model, cache, ids), lengths)
            fresh = [i for i, context in enumerate(batch) if turn < len(answers[context])]
            yield [numbers[i] for i in fresh], [scores[i] if pairs[numbers[i]][1] else (0.0, True) for i in fresh]


def _in_batches(lm: TwoTower, pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], list[Score]]) -> Scored:
    order = sorted((i for i in range(len(pairs)) if pairs[i][1]), key=lambda i: -len(pairs[i][0]))
    for start in range(0, len(order), lm.settings.batch_size):
        numbers = order[start : start + lm.settings.batch_size]
        yield numbers, score([pairs[i] for i in numbers])


def _by_bound(lm: TwoTower, pairs: Sequence[Pair]) -> Scored:
    own = lm.settings

    def score(some: Sequence[Pair]) -> list[Score]:
        cache = lm.model.prefill(*_pad_left([context for context, _ in some], lm.model.context_tower.device))
        ids, lengths = _pad_right([answer for _, answer in some])
        found = bound_scores(
            lm.model,
            cache,
            ids,
            lengths,
            block_size=own.block_size,
            draws=own.bound_draws,
            seed=own.seed,
            mask_id=lm.mask_id,
        )
        return [(float(value), False) for value in found]

    return _in_batches(lm, pairs, score)


def _by_mock_ar(lm: TwoTower, pairs: Sequence[Pair]) -> Scored:
    def score(some: Sequence[Pair]) -> list[Score]:
        contexts, mask = _pad_left([context for context, _ in some], lm.model.context_tower.device)
        ids, lengths = _pad_right([answer for _, answer in some])
        # A row of one token alone has no text before it: its padding takes the place.
        cache = lm.model.prefill(contexts[:, :-1], mask[:, :-1])
        return _read_off(*mock_ar_scores(lm.model, cache, contexts[:, -1:], ids), lengths)

    return _in_batches(lm, pairs, score)


SCORINGS: dict[str, Callable[[TwoTower, Sequence[Pair]], Scored]] = {
    "ar": _by_context_tower,
    "bound": _by_bound,
    "mock_ar": _by_mock_ar,
}


# --- tasks --------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _outcome(results: Mapping[str, Any], task: HarnessTask) -> dict[str, Any]:
    """The figure of a task: that of the harness, or, of several, their plain mean."""
    tables = results["results"]
    # A tag has no table of its own: its tasks do.
    names = [name for name in task.tasks if name in tables] if all(n in tables for n in task.tasks) else list(tables)
    metric = task.metric or next(
        key for key in tables[names[0]] if "," in key and "_stderr" not in key and key != "alias"
    )
    missing = [name for name in names if metric not in tables[name]]
    if missing:
        found = ", ".join(key for key in tables[missing[0]] if "," in key and "_stderr" not in key)
        raise UserError(f"task {missing[0]}: metric {metric!r}: not found, expected one of {found}")
    errors = [tables[name].get(metric.replace(",", "_stderr,")) for name in names]
    known = [error for error in errors if isinstance(error, float)]
    whole = len(known) == len(names)
    return {
        "metric": metric,
        "value": _mean([tables[name][metric] for name in names]),
        "stderr": sum(error**2 for error in known) ** 0.5 / len(names) if whole else None,
        "documents": sum(count["effective"] for count in results["n-samples"].values()),
        "versions": {name: results["versions"].get(name) for name in names},
    }


def run_tasks(
    folder: str | Path,
    tasks: Sequence[HarnessTask],
    *,
    settings: HarnessSettings = HarnessSettings(),
    limit: int | None = None,
    include_path: str | Path | None = None,
    allow_code_execution: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness. The result is ready for JSON.

    Args:
        limit: documents of each task; None for all.
        include_path: folder of further task files.
        allow_code_execution: run what the model has written, for tasks that need it.

    Raises:
        UserError: a task that is not there, or that cannot be run.
    """
    started = time.perf_counter()
    manager = task_manager(tasks, include_path)
    lm = TwoTower(
        folder,
        mode=settings.mode,
        scoring=settings.scoring,
        batch_size=settings.batch_size,
        max_length=settings.max_length_tokens,
        max_gen_toks=settings.max_new_tokens,
        block_size=settings.block_size,
        steps_per_block=settings.steps_per_block,
        confidence_threshold=settings.confidence_threshold,
        draft_steps=settings.draft_steps,
        bound_draws=settings.bound_draws,
        seed=settings.seed,
    )
    rows = []
    for task in tasks:
        lm.passes, lm.new_tokens, lm.seconds, began = 0, 0, 0.0, time.perf_counter()
        try:
            results = simple_evaluate(
                lm,
                tasks=load_tasks(task, manager),
                num_fewshot=task.shots,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                confirm_run_unsafe_code=allow_code_execution,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        except (OSError, ValueError, ConnectionError, ImportError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"task {', '.join(task.tasks)}: cannot be run ({reason})") from error
        rows.append(
            {
                "name": task.name,
                "tasks": list(task.tasks),
                "shots": task.shots,
                "note": task.note,
                "card": dict(task.card),
                **_outcome(results, task),
                "seconds": time.perf_counter() - began,
                "new_tokens": lm.new_tokens,
                "tokens_per_pass": lm.new_tokens / lm.passes if lm.passes else None,
                "tokens_per_second": lm.new_tokens / lm.seconds if lm.passes else None,
            }
        )
    return {
        "tasks": rows,
        "settings": asdict(settings),
        "limit": limit,
        "model": str(folder),
        "weights_sample_sha256": weights_sample(Path(folder)),
        "lm_eval": metadata.version("lm_eval"),
        "machine": machine(),
        "seconds": time.perf_counter() - started,
    }


def task_manager(tasks: Sequence[HarnessTask], include_path: str | Path | None = None) -> TaskManager:
    """Who knows all of these tasks. The harness's own files are thousands, and are read only where they are needed.

    Raises:
        UserError: a name that is not known; no model was loaded and no data set asked for.
    """
    names = [name for task in tasks for name in task.tasks]
    path = None if include_path is None else str(include_path)
    if path is not None:
        manager = TaskManager(include_path=path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=path)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"task {name!r}: not found, expected one of lm-evaluation-harness's or of --task-files")
    return manager


def load_tasks(task: HarnessTask, manager: TaskManager) -> list[Any]:
    """What the harness is to run: names, or tasks with settings of ours in place of their own.

    The harness merges settings where one task file includes another, so such a file is written, to
    be read at once.
    """
    if not task.overrides:
        return list(task.tasks)
    loaded: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in task.tasks:
            file = Path(folder) / f"{name}.yaml"
            own = {"include": str(manager.task_index[name].yaml_path), "task": name, **task.overrides}
            file.write_text(yaml.safe_dump(own))
            loaded += manager.load([str(file)])["tasks"].values()
    return loaded


def weights_sample(folder: Path, *, places: int = 64, size: int = 65536) -> str:
    """SHA-256, in hex, over configuration and names, sizes and `places` samples of every file of weights: tells folders
    apart that differ, in seconds whatever their size. It does not prove that two are equal."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        total = file.stat().st_size
        digest.update(json.dumps([file.name, total]).encode())
        with file.open("rb") as stream:
            for place in range(places):
                stream.seek(place * max(0, total - size) // (places - 1))
                digest.update(stream.read(size))
    return digest.hexdigest()

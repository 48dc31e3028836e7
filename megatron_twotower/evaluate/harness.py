"""A two-tower folder as a model of lm-evaluation-harness, in every mode.

Importing this module registers the name `twotower` with the harness. It needs the extra `eval`.
"""

import copy
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import silent, stage_bars
from megatron_twotower.data.tokenizer import load_tokenizer, text_encoder
from megatron_twotower.evaluate.answer_scores import (
    SCORE_FUNCTIONS,
    ContextAnswer,
    Score,
    padded_contexts,
    plan_batches,
)
from megatron_twotower.evaluate.harness_settings import (
    AnswerSettings,
    HarnessSettings,
    read_generation_kwargs,
    text_before_stop,
)
from megatron_twotower.generate.engine import (
    Callbacks,
    GenerationSettings,
    default_devices,
    end_of_text,
    generate_ids,
    load,
    warn_of_untrained_block,
)
from megatron_twotower.generate.loaded import ModelFacts, facts_of
from megatron_twotower.hf.modeling_nemotron_h_twotower import ContextCache, as_ids


# A batch of work for the model that answers.
@dataclass(frozen=True)
class ScoreTask:
    """Pairs to score."""

    pairs: list[ContextAnswer]


@dataclass(frozen=True)
class WriteTask:
    """Prompts to continue."""

    prompts: list[list[int]]
    answer: AnswerSettings


@dataclass(frozen=True)
class Reply:
    """What was answered.

    Attributes:
        values: Scores or texts, in the order of the task.
        passes, new_tokens, seconds: Of the generation, as in `TwoTower`.
    """

    values: list[Any]
    passes: int = 0
    new_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PromptsRead:
    """The prompts of a `WriteTask` as the context tower has read them, for several answers.

    Attributes:
        cache: Is copied for each answer.
        seconds: The time of the reading. It counts in each answer.
    """

    cache: ContextCache
    seconds: float


@dataclass(frozen=True)
class Elsewhere:
    """A model that other processes have (`answering`).

    Attributes:
        facts: What is known of it.
        answers: Yields the replies to each task, in order: one for each of the settings given.
    """

    facts: ModelFacts
    answers: Callable[[Sequence[ScoreTask | WriteTask], Sequence[HarnessSettings]], Iterator[list[Reply]]]


@register_model("twotower")
class TwoTower(TemplateLM):
    """A two-tower folder as a model of lm-evaluation-harness.

    Args:
        pretrained: The folder.
        max_length: `max_length_tokens` of `HarnessSettings`.
        max_gen_toks: `max_new_tokens` of `HarnessSettings`.
        device: Device of the model; None for `default_devices`.
        max_batch_size: Not supported.
        elsewhere: The model, if other processes have it. This one loads no weights then.

    The other arguments are fields of `HarnessSettings`.

    Attributes:
        passes: Forward passes of all generations so far, summed over rows.
        new_tokens: New tokens of all generations so far.
        seconds: Wall-clock time of all generations so far.
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
        block_size: int | None = None,
        steps_per_block: int = 16,
        confidence_threshold: float = 0.8,
        draft_steps: int = 1,
        bound_draws: int = 16,
        seed: int = 1234,
        prefill_chunk_size: int = 4096,
        sampler: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        elsewhere: Elsewhere | None = None,
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
            None if block_size is None else int(block_size),
            int(steps_per_block),
            float(confidence_threshold),
            int(draft_steps),
            int(bound_draws),
            int(seed),
            int(prefill_chunk_size),
            sampler,
        )
        if elsewhere is None:
            self._device = torch.device(device or default_devices()[0])
            self.model, self.tokenizer = load(pretrained, device=self._device)
            self.model.prefill_chunk_size = self.settings.prefill_chunk_size
            facts = facts_of(self.model)
        else:
            self.tokenizer, facts = load_tokenizer(Path(pretrained)), elsewhere.facts
        self._elsewhere = elsewhere
        self._encode = text_encoder(self.tokenizer)
        warn_of_untrained_block(facts.trained_block_sizes, self.settings.block_size)
        self.block_size = self.settings.block_size or facts.block_size
        self.settings = replace(self.settings, block_size=self.block_size)
        self.mask_id, self.eos_ids = (
            facts.mask_token_id,
            as_ids((*facts.eos_token_ids, *as_ids(self.tokenizer.eos_token_id))),
        )
        # No chat may have the mask token, which the context tower never read.
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {token.content for id, token in added if token.special and id != self.mask_id}
        self._encode_chat, self._is_chat = text_encoder(self.tokenizer, recognised=self._special), False
        self.max_length = self.settings.max_length_tokens or facts.max_length_tokens
        self.passes, self.new_tokens, self.seconds = 0, 0, 0.0

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token. Texts without a context begin with it."""
        # The tokenizer's own, else the first of the folder.
        found = (
            self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else next(iter(self.eos_ids), None)
        )
        if found is None:
            raise UserError("tokenizer: found no end-of-text token, expected one to begin texts without a context")
        return int(found)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode text without added tokens.

        The spelling of a special token is ordinary text. From the first chat on it is that token,
        except for the mask token.
        """
        return (self._encode_chat if self._is_chat else self._encode)([string])[0]

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests.

        The harness asks for it only where requests are chats. Those from its cache were rendered
        before, so nothing else tells that they are.
        """
        self._is_chat = True
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Make one prompt of a conversation, with the chat template of the tokenizer.

        Args:
            add_generation_prompt: Begin a turn of the assistant. The harness gives False where a
                task has begun that turn; it then stays open.

        Raises:
            UserError: There is no template, or it does not take the conversation.
        """
        if self.tokenizer.chat_template is None:
            raise UserError("tokenizer: found no chat template, expected one to apply; leave it out for a base model")
        self._is_chat = True
        begun = not add_generation_prompt and chat_history[-1]["role"] == "assistant"
        try:
            return self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=begun
            )
        except Exception as error:  # a template is a program of the folder, and may raise anything
            roles = ", ".join(message["role"] for message in chat_history)
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"chat template: cannot be applied to turns of {roles} ({reason})") from error

    # --- scoring

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[Score]:
        scores = self.score([(context, answer) for _, context, answer in requests], quiet=disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text after the end-of-text token; long texts have windows."""
        pairs, owner = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self._encode([request.args[0]])[0],  # never a chat
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

    def score(self, pairs: Sequence[ContextAnswer], *, quiet: bool = False) -> list[Score]:
        """Score every answer after its context with the `scoring` of the settings, in order.

        Raises:
            UserError: An answer longer than `max_length`.
        """
        for _, answer in pairs:
            if len(answer) > self.max_length:
                raise UserError(f"an answer of {len(answer)} tokens: expected at most max_length, {self.max_length}")
        # The last token of an answer is not read, so context and answer may have one token more. At
        # least one token of the context stays.
        shortened = [(context[-max(1, self.max_length + 1 - len(answer)) :], answer) for context, answer in pairs]
        scores: list[Score] = [(0.0, True)] * len(pairs)
        batches = plan_batches(self.settings.scoring, shortened, self.settings.batch_size)
        replies = self._replies([ScoreTask([shortened[number] for number in numbers]) for numbers in batches])
        done = 0
        with nullcontext(silent) if quiet else stage_bars() as progress:
            for numbers, reply in zip(batches, replies, strict=True):
                for number, score in zip(numbers, reply.values, strict=True):
                    scores[number] = score
                done += len(numbers)
                progress(f"scoring, {self.settings.scoring}", done, len(pairs))
        return scores

    # --- batches, here or elsewhere

    def use(self, settings: HarnessSettings) -> None:
        """Answer with these settings, which name a block size."""
        assert settings.block_size is not None
        self.settings, self.block_size = settings, settings.block_size

    def _replies(self, tasks: Sequence[ScoreTask | WriteTask]) -> Iterator[Reply]:
        if self._elsewhere is None:
            yield from map(self.reply, tasks)
            return
        for (reply,) in self._elsewhere.answers(tasks, [self.settings]):
            self.passes, self.new_tokens = self.passes + reply.passes, self.new_tokens + reply.new_tokens
            self.seconds += reply.seconds
            yield reply

    def read(self, task: WriteTask) -> dict[str, PromptsRead]:
        """Read the prompts of a task, for answers in the modes `ar` and `mask_diffusion`.

        Both have the same reading, unless the denoiser reads the last token itself (`token_shift`).
        """
        rows, _ = self._rows(task.prompts, task.answer)

        def timed(for_denoiser: bool) -> PromptsRead:
            started = time.perf_counter()
            cache = self.model.prefill(*padded_contexts(self.model, rows), for_denoiser=for_denoiser)
            if cache.hidden is not None:
                cache.hidden.cpu()  # before the clock is read, the device must be done
            return PromptsRead(cache, time.perf_counter() - started)

        by_context = timed(False)
        return {"ar": by_context, "mask_diffusion": timed(True) if self.model.token_shift else by_context}

    def reply(self, task: ScoreTask | WriteTask, reads: Mapping[str, PromptsRead] | None = None) -> Reply:
        """Do one task with the model of this process.

        Args:
            task: The task.
            reads: Its prompts by mode if they have been read; other modes read them themselves.
        """
        if isinstance(task, ScoreTask):
            scores: list[Score] = [(0.0, True)] * len(task.pairs)
            for numbers, found in SCORE_FUNCTIONS[self.settings.scoring](
                self.model, task.pairs, self.settings, self.mask_id
            ):
                for number, score in zip(numbers, found, strict=True):
                    scores[number] = score
            return Reply(list(scores))
        before = self.passes, self.new_tokens, self.seconds
        texts = self.write(task.prompts, task.answer, None if reads is None else reads.get(self.settings.mode))
        passes, new_tokens, seconds = self.passes - before[0], self.new_tokens - before[1], self.seconds - before[2]
        return Reply(list(texts), passes, new_tokens, seconds)

    # --- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate the answer to each request. Only requests with equal settings share a batch."""
        settings = [read_generation_kwargs(request.args[1]) for request in requests]
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        texts = [""] * len(requests)
        batches: list[tuple[list[int], AnswerSettings]] = []
        for own in dict.fromkeys(settings):
            # Rows of a batch have similar lengths.
            numbers = [i for i in range(len(settings)) if settings[i] == own]
            numbers.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(numbers), self.settings.batch_size):
                batches.append((numbers[start : start + self.settings.batch_size], own))
        replies = self._replies([WriteTask([prompts[i] for i in numbers], own) for numbers, own in batches])
        done = 0
        with nullcontext(silent) if disable_tqdm else stage_bars() as progress:
            for (numbers, _), reply in zip(batches, replies, strict=True):
                for number, text in zip(numbers, reply.values, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                done += len(numbers)
                progress(f"writing, {self.settings.mode}", done, len(requests))
        return texts

    def _rows(self, prompts: Sequence[list[int]], answer: AnswerSettings) -> tuple[list[list[int]], int]:
        """The prompts without what is too long, and the maximum tokens of an answer."""
        limit = answer.max_new_tokens or self.settings.max_new_tokens
        if limit >= self.max_length:
            raise UserError(f"an answer of {limit} tokens: expected less than max_length, {self.max_length}")
        return [prompt[-(self.max_length - limit) :] for prompt in prompts], limit

    def write(self, prompts: Sequence[list[int]], answer: AnswerSettings, read: PromptsRead | None = None) -> list[str]:
        """Generate the answers to prompts of any lengths.

        A row ends with EOS, or when its text has one of the strings that end an answer.
        """
        texts = []
        for ids in self._continue(*self._rows(prompts, answer), answer, read):
            new = ids[: end_of_text(ids, self.eos_ids)]
            text = self._text_before_stop(new, answer.until)
            texts.append(self.tokenizer.decode(new, skip_special_tokens=True) if text is None else text)
        return texts

    def _text_before_stop(self, ids: list[int], until: Sequence[str]) -> str | None:
        """The text before the first of the strings that end it; None if it has none of them.

        Special tokens are no part of the text. A string that names one is looked for where they are
        spelled out.
        """
        special = [stop for stop in until if any(token in stop for token in self._special)]
        plain = [stop for stop in until if stop not in special]
        found = [text_before_stop(self.tokenizer.decode(ids, skip_special_tokens=True), plain)]
        if special and (before := text_before_stop(self.tokenizer.decode(ids), special)) is not None:
            # The first ids that spell what is before the string, and what the last one has more.
            count = bisect_left(range(len(ids)), True, key=lambda n: self.tokenizer.decode(ids[:n]).startswith(before))
            extra = len(self.tokenizer.decode(ids[:count])) - len(before)
            text = self.tokenizer.decode(ids[:count], skip_special_tokens=True)
            found.append(text[: len(text) - extra])
        return min((text for text in found if text is not None), key=len, default=None)

    def _continue(
        self, rows: Sequence[list[int]], limit: int, answer: AnswerSettings, read: PromptsRead | None
    ) -> list[list[int]]:
        """Continue each row by `limit` tokens, or up to and including EOS or a string that ends it.

        What rows that ended earlier have after their end is EOS.
        """
        ids, mask = padded_contexts(self.model, rows)

        def has_ended(new: Tensor, counts: Tensor) -> Tensor:
            own_ids = (row[:count] for row, count in zip(new.tolist(), counts.tolist(), strict=True))
            return torch.tensor([self._text_before_stop(each, answer.until) is not None for each in own_ids])

        own = self.settings
        output, stats = generate_ids(
            self.model,
            ids,
            mode=own.mode,
            settings=GenerationSettings(
                max_new_tokens=limit,
                block_size=own.block_size,
                steps_per_block=own.steps_per_block,
                confidence_threshold=own.confidence_threshold,
                temperature=answer.temperature,
                top_k=answer.top_k,
                seed=own.seed,
                top_p=answer.top_p,
                draft_steps=own.draft_steps,
                prefill_chunk_size=own.prefill_chunk_size,
                sampler=own.sampler,
            ),
            mask_id=self.mask_id,
            eos_id=self.eos_ids,
            attention_mask=mask,
            callbacks=Callbacks(stop=has_ended if answer.until else None),
            cache=None if read is None else copy.deepcopy(read.cache),
        )
        self.passes, self.new_tokens = self.passes + stats.row_passes, self.new_tokens + stats.new_tokens
        self.seconds += stats.seconds + (0.0 if read is None else read.seconds)
        return output[:, ids.shape[1] :].tolist()

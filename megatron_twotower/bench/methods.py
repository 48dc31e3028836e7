"""The command `bench methods`: what else writes the text of the same context tower.

Every method continues the same held-out prompts, greedily, one prompt at a time and in one run:

- the context tower token by token, with the class of this repository and with that of transformers;
- the context tower with drafts that it verifies: looked up in the text (prompt lookup), written by
  a smaller model, or by the denoiser;
- the denoiser by mask diffusion.

transformers refuses its own prompt lookup and assisted generation for every NemotronH: after a
rejected draft it cannot take back the states of Mamba layers. `verified` does it here, with
`verify` and `settle` of the modelling file, and prompt lookup drafts with the code of transformers.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from megatron_twotower.bench import measure
from megatron_twotower.bench.fp8 import open_model
from megatron_twotower.bench.results import report
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import number, plain_table, wide_console, with_error
from megatron_twotower.convert.export import ExportOptions, export
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.documents import VALIDATION
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import check_tokenizer
from megatron_twotower.evaluate.speed_quality import means, text_quality
from megatron_twotower.generate.engine import default_devices, load, place_towers
from megatron_twotower.hf.modeling_nemotron_h_twotower import ContextCache
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

BASELINE = "AR"


@dataclass(frozen=True)
class MethodOptions:
    """What to measure.

    Attributes:
        prompts: Windows of held-out text.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens to write after each prompt.
        thresholds: Confidence thresholds of mask diffusion, at the block size of the folder.
        lookup_tokens: Tokens that prompt lookup drafts at most.
        draft_tokens: Tokens that the smaller model drafts.
        rounds: Times that every method continues every prompt; the median counts.
    """

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 192
    thresholds: tuple[float, ...] = (0.9, 0.8, 0.6)
    lookup_tokens: int = 10
    draft_tokens: int = 4
    rounds: int = 2


QUICK = MethodOptions(prompts=2, prompt_tokens=8, new_tokens=12, thresholds=(0.8,), rounds=1)


# --- drafts that the context tower verifies ---

# Maps the text (1, l) so far to further ids (1, n), n at least 0.
Drafter = Callable[[Tensor], Tensor]


@torch.no_grad()
def verified(model: Model, ids: Tensor, new_tokens: int, drafter: Drafter) -> Tensor:
    """Continue one prompt (1, l) greedily with drafts that the context tower verifies.

    The ids are those of `generate_ar`, whatever is drafted, up to ties within rounding.

    Args:
        model: Two-tower model, of which only the context tower is used.
        ids: (1, l) int64, l at least 1.
        new_tokens: Tokens to write; no EOS ends the text.
        drafter: Is called before each pass.

    Returns:
        (1, l + new_tokens) ids.
    """
    length = ids.shape[1] + new_tokens
    cache, text = model.prefill(ids[:, :-1]), ids
    while text.shape[1] < length:
        last = text[:, -1:]
        draft = drafter(text)[:, : length - text.shape[1] - 1]
        if draft.shape[1]:
            best = model.verify(cache, torch.cat([last, draft], dim=1)).argmax(-1)
            accepted = (draft == best[:, :-1]).long().cumprod(-1).sum(-1)
            model.settle(cache, accepted + 1, draft.shape[1] + 1)
        else:
            best = model.context_lm_head(model.extend(cache, last).hidden).argmax(-1, keepdim=True)
            accepted = best.new_zeros(1)
        text = torch.cat([text, best[:, : int(accepted) + 1]], dim=1)
    return text


def lookup_drafter(tokens: int, length: int) -> Drafter:
    """Drafts what followed the last two tokens, or the last one, where they were first in the text.

    Args:
        tokens: Drafted tokens at most.
        length: That of the complete text.
    """
    generator = PromptLookupCandidateGenerator(num_output_tokens=tokens, max_length=length)
    return lambda text: generator.get_candidates(text)[0][:, text.shape[1] :]


def model_drafter(draft: Model, tokens: int) -> Drafter:
    """Drafts greedily with the context tower of a smaller model, for one text.

    Args:
        draft: It has the vocabulary of the larger one.
        tokens: Drafted tokens.
    """
    cache, read = draft.prefill(torch.empty(1, 0, dtype=torch.int64)), 0

    def drafted(text: Tensor) -> Tensor:
        nonlocal read
        draft.extend(cache, text[:, read:])
        read = text.shape[1]
        # The drafted tokens are read by a copy: the states of Mamba layers never go back.
        trial, ids = copy.deepcopy(cache), [next_token(cache)]
        while len(ids) < tokens:
            draft.extend(trial, ids[-1])
            ids.append(next_token(trial))
        return torch.cat(ids, dim=1)

    def next_token(cache: ContextCache) -> Tensor:
        return draft.context_lm_head(cache.hidden).argmax(-1, keepdim=True)

    return drafted


# --- methods ---

# Continues one prompt (1, l): (1, l + new tokens).
Method = Callable[[Tensor], Tensor]


def transformers_model(folder: Path) -> Any:
    """The context tower of a two-tower folder in transformers' class; no EOS ends its text."""
    with tempfile.TemporaryDirectory() as home:
        export(folder, Path(home) / "context", options=ExportOptions(what="context"))
        model = AutoModelForCausalLM.from_pretrained(Path(home) / "context", dtype="auto", local_files_only=True)
    model.generation_config.eos_token_id = None
    return model.eval()


def build_methods(model: Model, one_tower: Any, draft: Model | None, options: MethodOptions) -> dict[str, Method]:
    """All methods by name, the baseline first.

    Args:
        model: Two-tower model.
        one_tower: See `transformers_model`.
        draft: A smaller model; None leaves its method out.
    """
    new, length = options.new_tokens, options.prompt_tokens + options.new_tokens

    def by_transformers(ids: Tensor) -> Tensor:
        return one_tower.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)

    def by_draft_model(ids: Tensor) -> Tensor:
        assert draft is not None
        return verified(model, ids, new, model_drafter(draft, options.draft_tokens))

    def by_mask_diffusion(threshold: float) -> Method:
        return lambda ids: model.generate_mask_diffusion(
            ids, new, steps_per_block=model.block_size, confidence_threshold=threshold, eos_token_id=()
        )

    return {
        BASELINE: lambda ids: model.generate_ar(ids, new, eos_token_id=()),
        "AR, transformers": by_transformers,
        "prompt lookup": lambda ids: verified(model, ids, new, lookup_drafter(options.lookup_tokens, length)),
        **({} if draft is None else {"smaller model drafts": by_draft_model}),
        "denoiser drafts": lambda ids: model.generate_speculative(ids, new, eos_token_id=()),
        **{f"mask diffusion, {each:g}": by_mask_diffusion(each) for each in options.thresholds},
    }


@contextmanager
def counted_passes(towers: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Count the forward passes of some modules; the only item of the list is their number."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    with measure.hooked(towers, before=add):
        yield count


@dataclass
class MethodTotals:
    """What one method did, one entry for each prompt.

    Attributes:
        seconds: Median over rounds.
        passes: Forward passes of either tower, that over the prompt included.
        qualities: See `text_quality`.
    """

    seconds: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    qualities: list[dict[str, float]] = field(default_factory=list)

    def row(self, name: str, new_tokens: int, baseline: Sequence[float]) -> dict[str, Any]:
        """The row for JSON: means over prompts and their standard errors.

        Args:
            name: Of the method.
            new_tokens: Of each text.
            baseline: Seconds of the baseline for each prompt.
        """
        figures = {
            "tokens_per_pass": [new_tokens / each for each in self.passes],
            "speedup": [before / own for before, own in zip(baseline, self.seconds, strict=True)],
            **{key: [each[key] for each in self.qualities] for key in self.qualities[0]},
        }
        same = [each["same_as_ar"] == 1 for each in self.qualities]
        return {
            "method": name,
            "tokens_per_second": new_tokens * len(self.seconds) / sum(self.seconds),
            "exact_texts": sum(same),
            "texts": len(same),
            **means(figures),
        }


def _write(method: Method, ids: Tensor, texts: list[Tensor]) -> None:
    texts.append(method(ids))


def compare(
    model: Model, methods: Mapping[str, Method], prompts: Tensor, *, towers: Sequence[nn.Module], options: MethodOptions
) -> list[dict[str, Any]]:
    """Continue every prompt by every method, each round in the same order; one row for each method.

    Args:
        model: Two-tower model.
        methods: The baseline first.
        prompts: (n, l) int64.
        towers: The full-size modules whose passes count.
        options: What to measure.
    """
    totals = {name: MethodTotals() for name in methods}
    for method in methods.values():  # the first call is slower
        method(prompts[:1])
    for ids in prompts.split(1):
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        ar_text = None
        for turn in range(options.rounds):
            for name, method in methods.items():
                texts: list[Tensor] = []
                with counted_passes(towers) as count:
                    seconds[name].append(measure.elapsed_seconds(partial(_write, method, ids, texts)))
                if turn == 0:
                    ar_text = texts[0][0, ids.shape[1] :] if ar_text is None else ar_text
                    totals[name].passes.append(count[0])
                    totals[name].qualities.append(text_quality(model, texts[0], ids.shape[1], ar_text))
        for name, each in seconds.items():
            totals[name].seconds.append(float(torch.tensor(each, dtype=torch.float64).median()))
    baseline = totals[BASELINE].seconds
    return [each.row(name, options.new_tokens, baseline) for name, each in totals.items()]


# --- the command ---


def towers_and_prompts(model: Path, data: Path, *, count: int, length: int) -> tuple[Model, Tensor, Corpus]:
    """Load a two-tower folder to its devices, with prompts from held-out text of its tokenizer.

    Args:
        model: Two-tower folder.
        data: A prepared data folder.
        count: Prompts.
        length: Tokens of a prompt.

    Returns:
        The towers, prompts (count, length) int64 on the device of the context tower, and the
        held-out corpus.

    Raises:
        UserError: A folder is wrong, or the data has another tokenizer.
    """
    corpus, devices = Corpus.open(data / VALIDATION), default_devices()
    towers, _ = load(model)
    check_tokenizer(model, corpus.tokenizer_fingerprint, exact_ids=corpus.exact_ids, data=data)
    prompts = evenly_spaced_windows(corpus, count=max(2, count), length=length)[:count]
    place_towers(towers, devices)
    return towers, prompts.to(devices[0]), corpus


def run(
    output: Path,
    *,
    model: Path,
    data: Path,
    draft: Path | None = None,
    options: MethodOptions = MethodOptions(),
    threads: int,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `methods.json` to `output`.

    Args:
        model: Two-tower folder.
        data: A prepared data folder, whose held-out part has the prompts.
        draft: The folder of a smaller NemotronH with the same tokenizer; None leaves it out.

    Raises:
        UserError: A folder is wrong, or the data has another tokenizer.
    """
    towers, prompts, corpus = towers_and_prompts(model, data, count=options.prompts, length=options.prompt_tokens)
    smaller = None
    if draft is not None:
        smaller = open_model(draft)[0].to(prompts.device)
        check_tokenizer(draft, corpus.tokenizer_fingerprint, exact_ids=corpus.exact_ids, data=data)
    one_tower = transformers_model(model).to(prompts.device)
    methods = build_methods(towers, one_tower, smaller, options)
    counted = (towers.context_tower, towers.denoiser_tower, one_tower.model)
    with measure.torch_threads(threads), torch.no_grad():
        rows = compare(towers, methods, prompts, towers=counted, options=options)
        facts = machine()
    results = {
        "machine": facts,
        "model": str(model),
        "draft": None if draft is None else str(draft),
        "prompts": len(prompts),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rows": rows,
    }
    report(output, "methods", results, tables=[method_table(results)], console=console or wide_console())


def method_table(results: Mapping[str, Any]) -> Table:
    """A line for each method."""
    title = (
        f"{results['prompts']} held-out prompts of {results['prompt_tokens']} tokens, {results['new_tokens']} new "
        "tokens each, greedy; a pass is one forward pass of either tower"
    )
    rows = [
        (
            row["method"],
            with_error(row["tokens_per_pass"], row["tokens_per_pass_stderr"]),
            number(row["tokens_per_second"], 0),
            f"{with_error(row['speedup'], row['speedup_stderr'])} x",
            f"{row['exact_texts']} of {row['texts']}",
            f"{row['agreement']:.1%}",
            f"{row['repeated_4']:.0%}",
        )
        for row in results["rows"]
    ]
    headings = ("method", "tokens/pass", "tokens/s", "of AR", "same text as AR", "as AR would choose")
    return plain_table(title, (*headings, "repeated 4-grams"), rows, left=1)

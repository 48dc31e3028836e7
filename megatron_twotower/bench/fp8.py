"""The command `bench fp8`: the effect of FP8 weights of the context tower on predictions.

The rounding is emulated on any device (`fp8_rounding.py`). Both towers see the same text
twice: once with the context tower as it is ("wide"), once with its projections and experts in FP8.
Everything else, such as all of the denoiser, stays float32. If Transformer Engine and a GPU are
available, each rounded matrix is compared with Transformer Engine's rounding.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.bench import measure
from megatron_twotower.bench.fp8_rounding import ROUNDINGS, RoundedTower, rounded, rounded_tower
from megatron_twotower.bench.results import report
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.config.hf_config import model_from_hf, read_hf_config
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.documents import VALIDATION
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import check_tokenizer, load_tokenizer
from megatron_twotower.evaluate.likelihood import check_sequences, ratio, token_nats
from megatron_twotower.generate.engine import default_devices, load
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model
from megatron_twotower.hf.modeling_nemotron_h_twotower import Tower, context_tensors
from megatron_twotower.model.parameter_map import context_entries, layer_of_projection, parameter_from_hf
from megatron_twotower.ops.dispatch import unavailable

BACKBONE = "NemotronHForCausalLM"
NEXT, MASKED = "context tower, next token", "denoiser, masked tokens"
SEQUENCES_PER_BATCH = 8  # their logits are in memory twice


@dataclass(frozen=True)
class Fp8Options:
    """What to measure.

    Attributes:
        sequences: The number of held-out sequences.
        length_tokens: Tokens per sequence.
        block_size_tokens: Block size of the denoiser; None for that of the folder.
        levels: Shares of a block that are masked, for the denoiser.
        seed: Of the masked positions.

    Raises:
        UserError: A number is too small.
    """

    sequences: int = 32
    length_tokens: int = 256
    block_size_tokens: int | None = None
    levels: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, least in (("sequences", 2), ("length_tokens", 2), ("block_size_tokens", 1)):
            found = getattr(self, name)
            if found is not None and found < least:
                raise UserError(f"{name}: found {found}, expected at least {least}")


QUICK = Fp8Options(sequences=2, length_tokens=32, levels=(1.0,))


# --- two predictions of the same tokens ---


@dataclass
class ComparisonSums:
    """Sums over the counted tokens of each sequence. All tensors are (n,) float64.

    Attributes:
        wide: Cross-entropies of the wide prediction.
        fp8: Cross-entropies with the FP8 context tower.
        kl: KL(wide || fp8).
        same: Tokens whose most probable prediction is the same.
        count: Counted tokens.
        squares: Mean square of the wide logits.
        largest: The largest difference of two logits; not a sum.
    """

    wide: Tensor
    fp8: Tensor
    kl: Tensor
    same: Tensor
    count: Tensor
    squares: Tensor
    largest: float = 0.0

    def __add__(self, other: "ComparisonSums") -> "ComparisonSums":
        names = (field.name for field in fields(self) if field.name != "largest")
        added = {name: getattr(self, name) + getattr(other, name) for name in names}
        return ComparisonSums(**added, largest=max(self.largest, other.largest))


def concatenate(sums: Sequence[ComparisonSums]) -> ComparisonSums:
    """The sums of all sequences from the sums of batches of sequences."""
    names = (field.name for field in fields(ComparisonSums) if field.name != "largest")
    rows = {name: torch.cat([getattr(each, name) for each in sums]) for name in names}
    return ComparisonSums(**rows, largest=max(each.largest for each in sums))


def compare_logits(wide: Tensor, fp8: Tensor, targets: Tensor, counted: Tensor) -> ComparisonSums:
    """Compare two logits (b, l, v) for targets (b, l), where `counted` (b, l) is true."""
    counted = counted.to(wide.device)
    wide_log, fp8_log = wide.double().log_softmax(-1), fp8.double().log_softmax(-1)
    per_token = {
        "wide": token_nats(wide, targets),
        "fp8": token_nats(fp8, targets),
        "kl": (wide_log.exp() * (wide_log - fp8_log)).sum(-1),
        "same": wide.argmax(-1) == fp8.argmax(-1),
        "count": torch.ones_like(counted),
        "squares": wide.double().square().mean(-1),
    }
    sums = {name: (values.double() * counted).sum(-1).cpu() for name, values in per_token.items()}
    largest = (wide - fp8).abs().amax(-1).masked_fill(~counted, 0.0).max().item()
    return ComparisonSums(**sums, largest=largest)


@contextlib.contextmanager
def with_context_tower(model: Model, tower: Tower) -> Iterator[None]:
    """Give the model another context tower, and restore its own at the end."""
    own, model.context_tower = model.context_tower, tower
    try:
        yield
    finally:
        model.context_tower = own


@torch.no_grad()
def compare_next_token(model: Model, tower: Tower, tokens: Tensor) -> ComparisonSums:
    """Compare next-token predictions of the model's context tower and of another one.

    Args:
        tokens: (b, l).
    """
    wide = model(tokens).logits[:, :-1]
    with with_context_tower(model, tower):
        fp8 = model(tokens).logits[:, :-1]
    return compare_logits(wide, fp8, tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.bool))


@torch.no_grad()
def compare_masked_tokens(
    model: Model, tower: Tower, tokens: Tensor, uniform: Tensor, *, block: int, levels: Sequence[float], mask_id: int
) -> ComparisonSums:
    """Compare the denoiser's predictions with the model's context tower and with another one.

    Args:
        tokens: (b, l), a number of complete blocks.
        uniform: (b, l) random numbers. Positions below a level are masked at that level.
    """
    wide_cache, fp8_cache = (model.prefill(tokens[:, :0], for_denoiser=True) for _ in range(2))
    comparisons = []
    for start in range(0, tokens.shape[1], block):
        clean, noise = tokens[:, start : start + block], uniform[:, start : start + block]
        # The first block is left out: there are no states before it.
        for level in levels if start else ():
            masked, t = noise < level, torch.full((len(tokens),), level)
            noisy = clean.masked_fill(masked, mask_id)
            wide, fp8 = (model.denoise_block(noisy, t, cache) for cache in (wide_cache, fp8_cache))
            comparisons.append(compare_logits(wide, fp8, clean, masked))
        model.extend(wide_cache, clean)
        with with_context_tower(model, tower):
            model.extend(fp8_cache, clean)
    return sum(comparisons[1:], comparisons[0])


def summarise(sums: ComparisonSums) -> dict[str, Any]:
    """Means in nats per token with standard errors over sequences, for JSON.

    The error of the difference is that of paired values.
    """
    results: dict[str, Any] = {"tokens": int(sums.count.sum())}
    for name, values in (("wide", sums.wide), ("fp8", sums.fp8), ("difference", sums.fp8 - sums.wide), ("kl", sums.kl)):
        results[name], results[f"{name}_stderr"], _ = ratio(values, sums.count)
    results["same_choice"] = float(sums.same.sum() / sums.count.sum())
    results["largest_logit_error"] = sums.largest
    results["logit_rms"] = float((sums.squares.sum() / sums.count.sum()).sqrt())
    return results


# --- measuring ---


def open_model(folder: Path) -> tuple[Model, PreTrainedTokenizerFast, bool]:
    """Open a two-tower folder, or a plain NemotronH as a context tower with an unusable denoiser.

    Returns:
        The model, its tokenizer, and whether it has a denoiser.

    Raises:
        UserError: The folder is neither, or weights are missing.
    """
    if read_hf_config(folder).get("architectures") != [BACKBONE]:
        model, tokenizer = load(folder, dtype=torch.float32)
        return model, tokenizer, True
    model = Model(Model.config_class.from_pretrained(str(folder), local_files_only=True)).float()
    missing = model.load_state_dict(dict(context_tensors(folder)), strict=False).missing_keys
    if absent := sorted(name for name in missing if name.startswith("context_")):
        raise UserError(f"{folder}: found no {', '.join(absent[:3])}, expected the tensors of its configuration")
    return model.eval(), load_tokenizer(folder), False


def compare_with_transformer_engine(tower: Tower, model: ModelConfig, name: str) -> dict[str, Any]:
    """The number of rounded weights that differ from Transformer Engine's, or why it is unknown.

    Args:
        name: A key of `ROUNDINGS`.
    """
    if reason := unavailable("transformer-engine"):
        return {"not_run": reason}
    from megatron_twotower.mcore.modules import rounded_by_transformer_engine

    rounding, differing, elements = ROUNDINGS[name], 0, 0
    for entry in context_entries(model):
        if layer_of_projection(entry.megatron_name) is None:
            continue
        tensors = [tower.get_parameter(each.removeprefix("context_tower.")) for each in entry.hf_names]
        weight = parameter_from_hf(entry, tensors, model).float()
        ours = rounded(weight, rounding.weights, powers_of_two=rounding.powers_of_two)
        differing += int((ours != rounded_by_transformer_engine(weight, name)).sum())
        elements += weight.numel()
    return {"differing_elements": differing, "elements": elements}


def measure_fp8(
    model: Model,
    config: ModelConfig,
    sequences: Tensor,
    *,
    options: Fp8Options,
    mask_id: int,
    denoiser: bool,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each rounding, with and without rounded inputs, and for each tower.

    Args:
        sequences: (n, l) token ids.
        denoiser: Whether the model has a denoiser to measure.
        log: Called with a line of text after each rounding.
    """
    uniform = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(options.seed))
    device, rows = model.context_tower.device, []
    block = options.block_size_tokens or model.block_size
    settings: dict[str, Any] = {"block": block, "levels": options.levels, "mask_id": mask_id}
    for name, rounding in ROUNDINGS.items():
        for inputs in (False, True):
            started = time.perf_counter()
            narrow = rounded_tower(model.context_tower, config, rounding, inputs=inputs)
            found: dict[str, list[ComparisonSums]] = {NEXT: [], **({MASKED: []} if denoiser else {})}
            for first in range(0, len(sequences), SEQUENCES_PER_BATCH):
                tokens, noise = (each[first : first + SEQUENCES_PER_BATCH].to(device) for each in (sequences, uniform))
                found[NEXT].append(compare_next_token(model, narrow.tower, tokens))
                if denoiser:
                    found[MASKED].append(compare_masked_tokens(model, narrow.tower, tokens, noise, **settings))
            rows += [_row(name, narrow, inputs, what, concatenate(sums)) for what, sums in found.items()]
            log(f"{name}, {'weights and inputs' if inputs else 'weights'}: {time.perf_counter() - started:.0f} s")
    return rows


def _row(name: str, tower: RoundedTower, inputs: bool, what: str, sums: ComparisonSums) -> dict[str, Any]:
    return {
        "precision": name,
        "inputs": inputs,
        "of": what,
        **summarise(sums),
        "elements_in_fp8": tower.elements,
        "elements_of_the_tower": tower.total,
        "weight_error": tower.error,
    }


def run(
    output: Path,
    *,
    model: Path,
    data: Path,
    options: Fp8Options = Fp8Options(),
    threads: int | None = None,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `fp8.json` to `output`.

    Args:
        model: A two-tower folder or the folder of a backbone, see `open_model`.
        data: A prepared data folder, whose held-out part is read.
        threads: Threads of torch; its own choice if `None`.

    Raises:
        UserError: A folder is wrong, or the data has another tokenizer.
    """
    corpus = Corpus.open(data / VALIDATION)
    opened, _, denoiser = open_model(model)
    check_tokenizer(model, corpus.tokenizer_fingerprint, exact_ids=corpus.exact_ids, data=data)
    opened.to(default_devices()[0])
    sequences = evenly_spaced_windows(corpus, count=options.sequences, length=options.length_tokens)
    if denoiser:
        check_sequences(sequences, options.block_size_tokens or opened.block_size)
    config, console = model_from_hf(read_hf_config(model), source=str(model)), console or wide_console()
    with measure.torch_threads(threads or torch.get_num_threads()):
        rows = measure_fp8(
            opened,
            config,
            sequences,
            options=options,
            mask_id=opened.mask_token_id,
            denoiser=denoiser,
            log=lambda line: console.print(line, highlight=False, style="dim"),
        )
    checks = {name: compare_with_transformer_engine(opened.context_tower, config, name) for name in ROUNDINGS}
    results = {
        "emulated": True,
        "rows": rows,
        "transformer_engine": checks,
        "model": str(model),
        "data": str(data),
        "sequences": len(sequences),
        "length_tokens": options.length_tokens,
        "levels": options.levels,
        "machine": machine(),
    }
    report(output, "fp8", results, tables=[fp8_table(results)], notes=_notes(results), console=console)


def fp8_table(results: dict[str, Any]) -> Table:
    """A line for each row of the results."""
    title = (
        f"emulated FP8: {results['sequences']} held-out sequences of {results['length_tokens']} tokens, "
        f"{results['model']}"
    )
    headings = ("context tower in", "rounded", "nats per token of", "wide", "FP8", "difference", "KL", "same choice")
    rows = [
        (
            row["precision"],
            "weights, inputs" if row["inputs"] else "weights",
            row["of"],
            f"{row['wide']:.4f}",
            f"{row['fp8']:.4f}",
            f"{row['difference']:+.4f} ± {row['difference_stderr']:.4f}",
            f"{row['kl']:.5f}",
            f"{row['same_choice']:.2%}",
            f"{row['largest_logit_error']:.2f} of {row['logit_rms']:.1f}",
        )
        for row in results["rows"]
    ]
    return plain_table(title, (*headings, "largest logit error"), rows, left=3)


def _notes(results: dict[str, Any]) -> Iterator[str]:
    """Lines on the rounding of weights, and on the comparison with Transformer Engine."""
    rows = results["rows"]
    share = rows[0]["elements_in_fp8"] / rows[0]["elements_of_the_tower"]
    errors = {row["precision"]: row["weight_error"] for row in rows}
    listed = ", ".join(f"{error:.2%} with {name}" for name, error in errors.items())
    yield f"{share:.0%} of the tower's elements are in FP8; the error of weights is {listed}"
    for name, check in results["transformer_engine"].items():
        if "not_run" in check:
            outcome = f"not compared ({check['not_run']})"
        else:
            outcome = f"{check['differing_elements']} of {check['elements']} elements differ"
        yield f"{name}, Transformer Engine's own rounding: {outcome}"

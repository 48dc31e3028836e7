"""What FP8 weights of the context tower do to its predictions, and to those of the denoiser that reads its states.

On any device, by the rounding alone (`fp8_rounding.py`): an emulation. Both towers see the same
text twice, once with the context tower as it is, once with its projections and experts in FP8;
everything else stays float32, the denoiser all of it. Where Transformer Engine and a GPU are there,
each rounded matrix is compared with its own.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.bench import measure
from megatron_twotower.bench.fp8_rounding import ROUNDINGS, RoundedTower, rounded, rounded_tower
from megatron_twotower.common import machine, tables
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.hf_config import model_from_hf, read_hf_config
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.documents import VALIDATION
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_twotower.evaluate.likelihood import check_sequences, ratio, token_nats
from megatron_twotower.generate.engine import default_devices, load, mask_token_id
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model
from megatron_twotower.hf.modeling_nemotron_h_twotower import Tower, context_tensors
from megatron_twotower.model.parameter_map import context_entries, layer_of_projection, parameter_from_hf
from megatron_twotower.ops.dispatch import unavailable

BACKBONE = "NemotronHForCausalLM"
NEXT, MASKED = "context tower, next token", "denoiser, masked tokens"
ROWS = 8  # sequences at a time, whose logits are held twice


@dataclass(frozen=True)
class Settings:
    """levels: shares of a block that are masked, for the denoiser."""

    sequences: int = 32
    length_tokens: int = 256
    block_size_tokens: int = 16
    levels: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, least in (("sequences", 2), ("length_tokens", 2), ("block_size_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}, expected at least {least}")


QUICK = Settings(sequences=2, length_tokens=32, levels=(1.0,))


# --- two predictions of the same tokens -----------------------------------------------------------------------------


@dataclass
class Sums:
    """Over the tokens of each sequence (n,), float64: cross-entropies, KL(wide || fp8), tokens whose most probable
    prediction is the same, all tokens; squared wide logits over all of them. largest: difference of any two logits."""

    wide: Tensor
    fp8: Tensor
    kl: Tensor
    same: Tensor
    count: Tensor
    squares: Tensor
    largest: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "largest"}
        return Sums(**added, largest=max(self.largest, other.largest))


def joined(parts: Sequence[Sums]) -> Sums:
    """Of further sequences."""
    rows = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Sums) if f.name != "largest"}
    return Sums(**rows, largest=max(part.largest for part in parts))


def compared(wide: Tensor, fp8: Tensor, targets: Tensor, counted: Tensor) -> Sums:
    """Of two logits (b, l, v) for targets (b, l), at the positions that are counted (b, l) bool."""
    counted = counted.to(wide.device)
    logs, other = wide.double().log_softmax(-1), fp8.double().log_softmax(-1)
    each = {
        "wide": token_nats(wide, targets),
        "fp8": token_nats(fp8, targets),
        "kl": (logs.exp() * (logs - other)).sum(-1),
        "same": wide.argmax(-1) == fp8.argmax(-1),
        "count": torch.ones_like(counted),
        "squares": wide.double().square().mean(-1),
    }
    sums = {name: (values.double() * counted).sum(-1).cpu() for name, values in each.items()}
    largest = (wide - fp8).abs().amax(-1).masked_fill(~counted, 0.0).max().item()
    return Sums(**sums, largest=largest)


@contextlib.contextmanager
def reading_with(model: Model, tower: Tower) -> Iterator[None]:
    """The model with another context tower."""
    own, model.context_tower = model.context_tower, tower
    try:
        yield
    finally:
        model.context_tower = own


@torch.no_grad()
def next_token(model: Model, tower: Tower, rows: Tensor) -> Sums:
    """The context tower of the model against another one, on (b, l)."""
    wide = model(rows).logits[:, :-1]
    with reading_with(model, tower):
        narrow = model(rows).logits[:, :-1]
    return compared(wide, narrow, rows[:, 1:], torch.ones_like(rows[:, 1:], dtype=torch.bool))


@torch.no_grad()
def masked_tokens(
    model: Model, tower: Tower, rows: Tensor, uniform: Tensor, *, block: int, levels: Sequence[float], mask_id: int
) -> Sums:
    """The denoiser over the states of the model's context tower against those of another one.

    Args:
        rows: (b, l), whole blocks. uniform: (b, l); what is below a level is masked at that level.
    """
    wide_cache, cache, total = model.prefill(rows[:, :0]), model.prefill(rows[:, :0]), []
    for start in range(0, rows.shape[1], block):
        clean, noise = rows[:, start : start + block], uniform[:, start : start + block]
        # Before the first block there is nothing to read: both are the same there.
        for level in levels if start else ():
            masked, t = noise < level, torch.full((len(rows),), level)
            noisy = clean.masked_fill(masked, mask_id)
            wide, narrow = (model.denoise_block(noisy, t, each) for each in (wide_cache, cache))
            total.append(compared(wide, narrow, clean, masked))
        model.extend(wide_cache, clean)
        with reading_with(model, tower):
            model.extend(cache, clean)
    return sum(total[1:], total[0])


def figures(sums: Sums) -> dict[str, Any]:
    """For JSON, in nats per token; standard errors are over sequences, that of the difference is of the pairs."""
    found: dict[str, Any] = {"tokens": int(sums.count.sum())}
    for name, values in (("wide", sums.wide), ("fp8", sums.fp8), ("difference", sums.fp8 - sums.wide), ("kl", sums.kl)):
        found[name], found[f"{name}_stderr"], _ = ratio(values, sums.count)
    found["same_choice"] = float(sums.same.sum() / sums.count.sum())
    found["largest_logit_error"] = sums.largest
    found["logit_rms"] = float((sums.squares.sum() / sums.count.sum()).sqrt())
    return found


# --- the bench ------------------------------------------------------------------------------------------------------


def open_model(folder: Path) -> tuple[Model, PreTrainedTokenizerFast, bool]:
    """A two-tower folder, or a plain NemotronH as the context tower beside a denoiser that is none. The last: whether
    there is a denoiser.

    Raises:
        UserError: it is neither, or lacks weights.
    """
    if read_hf_config(folder).get("architectures") != [BACKBONE]:
        model, tokenizer = load(folder, dtype=torch.float32)
        return model, tokenizer, True
    model = Model(Model.config_class.from_pretrained(str(folder), local_files_only=True)).float()
    missing = model.load_state_dict(dict(context_tensors(folder)), strict=False).missing_keys
    if lost := sorted(name for name in missing if name.startswith("context_")):
        raise UserError(f"{folder}: found no {', '.join(lost[:3])}, expected the tensors of its configuration")
    return model.eval(), load_tokenizer(folder), False


def against_transformer_engine(tower: Tower, model: ModelConfig, name: str) -> dict[str, Any]:
    """How many elements of the rounded weights differ from Transformer Engine's; or why that is not known here."""
    if reason := unavailable("transformer-engine"):
        return {"not_run": reason}
    from megatron_twotower.mcore.modules import rounded_by_transformer_engine

    rounding, differing, elements = ROUNDINGS[name], 0, 0
    for entry in context_entries(model):
        if layer_of_projection(entry.megatron_name) is None:
            continue
        parts = [tower.get_parameter(each.removeprefix("context_tower.")) for each in entry.hf_names]
        weight = parameter_from_hf(entry, parts, model).float()
        ours = rounded(weight, rounding.weights, powers_of_two=rounding.powers_of_two)
        differing += int((ours != rounded_by_transformer_engine(weight, name)).sum())
        elements += weight.numel()
    return {"differing_elements": differing, "elements": elements}


def measured(
    model: Model,
    config: ModelConfig,
    sequences: Tensor,
    *,
    wanted: Settings,
    mask_id: int,
    denoiser: bool,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each way of scaling, with and without rounded inputs, and each tower, on (n, l) sequences."""
    uniform = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(wanted.seed))
    device, rows = model.context_tower.device, []
    for name, rounding in ROUNDINGS.items():
        for inputs in (False, True):
            started, held = time.perf_counter(), rounded_tower(model.context_tower, config, rounding, inputs=inputs)
            found: dict[str, list[Sums]] = {NEXT: [], **({MASKED: []} if denoiser else {})}
            for first in range(0, len(sequences), ROWS):
                some, noise = (each[first : first + ROWS].to(device) for each in (sequences, uniform))
                found[NEXT].append(next_token(model, held.tower, some))
                if denoiser:
                    found[MASKED].append(
                        masked_tokens(
                            model,
                            held.tower,
                            some,
                            noise,
                            block=wanted.block_size_tokens,
                            levels=wanted.levels,
                            mask_id=mask_id,
                        )
                    )
            rows += [row(name, held, inputs, what, joined(parts)) for what, parts in found.items()]
            say(f"{name}, {'weights and inputs' if inputs else 'weights'}: {time.perf_counter() - started:.0f} s")
    return rows


def row(name: str, held: RoundedTower, inputs: bool, what: str, sums: Sums) -> dict[str, Any]:
    return {
        "precision": name,
        "inputs": inputs,
        "of": what,
        **figures(sums),
        "elements_in_fp8": held.elements,
        "elements_of_the_tower": held.total,
        "weight_error": held.error,
    }


def table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "context tower in",
        "rounded",
        "nats per token of",
        "wide",
        "FP8",
        "difference",
        "KL",
        "same choice",
        "largest logit error",
    ):
        made.add_column(heading, justify="left" if len(made.columns) < 3 else "right")
    for each in rows:
        made.add_row(
            each["precision"],
            "weights, inputs" if each["inputs"] else "weights",
            each["of"],
            f"{each['wide']:.4f}",
            f"{each['fp8']:.4f}",
            f"{each['difference']:+.4f} ± {each['difference_stderr']:.4f}",
            f"{each['kl']:.5f}",
            f"{each['same_choice']:.2%}",
            f"{each['largest_logit_error']:.2f} of {each['logit_rms']:.1f}",
        )
    return made


def run(
    output: Path,
    *,
    model: Path,
    data: Path,
    wanted: Settings = Settings(),
    threads: int | None = None,
    console: Console | None = None,
) -> None:
    """The command `bench fp8`: print the table, write `fp8.json`.

    Raises:
        UserError: a folder that is not what it should be, or data of another tokenizer.
    """
    corpus = Corpus.open(data / VALIDATION)
    opened, tokenizer, denoiser = open_model(model)
    found, expected = tokenizer_fingerprint(model), corpus.tokenizer_fingerprint
    if found != expected:
        raise UserError(f"{model}: found a tokenizer with sha256 {found}, expected that of {data}, {expected}")
    opened.to(default_devices()[0])
    sequences = evenly_spaced_windows(corpus, count=wanted.sequences, length=wanted.length_tokens)
    if denoiser:
        check_sequences(sequences, wanted.block_size_tokens)
    config, console = model_from_hf(read_hf_config(model), source=str(model)), console or tables.wide_console()
    with measure.torch_threads(threads or torch.get_num_threads()):
        rows = measured(
            opened,
            config,
            sequences,
            wanted=wanted,
            mask_id=mask_token_id(tokenizer),
            denoiser=denoiser,
            say=lambda line: console.print(line, highlight=False, style="dim"),
        )
    title = f"emulated FP8: {len(sequences)} held-out sequences of {wanted.length_tokens} tokens, {model}"
    console.print(table(rows, title=title))
    errors = {each["precision"]: each["weight_error"] for each in rows}
    share = rows[0]["elements_in_fp8"] / rows[0]["elements_of_the_tower"]
    said = ", ".join(f"{error:.2%} with {name}" for name, error in errors.items())
    console.print(f"{share:.0%} of the tower's elements are held in FP8; weights are off by {said}", highlight=False)
    checks = {name: against_transformer_engine(opened.context_tower, config, name) for name in ROUNDINGS}
    for name, check in checks.items():
        line = (
            f"not compared ({check['not_run']})"
            if "not_run" in check
            else (f"{check['differing_elements']} of {check['elements']} elements differ")
        )
        console.print(f"{name}, Transformer Engine's own rounding: {line}", highlight=False)
    facts = machine.machine()
    console.print(machine.machine_line(facts), highlight=False)
    measure.write_files(
        output,
        "fp8",
        {
            "emulated": True,
            "rows": rows,
            "transformer_engine": checks,
            "model": str(model),
            "data": str(data),
            "sequences": len(sequences),
            "length_tokens": wanted.length_tokens,
            "levels": wanted.levels,
            "machine": facts,
        },
        None,
    )

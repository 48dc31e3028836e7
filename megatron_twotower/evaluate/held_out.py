"""The command `evaluate --data`: likelihoods, and speed against quality, on held-out text.

It does not need Megatron.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import write_file
from megatron_twotower.common.machine import machine
from megatron_twotower.common.progress import OnProgress, silent, stage_bars
from megatron_twotower.common.tables import wide_console
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.documents import VALIDATION
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import check_tokenizer
from megatron_twotower.evaluate import likelihood
from megatron_twotower.evaluate.held_out_figures import PLOTS, print_figures
from megatron_twotower.evaluate.likelihood import LEVELS, Estimate
from megatron_twotower.evaluate.sampler_curves import LEAST_PROMPTS, sampler_curves
from megatron_twotower.evaluate.speed_quality import sweep, sweep_points, threshold_rows
from megatron_twotower.generate.engine import (
    GenerationSettings,
    check_sampler,
    decode,
    default_devices,
    eos_token_ids,
    generate_ids,
    load,
    warn_of_larger_blocks,
)
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, in the order of cost.

    Attributes:
        sequences: Number of windows of held-out text for the likelihoods.
        sequence_length_tokens: Tokens of a window.
        block_size_tokens: The block size that the denoiser was trained with; None for that of the
            folder.
        levels: Noise levels of the masked loss.
        bound_draws: Noise draws for each block, of the likelihood bound.
        thresholds: Confidence thresholds of the sweep, at the trained block size with a step per
            token.
        samplers: Samplers of the sweep, as the thresholds. They are compared with `threshold`.
        threshold: Confidence threshold where the sweep varies block sizes or steps.
        block_sizes: Other block sizes of the sweep, with a step per token.
        steps: Fewer steps per block in the sweep, at the trained block size.
        every: Sweep all combinations of thresholds and samplers, block sizes and steps instead.
        prompts: Number of prompts that each setting of the sweep continues.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens that are generated after a prompt.
        samples: Number of prompts whose text is shown in every mode.
        seed: Seed of the noise.
    """

    sequences: int = 32
    sequence_length_tokens: int = 256
    block_size_tokens: int | None = None
    levels: tuple[float, ...] = LEVELS
    bound_draws: int = 4
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    samplers: tuple[str, ...] = ()
    threshold: float = 0.8
    block_sizes: tuple[int, ...] = (8, 32)
    steps: tuple[int, ...] = (2, 4, 8)
    every: bool = False
    prompts: int = 6
    prompt_tokens: int = 64
    new_tokens: int = 96
    samples: int = 2
    seed: int = 1234

    def __post_init__(self) -> None:
        least = {
            "sequences": 2,
            "prompts": 1,
            "prompt_tokens": 1,
            "new_tokens": 4,
            "samples": 0,
            "bound_draws": 1,
            "block_size_tokens": 1,
        }
        for name, expected in least.items():
            found = getattr(self, name)
            if found is not None and found < expected:
                raise UserError(f"{name}: found {found}, expected at least {expected}")
        for sampler in self.samplers:
            check_sampler(sampler, GenerationSettings.confidence_threshold)
        if self.samplers and self.prompts < LEAST_PROMPTS:
            raise UserError(f"prompts: found {self.prompts} with samplers, expected at least {LEAST_PROMPTS}")
        if self.prompts > self.sequences:
            raise UserError(f"prompts {self.prompts}: expected at most {self.sequences}, the sequences to begin")
        if self.prompt_tokens > self.sequence_length_tokens:
            length = self.sequence_length_tokens
            raise UserError(f"prompt_tokens {self.prompt_tokens}: expected at most the sequence length {length}")
        for threshold in (*self.thresholds, self.threshold):
            if not 0 <= threshold <= 1:
                raise UserError(f"threshold: found {threshold}, expected 0 to 1")
        for name, values in (("block sizes", self.block_sizes), ("steps", self.steps)):
            if any(value < 1 for value in values):
                raise UserError(f"{name}: found {min(values)}, expected at least 1")


# --- figures ---


def generate_samples(
    model: TwoTowerModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    block_size: int,
    progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """Greedy text in three modes from prompts (n, l), with the default threshold."""
    settings = GenerationSettings(max_new_tokens=max_new_tokens, block_size=block_size, steps_per_block=block_size)
    samples: list[dict[str, Any]] = []
    modes, eos_ids = ("mask_diffusion", "mock_ar", "ar"), eos_token_ids(model, tokenizer)
    for row in prompts:
        for mode in modes:
            ids, stats = generate_ids(model, row.unsqueeze(0), mode=mode, settings=settings, eos_id=eos_ids)
            samples.append(
                {
                    "mode": mode,
                    "prompt": tokenizer.decode(row.tolist()),
                    "text": decode(tokenizer, ids[0, len(row) :], eos_ids=eos_ids),
                    "passes": stats.passes,
                    "new_tokens": stats.new_tokens,
                    "seconds": stats.seconds,
                }
            )
            progress("samples", len(samples), len(prompts) * len(modes))
    return samples


def likelihoods(
    model: TwoTowerModel,
    sequences: Tensor,
    *,
    settings: EvaluationSettings,
    mask_id: int,
    progress: OnProgress = silent,
) -> dict[str, Any]:
    """Nats per token of sequences (n, l) under both towers.

    They are given as means over all tokens, by noise level, and by position in the block.
    """
    block = settings.block_size_tokens or model.block_size
    ar_nats = likelihood.ar_nats(model, sequences, progress=progress)
    # Of the tokens that the bound scores: all blocks except the first.
    ar_nats_on_bound_tokens = ar_nats[:, block - 1 :]
    by_noise = likelihood.masked_loss_by_noise(
        model,
        sequences,
        block_size=block,
        levels=settings.levels,
        seed=settings.seed,
        mask_id=mask_id,
        progress=progress,
    )
    bound = likelihood.bound_nats(
        model,
        sequences,
        block_size=block,
        draws=settings.bound_draws,
        seed=settings.seed,
        mask_id=mask_id,
        progress=progress,
    )

    def named(name: str, found: Estimate) -> dict[str, Any]:
        return {name: found.nats_per_token, f"{name}_stderr": found.stderr, f"{name}_tokens": found.tokens}

    return {
        **named("ar_loss", likelihood.estimate(ar_nats)),
        **named("ar_loss_on_bound_tokens", likelihood.estimate(ar_nats_on_bound_tokens)),
        **named("diffusion_bound", likelihood.estimate(bound)),
        "masked_loss_by_noise": by_noise,
        "ar_loss_by_position": [asdict(each) for each in likelihood.by_position(ar_nats_on_bound_tokens, block)],
        "diffusion_bound_by_position": [asdict(each) for each in likelihood.by_position(bound, block)],
    }


def _generation(
    model: TwoTowerModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Tensor,
    *,
    settings: EvaluationSettings,
    progress: OnProgress,
) -> dict[str, Any]:
    """The sweep over prompts (n, l), and samples of text in every mode."""
    block = settings.block_size_tokens or model.block_size
    points = sweep_points(
        thresholds=settings.thresholds,
        block_sizes=settings.block_sizes,
        steps=settings.steps,
        trained_block=block,
        threshold=settings.threshold,
        samplers=settings.samplers,
        every=settings.every,
    )
    mask_id, new_tokens = model.mask_token_id, settings.new_tokens
    rows = sweep(model, prompts, points=points, max_new_tokens=new_tokens, mask_id=mask_id, progress=progress)
    first = prompts[: settings.samples]
    samples = generate_samples(model, tokenizer, first, max_new_tokens=new_tokens, block_size=block, progress=progress)
    found: dict[str, Any] = {
        "ar_generation": rows[0],
        "sweep": threshold_rows(rows, block),
        "generation": rows,
        "samples": samples,
    }
    if settings.samplers and not settings.every:
        found["samplers"] = sampler_curves(rows, block=block, threshold=settings.threshold)
    return found


def evaluate(
    folder: str | Path,
    data: str | Path,
    *,
    settings: EvaluationSettings = EvaluationSettings(),
    progress: OnProgress = silent,
) -> dict[str, Any]:
    """Measure an exported folder on the held-out part of a prepared data folder.

    Args:
        folder: Two-tower Hugging Face folder.
        data: Prepared data folder, in the tokenizer of the model.
        settings: What to measure.
        progress: Called with the progress of each stage.

    Returns:
        The figures, ready for JSON.

    Raises:
        UserError: No two-tower folder, no data folder, or data of another tokenizer.
    """
    started = time.perf_counter()
    corpus = Corpus.open(Path(data) / VALIDATION)
    model, tokenizer = load(folder, device=default_devices()[0])
    sha256 = check_tokenizer(Path(folder), corpus.tokenizer_fingerprint, exact_ids=corpus.exact_ids, data=data)
    sequences = evenly_spaced_windows(corpus, count=settings.sequences, length=settings.sequence_length_tokens)
    warn_of_larger_blocks(model, settings.block_size_tokens)
    block = settings.block_size_tokens or model.block_size
    settings = replace(settings, block_size_tokens=block)
    likelihood.check_sequences(sequences, block)

    scored = likelihoods(model, sequences, settings=settings, mask_id=model.mask_token_id, progress=progress)
    prompts = sequences[: settings.prompts, : settings.prompt_tokens].to(model.context_tower.device)
    generated = _generation(model, tokenizer, prompts, settings=settings, progress=progress)
    bytes_per_token = corpus.total_bytes / corpus.total_tokens
    return {
        **scored,
        "ar_loss_per_byte": scored["ar_loss"] / bytes_per_token,
        "bytes_per_token": bytes_per_token,
        **generated,
        "model": str(folder),
        "data": str(data),
        "tokenizer_sha256": sha256,
        "sequences": len(sequences),
        "settings": asdict(settings),
        "machine": machine(),
        "device": str(model.context_tower.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }


# --- the command ---


def run(
    folder: str | Path, *, data: str | Path, output: str | Path, settings: EvaluationSettings = EvaluationSettings()
) -> None:
    """Run the command: measure with progress bars, write a JSON file and plots, print tables.

    Args:
        folder: Two-tower Hugging Face folder.
        data: Prepared data folder.
        output: JSON file; the plots are written next to it.
        settings: What to measure.

    Raises:
        UserError: See `evaluate`; then nothing is written.
    """
    with stage_bars() as progress:
        figures = evaluate(folder, data, settings=settings, progress=progress)
    target = Path(output)
    for name, draw in PLOTS.items():
        if (picture := draw(figures)) is not None:
            write_file(target.with_name(f"{target.stem}-{name}.png"), picture)
    write_file(target, (json.dumps(figures, indent=1) + "\n").encode())
    print_figures(figures, wide_console())

"""Writing text with an exported two-tower folder."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.hf_config import read_hf_config
from megatron_twotower.data.tokenizer import load_tokenizer, text_encoder
from megatron_twotower.hf import ARCHITECTURE
from megatron_twotower.hf.modeling_nemotron_h_twotower import (
    ArgumentError,
    GenerationStats,
    NemotronHTwoTowerForCausalLM,
    OnStep,
    OnTokens,
)

# Where a tokenizer names no mask token: the id of the released checkpoint.
MASK_TOKEN_ID = 3


@dataclass(frozen=True)
class GenerationSettings:
    """How to write.

    block_size: tokens that the denoiser sees at once. steps_per_block, confidence_threshold (more
    probable tokens are committed at once): of mask diffusion alone. temperature: 0 is greedy.
    top_k, top_p: among how many tokens, and among how much of their probability, to sample; None
    for all. seed: of the sampling. draft_steps: passes of the denoiser to a draft, of speculative
    generation alone.
    """

    max_new_tokens: int = 128
    block_size: int = 16
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    top_p: float | None = None
    draft_steps: int = 1


@dataclass(frozen=True)
class Watch:
    """Who is told while text is written: `on_step` by mask diffusion, `on_tokens` by the other modes."""

    on_step: OnStep | None = None
    on_tokens: OnTokens | None = None


UNWATCHED = Watch()


@dataclass(frozen=True)
class Generation:
    """What was written. ids: (l + new,) int64 on the CPU, the prompt's first. text: of the new ids, up to EOS.

    passes: of the denoiser, or, in modes `ar` and `speculative`, of the context tower. seconds:
    wall-clock, with the prompt's prefill. accepted: of the drafted tokens, those that stayed, in
    mode `speculative`; else None.
    """

    mode: str
    prompt: str
    text: str
    ids: Tensor
    new_tokens: int
    passes: int
    seconds: float
    accepted: int | None = None

    @property
    def tokens_per_pass(self) -> float:
        return self.new_tokens / self.passes

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[NemotronHTwoTowerForCausalLM, PreTrainedTokenizerFast]:
    """Open a two-tower folder with this package's own modelling code: nothing in the folder is executed.

    Args:
        dtype: of the weights; None for that of `config.json`.

    Raises: UserError: not a two-tower folder, or its weights are not exactly those of its
        configuration.
    """
    architectures = read_hf_config(folder).get("architectures")
    if architectures != [ARCHITECTURE]:
        raise UserError(f"{folder}/config.json: architectures: found {architectures}, expected ['{ARCHITECTURE}']")
    tokenizer = load_tokenizer(Path(folder))
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        model, info = NemotronHTwoTowerForCausalLM.from_pretrained(
            str(folder), dtype="auto" if dtype is None else dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info[problem]))
        if names:
            some = ", ".join(names[:3])
            raise UserError(f"{folder}: {problem.replace('_', ' ')}: found {len(names)} ({some}), expected none")
    return model.eval().to(device), tokenizer


def default_devices() -> tuple[str, ...]:
    return ("cuda",) if torch.cuda.is_available() else ("cpu",)


def place(model: NemotronHTwoTowerForCausalLM, devices: Sequence[str]) -> None:
    """Put the model on one device, or its context tower on the first and its denoiser on the second.

    Raises:
        UserError: a device that is not there.
    """
    if len(devices) > 2:
        raise UserError(f"device: found {' '.join(devices)}, expected one or two")
    try:
        model.place_towers_on_devices(devices[0], devices[-1])
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"device: found {' '.join(devices)}, expected one or two that are here ({reason})") from error


def mask_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    found = tokenizer.mask_token_id
    return MASK_TOKEN_ID if found is None else int(found)


def write(
    model: NemotronHTwoTowerForCausalLM,
    ids: Tensor,
    *,
    mode: str,
    settings: GenerationSettings,
    mask_id: int,
    eos_id: int | None,
    attention_mask: Tensor | None = None,
    watch: Watch = UNWATCHED,
) -> tuple[Tensor, GenerationStats]:
    """Continue prompts.

    Args: ids: (b, l) int64. attention_mask: (b, l), 0 for padding on the left of shorter prompts;
        None: all are of one length. eos_id: ends a row; None always writes `max_new_tokens`.

    Returns:
        (b, l + new) ids and what they took.

    Raises:
        UserError: an unknown mode, or a setting out of range.
    """
    check_mode(mode)
    try:
        written = MODES[mode](model, Request(ids, attention_mask, mask_id, eos_id, watch), settings)
    except ArgumentError as error:
        raise UserError(str(error)) from error
    assert model.last_generation is not None
    return written, model.last_generation


def check_mode(mode: str, *more: str) -> None:
    """Refuse what is neither a mode nor one of `more`."""
    if mode not in (*MODES, *more):
        raise UserError(f"mode: found {mode!r}, expected one of {', '.join((*MODES, *more))}")


@dataclass(frozen=True)
class Request:
    """What to continue; see `write`."""

    ids: Tensor
    attention_mask: Tensor | None
    mask_id: int
    eos_id: int | None
    watch: Watch


Mode = Callable[[NemotronHTwoTowerForCausalLM, Request, GenerationSettings], Tensor]


def _generator(device: torch.device, settings: GenerationSettings) -> torch.Generator:
    return torch.Generator(device).manual_seed(settings.seed)


def _mask_diffusion(model: NemotronHTwoTowerForCausalLM, what: Request, settings: GenerationSettings) -> Tensor:
    return model.generate_mask_diffusion(
        what.ids,
        settings.max_new_tokens,
        settings.block_size,
        settings.steps_per_block,
        what.mask_id,
        settings.temperature,
        settings.top_k,
        settings.confidence_threshold,
        what.eos_id,
        attention_mask=what.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.denoiser_tower.device, settings),
        on_step=what.watch.on_step,
    )


def _mock_ar(model: NemotronHTwoTowerForCausalLM, what: Request, settings: GenerationSettings) -> Tensor:
    return model.generate_mock_ar(
        what.ids,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        what.eos_id,
        attention_mask=what.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.denoiser_tower.device, settings),
        on_tokens=what.watch.on_tokens,
    )


def _ar(model: NemotronHTwoTowerForCausalLM, what: Request, settings: GenerationSettings) -> Tensor:
    return model.generate_ar(
        what.ids,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        what.eos_id,
        attention_mask=what.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.context_tower.device, settings),
        on_tokens=what.watch.on_tokens,
    )


def _speculative(model: NemotronHTwoTowerForCausalLM, what: Request, settings: GenerationSettings) -> Tensor:
    return model.generate_speculative(
        what.ids,
        settings.max_new_tokens,
        settings.block_size,
        settings.draft_steps,
        what.mask_id,
        settings.temperature,
        settings.top_k,
        what.eos_id,
        attention_mask=what.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.context_tower.device, settings),
        on_tokens=what.watch.on_tokens,
    )


MODES: Mapping[str, Mode] = {
    "mask_diffusion": _mask_diffusion,
    "mock_ar": _mock_ar,
    "ar": _ar,
    "speculative": _speculative,
}
DECIDED_BY = {name: "context tower" if name in ("ar", "speculative") else "denoiser" for name in MODES}


def decode(tokenizer: PreTrainedTokenizerFast, new: Tensor) -> str:
    """Text of new ids (n,), without the EOS that may end them."""
    ids = new.tolist()
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids)


def generate(
    model: NemotronHTwoTowerForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    mode: str = "mask_diffusion",
    settings: GenerationSettings = GenerationSettings(),
    watch: Watch = UNWATCHED,
) -> Generation:
    """Continue a prompt, up to the tokenizer's end-of-text token.

    Raises:
        UserError: an empty prompt, an unknown mode, or a setting out of range.
    """
    ids = text_encoder(tokenizer)([prompt])[0]
    if not ids:
        raise UserError("prompt: found no text, expected at least one token")
    inputs = torch.tensor([ids], device=model.context_tower.device)
    output, stats = write(
        model,
        inputs,
        mode=mode,
        settings=settings,
        mask_id=mask_token_id(tokenizer),
        eos_id=tokenizer.eos_token_id,
        watch=watch,
    )
    written = output[0].cpu()
    text = decode(tokenizer, written[len(ids) :])
    accepted = stats.accepted if mode == "speculative" else None
    return Generation(mode, prompt, text, written, stats.new_tokens, stats.passes, stats.seconds, accepted)

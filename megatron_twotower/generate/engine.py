"""Load an exported two-tower folder and generate text with it, in four modes."""

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
from megatron_twotower.hf.modeling_nemotron_h_twotower import ArgumentError, GenerationStats, OnStep, OnTokens
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

# The mask token of the released checkpoint, for a tokenizer that names none.
MASK_TOKEN_ID = 3


# --- settings and results ---


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated.

    Attributes:
        max_new_tokens: Maximum number of new tokens.
        block_size: Tokens of a block, which the denoiser fills together.
        steps_per_block: Maximum number of denoiser passes for a block; only for mask diffusion.
        confidence_threshold: Mask diffusion commits every token more probable than this at once.
        temperature: 0 is greedy.
        top_k: Number of most probable tokens to sample among; None for all.
        seed: Seed of the sampling.
        top_p: Probability mass of the most probable tokens to sample among; None for all.
        draft_steps: Denoiser passes for a draft; only for speculative generation.
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
class Callbacks:
    """Functions that are called while text is generated.

    Attributes:
        on_step: Called after every step of mask diffusion.
        on_tokens: Called by the other modes when text grows.
    """

    on_step: OnStep | None = None
    on_tokens: OnTokens | None = None


NO_CALLBACKS = Callbacks()


@dataclass(frozen=True)
class Generation:
    """Text that was generated from one prompt.

    Attributes:
        mode: One of `MODES`.
        prompt: The text that was continued.
        text: The new text, without the EOS that may end it.
        ids: (l + new,) int64 on the CPU, those of the prompt first.
        new_tokens: Number of new tokens, including EOS.
        passes: Forward passes of the tower that decides, see `DECIDING_TOWER`.
        seconds: Wall-clock time, including the prefill of the prompt.
        accepted: Number of drafted tokens that were accepted, in mode `speculative`; else None.
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
        """New tokens per forward pass."""
        return self.new_tokens / self.passes

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return self.new_tokens / self.seconds


# --- loading ---


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[TwoTowerModel, PreTrainedTokenizerFast]:
    """Load a two-tower folder with the modelling code of this package.

    No code in the folder is executed.

    Args:
        folder: Two-tower Hugging Face folder.
        dtype: Dtype of the weights; None for that of `config.json`.
        device: Device of both towers.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        UserError: Not a two-tower folder, or weights that are not exactly those of its
            configuration.
    """
    architectures = read_hf_config(folder).get("architectures")
    if architectures != [ARCHITECTURE]:
        raise UserError(f"{folder}/config.json: architectures: found {architectures}, expected ['{ARCHITECTURE}']")
    tokenizer = load_tokenizer(Path(folder))
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        model, info = TwoTowerModel.from_pretrained(
            str(folder), dtype="auto" if dtype is None else dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info[problem]))
        if names:
            first = ", ".join(names[:3])
            raise UserError(f"{folder}: {problem.replace('_', ' ')}: found {len(names)} ({first}), expected none")
    return model.eval().to(device), tokenizer


def default_devices() -> tuple[str, ...]:
    """CUDA if it is available, else the CPU."""
    return ("cuda",) if torch.cuda.is_available() else ("cpu",)


def place_towers(model: TwoTowerModel, devices: Sequence[str]) -> None:
    """Put the model on one device, or the context tower on one and the denoiser on another.

    Raises:
        UserError: More than two devices, or a device that does not exist.
    """
    if len(devices) > 2:
        raise UserError(f"device: found {' '.join(devices)}, expected one or two")
    try:
        model.place_towers_on_devices(devices[0], devices[-1])
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"device: found {' '.join(devices)}, expected one or two that are here ({reason})") from error


def mask_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The mask token of a tokenizer, or that of the released checkpoint if it names none."""
    found = tokenizer.mask_token_id
    return MASK_TOKEN_ID if found is None else int(found)


# --- modes ---


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue; see `generate_ids`."""

    ids: Tensor
    attention_mask: Tensor | None
    mask_id: int
    eos_id: int | None
    callbacks: Callbacks


Mode = Callable[[TwoTowerModel, Prompts, GenerationSettings], Tensor]


def _generator(device: torch.device, settings: GenerationSettings) -> torch.Generator:
    return torch.Generator(device).manual_seed(settings.seed)


def _mask_diffusion(model: TwoTowerModel, prompts: Prompts, settings: GenerationSettings) -> Tensor:
    return model.generate_mask_diffusion(
        prompts.ids,
        settings.max_new_tokens,
        settings.block_size,
        settings.steps_per_block,
        prompts.mask_id,
        settings.temperature,
        settings.top_k,
        settings.confidence_threshold,
        prompts.eos_id,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.denoiser_tower.device, settings),
        on_step=prompts.callbacks.on_step,
    )


def _mock_ar(model: TwoTowerModel, prompts: Prompts, settings: GenerationSettings) -> Tensor:
    return model.generate_mock_ar(
        prompts.ids,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        prompts.eos_id,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.denoiser_tower.device, settings),
        on_tokens=prompts.callbacks.on_tokens,
    )


def _ar(model: TwoTowerModel, prompts: Prompts, settings: GenerationSettings) -> Tensor:
    return model.generate_ar(
        prompts.ids,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        prompts.eos_id,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.context_tower.device, settings),
        on_tokens=prompts.callbacks.on_tokens,
    )


def _speculative(model: TwoTowerModel, prompts: Prompts, settings: GenerationSettings) -> Tensor:
    return model.generate_speculative(
        prompts.ids,
        settings.max_new_tokens,
        settings.block_size,
        settings.draft_steps,
        prompts.mask_id,
        settings.temperature,
        settings.top_k,
        prompts.eos_id,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.context_tower.device, settings),
        on_tokens=prompts.callbacks.on_tokens,
    )


MODES: Mapping[str, Mode] = {
    "mask_diffusion": _mask_diffusion,
    "mock_ar": _mock_ar,
    "ar": _ar,
    "speculative": _speculative,
}
# The tower that decides on tokens. Its passes are counted.
DECIDING_TOWER = {name: "context tower" if name in ("ar", "speculative") else "denoiser" for name in MODES}


def check_mode(mode: str, *more: str) -> None:
    """Raise a `UserError` for a name that is neither a mode nor one of `more`."""
    if mode not in (*MODES, *more):
        raise UserError(f"mode: found {mode!r}, expected one of {', '.join((*MODES, *more))}")


# --- generation ---


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Pad rows of ids on the left to one length.

    Returns:
        Ids (b, l), and their attention mask (b, l), 0 at padding; None without padding.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    mask = torch.arange(longest) >= longest - lengths
    return ids, None if bool(mask.all()) else mask.long()


def generate_ids(
    model: TwoTowerModel,
    ids: Tensor,
    *,
    mode: str,
    settings: GenerationSettings,
    mask_id: int,
    eos_id: int | None,
    attention_mask: Tensor | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> tuple[Tensor, GenerationStats]:
    """Continue prompts.

    Args:
        model: Two-tower model.
        ids: (b, l) int64, on the device of the context tower.
        mode: One of `MODES`.
        settings: How to generate.
        mask_id: Id of the mask token.
        eos_id: Ends a row; with None every row gets `max_new_tokens`.
        attention_mask: (b, l), 0 at padding on the left of shorter prompts; None without padding.
        callbacks: Functions to call while text is generated.

    Returns:
        Ids (b, l + new) and the cost of the generation.

    Raises:
        UserError: An unknown mode, or a setting out of range.
    """
    check_mode(mode)
    try:
        output = MODES[mode](model, Prompts(ids, attention_mask, mask_id, eos_id, callbacks), settings)
    except ArgumentError as error:
        raise UserError(str(error)) from error
    assert model.last_generation is not None
    return output, model.last_generation


def decode(tokenizer: PreTrainedTokenizerFast, new: Tensor) -> str:
    """Decode new ids (n,) to text, without the EOS that may end them."""
    ids = new.tolist()
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids)


def generate(
    model: TwoTowerModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    mode: str = "mask_diffusion",
    settings: GenerationSettings = GenerationSettings(),
    callbacks: Callbacks = NO_CALLBACKS,
) -> Generation:
    """Continue one prompt, up to the end-of-text token of the tokenizer.

    Raises:
        UserError: An empty prompt, an unknown mode, or a setting out of range.
    """
    ids = text_encoder(tokenizer)([prompt])[0]
    if not ids:
        raise UserError("prompt: found no text, expected at least one token")
    inputs = torch.tensor([ids], device=model.context_tower.device)
    output, stats = generate_ids(
        model,
        inputs,
        mode=mode,
        settings=settings,
        mask_id=mask_token_id(tokenizer),
        eos_id=tokenizer.eos_token_id,
        callbacks=callbacks,
    )
    all_ids = output[0].cpu()
    text = decode(tokenizer, all_ids[len(ids) :])
    accepted = stats.accepted if mode == "speculative" else None
    return Generation(mode, prompt, text, all_ids, stats.new_tokens, stats.passes, stats.seconds, accepted)

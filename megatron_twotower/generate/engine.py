"""Load an exported two-tower folder and generate text with it, in four modes."""

import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.config.hf_config import read_hf_config
from megatron_twotower.config.special_tokens import SpecialTokens, read_special_tokens
from megatron_twotower.data.tokenizer import load_tokenizer, text_encoder
from megatron_twotower.generate.quantization import (
    NO_QUANTIZATION,
    Quantization,
    check_quantized,
    check_widths,
    quantization_config,
    require_torchao,
)
from megatron_twotower.hf import ARCHITECTURE
from megatron_twotower.hf.modeling_nemotron_h_twotower import (
    ArgumentError,
    ContextCache,
    EndOfText,
    GenerationStats,
    OnStep,
    OnTokens,
    Stop,
    as_ids,
    read_sampler,
)
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

# --- settings and results ---


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated.

    Attributes:
        max_new_tokens: Maximum number of new tokens.
        block_size: Tokens of a block, which the denoiser fills together; None for that of the
            folder.
        steps_per_block: Maximum number of denoiser passes for a block; only for mask diffusion.
        confidence_threshold: Mask diffusion commits every token more probable than this at once.
        temperature: 0 is greedy.
        top_k: Number of most probable tokens to sample among; None for all.
        seed: Seed of the sampling.
        top_p: Probability mass of the most probable tokens to sample among; None for all.
        draft_steps: Denoiser passes for a draft; only for speculative generation.
        prefill_chunk_size: Positions of each prompt that the context tower reads at a time.
        sampler: Rule by which mask diffusion commits tokens, in place of the confidence threshold:
            a name and numbers as in `read_sampler`; None for the threshold.
        experts_per_block: Experts that the tokens of a block share in each layer of the denoiser,
            at most; only for mask diffusion. None for all.

    Raises:
        UserError: An unknown sampler, or one beside a confidence threshold.
    """

    max_new_tokens: int = 128
    block_size: int | None = None
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    top_p: float | None = None
    draft_steps: int = 1
    prefill_chunk_size: int = TwoTowerModel.prefill_chunk_size
    sampler: str | None = None
    experts_per_block: int | None = None

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.confidence_threshold)


def check_sampler(sampler: str | None, confidence_threshold: float) -> None:
    """Check the name and the numbers of a sampler, and that no threshold is given beside it.

    Raises:
        UserError: The sampler does not exist or does not use the threshold.
    """
    if sampler is None:
        return
    try:
        read_sampler(sampler)
    except ArgumentError as error:
        raise UserError(str(error)) from error
    require(
        confidence_threshold == GenerationSettings.confidence_threshold,
        f"confidence_threshold: found {confidence_threshold} with the sampler {sampler}, which does not use it",
    )


@dataclass(frozen=True)
class Callbacks:
    """Functions that are called while text is generated.

    Attributes:
        on_step: Called after every step of mask diffusion.
        on_tokens: Called by the other modes when text grows.
        stop: Called by all modes when text has grown; says which rows end.
    """

    on_step: OnStep | None = None
    on_tokens: OnTokens | None = None
    stop: Stop | None = None


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
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantization: Quantization = NO_QUANTIZATION,
) -> tuple[TwoTowerModel, PreTrainedTokenizerFast]:
    """Load a two-tower folder with the modelling code of this package.

    No code in the folder is executed.

    Args:
        folder: Two-tower Hugging Face folder.
        dtype: Dtype of the weights; None for that of `config.json`.
        device: Device of both towers.
        quantization: Which weights to quantise. A folder that is quantised stays as it is.

    Returns:
        The model in evaluation mode, with the special tokens of the folder, and its tokenizer.

    Raises:
        UserError: Not a two-tower folder, weights that are not exactly those of its configuration,
            files that disagree about the special tokens, or weights that cannot be quantised.
    """
    config = read_hf_config(folder)
    architectures = config.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise UserError(f"{folder}/config.json: architectures: found {architectures}, expected ['{ARCHITECTURE}']")
    if config.get("quantization_config") is not None:
        found = f"--quantize: found {quantization.kind}, expected none"
        require(quantization.kind is None, f"{found}: {folder} is quantised")
        require_torchao(f"{folder}/config.json: quantization_config")
    settings: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if quantization.kind is not None:
        check_widths(quantization, config, source=f"{folder}/config.json")
        settings["quantization_config"] = quantization_config(quantization, torch.device(device))
        if torch.device(device).type != "cpu":
            settings["device_map"] = str(device)  # torchao packs four bits on the device that computes
    tokenizer, said = load_tokenizer(Path(folder)), read_special_tokens(folder)
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        model, info = TwoTowerModel.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **settings
        )
    except (ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info[problem]))
        if names:
            first = ", ".join(names[:3])
            raise UserError(f"{folder}: {problem.replace('_', ' ')}: found {len(names)} ({first}), expected none")
    if quantization.kind is not None:
        check_quantized(model, quantization)
    _set_special_tokens(model, said, tokenizer)
    return model.eval().to(device), tokenizer


def _set_special_tokens(model: TwoTowerModel, said: SpecialTokens, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the model the mask token and EOS of its tokenizer, if its own files name none."""
    mask = tokenizer.mask_token_id if said.mask_token_id is None else said.mask_token_id
    eos = said.eos_token_ids or as_ids(tokenizer.eos_token_id)
    require(mask is None or mask not in eos, f"mask_token_id: found {mask}, which is EOS too, expected another id")
    model.generation_config.mask_token_id = mask
    if eos:
        model.generation_config.eos_token_id = list(eos)


def eos_token_ids(model: TwoTowerModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """All ids that end a text: those of the folder, and that of the tokenizer."""
    return as_ids((*model.eos_token_ids, *as_ids(tokenizer.eos_token_id)))


def end_of_text(ids: Sequence[int], eos_ids: Collection[int]) -> int | None:
    """The index of the first EOS of written ids; None without one."""
    return next((place for place, each in enumerate(ids) if each in eos_ids), None)


def with_block_size(model: TwoTowerModel, settings: GenerationSettings) -> GenerationSettings:
    """The settings with the block size of the folder if they have none; warns of larger blocks."""
    warn_of_larger_blocks(model, settings.block_size)
    return replace(settings, block_size=model.block_size if settings.block_size is None else settings.block_size)


def warn_of_larger_blocks(model: TwoTowerModel, block_size: int | None) -> None:
    """Warn of a block size that is larger than all that the denoiser was trained with."""
    warn_of_untrained_block(trained_block_sizes(model), block_size)


def trained_block_sizes(model: TwoTowerModel) -> tuple[int, ...]:
    """The block sizes that the denoiser was trained with, as far as the folder says."""
    return tuple(vars(model.generation_config).get("trained_block_sizes") or [model.block_size])


def warn_of_untrained_block(trained: Sequence[int], block_size: int | None) -> None:
    """`warn_of_larger_blocks` for the `trained_block_sizes` of a model that is elsewhere."""
    if block_size is not None and block_size > max(trained):
        sizes = ", ".join(map(str, trained))
        logging.getLogger(__name__).warning(
            "block_size %d: the denoiser was trained with blocks of %s; in larger ones text is worse", block_size, sizes
        )


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


# --- modes ---


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue; see `generate_ids`."""

    ids: Tensor
    attention_mask: Tensor | None
    mask_id: int | None
    eos_ids: tuple[int, ...]
    callbacks: Callbacks
    cache: ContextCache | None


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
        settings.confidence_threshold if settings.sampler is None else None,
        prompts.eos_ids,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.denoiser_tower.device, settings),
        on_step=prompts.callbacks.on_step,
        stop=prompts.callbacks.stop,
        sampler=settings.sampler,
        experts_per_block=settings.experts_per_block,
        cache=prompts.cache,
    )


def _mock_ar(model: TwoTowerModel, prompts: Prompts, settings: GenerationSettings) -> Tensor:
    return model.generate_mock_ar(
        prompts.ids,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        prompts.eos_ids,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.denoiser_tower.device, settings),
        on_tokens=prompts.callbacks.on_tokens,
        stop=prompts.callbacks.stop,
    )


def _ar(model: TwoTowerModel, prompts: Prompts, settings: GenerationSettings) -> Tensor:
    return model.generate_ar(
        prompts.ids,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        prompts.eos_ids,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.context_tower.device, settings),
        on_tokens=prompts.callbacks.on_tokens,
        stop=prompts.callbacks.stop,
        cache=prompts.cache,
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
        prompts.eos_ids,
        attention_mask=prompts.attention_mask,
        top_p=settings.top_p,
        generator=_generator(model.context_tower.device, settings),
        on_tokens=prompts.callbacks.on_tokens,
        stop=prompts.callbacks.stop,
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
    mask_id: int | None = None,
    eos_id: EndOfText = None,
    attention_mask: Tensor | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
    cache: ContextCache | None = None,
) -> tuple[Tensor, GenerationStats]:
    """Continue prompts.

    Args:
        model: Two-tower model.
        ids: (b, l) int64, on the device of the context tower.
        mode: One of `MODES`.
        settings: How to generate.
        mask_id: Id of the mask token; None for that of the folder.
        eos_id: One id or several that end a row; with None every row gets `max_new_tokens`.
        attention_mask: (b, l), 0 at padding on the left of shorter prompts; None without padding.
        callbacks: Functions to call while text is generated.
        cache: The `prefill` of the prompts, which is used up; only for the modes `ar` and
            `mask_diffusion`. None to read them here.

    Returns:
        Ids (b, l + new) and the cost of the generation.

    Raises:
        UserError: An unknown mode, or a setting out of range.
    """
    check_mode(mode)
    model.prefill_chunk_size = settings.prefill_chunk_size
    try:
        output = MODES[mode](model, Prompts(ids, attention_mask, mask_id, as_ids(eos_id), callbacks, cache), settings)
    except ArgumentError as error:
        raise UserError(str(error)) from error
    assert model.last_generation is not None
    return output, model.last_generation


def decode(tokenizer: PreTrainedTokenizerFast, new: Tensor, *, eos_ids: Sequence[int]) -> str:
    """Decode new ids (n,) to text, without the EOS that may end them."""
    ids = new.tolist()
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in eos_ids else ids)


def generate(
    model: TwoTowerModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    mode: str = "mask_diffusion",
    settings: GenerationSettings = GenerationSettings(),
    callbacks: Callbacks = NO_CALLBACKS,
    recognised: Collection[str] = (),
) -> Generation:
    """Continue one prompt, up to an end-of-text token of the folder.

    Args:
        model: Two-tower model.
        tokenizer: The tokenizer of the model.
        prompt: Text to continue.
        mode: One of `MODES`.
        settings: How to generate.
        callbacks: Functions to call while text is generated.
        recognised: As in `text_encoder`, for a rendered conversation.

    Raises:
        UserError: An empty prompt, an unknown mode, or a setting out of range.
    """
    ids = text_encoder(tokenizer, recognised=recognised)([prompt])[0]
    if not ids:
        raise UserError("prompt: found no text, expected at least one token")
    inputs = torch.tensor([ids], device=model.context_tower.device)
    eos_ids = eos_token_ids(model, tokenizer)
    output, stats = generate_ids(model, inputs, mode=mode, settings=settings, eos_id=eos_ids, callbacks=callbacks)
    all_ids = output[0].cpu()
    text = decode(tokenizer, all_ids[len(ids) :], eos_ids=eos_ids)
    accepted = stats.accepted if mode == "speculative" else None
    return Generation(mode, prompt, text, all_ids, stats.new_tokens, stats.passes, stats.seconds, accepted)

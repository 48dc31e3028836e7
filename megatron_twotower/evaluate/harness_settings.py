"""Settings of the tasks of lm-evaluation-harness. They can be read without the extra `eval`."""

from dataclasses import dataclass

from megatron_twotower.common.errors import UserError
from megatron_twotower.generate.engine import MODES

# How a given answer is scored: see `HarnessSettings.scoring`.
SCORINGS = ("ar", "bound", "mock_ar")


@dataclass(frozen=True)
class HarnessSettings:
    """How a model answers.

    Attributes: mode: How text is written. scoring: `ar`, by the context tower; `bound`, a lower
        bound on the denoiser's likelihood from `bound_draws` draws of noise for each block;
        `mock_ar`, by the denoiser as a next-token model. max_length_tokens: Tokens of context and
        answer together. A longer one loses its beginning. `None` for the model's own.
        max_new_tokens: Tokens of an answer, if the task does not say.

    The others are those of `GenerationSettings`.
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

"""The recording of one generation by mask diffusion, step by step, ready for JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_twotower.generate.engine import Generation, GenerationSettings
from megatron_twotower.hf.modeling_nemotron_h_twotower import DenoisingStep

# Version of the format of a recording.
VERSION = 1


@dataclass
class Recorder:
    """Records the steps of one row, as `on_step` of `generate_mask_diffusion`.

    Attributes:
        row: Index of the row in the batch.
        blocks: The recorded steps of each block.
    """

    row: int = 0
    blocks: list[list[dict[str, Any]]] = field(default_factory=list)

    def __call__(self, step: DenoisingStep) -> None:
        """Record a step."""
        if step.block == len(self.blocks):
            self.blocks.append([])
        committed = step.committed[self.row].nonzero().flatten().tolist()
        if committed:  # else this row had ended, and the pass was for other rows
            self.blocks[step.block].append(
                {
                    "t": round(float(step.t[self.row]), 4),
                    "predicted": step.predicted[self.row].tolist(),
                    "confidence": [round(value, 4) for value in step.confidence[self.row].tolist()],
                    "committed": committed,
                }
            )

    def recording(
        self, generation: Generation, tokenizer: PreTrainedTokenizerFast, *, model: str, settings: GenerationSettings
    ) -> dict[str, Any]:
        """Everything that a page shows: the steps as ids, the text of each id, and figures."""
        blocks = [steps for steps in self.blocks if steps]
        ids = {token for steps in blocks for step in steps for token in step["predicted"]}
        return {
            "version": VERSION,
            "model": model,
            "settings": asdict(settings),
            "mode": generation.mode,
            "prompt": generation.prompt,
            "text": generation.text,
            "new_tokens": generation.new_tokens,
            "passes": generation.passes,
            "seconds": round(generation.seconds, 3),
            "summary": _summary(generation),
            "blocks": blocks,
            "pieces": {str(token): tokenizer.decode([token]) for token in sorted(ids)},
        }


def _summary(generation: Generation) -> str:
    return (
        f"{generation.new_tokens} tokens in {generation.passes} passes, {generation.tokens_per_pass:.2f} per pass, "
        f"{generation.tokens_per_second:.0f} tokens/s"
    )

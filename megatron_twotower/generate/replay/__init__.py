"""A generation by mask diffusion, recorded step by step, and the page that plays it.

The page needs no other file and no network, and holds the recording as JSON: `read_page` gives it
back.
"""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_file
from megatron_twotower.generate.engine import Generation, GenerationSettings
from megatron_twotower.hf.modeling_nemotron_h_twotower import DenoisingStep

STYLE, SCRIPT = ((Path(__file__).with_name(f"replay.{kind}")).read_text(encoding="utf-8") for kind in ("css", "js"))
_RECORDING = re.compile(r'<script type="application/json">(.*?)</script>', re.DOTALL)
VERSION = 1


@dataclass
class Recorder:
    """Takes up the steps of one row, as `on_step` of `generate_mask_diffusion`."""

    row: int = 0
    blocks: list[list[dict[str, Any]]] = field(default_factory=list)

    def __call__(self, seen: DenoisingStep) -> None:
        if seen.block == len(self.blocks):
            self.blocks.append([])
        committed = seen.committed[self.row].nonzero().flatten().tolist()
        if committed:  # else the row had ended, and the pass was for others
            self.blocks[seen.block].append(
                {
                    "t": round(float(seen.t[self.row]), 4),
                    "predicted": seen.predicted[self.row].tolist(),
                    "confidence": [round(value, 4) for value in seen.confidence[self.row].tolist()],
                    "committed": committed,
                }
            )

    def recording(
        self, generation: Generation, tokenizer: PreTrainedTokenizerFast, *, model: str, settings: GenerationSettings
    ) -> dict[str, Any]:
        """All that a page shows, ready for JSON: ids, and the text of each id that occurs."""
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
        f"{generation.new_tokens / generation.seconds:.0f} tokens/s"
    )


def fragment(recording: Mapping[str, Any]) -> str:
    """The recording as an element for any page that holds `STYLE` in its head and `SCRIPT` at its end."""
    # With no "<" in it, no text of a model ends the element early.
    data = json.dumps(recording, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    plain = html.escape(recording["prompt"] + recording["text"])
    return (
        f'<section class="replay" aria-label="replay of the denoising">'
        f'<script type="application/json">{data}</script><noscript><pre>{plain}</pre></noscript></section>'
    )


_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { background: #f5f6f8; color: #1d2129; font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  margin: 0 auto; max-width: 1120px; padding: 2.2rem 1.25rem 3rem; }
h1 { font-size: 1.5rem; margin: 0; }
body > p { color: #6b7280; margin: .3rem 0 1.2rem; max-width: 80ch; }
footer { color: #6b7280; font-size: .87rem; margin-top: 1rem; }
@media (prefers-color-scheme: dark) {
  body { background: #0f1115; color: #e8eaed; } body > p, footer { color: #9aa1ac; }
}
"""


def page(recording: Mapping[str, Any]) -> str:
    """One self-contained page. Its policy forbids it to load anything."""
    settings, model = recording["settings"], html.escape(Path(recording["model"]).name)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Denoising replay: {model}</title><style>{_PAGE_STYLE}{STYLE}</style></head><body>
<h1>Denoising replay</h1>
<p>Each block of {settings["block_size"]} tokens starts from masks. A pass of the denoiser predicts all of them at
once; those it is most sure of are committed, out of order, and stay.</p>
{fragment(recording)}
<footer>{model}, block size {settings["block_size"]}, at most {settings["steps_per_block"]} steps per block,
confidence threshold {settings["confidence_threshold"]:g}, temperature {settings["temperature"]:g}.
Keys: space, arrows, home, end.</footer>
<script>{SCRIPT}</script>
</body></html>
"""


def write_page(path: Path, recording: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: `path` cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(page(recording), encoding="utf-8")


def read_page(path: Path) -> dict[str, Any]:
    """The recording that a page holds.

    Raises:
        UserError: not a page that `write_page` wrote.
    """
    found = _RECORDING.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"{path}: found no recording, expected a page of `twotower generate --html`")
    recording = json.loads(found[1])
    if recording.get("version") != VERSION:
        raise UserError(f"{path}: found a recording of version {recording.get('version')}, expected {VERSION}")
    return recording

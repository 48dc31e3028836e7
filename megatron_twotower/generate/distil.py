"""Text that a context tower writes, for its denoiser to train on: distillation by sequences (Kim and Rush 2016).

Of real text, many continuations are likely, and a denoiser that fills many positions at once is
unsure of each. Of what the context tower writes greedily there is one. A denoiser trained on that
is sure of more tokens in a pass, and of those that the context tower would have written; it learns
nothing that the tower does not know.
"""

import json
from pathlib import Path

from megatron_twotower.common.errors import require
from megatron_twotower.common.files import atomic_file
from megatron_twotower.common.progress import OnProgress, silent, stage_bars
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.documents import TRAIN
from megatron_twotower.data.shards import Corpus
from megatron_twotower.generate.engine import default_devices, load


def distil(
    folder: str | Path,
    data: str | Path,
    output: Path,
    *,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    progress: OnProgress = silent,
) -> int:
    """Continue stretches of training text greedily and write each, prompt and continuation, as a line of JSON.

    Args:
        folder: two-tower Hugging Face folder. data: prepared data folder, in its tokenizer.
        output: JSON lines with a field `text`, as `data prepare` reads them; whole or not there.

    Returns:
        how many lines.

    Raises:
        UserError: `output` exists or cannot be written, a number below 1, or too little data.
    """
    numbers = {
        "sequences": sequences,
        "prompt-tokens": prompt_tokens,
        "new-tokens": new_tokens,
        "batch-size": batch_size,
    }
    for name, value in numbers.items():
        require(value >= 1, f"--{name}: found {value}, expected at least 1")
    require(not output.exists(), f"{output}: exists, expected a file that is not there yet")
    prompts = evenly_spaced_windows(Corpus.open(Path(data) / TRAIN), count=sequences, length=prompt_tokens)
    model, tokenizer = load(folder, device=default_devices()[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    with atomic_file(output) as partial, partial.open("w") as file:
        for rows in prompts.split(batch_size):
            for ids in model.generate_ar(rows.to(model.context_tower.device), new_tokens).tolist():
                file.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
            done += len(rows)
            progress("writing", done, len(prompts))
    return done


def run(
    folder: Path, *, data: Path, output: Path, sequences: int, prompt_tokens: int, new_tokens: int, batch_size: int
) -> None:
    """The command `distil`."""
    with stage_bars() as progress:
        lines = distil(
            folder,
            data,
            output,
            sequences=sequences,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
    print(f"{output}: {lines:,} texts of {prompt_tokens} + {new_tokens} tokens")

"""The model of a worker: loaded once, kept, and named in every task.

Tasks of generation are done by an engine (`common.engines`). A task carries a `ModelPlace`; the
worker that gets it loads that model, or has it already. The process that hands out tasks asks a
worker for the few facts that it needs, and loads no weights.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.engines import Needs
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.workers import Engine
from megatron_twotower.generate.engine import default_devices, load, place_towers, trained_block_sizes
from megatron_twotower.generate.quantization import NO_QUANTIZATION, Quantization, first_device
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelPlace:
    """A model, and where a worker puts it.

    Attributes:
        folder: Two-tower Hugging Face folder.
        fingerprint: See `model_fingerprint`.
        devices: One, or one for each tower; empty for `default_devices` of the worker.
        quantization: Which weights the worker quantises.
    """

    folder: Path
    fingerprint: str
    devices: tuple[str, ...]
    quantization: Quantization = NO_QUANTIZATION

    @classmethod
    def of(
        cls, folder: str | Path, devices: Sequence[str] = (), quantization: Quantization = NO_QUANTIZATION
    ) -> "ModelPlace":
        """The place of the model that is in `folder` now.

        Raises:
            UserError: More than two devices.
        """
        if len(devices) > 2:
            raise UserError(f"device: found {' '.join(devices)}, expected one or two")
        return cls(Path(folder).resolve(), model_fingerprint(Path(folder)), tuple(devices), quantization)

    @property
    def needs(self) -> Needs:
        """What a worker needs: the folder, and a GPU for each CUDA device."""
        gpus = len({device for device in self.devices if device.startswith("cuda")})
        return Needs(files=(self.folder / "config.json",), gpus=gpus if self.devices else None)


def model_fingerprint(folder: Path) -> str:
    """A SHA-256 that changes with a model.

    It covers the configuration, the tokenizer and its template, and of each weight file the size
    and both ends. Weights are not read completely: for a large model that would take minutes at
    every start.
    """
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("json", "jinja", "safetensors") for path in folder.glob(f"*.{kind}")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            stream.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def loaded(place: ModelPlace) -> tuple[TwoTowerModel, PreTrainedTokenizerFast]:
    """The model of this process, on its devices, and its tokenizer.

    Raises:
        UserError: See `engine.load` and `engine.place_towers`.
    """
    return _loaded(place, place.devices or default_devices())


@functools.lru_cache(maxsize=1)
def _loaded(place: ModelPlace, devices: tuple[str, ...]) -> tuple[TwoTowerModel, PreTrainedTokenizerFast]:
    model, tokenizer = load(
        place.folder, device=first_device(place.quantization, devices), quantization=place.quantization
    )
    place_towers(model, devices)
    return model, tokenizer


@dataclass(frozen=True)
class ModelFacts:
    """What the process that hands out tasks needs to know of a model.

    Attributes:
        block_size: Of the folder.
        trained_block_sizes: Those that the denoiser was trained with.
        max_length_tokens: The most positions of a text.
        mask_token_id, eos_token_ids: The special tokens of the folder.
    """

    block_size: int
    trained_block_sizes: tuple[int, ...]
    max_length_tokens: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]


def facts_of(model: TwoTowerModel) -> ModelFacts:
    """The facts of a model."""
    return ModelFacts(
        block_size=model.block_size,
        trained_block_sizes=trained_block_sizes(model),
        max_length_tokens=int(model.config.max_position_embeddings),
        mask_token_id=model.mask_token_id,
        eos_token_ids=model.eos_token_ids,
    )


def facts_here(place: ModelPlace) -> ModelFacts:
    """The facts of the model of this process."""
    return facts_of(loaded(place)[0])


def ask_facts(engine: Engine, place: ModelPlace) -> ModelFacts:
    """The facts of a model, from a worker that loads it.

    Raises:
        UserError: The model cannot be loaded.
    """
    ((_, facts),) = engine(facts_here, [place])
    return facts

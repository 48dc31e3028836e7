"""Weighted mixtures of corpora: the blend file that names them, and the sequences that a run reads.

A blend file:

    corpora:
      web: {folder: web}                     # folders of `twotower data prepare`
      math: {folder: math, source: "where it comes from", public: true}
    mixtures:
      breadth: {web: 90, math: 10}           # weights on any scale
      quality: {web: 40, math: 60}

A run reads one mixture in each of its phases. `order.Mixture` says which corpus position k of a
phase reads from: after any number of positions, the share of each corpus is within one sequence of
its weight. Every corpus is read in its own shuffled epochs, and a later phase continues where an
earlier phase stopped. So no sequence comes twice before all sequences of its corpus have come once.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.phases import Phase, phase_number
from megatron_twotower.data import remote
from megatron_twotower.data.dataset import SequenceDataset, stack_sequences
from megatron_twotower.data.documents import TRAIN, VALIDATION
from megatron_twotower.data.order import LONGEST_PERIOD, Mixture, integer_shares
from megatron_twotower.data.shards import INDEX_FILE
from megatron_twotower.types import Batch


@dataclass(frozen=True)
class BlendCorpus:
    """A corpus of a mixture.

    Attributes:
        number: Its place among the corpora of the file. It keys order and noise.
        folder: The prepared folder, absolute or below the folder of the corpora; or a URL.
        weight: As in the file.
        source, public: What the file says about its origin, for the reader.
    """

    name: str
    number: int
    folder: str
    weight: float
    source: str
    public: bool


@dataclass(frozen=True)
class BlendMixture:
    """A named mixture of a blend file."""

    name: str
    corpora: tuple[BlendCorpus, ...]


@dataclass(frozen=True)
class Blend:
    """The mixtures of a blend file, in the order of the file."""

    path: Path
    mixtures: tuple[BlendMixture, ...]

    @classmethod
    def open(cls, path: str | Path, *, root: str | Path | None = None) -> "Blend":
        """Read a blend file.

        Args:
            root: Where relative folders of corpora are; the folder of the file if None.

        Raises:
            UserError: The file is missing or is not YAML, a key is unknown or missing, a mixture
                names an unknown corpus, or a weight is out of range.
        """
        path = Path(path)
        content = _read_yaml(path)
        listed = _table(content, "corpora", path)
        tables = _table(content, "mixtures", path)
        if unknown := content.keys() - {"corpora", "mixtures"}:
            raise UserError(f"{path}: found the key {min(unknown)}, expected corpora and mixtures")
        base = Path(root) if root else path.parent
        known = {name: _corpus(path, name, listed[name], number=n, root=base) for n, name in enumerate(listed)}
        mixtures = []
        for mixture in tables:
            weights = _table(tables, mixture, path)
            _check_weights(weights, listed=listed, where=f"{path}: {mixture}")
            corpora = (dataclasses.replace(known[name], weight=float(weight)) for name, weight in weights.items())
            mixtures.append(BlendMixture(mixture, tuple(corpora)))
        return cls(path, tuple(mixtures))

    def mixture(self, name: str) -> BlendMixture:
        """The mixture with a name. An empty name is allowed if there is only one mixture.

        Raises:
            UserError: There is no such mixture.
        """
        if not name and len(self.mixtures) == 1:
            return self.mixtures[0]
        for mixture in self.mixtures:
            if mixture.name == name:
                return mixture
        names = ", ".join(mixture.name for mixture in self.mixtures)
        raise UserError(f"{self.path}: found the mixtures {names}, expected {name or 'phases that name them'}")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a blend file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected the keys corpora and mixtures")
    return content


def _table(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: {key}: found {value!r}, expected names and their values")
    return value


def _corpus(path: Path, name: str, entry: Any, *, number: int, root: Path) -> BlendCorpus:
    """A corpus of the file, with weight 0."""
    if not isinstance(entry, dict) or not isinstance(entry.get("folder"), str):
        raise UserError(f"{path}: corpora.{name}: found {entry!r}, expected a folder")
    if unknown := entry.keys() - {"folder", "source", "public"}:
        raise UserError(f"{path}: corpora.{name}: found the key {min(unknown)}, expected folder, source, public")
    folder = entry["folder"]
    folder = folder if remote.is_url(folder) else str(root / folder)
    return BlendCorpus(name, number, folder, 0.0, str(entry.get("source", "")), bool(entry.get("public", False)))


def _check_weights(weights: dict[str, Any], *, listed: dict[str, Any], where: str) -> None:
    for name, weight in weights.items():
        if name not in listed:
            raise UserError(f"{where}: found the corpus {name}, expected one of {', '.join(listed)}")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            raise UserError(f"{where}: {name}: found the weight {weight!r}, expected a number above 0")
    for name, count in zip(weights, integer_shares(list(weights.values())), strict=True):
        if count == 0:
            raise UserError(
                f"{where}: {name}: found the weight {weights[name]}, expected at least 1 in {LONGEST_PERIOD} of all"
            )


def prepared_folders(data: str, *, folder: str | None = None) -> dict[str, str]:
    """Name and prepared folder (path or URL) of each corpus of `data`.

    Args:
        data: a prepared folder, its URL, or a blend file.
        folder: Where the corpora of a blend file are, as `data.folder` of a recipe; next to the
            file if None.

    Raises:
        UserError: `data` is none of these, or `folder` is given without a blend file.
    """
    if Path(data).suffix in (".yaml", ".yml"):
        blend = Blend.open(data, root=folder)
        return {corpus.name: corpus.folder for mixture in blend.mixtures for corpus in mixture.corpora}
    if folder is not None:
        raise UserError(f"{data}: found no .yaml with --folder {folder}, expected a blend file")
    if not remote.is_url(data) and not any((Path(data) / part / INDEX_FILE).is_file() for part in (TRAIN, VALIDATION)):
        raise UserError(f"{data}: found no {TRAIN}/{INDEX_FILE}, expected a prepared folder, its URL or a blend file")
    return {Path(data).resolve().name if not remote.is_url(data) else data: data}


def split_folder(folder: str, split: str) -> Path | str:
    """The folder, or URL, of a split of a prepared folder or URL."""
    if not remote.is_url(folder):
        return Path(folder) / split
    place = remote.FILE_PLACE
    return remote.join(folder, f"{split}/{place}" if place in folder else split)


# --- reading ---


@dataclass(frozen=True)
class _PhaseMixture:
    """The mixture of a phase over the corpora of the run.

    Attributes:
        corpora: (C,) int64, the index of each corpus of the mixture among those of the run.
        taken: (C,) int64, the sequences of each that earlier phases consume.
    """

    mixture: Mixture
    corpora: np.ndarray
    taken: np.ndarray


@dataclass(frozen=True)
class BlendedDataset:
    """The sequences of a run that reads a mixture of corpora in each phase.

    Attributes:
        datasets: By name of the corpus.
        phases: The phases of the run.
        weights: The weights of each phase, by name of the corpus.
    """

    datasets: dict[str, SequenceDataset]
    phases: tuple[Phase, ...]
    weights: Sequence[dict[str, float]]
    _mixtures: tuple[_PhaseMixture, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.phases) == len(self.weights) > 0, (self.phases, self.weights)
        index = {name: place for place, name in enumerate(self.datasets)}
        taken = np.zeros(len(index), dtype=np.int64)
        mixtures = []
        for phase, weights in zip(self.phases, self.weights, strict=True):
            mixture = Mixture.of(list(weights.values()))
            corpora = np.array([index[name] for name in weights], dtype=np.int64)
            mixtures.append(_PhaseMixture(mixture, corpora, taken[corpora]))
            taken[corpora] += mixture.counts_before(phase.sequences)
        object.__setattr__(self, "_mixtures", tuple(mixtures))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus and the index within its reading at positions (b,) int64: (b,) int64 each.

        A corpus is given by its place in `datasets`.
        """
        starts = np.array([phase.first for phase in self.phases])
        numbers = np.searchsorted(starts, positions, side="right") - 1
        corpora, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            chosen, phase = numbers == number, self._mixtures[number]
            corpus, index = phase.mixture.at(positions[chosen] - starts[number])
            corpora[chosen], indices[chosen] = phase.corpora[corpus], index + phase.taken[corpus]
        return corpora, indices

    def batch(self, positions: np.ndarray) -> Batch:
        """The sequences at positions (b,) int64."""
        corpora, indices = self.locate(positions)
        epochs, numbers, samples = (np.empty_like(positions) for _ in range(3))
        datasets = list(self.datasets.values())
        for corpus in np.unique(corpora).tolist():
            chosen, dataset = corpora == corpus, datasets[corpus]
            epochs[chosen], numbers[chosen] = dataset.locate(indices[chosen])
            samples[chosen] = dataset.sample_keys(numbers[chosen])
        places = zip(corpora.tolist(), numbers.tolist(), strict=True)
        sequences = [datasets[corpus].sequence(number) for corpus, number in places]
        in_blend = np.array([dataset.number for dataset in datasets])[corpora]
        return stack_sequences(sequences, samples=samples, epochs=epochs, positions=positions, corpora=in_blend)

    def sequences_before(self, cursor: int) -> dict[str, int]:
        """The exact number of sequences of each corpus that the run consumes before `cursor`."""
        number = phase_number(self.phases, cursor)
        total = np.zeros(len(self.datasets), dtype=np.int64)
        for phase, mixture in zip(self.phases[:number], self._mixtures, strict=False):
            total[mixture.corpora] += mixture.mixture.counts_before(phase.sequences)
        last = self._mixtures[number]
        total[last.corpora] += last.mixture.counts_before(cursor - self.phases[number].first)
        return dict(zip(self.datasets, total.tolist(), strict=True))

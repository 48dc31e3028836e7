"""Weighted mixtures of corpora: the blend file that names them, and the run's sequences drawn from them by phase.

A blend file:

    corpora:
      web: {folder: web}                     # folders of `twotower data prepare`
      math: {folder: math, source: "where it comes from", public: true}
    mixtures:
      breadth: {web: 90, math: 10}           # weights on any scale
      quality: {web: 40, math: 60}

Within a phase, position k reads from the corpus that `order.Mixture` lays there: after any number
of positions, each corpus has come up within one sequence of its weight. Every corpus is read in its
own shuffled epochs, and a later phase goes on where an earlier one left it, so that no sequence
comes twice before all have come once.
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
from megatron_twotower.data.dataset import SequenceDataset, stacked
from megatron_twotower.data.order import LONGEST_PERIOD, Mixture, whole_shares
from megatron_twotower.types import Batch


@dataclass(frozen=True)
class BlendCorpus:
    """A corpus of a mixture.

    number: its place among the corpora of the file, part of the keys of order and noise. folder: as
    the file has it, made absolute or relative to where the corpora are; a URL stays as it is.
    weight: as the file has it. source,
    public: what the file says of its origin, for the reader.
    """

    name: str
    number: int
    folder: str
    weight: float
    source: str
    public: bool


@dataclass(frozen=True)
class BlendPhase:
    """A named mixture."""

    name: str
    corpora: tuple[BlendCorpus, ...]


@dataclass(frozen=True)
class Blend:
    """The mixtures of a blend file, in its order."""

    path: Path
    phases: tuple[BlendPhase, ...]

    @classmethod
    def open(cls, path: str | Path, *, root: str | Path | None = None) -> "Blend":
        """Read a blend file. root: where its relative folders are; the folder of the file if left out.

        Raises: UserError: not there, not YAML, an unknown or missing key, a corpus that is not
            listed, or a bad weight.
        """
        path = Path(path)
        content = _read_yaml(path)
        listed = _table(content, "corpora", path)
        mixtures = _table(content, "mixtures", path)
        if unknown := content.keys() - {"corpora", "mixtures"}:
            raise UserError(f"{path}: found the key {min(unknown)}, expected corpora and mixtures")
        base = Path(root) if root else path.parent
        known = {name: _corpus(path, name, listed[name], number=n, root=base) for n, name in enumerate(listed)}
        phases = []
        for mixture, weights in mixtures.items():
            weights = _table(mixtures, mixture, path)
            _check_weights(weights, listed=listed, where=f"{path}: {mixture}")
            corpora = (dataclasses.replace(known[name], weight=float(weight)) for name, weight in weights.items())
            phases.append(BlendPhase(mixture, tuple(corpora)))
        return cls(path, tuple(phases))

    def mixture(self, name: str) -> BlendPhase:
        """The mixture of a name; the only one for no name.

        Raises:
            UserError: there is none.
        """
        if not name and len(self.phases) == 1:
            return self.phases[0]
        for phase in self.phases:
            if phase.name == name:
                return phase
        names = ", ".join(phase.name for phase in self.phases)
        raise UserError(f"{self.path}: found the mixtures {names}, expected {name or 'phases that name them'}")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a blend file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected the keys corpora and mixtures")
    return content


def _table(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: {key}: found {value!r}, expected names and what they stand for")
    return value


def _corpus(path: Path, name: str, entry: Any, *, number: int, root: Path) -> BlendCorpus:
    """A corpus as listed, its weight 0."""
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
    for name, count in zip(weights, whole_shares(list(weights.values())), strict=True):
        if count == 0:
            raise UserError(
                f"{where}: {name}: found the weight {weights[name]}, expected at least 1 in {LONGEST_PERIOD} of all"
            )


def split_folder(folder: str, split: str) -> Path | str:
    """The folder of a split of a prepared folder or URL."""
    if not remote.is_url(folder):
        return Path(folder) / split
    place = remote.FILE_PLACE
    return remote.join(folder, f"{split}/{place}" if place in folder else split)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PhaseMixture:
    """A phase's mixture over the run's corpora.

    corpora: (C,) int64 index of each corpus of the mixture among those of the run. taken: (C,)
    int64 sequences of each that earlier phases consume.
    """

    mixture: Mixture
    corpora: np.ndarray
    taken: np.ndarray


@dataclass(frozen=True)
class BlendedDataset:
    """The sequences of a run, each from the corpus that its phase's mixture has at its position.

    datasets: by name of the corpus. phases and weights: in parallel; the weights of a phase by name
    of the corpus.
    """

    datasets: dict[str, SequenceDataset]
    phases: tuple[Phase, ...]
    weights: Sequence[dict[str, float]]
    _stages: tuple[_PhaseMixture, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.phases) == len(self.weights) > 0, (self.phases, self.weights)
        index = {name: place for place, name in enumerate(self.datasets)}
        total = np.zeros(len(index), dtype=np.int64)
        stages = []
        for phase, weights in zip(self.phases, self.weights, strict=True):
            mixture = Mixture.of(list(weights.values()))
            corpora = np.array([index[name] for name in weights], dtype=np.int64)
            stages.append(_PhaseMixture(mixture, corpora, total[corpora]))
            total[corpora] += mixture.before(phase.sequences)
        object.__setattr__(self, "_stages", tuple(stages))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus, as its place in `datasets`, and index within that corpus's reading: (b,) int64 each."""
        starts = np.array([phase.first for phase in self.phases])
        numbers = np.searchsorted(starts, positions, side="right") - 1
        corpora, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            chosen, stage = numbers == number, self._stages[number]
            corpus, index = stage.mixture.at(positions[chosen] - starts[number])
            corpora[chosen], indices[chosen] = stage.corpora[corpus], index + stage.taken[corpus]
        return corpora, indices

    def batch(self, positions: np.ndarray) -> Batch:
        corpora, indices = self.locate(positions)
        epochs, numbers, samples = (np.empty_like(positions) for _ in range(3))
        datasets = list(self.datasets.values())
        for corpus in np.unique(corpora).tolist():
            chosen, dataset = corpora == corpus, datasets[corpus]
            epochs[chosen], numbers[chosen] = dataset.locate(indices[chosen])
            samples[chosen] = dataset.keys(numbers[chosen])
        rows = [datasets[corpus].row(number) for corpus, number in zip(corpora.tolist(), numbers.tolist(), strict=True)]
        keys = np.array([dataset.number for dataset in datasets])[corpora]
        return stacked(rows, samples=samples, epochs=epochs, positions=positions, corpora=keys)

    def sequences_before(self, cursor: int) -> dict[str, int]:
        """How many sequences of each corpus the run consumes before `cursor`: exact, whatever the cursor."""
        number = phase_number(self.phases, cursor)
        total = np.zeros(len(self.datasets), dtype=np.int64)
        for phase, stage in zip(self.phases[:number], self._stages, strict=False):
            total[stage.corpora] += stage.mixture.before(phase.sequences)
        last = self._stages[number]
        total[last.corpora] += last.mixture.before(cursor - self.phases[number].first)
        return dict(zip(self.datasets, total.tolist(), strict=True))

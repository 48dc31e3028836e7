"""Opens what a run reads, one corpus or a blend, and checks it against the configuration."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.phases import Phase, document_alignment, resolve_phases
from megatron_twotower.config.schema import DataConfig, RunConfig
from megatron_twotower.data.blend import Blend, BlendedDataset, BlendMixture, split_folder
from megatron_twotower.data.dataset import SequenceDataset
from megatron_twotower.data.documents import TRAIN
from megatron_twotower.data.order import LONGEST_PERIOD, Shuffle
from megatron_twotower.data.packing import Packing, WholePacking
from megatron_twotower.data.remote import is_url
from megatron_twotower.data.shards import INDEX_FILE, OFFSETS_FILE, SCORED_FILE, STARTS_FILE, Corpus
from megatron_twotower.data.tokenizer import accepted_fingerprints, rebuilt_class


def open_training(config: RunConfig, *, examine: bool = True) -> SequenceDataset | BlendedDataset:
    """What a run trains on: the corpus of `data.folder`, or the mixtures of `data.blend` by phase.

    Args:
        config: A resolved configuration.
        examine: Whether to examine every shard and the tokenizer, which one rank of a run does.

    Raises:
        UserError: a blend, corpus or phase does not fit the run, or the tokens are from another
            tokenizer.
    """
    phases = resolve_phases(config)
    if not config.data.blend:
        return _open_corpus(config, config.data.folder, "train", number=0, examine=examine)
    mixtures = _mixtures(config, phases)
    datasets = _open_corpora(config, mixtures, "train", examine=examine)
    return BlendedDataset(datasets, phases, [_weights(mixture) for mixture in mixtures])


def open_validation(config: RunConfig, count: int, *, examine: bool = True) -> SequenceDataset | BlendedDataset:
    """What a run validates on: held-out sequences.

    With a blend, the proportions of the corpora are those of all phases of the run together. A
    corpus whose share is less than one in `LONGEST_PERIOD` is left out.

    Args:
        config: A resolved configuration.
        count: The number of sequences that validation reads.
        examine: As in `open_training`.

    Raises:
        UserError: As `open_training`, or fewer than `count` sequences are held out.
    """
    phases, key = resolve_phases(config), f"train.validation_sequences: found {count}, expected at most the"
    if not config.data.blend:
        alone = _open_corpus(config, config.data.folder, "validation", number=0, examine=examine)
        if count > len(alone):
            raise UserError(f"{key} {len(alone)} held out")
        return alone
    mixtures = _mixtures(config, phases)
    shares: dict[str, float] = {}
    for phase, mixture in zip(phases, mixtures, strict=True):
        total = sum(corpus.weight for corpus in mixture.corpora)
        for corpus in mixture.corpora:
            part = phase.sequences * corpus.weight / total
            shares[corpus.name] = shares.get(corpus.name, 0.0) + part / sum(phase.sequences for phase in phases)
    shares = {name: share for name, share in shares.items() if share * LONGEST_PERIOD >= 1}
    datasets = _open_corpora(config, mixtures, "validation", only=shares, examine=examine)
    only_phase = dataclasses.replace(phases[0], first=0, sequences=count)
    source = BlendedDataset(datasets, (only_phase,), [shares])
    for name, needed in source.sequences_before(count).items():
        if needed > len(datasets[name]):
            raise UserError(f"{key} {len(datasets[name])} held out of {name} (its part is {needed})")
    return source


def reading_only(
    source: SequenceDataset | BlendedDataset, stretches: tuple[slice, ...]
) -> SequenceDataset | BlendedDataset:
    """The same source, which reads only some positions of each sequence.

    If damaged shards are skipped it reads all: whether a sequence touches one must be known to all
    ranks that share it.
    """

    def part(dataset: SequenceDataset) -> SequenceDataset:
        return dataset if dataset.skip_damaged else dataclasses.replace(dataset, stretches=stretches)

    if isinstance(source, SequenceDataset):
        return part(source)
    return dataclasses.replace(source, datasets={name: part(each) for name, each in source.datasets.items()})


def describing_files(config: RunConfig) -> dict[str, list[Path]]:
    """The files that say what a run reads, by key and path: blend file, indices and their arrays.

    Files at URLs are not among them.

    Raises:
        UserError: The blend file cannot be read.
    """
    data, files = config.data, {}
    folders = [data.folder] if data.folder else []
    if data.blend:
        files[f"data.blend {data.blend}"] = [Path(data.blend)]
        folders = [corpus.folder for mixture in _mixtures(config, resolve_phases(config)) for corpus in mixture.corpora]
    for folder in dict.fromkeys(folders):
        splits = [split_folder(folder, split) for split in ("train", "validation")]
        local = [split for split in splits if isinstance(split, Path)]
        needed = [split / name for split in local for name in (INDEX_FILE, STARTS_FILE, OFFSETS_FILE)]
        of_conversations = [split / SCORED_FILE for split in local]
        files[f"data {folder}"] = needed + [path for path in of_conversations if path.is_file()]
    return files


def _mixtures(config: RunConfig, phases: Sequence[Phase]) -> list[BlendMixture]:
    blend = Blend.open(config.data.blend, root=config.data.folder or None)
    return [blend.mixture(phase.mixture) for phase in phases]


def _weights(mixture: BlendMixture) -> dict[str, float]:
    return {corpus.name: corpus.weight for corpus in mixture.corpora}


def _open_corpora(
    config: RunConfig,
    mixtures: Sequence[BlendMixture],
    split: str,
    *,
    only: Collection[str] | None = None,
    examine: bool,
) -> dict[str, SequenceDataset]:
    """The datasets of all corpora of the mixtures by name, in the order of the blend file.

    Args:
        only: Names of the corpora to open; None for all.
    """
    named = {corpus.name: corpus for mixture in mixtures for corpus in mixture.corpora}
    ordered = sorted(named.values(), key=lambda corpus: corpus.number)
    opened = {
        corpus.name: _open_corpus(config, corpus.folder, split, number=corpus.number, examine=examine)
        for corpus in ordered
        if only is None or corpus.name in only
    }
    first, *others = (dataset.corpus for dataset in opened.values())
    for other in others:
        if other.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(
                f"{other.folder}: found tokens of tokenizer {other.tokenizer_fingerprint[:12]}, expected those of "
                f"{first.folder}, {first.tokenizer_fingerprint[:12]}"
            )
    return opened


def _open_corpus(config: RunConfig, folder: str, split: str, *, number: int, examine: bool) -> SequenceDataset:
    data, skip = config.data, config.data.damaged_shards == "skip"
    corpus = Corpus.open(
        split_folder(folder, split),
        damaged="skip" if skip else "stop",
        verify_shards=skip or data.verify_shards,
        examine=examine,
    )
    backbone = config.init.backbone
    if examine and backbone and (Path(backbone) / "tokenizer.json").is_file():
        accepted = accepted_fingerprints(Path(backbone), exact_ids=corpus.exact_ids)
        if corpus.tokenizer_fingerprint not in accepted:
            raise UserError(
                f"{folder}: found tokens of tokenizer {corpus.tokenizer_fingerprint[:12]}, expected those "
                f"of {backbone}, {accepted[0][:12]}"
            )
        if not corpus.exact_ids and (name := rebuilt_class(Path(backbone))):
            logging.getLogger(__name__).warning(
                f"{folder}: prepared by an older version with tokenizer_class {name}, so its ids may not be those of "
                "tokenizer.json (`twotower data verify` compares them)"
            )
    if corpus.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{folder}: found a vocabulary of {corpus.vocab_size}, expected at most model.vocab_size "
            f"{config.model.vocab_size}"
        )
    length, alignment = data.sequence_length_tokens, document_alignment(config)
    return SequenceDataset(
        corpus,
        sequence_length=length,
        seed=config.seed,
        number=number,
        shuffle=Shuffle(data.shuffle, -(-data.shuffle_run_tokens // length), data.shuffle_window_runs),
        packing=_packing(corpus, data, alignment) if data.documents == "respect" else None,
        skip_damaged=skip,
    )


def _packing(corpus: Corpus, data: DataConfig, alignment: int) -> Packing | WholePacking:
    """Conversations stay whole: an answer would lack its question. Other documents may be cut."""
    length = data.sequence_length_tokens
    if corpus.scored_offsets is None:
        if data.align_blocks == "answer":
            raise UserError(f"data.align_blocks: found answer, but {corpus.folder} has no conversations, expected grid")
        return Packing.of(corpus.starts, alignment=alignment)
    if data.align_blocks == "answer":
        return WholePacking.of_answers(*corpus.answers(), alignment=alignment, length=length)
    return WholePacking.of(corpus.starts, alignment=alignment, length=length)


def tokenizer_folder(config: RunConfig) -> Path:
    """The folder of the run's tokenizer, in the prepared folder of its first corpus."""
    if not config.data.blend:
        return Path(config.data.folder) / "tokenizer"
    return Path(_mixtures(config, resolve_phases(config))[0].corpora[0].folder) / "tokenizer"


def turn_ends(config: RunConfig) -> tuple[int, ...]:
    """The ids that end the answers of a run's conversations; none without data that is there."""
    folders = [config.data.folder]
    if config.data.blend:
        folders = [corpus.folder for mixture in _mixtures(config, resolve_phases(config)) for corpus in mixture.corpora]
    indices = [Path(folder) / TRAIN / INDEX_FILE for folder in dict.fromkeys(folders) if not is_url(folder)]
    found = (json.loads(index.read_bytes()).get("conversations") for index in indices if index.is_file())
    return tuple(sorted({token for each in found if each for token in each["turn_ends"]}))


def order_settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the order of a run, except for the alignment of documents.

    Args:
        configuration: A resolved configuration as nested mappings, such as that of a checkpoint.
    """
    data = configuration["data"]
    names = ("sequence_length_tokens", "documents", "shuffle")
    order = {"seed": configuration["seed"]} | {name: data[name] for name in names}
    if (align := data.get("align_blocks", "grid")) != "grid":  # older checkpoints have no such key
        order["align_blocks"] = align
    if data["shuffle"] == "windowed":
        order |= {"run_tokens": data["shuffle_run_tokens"], "window_runs": data["shuffle_window_runs"]}
    return order


def data_summary(config: RunConfig, source: SequenceDataset | BlendedDataset) -> dict[str, Any]:
    """What decides the order of a run, as values of JSON, and the share of padding of every corpus.

    Of conversations also how many are longer than a sequence, whose end is left out (`cut`).

    Returns:
        Order: the settings; corpora: by name, "" if there is no blend; phases: of a blend, the
        first sequence and the weights of each phase.
    """
    order = order_settings(dataclasses.asdict(config))
    if config.data.documents == "respect":
        order["alignment"] = document_alignment(config)
    weighted: list[tuple[Phase, dict[str, float]]] = []
    datasets = {"": source} if isinstance(source, SequenceDataset) else source.datasets
    if isinstance(source, BlendedDataset):
        weighted = list(zip(source.phases, source.weights, strict=True))
    corpora = {
        name: {
            "folder": str(dataset.corpus.folder),
            "number": dataset.number,
            "sha256": dataset.corpus.fingerprint,
            "tokens": dataset.corpus.total_tokens,
            "sequences": len(dataset),
            "padding": 0.0 if dataset.packing is None else round(dataset.packing.padding_fraction, 6),
            **({"cut": dataset.packing.cut_documents} if isinstance(dataset.packing, WholePacking) else {}),
        }
        for name, dataset in datasets.items()
    }
    phases = [{"name": phase.name, "first": phase.first, "weights": weights} for phase, weights in weighted]
    return {"order": order, "corpora": corpora, "phases": phases}


# The values of a corpus that may not change during a run, and how messages name them.
_FIXED = {"number": "place in the blend file", "tokens": "tokens", "sha256": "shards of sha256"}


def check_unchanged(found: dict[str, Any], expected: dict[str, Any], *, cursor: int) -> None:
    """Refuse to resume from `cursor` with data that differs in what the run has read so far.

    What the run has not read yet may change.

    Args:
        found: `data_summary` now.
        expected: `data_summary` when the run was last started.

    Raises:
        UserError: The order is different, a corpus has other text or another place in the blend
            file, or a phase that had begun has another mixture.
    """
    for key, value in expected["order"].items():
        if found["order"].get(key) != value:
            raise UserError(f"{key}: found {found['order'].get(key)}, expected {value}, as the run has read so far")
    begun = _begun(expected, cursor)
    for other, phase in itertools.zip_longest(_begun(found, cursor), begun):
        if other != phase:
            raise UserError(f"phases: found {other}, expected {phase}: sequence {cursor} is past where it had begun")
    for name in ["", *(name for phase in begun for name in phase["weights"])]:
        corpus, other = expected["corpora"].get(name, {}), found["corpora"].get(name, {"folder": name})
        for key, what in _FIXED.items():
            if key in corpus and other.get(key) != corpus[key]:
                raise UserError(
                    f"{other['folder']}: found {what} {other.get(key)}, expected {corpus[key]}, as the run has read "
                    "so far"
                )


def _begun(summary: dict[str, Any], cursor: int) -> list[dict[str, Any]]:
    """The phases that begin before `cursor`."""
    return [phase for phase in summary["phases"] if phase["first"] < cursor]

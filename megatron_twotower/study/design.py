"""What a study compares: a file of `recipes/studies`, and the trainings that follow from it.

    question: one sentence
    recipe: name of the recipe of all trainings
    overrides: [key=value, ...]           of all trainings
    sizes: {NAME: [key=value, ...]}       backbones and their data
    seeds: [1, 2, ...]                    one seed gives all arms the same data, order and noise
    reference: NAME of the arm that the others are compared with
    arms: {NAME: {overrides: [key=value, ...], shares: [0.35, 1.0]}}
    arms: {NAME: {..., sizes: [NAME]}}    an arm that only these sizes have

A share is a part of the tokens of the recipe at that size. The others are compared with the largest
share of the reference. Warm-up and decay of a training take the
same part of its steps as they do in the whole recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate

Words = tuple[str, ...]
_KEYS = {"question", "recipe", "overrides", "sizes", "seeds", "reference", "arms"}
_KEYS_OF_ARM = {"overrides", "shares", "sizes"}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        overrides: What it changes in the recipe.
        shares: Parts of the recipe's tokens to train with, one training each.
        sizes: The sizes that have it.
    """

    overrides: Words
    shares: tuple[float, ...]
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """The file of a study; the keys are described above."""

    question: str
    recipe: str
    overrides: Words
    sizes: Mapping[str, Words]
    seeds: tuple[int, ...]
    reference: str
    arms: Mapping[str, Arm]


@dataclass(frozen=True)
class Training:
    """One training of a study.

    Attributes:
        folder: Its run folder.
        overrides: Of the study, the size and the arm, and what follows from share and seed.
        config: The resolved recipe.
    """

    size: str
    arm: str
    share: float
    seed: int
    folder: Path
    overrides: Words
    config: RunConfig


def _words(found: Any, where: str) -> Words:
    require(
        isinstance(found, list) and all(isinstance(word, str) and "=" in word for word in found),
        f"{where}: found {found!r}, expected a list of key=value",
    )
    return tuple(found)


def _numbers(found: Any, where: str, kind: Any, expected: str) -> tuple[Any, ...]:
    fits = isinstance(found, list) and all(isinstance(each, kind) and each > 0 for each in found)
    require(fits and 0 < len(found) == len(set(found)), f"{where}: found {found!r}, expected {expected}")
    return tuple(found)


def _table(found: Any, where: str, *, keys: set[str] | None = None) -> dict[str, Any]:
    require(
        isinstance(found, dict) and bool(found) and all(isinstance(key, str) and "/" not in key for key in found),
        f"{where}: found {found!r}, expected names with values",
    )
    if keys is not None:
        other = sorted(set(found) ^ keys)
        require(not other, f"{where}: {', '.join(other)}: unknown or missing, expected {', '.join(sorted(keys))}")
    return dict(found)


def read_study(path: Path) -> Study:
    """Read the file of a study.

    Raises:
        UserError: The file is missing, or a key is unknown, missing or has another type.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}, expected the file of a study") from error
    top = _table(found, f"{path}", keys=_KEYS)
    arms, sizes = {}, _table(top["sizes"], f"{path}: sizes")
    for name, arm in _table(top["arms"], f"{path}: arms").items():
        where = f"{path}: arms.{name}"
        arm = _table({"sizes": list(sizes)} | _table(arm, where), where, keys=_KEYS_OF_ARM)
        shares = _numbers(arm["shares"], f"{where}.shares", (int, float), "different parts above 0, such as [0.35, 1]")
        of_arm = arm["sizes"]
        require(
            isinstance(of_arm, list) and bool(of_arm) and all(size in sizes for size in of_arm),
            f"{where}.sizes: found {of_arm!r}, expected some of {', '.join(sizes)}",
        )
        arms[name] = Arm(_words(arm["overrides"], f"{where}.overrides"), shares, tuple(of_arm))
    require(
        top["reference"] in arms, f"{path}: reference: found {top['reference']!r}, expected one of {', '.join(arms)}"
    )
    return Study(
        question=str(top["question"]),
        recipe=str(top["recipe"]),
        overrides=_words(top["overrides"], f"{path}: overrides"),
        sizes={name: _words(words, f"{path}: sizes.{name}") for name, words in sizes.items()},
        seeds=_numbers(top["seeds"], f"{path}: seeds", int, "different seeds, such as [1, 2, 3]"),
        reference=top["reference"],
        arms=arms,
    )


def _tokens_per_step(config: RunConfig) -> int:
    return config.data.global_batch_size * config.data.sequence_length_tokens


def _in_proportion(whole: RunConfig, arm: RunConfig, share: float) -> Words:
    """The overrides of a training with a share of the tokens of `whole`."""
    steps = max(1, round(share * whole.train.steps * _tokens_per_step(whole) / _tokens_per_step(arm)))
    part = steps / arm.train.steps
    return (
        f"train.steps={steps}",
        f"train.validate_every_steps={steps}",
        f"schedule.warmup_steps={round(part * arm.schedule.warmup_steps)}",
        f"schedule.decay_steps={round(part * arm.schedule.decay_steps)}",
    )


def trainings(study: Study, output: Path) -> list[Training]:
    """All trainings of a study, all arms of a seed before the next seed.

    Args:
        study: The study.
        output: The folder below which each training has its run folder.

    Raises:
        UserError: The recipe or an override is wrong, a share is too small for the warm-up, or a
            backbone cannot be read.
    """
    found = []
    for size, of_size in study.sizes.items():
        common = (*study.overrides, *of_size)
        whole = load_recipe(study.recipe, common)
        for name, arm in study.arms.items():
            if size not in arm.sizes:
                continue
            changed = load_recipe(study.recipe, (*common, *arm.overrides))
            for share in arm.shares:
                words = (*common, *arm.overrides, *_in_proportion(whole, changed, share))
                config = load_recipe(study.recipe, words)
                validate(config, world_size=1)
                for seed in study.seeds:
                    folder = output / size / f"{name}-{share:g}" / f"seed-{seed}"
                    of_run = (*words, f"seed={seed}", f"output={folder}")
                    one = replace(config, seed=seed, output=str(folder))
                    found.append(Training(size, name, share, seed, folder, of_run, one))
    return sorted(found, key=lambda each: study.seeds.index(each.seed))

"""Options that come from the fields of a dataclass."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_twotower.cli.options import add_options, arguments_for, option, recipe_and_overrides
from megatron_twotower.common.errors import UserError


@dataclass(frozen=True)
class Settings:
    folder: Path
    rounds: int = 7
    budget_seconds: float = 30.0
    top_k: int | None = None
    name: str = "a"
    sizes: Sequence[int] = (1, 2)
    quick: bool = False
    deduplicate: bool = True
    not_an_option: int = 5


OPTIONS = {
    "folder": option("where"),
    "rounds": option("how often"),
    "budget_seconds": option("how long", "--budget", metavar="SECONDS"),
    "top_k": option("among how many"),
    "name": option("which", choices=("a", "b")),
    "sizes": option("how large"),
    "quick": option("fast"),
    "deduplicate": option("keep repeated ones", "--no-dedup", dest="deduplicate"),
}


def settings_of(words, **keywords):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Settings, OPTIONS, **keywords)
    return Settings(**arguments_for(OPTIONS, parser.parse_args(words)))


def test_what_is_left_out_is_the_default_of_the_dataclass():
    assert settings_of(["--folder", "f"]) == Settings(Path("f"))


def test_every_kind_of_field_is_read():
    words = "--folder f --rounds 3 --budget 1.5 --top-k 4 --name b --sizes 8 9 --quick --no-dedup"
    assert settings_of(words.split()) == Settings(Path("f"), 3, 1.5, 4, "b", (8, 9), True, False)


def test_a_field_without_a_default_is_required():
    with pytest.raises(SystemExit):
        settings_of([])


def test_unset_options_are_none_and_their_help_shows_the_default():
    parser = argparse.ArgumentParser()
    add_options(parser, Settings, {name: OPTIONS[name] for name in ("rounds", "sizes", "top_k")}, unset=True)
    assert vars(parser.parse_args([])) == {"rounds": None, "sizes": None, "top_k": None}
    shown = parser.format_help()
    assert "how often (7)" in shown and "how large (1 2)" in shown and "among how many\n" in shown


def test_one_recipe_is_expected():
    assert recipe_and_overrides(["a=1", "recipe=tiny", "b=2"]) == ("tiny", ["a=1", "b=2"])
    for words in ([], ["recipe=a", "recipe=b"]):
        with pytest.raises(UserError, match="expected exactly one recipe=NAME"):
            recipe_and_overrides(words)

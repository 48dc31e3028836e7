"""The accepted versions: those of setup.py, and those that containers carry."""

import ast
import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_twotower.common import versions
from megatron_twotower.common.errors import UserError

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def pretend(monkeypatch, **found):
    """Pretend versions of packages, written with `_` for `-`."""
    found = {name.replace("_", "-"): version for name, version in found.items()}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found[name])


def test_the_ranges_are_those_of_setup():
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(SETUP.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRES", "EXTRAS")
    }
    extras = lists["EXTRAS"]
    wanted = [*lists["REQUIRES"], *extras["gpu"], *extras["cluster"], *extras["quantize"]]
    asked = {each.name: each.specifier for each in map(Requirement, wanted)}
    assert {name: SpecifierSet(text) for name, text in versions.ACCEPTED.items()} == {
        name: asked[name] for name in versions.ACCEPTED
    }


@pytest.mark.parametrize(
    ("package", "found", "fits"),
    [
        ("torch", "2.9.0a0+50eac811a6.nv25.9", True),
        ("torch", "2.10.0a0+b558c986e8.nv25.11", True),
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.8.0a0+34c6371d24.nv25.8", False),
        ("torch", "3.0.0", False),
        ("transformer-engine", "2.7.0+f8933bb", False),
        ("transformer-engine", "2.9.0+70f53666", True),
        ("mamba-ssm", "2.2.4", False),
        ("mamba-ssm", "2.3.2.post1", True),
        ("causal-conv1d", "1.4.0", False),
        ("transformers", "4.57.0", False),
        ("rich", "1.0", True),
    ],
)
def test_versions_of_containers(package, found, fits, monkeypatch):
    pretend(monkeypatch, **{package.replace("-", "_"): found})
    assert (versions.unfit(package) is None) == fits
    if not fits:
        with pytest.raises(UserError) as caught:
            versions.require_fit(package, otherwise=", or none")
        assert str(caught.value) == f"{package}: found {found}, expected {versions.ACCEPTED[package]}, or none"


def test_what_is_not_installed_is_not_wrong(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert versions.installed("mamba-ssm") is None and versions.unfit("mamba-ssm") is None

"""Rooms stand in one order, and a room imports only rooms that stand before it. Reads the imports of the sources."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_twotower"

# By level; within a level, too, a room may only use those before it. A folder is one room.
LEVELS = (
    ("records", "precision", "config", "validation", "phases", "stages", "host", "machine"),
    ("names", "tokenizer", "data"),
    ("corruption",),
    ("ops",),
    ("memory", "adaln", "router", "spec", "layers", "towers"),
    ("loss",),
    ("parallel", "provenance", "optimizer", "metrics"),
    ("trainer", "watchdog", "ledger"),
    ("pieces", "scaling", "checkpoint", "saving", "keeping"),
    ("hf", "convert"),
    (
        "generate",
        "bulk",
        "replay",
        "live",
        "likelihood",
        "sweep",
        "pictures",
        "evaluate",
        "distil",
        "task_recipes",
        "harness",
        "evaluate_tasks",
        "inspect_data",
        "report",
        "doctor",
        "plan",
    ),
    ("build", "bench", "multirun", "cli"),
    ("__main__",),
)
ORDER = {room: place for place, room in enumerate(room for level in LEVELS for room in level)}

# Packages that one or two rooms alone may import.
ONLY_IN = {
    "hydra": {"config", "multirun"},
    "omegaconf": {"config", "multirun"},
    "wandb": {"metrics"},
    "matplotlib": {"pictures"},
    "triton": {"ops"},
    "transformer_engine": {"spec"},
    "mamba_ssm": {"ops"},
    "causal_conv1d": {"ops"},
    "webdataset": {"data", "bench"},
    "pyarrow": {"data"},
    "zstandard": {"data"},
    "lm_eval": {"harness"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(parts):
    """The room that a file or a dotted module within the package belongs to."""
    return parts[0].removesuffix(".py") if parts else "__init__"


def imported_modules(source):
    """Every absolute module name that a source imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module
            if node.module == PACKAGE.name:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source):
    for module in imported_modules(source):
        package, *parts = module.split(".")
        if package == PACKAGE.name and parts and room_of(parts) in ORDER:
            yield room_of(parts)


def violations(room, source):
    return sorted({other for other in rooms_imported(source) if other != room and ORDER[other] > ORDER[room]})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_before_it(path):
    room, source = room_of(path.relative_to(PACKAGE).parts), path.read_text()
    if path == PACKAGE / "__init__.py":
        assert not list(imported_modules(source))
        return
    assert room in ORDER, f"{room}: give it a place in LEVELS"
    assert violations(room, source) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_some_packages_are_imported_by_their_room_alone(path):
    room = room_of(path.relative_to(PACKAGE).parts)
    packages = {module.partition(".")[0] for module in imported_modules(path.read_text())}
    assert [name for name in packages & ONLY_IN.keys() if room not in ONLY_IN[name]] == []


def test_the_modelling_file_stands_alone():
    """It is copied into exported folders, where this package is not installed."""
    files = sorted((PACKAGE / "hf").glob("modeling_*.py"))
    assert files
    for path in files:
        packages = {module.partition(".")[0] for module in imported_modules(path.read_text())}
        assert PACKAGE.name not in packages
        assert "megatron" not in packages


def test_the_reader_sees_every_form_of_import():
    source = """
import megatron_twotower.trainer
from megatron_twotower import __version__, cli
from megatron_twotower.ops.scan import chunk_scan
def late():
    from megatron_twotower.loss import something
"""
    assert set(rooms_imported(source)) == {"trainer", "cli", "ops", "loss"}
    assert violations("ops", source) == ["cli", "loss", "trainer"]
    assert violations("trainer", source) == ["cli"]
    assert violations("__main__", source) == []
    with pytest.raises(AssertionError, match="relative import"):
        list(imported_modules("from .loss import something"))

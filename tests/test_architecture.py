"""A module imports only from folders before its own, and modules never import in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_twotower"

# Each folder imports from those before it. `types` and `doctor` are read like folders.
ORDER = (
    "types",
    "common",
    "config",
    "data",
    "hf",
    "ops",
    "mcore",
    "model",
    "checkpoint",
    "convert",
    "plan",
    "generate",
    "evaluate",
    "report",
    "study",
    "doctor",
    "train",
    "bench",
    "cli",
    "__main__",
)
PLACE = {folder: place for place, folder in enumerate(ORDER)}

# Packages that some folders or modules alone may import.
ONLY_IN = {
    "hydra": {"config.overrides", "config.recipes", "train.multirun"},
    "omegaconf": {"config.recipes", "train.multirun"},
    "wandb": {"train.metrics"},
    "matplotlib": {"common.plots"},
    "jinja2": {"report.page", "generate.replay.page"},
    "triton": {"ops"},
    "transformer_engine": {"mcore"},
    "mamba_ssm": {"ops"},
    "causal_conv1d": {"ops"},
    "webdataset": {"data", "bench"},
    "fsspec": {"data.remote"},
    "upath": {"data.remote"},
    "pyarrow": {"data"},
    "zstandard": {"data"},
    "lm_eval": {"evaluate.harness", "evaluate.task_runner", "evaluate.comparison"},
    "ray": {"common.ray_engine"},
    "datatrove": {"bench.prepare"},
    # A folder that imports Megatron Core imports `mcore` first, in its `__init__`.
    "megatron": {"mcore", "model", "checkpoint", "train", "doctor", "bench.data", "bench.prepare"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """`folder.module` of a file within the package; `folder` of its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imported_modules(source):
    """Every absolute module name that a source imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(source):
    """The modules of this package that a source imports, as `folder.module`."""
    for name in imported_modules(source):
        package, _, module = name.partition(".")
        if package == PACKAGE.name and module in MODULES:
            yield module


def violations(module, source):
    folder = module.partition(".")[0]
    folders = {name.partition(".")[0] for name in own_imports(source)}
    return sorted(other for other in folders if other != folder and PLACE[other] > PLACE[folder])


def third_party(source):
    return {name.partition(".")[0] for name in imported_modules(source)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_folders_before_its_own(module):
    source = MODULES[module].read_text()
    if module == "__init__":
        assert not list(imported_modules(source))
        return
    folder = module.partition(".")[0]
    assert folder in PLACE, f"{folder}: give it a place in ORDER"
    assert violations(module, source) == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(own_imports(path.read_text())) - {module} for module, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(MODULES)


def test_common_imports_nothing_of_the_package():
    for module, path in MODULES.items():
        if module.startswith("common."):
            assert all(other.startswith("common") for other in own_imports(path.read_text())), module


@pytest.mark.parametrize("module", MODULES)
def test_some_packages_are_imported_in_their_place_alone(module):
    places = {module, module.partition(".")[0]}
    packages = third_party(MODULES[module].read_text()) & ONLY_IN.keys()
    assert [package for package in sorted(packages) if not places & ONLY_IN[package]] == []


def test_what_imports_megatron_has_made_it_run_first():
    for module, path in MODULES.items():
        folder = module.partition(".")[0]
        if folder == "mcore" or "megatron" not in third_party(path.read_text()):
            continue
        first = PACKAGE / folder / "__init__.py"
        source = first.read_text() if first.is_file() else path.read_text()
        before = set(own_imports(source)) | set(own_imports(path.read_text()))
        assert any(name.partition(".")[0] in ("mcore", "model", "train") for name in before), module


def test_the_modelling_file_stands_alone():
    """It is copied into exported folders, where this package is not installed."""
    files = sorted((PACKAGE / "hf").glob("modeling_*.py"))
    assert files
    for path in files:
        assert not third_party(path.read_text()) & {PACKAGE.name, "megatron"}


def test_the_reader_sees_every_form_of_import():
    source = """
import megatron_twotower.train.loop
from megatron_twotower import __version__, cli
from megatron_twotower.ops.scan import chunk_scan
from megatron_twotower.common import files
def late():
    from megatron_twotower.train.losses import something
"""
    assert set(own_imports(source)) == {*("cli", "common", "common.files", "ops.scan", "train.loop", "train.losses")}
    assert violations("ops.scan", source) == ["cli", "train"]
    assert violations("train.loop", source) == ["cli"]
    assert violations("__main__", source) == []
    with pytest.raises(AssertionError, match="relative import"):
        list(imported_modules("from .loss import something"))

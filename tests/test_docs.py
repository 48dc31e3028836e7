"""The pages: short enough to read, and nothing named in them that is not there."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_twotower.cli.main import parse
from megatron_twotower.config import recipes
from megatron_twotower.config.recipes import load_recipe, recipes_folder
from megatron_twotower.config.validation import validate

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data" / "README.md", ROOT / "launch" / "README.md"]
)
README_LINES = 180
COLUMNS = 100


def prose(page):
    """The numbered lines that are not rows of a table or links alone."""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if not line.startswith("|") and "](http" not in line:
            yield number, line


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_is_too_long(page):
    assert [number for number, line in prose(page) if len(line) > COLUMNS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_source_file_that_is_named_exists(page):
    named = re.findall(r"`((?:[\w-]+/)+(?:[\w*-]+\.(?:py|yaml|sh|sbatch|env))?)`", page.read_text())
    missing = []
    for name in named:
        folders = (ROOT, ROOT / "megatron_twotower", ROOT / "recipes", page.parent)
        # What a run, an export or a prepared corpus writes is no file of the repository.
        if name.split("/")[0] in {path.name for folder in folders[:2] for path in folder.iterdir()}:
            missing += [] if any(list(folder.glob(name.rstrip("/"))) for folder in folders) else [name]
    assert missing == []


def commands(page):
    """The `twotower` commands of a page, without comments, those that leave words open left out."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^ {4,}(?:\w+=\S+ )*twotower (.*)$", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        if not any("[" in word or word.endswith("...") or word == "|" for word in words):
            yield words


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda each: " ".join(each)[:60] if type(each) is list else ""
)
def test_every_command_is_one(page, words, monkeypatch):
    """Its options are known, and its recipe has every key, of this type."""
    arguments = parse(words)
    settings = getattr(arguments, "settings", [])
    named = [word.removeprefix("recipe=") for word in settings if word.startswith("recipe=")]
    if not named or "--multirun" in words or named[0].startswith("runs/"):
        return
    monkeypatch.setattr(recipes, "resolve", lambda config, **_: config)  # folders need not be there
    load_recipe(named[0], [word for word in settings if not word.startswith("recipe=")])


def test_every_page_is_in_the_index():
    index = (ROOT / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f"docs/{page.name}" not in index] == []


def test_the_ranks_of_the_readme_fit_the_recipe():
    example = r"RANKS_PER_NODE=(\d+) launch/torchrun\.sh recipe=(\w+) (.*) \.\.\.\n"
    ((ranks, recipe, overrides),) = re.findall(example, (ROOT / "README.md").read_text())
    backbone = f"init.backbone={recipes_folder() / 'backbones' / 'mini'}"
    validate(load_recipe(recipe, [*overrides.split(), backbone]), world_size=int(ranks))

"""The source of installed Python packages, as the input `python-packages` of a corpus.

These are the packages whose metadata states permissive licences alone, without this program,
without those that questions are cut from (`evaluate.code_documents`), and without the copies of
other packages that some have.
"""

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Import names of packages that no corpus of ours has. This program or torch requires each of them,
# so every installation has most.
HELD_OUT = ("networkx", "rich", "hydra", "click", "fsspec", "typer")
_THIS_PROGRAM = "megatron-twotower"
# How permissive licences begin: SPDX identifiers, classifiers of PyPI, and what authors write.
_PERMISSIVE = re.compile(
    r"(the )?(\d-clause )?(modified |new )?"
    r"(mit|bsd|0bsd|apache|isc|psfl?|python software foundation|cnri-python|zlib|bsl-1\.0|boost|unlicense|cc0|hpnd"
    r"|historical permission notice|cmu license|public domain)\b"
)
# Folders with copies of other packages, whose licences are others and some of which are held out.
_COPIES = re.compile(r"_?vendor(ed)?|third_?party(_files)?|externals?|_?extern")


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        name: Of the distribution.
        licence: As its metadata states it.
        files: Its modules by path relative to `site-packages`, with `/`.
    """

    name: str
    version: str
    licence: str
    files: dict[str, Path]

    def description(self) -> dict[str, Any]:
        """Everything but the places of the files, for `provenance.json`."""
        return asdict(self) | {"files": len(self.files)}


def stated_licences(metadata: Any) -> list[str]:
    """The licences that the metadata of a package states: expression, classifiers or first line."""
    if expression := metadata.get("License-Expression"):
        return [expression]
    classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
    names = [each.rpartition(" :: ")[2] for each in classifiers]
    return names or (metadata.get("License") or "").strip().splitlines()[:1]


def is_permissive(licence: str) -> bool:
    """Whether a licence or an SPDX expression asks for no more than notices.

    Of licences that are joined by OR one is enough; of those joined by AND all count.
    """
    parts = re.split(r"\s+AND\s+", licence)
    choices = [re.split(r"\s+OR\s+", part) for part in parts]
    return all(any(_PERMISSIVE.match(each.strip("() ").lower()) for each in choice) for choice in choices)


def installed_packages() -> list[Package]:
    """The packages of this environment that a corpus may have, by name."""
    found: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        metadata: Any = distribution.metadata
        name = (metadata.get("Name") or "").lower().replace("_", "-")  # none after a removal that was cut off
        licences = stated_licences(metadata)
        if name in ("", _THIS_PROGRAM, *found) or not licences or not all(map(is_permissive, licences)):
            continue
        if files := dict(_modules(distribution)):
            found[name] = Package(name, distribution.version, ", ".join(licences), files)
    return [found[name] for name in sorted(found)]


def _modules(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        copied = any(_COPIES.fullmatch(part) for part in file.parts[:-1])
        if file.suffix == ".py" and file.parts[0] not in ("..", *HELD_OUT) and not copied and path.is_file():
            yield file.as_posix(), path

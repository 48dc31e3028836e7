"""Questions about Python source, for the tasks of `recipes/evaluation/code_small.yaml`.

They are cut from the source of installed packages. A file of records has the questions of a kind:
`prompt` is the text that a model continues, `answer` what is compared with its text, and `source`
the place of the question. Nothing is downloaded. The same releases of the same packages give the
same questions.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import keyword
import random
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import write_file
from megatron_twotower.data.installed_packages import HELD_OUT, stated_licences

INDEX_FILE = "documents.json"
# Characters of a prompt, at most and at least.
LONGEST_PROMPT, SHORTEST_PROMPT = 800, 200
# Characters of a text whose likelihood is measured.
TEXT_CHARACTERS = 1024
_FILE_CHARACTERS = range(500, 200_000)
_CLOSING = re.compile(r"[)\]}]{2,}")
_NOT_CODE = frozenset({tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING})


@dataclass(frozen=True)
class Question:
    """A text to continue, and what is compared with the continuation."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Source:
    """A module of a package.

    Attributes:
        name: Its path, from the folder of the package's parent, with `/`.
        text: Its text.
    """

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        with warnings.catch_warnings():  # about escapes in strings
            warnings.simplefilter("ignore")
            return ast.parse(self.text)

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        """The tokens."""
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def line_starts(self) -> list[int]:
        """The offset of each line in the text; the first line has number 1."""
        starts = [0, 0]
        for line in self.text.split("\n"):
            starts.append(starts[-1] + len(line) + 1)
        return starts

    def offset(self, place: tuple[int, int]) -> int:
        """The offset of a place (line, column) of a token."""
        return self.line_starts[place[0]] + place[1]

    def before(self, offset: int) -> str | None:
        """The text before an offset, from the start of a line; None if it is too short."""
        start = max(0, offset - LONGEST_PROMPT)
        if start:
            start = self.text.find("\n", start, offset) + 1
        prompt = self.text[start:offset]
        return prompt if len(prompt) >= SHORTEST_PROMPT else None


def _code_tokens(source: Source) -> list[tokenize.TokenInfo]:
    """The tokens that are code: no comments, empty lines or changes of the indentation."""
    return [token for token in source.tokens if token.type not in _NOT_CODE]


def next_lines(source: Source) -> Iterator[Question]:
    """Statements of one line that follow a line of code; the answer is the line."""
    lines = source.text.split("\n")
    tokens = _code_tokens(source)
    begun, rows = None, {token.start[0] for token in tokens}
    for token in tokens:
        begun = begun or token
        if token.type != tokenize.NEWLINE:
            continue
        row, first, begun = token.start[0], begun, None
        line = lines[row - 1]
        if first.type == tokenize.STRING or first.start[0] != row or row - 1 not in rows:
            continue
        prompt = source.before(source.line_starts[row])
        if prompt and 8 <= len(line.strip()) <= 80:
            yield Question(prompt, line.rstrip())


def identifiers(source: Source) -> Iterator[Question]:
    """Names within a line that the prompt has already; the answer is the name."""
    for token in source.tokens:
        name, offset = token.string, source.offset(token.start)
        if token.type != tokenize.NAME or keyword.iskeyword(name) or len(name) < 4:
            continue
        line_begun = source.text[source.line_starts[token.start[0]] : offset].strip()
        # A model of words may write the space before a name together with it.
        prompt = source.before(offset)
        if line_begun and prompt and re.search(rf"\b{name}\b", prompt):
            yield Question(prompt.rstrip(" "), name)


def brackets(source: Source) -> Iterator[Question]:
    """Two or more closing brackets in a row; the answer is these."""
    operators = {source.offset(t.start) for t in source.tokens if t.type == tokenize.OP and t.string in ")]}"}
    for found in _CLOSING.finditer(source.text):
        prompt = source.before(found.start())
        if prompt and found.start() in operators:
            yield Question(prompt, found.group())


def indents(source: Source) -> Iterator[Question]:
    """Lines that follow a line of code and close its block; the answer is their indentation."""
    tokens = source.tokens
    for number, token in enumerate(tokens[:-1]):
        following = tokens[number + 1]
        if token.type != tokenize.NEWLINE or following.type != tokenize.DEDENT:
            continue
        prompt = source.before(source.line_starts[following.start[0]])
        if prompt and following.start[1]:
            yield Question(prompt, " " * following.start[1])


def signatures(source: Source) -> Iterator[Question]:
    """Functions by their docstring, put before them; the answer is the names of the parameters."""
    for node in ast.walk(source.tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = (ast.get_docstring(node) or "")[: LONGEST_PROMPT - 100]
        names = parameter_names(node.args)
        if len(text) < 60 or len(names) < 2 or any(mark in text for mark in ('"""', "\\", "'''")):
            continue
        if all(re.search(rf"\b{name}\b", text) for name in names):
            yield Question(f'"""{text}"""\n\n\ndef {node.name}(', ", ".join(names))


def parameter_names(arguments: ast.arguments) -> list[str]:
    """The names of the parameters of a function, without `self` and `cls`."""
    single = [arguments.vararg, arguments.kwarg]
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *(each for each in single if each)]
    return [each.arg for each in found if each.arg not in ("self", "cls")]


def bodies(source: Source) -> Iterator[Question]:
    """Functions of a module up to a statement in their middle; the answer is their rest."""
    body = source.tree.body
    for number, node in enumerate(body):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 4:
            continue
        cut = source.line_starts[node.body[len(node.body) // 2].lineno]
        # The statements before it that fit.
        starts = [source.line_starts[each.lineno] for each in body[: number + 1] if not _decorators(each)]
        start = next((each for each in starts if cut - each <= LONGEST_PROMPT), None)
        if start is not None and cut - start >= SHORTEST_PROMPT and node.end_lineno and not _decorators(node):
            yield Question(source.text[start:cut], source.text[cut : source.line_starts[node.end_lineno + 1]])


def _decorators(node: ast.AST) -> bool:
    """Whether a statement has decorators: its line is not where its text begins."""
    return bool(getattr(node, "decorator_list", []))


def texts(source: Source) -> Iterator[Question]:
    """Pieces of the text, from the start of a line; there is no answer."""
    for start in source.line_starts[1:-1]:
        piece = source.text[start : start + TEXT_CHARACTERS]
        if len(piece) == TEXT_CHARACTERS and not piece.isspace():
            yield Question(piece, "")


# The kinds of questions, by the names of their files.
KINDS: dict[str, Callable[[Source], Iterator[Question]]] = {
    "next_lines": next_lines,
    "identifiers": identifiers,
    "brackets": brackets,
    "indents": indents,
    "signatures": signatures,
    "bodies": bodies,
    "texts": texts,
}


# --- packages ---


def package_folder(name: str) -> Path | None:
    """The folder of an installed package; None if it is not installed, or is no folder."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) if places else None


def sources(package: Path) -> list[Source]:
    """The modules of a package by name, without its tests and what Python cannot read."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).as_posix()
        if re.search(r"(^|/)(tests?|_vendor|examples?)/|/(test_\w+|conftest)\.py$", name):
            continue
        try:
            source = Source(name, path.read_text(encoding="utf-8"))
            if len(source.text) in _FILE_CHARACTERS and "\t" not in source.text and source.tree:
                found.append(source)
        except (OSError, SyntaxError, ValueError):
            continue
    return found


def release(name: str) -> dict[str, str | None]:
    """The release of an installed package and its licence, as its metadata states them."""
    distributions = importlib.metadata.packages_distributions().get(name, [])
    if not distributions:
        return {"version": None, "licence": None}
    metadata = importlib.metadata.metadata(distributions[0])
    return {"version": metadata["Version"], "licence": ", ".join(stated_licences(metadata)) or None}


def chosen(kind: str, packages: Sequence[Sequence[Source]], *, count: int, seed: int) -> list[dict[str, str]]:
    """Records of questions of a kind, at most `count`.

    The packages take turns, and in a package the modules. No question is chosen twice.
    """
    rng = random.Random(f"{seed} {kind}")
    orders = [rng.sample(list(modules), len(modules)) for modules in packages]
    turns = [source for row in zip_longest(*orders) for source in row if source is not None]
    left: dict[str, list[Question]] = {}
    found: list[dict[str, str]] = []
    for turn in range(count):
        for source in turns:
            if turn == 0:
                questions = list(KINDS[kind](source))
                left[source.name] = rng.sample(questions, len(questions))
            if left[source.name]:
                question = left[source.name].pop()
                found.append({"prompt": question.prompt, "answer": question.answer, "source": source.name})
            if len(found) == count:
                return found
        if not any(left.values()):
            break
    return found


def write_documents(
    output: Path, *, packages: Sequence[str] = HELD_OUT, count: int = 100, seed: int = 1234
) -> dict[str, Any]:
    """Write a file of questions of each kind, and an index with the packages and checksums.

    Args:
        output: The folder, which must not have an index yet.
        packages: Names of packages. Those that are not installed are left out.
        count: Questions of each kind, at most.
        seed: Seed of the choice.

    Returns:
        The index.

    Raises:
        UserError: The folder has questions already, or there is no question of a kind.
    """
    if (output / INDEX_FILE).exists():
        raise UserError(f"{output}: found {INDEX_FILE}, expected a folder without questions")
    folders = {name: found for name in packages if (found := package_folder(name))}
    if not folders:
        raise UserError(f"packages: found none of {', '.join(packages)}, expected one that is installed")
    modules = [sources(each) for each in folders.values()]
    files, index = {}, {}
    for kind in KINDS:
        records = chosen(kind, modules, count=count, seed=seed)
        if not records:
            raise UserError(f"{', '.join(folders)}: found no text for {kind}, expected larger packages")
        files[kind] = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records).encode()
        index[kind] = {"count": len(records), "sha256": hashlib.sha256(files[kind]).hexdigest()}
    content = {
        "packages": {name: release(name) for name in folders},
        "not_installed": [name for name in packages if name not in folders],
        "seed": seed,
        "kinds": index,
    }
    for kind, data in files.items():
        write_file(output / f"{kind}.jsonl", data)
    write_file(output / INDEX_FILE, (json.dumps(content, indent=1) + "\n").encode())
    return content


def dataset(kind: str, questions: str, **_: Any) -> dict[str, Any]:
    """The questions of a kind as a data set of lm-evaluation-harness, for its task files.

    Args:
        kind: One of `KINDS`.
        questions: The folder that `write_documents` wrote.
    """
    from datasets import Dataset

    lines = (Path(questions) / f"{kind}.jsonl").read_text(encoding="utf-8").split("\n")
    return {"test": Dataset.from_list([json.loads(line) for line in lines if line])}


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of a folder of questions.

    Raises:
        UserError: It has no index, or a file is not the one that the index names.
    """
    file = Path(folder) / INDEX_FILE
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read, expected a folder of `twotower data questions`") from error
    for kind, facts in content["kinds"].items():
        questions = file.with_name(f"{kind}.jsonl")
        found = hashlib.sha256(questions.read_bytes()).hexdigest() if questions.is_file() else "no file"
        if found != facts["sha256"]:
            raise UserError(f"{questions}: found {found[:12]}, expected sha256 {facts['sha256'][:12]} of {INDEX_FILE}")
    return content

"""Conversations about Python's standard library, for small runs: no data needs to be downloaded.

The question is the first line of a function. The answer is a call of it: its name, and its
parameters without `self` and `cls`, annotations and defaults.

    def get(self, key, default=None):    ->    get(key, default)
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_twotower.common.files import atomic_file
from megatron_twotower.data.documents import STANDARD_LIBRARY, find_documents, read_text

_LONGEST_LINE = 60  # characters


def question_and_answer(line: str) -> tuple[str, str] | None:
    """The conversation about a line of source; None if it does not begin a function."""
    question = line.strip()
    if not question.startswith("def ") or not question.endswith(":") or len(question) > _LONGEST_LINE:
        return None
    try:
        (function,) = ast.parse(f"{question} pass").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    found = function.args
    names = [each.arg for each in (*found.posonlyargs, *found.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    names += [f"*{found.vararg.arg}"] if found.vararg else []
    names += [f"{each.arg}={each.arg}" for each in found.kwonlyargs]
    names += [f"**{found.kwarg.arg}"] if found.kwarg else []
    return question, f"{function.name}({', '.join(names)})"


def library_conversations() -> Iterator[dict[str, object]]:
    """Yields every conversation once, in the order of the files."""
    pairs: dict[tuple[str, str], None] = {}
    for document in find_documents([STANDARD_LIBRARY]):
        for line in (read_text(document) or "").splitlines():
            if pair := question_and_answer(line):
                pairs.setdefault(pair)
    for question, answer in pairs:
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_library_conversations(output: Path) -> int:
    """Write the conversations as JSON lines; returns their number.

    Raises:
        UserError: The file cannot be written.
    """
    count = 0
    with atomic_file(output) as path, open(path, "w", encoding="utf-8") as stream:
        for record in library_conversations():
            stream.write(json.dumps(record) + "\n")
            count += 1
    return count

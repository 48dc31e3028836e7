"""Conversations about Python's standard library, for small runs: no data needs to be downloaded.

The question is the first line of a function. The answer says what it is, and how many parameters a
call may give it: those of the line without `self` and `cls`.

    def get(self, key, default=None):    ->    a method with 2 parameters
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_twotower.common.files import atomic_file
from megatron_twotower.data.documents import STANDARD_LIBRARY, find_documents, read_text

_LONGEST_LINE = 60  # characters
_KINDS = {"self": "a method", "cls": "a class method"}


def question_and_answer(line: str) -> tuple[str, str] | None:
    """The conversation about a line of source; None if it begins no function with parameters."""
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
    kind = _KINDS.get(names[0] if names else "", "a function")
    count = len(names) - (kind != "a function") + len(found.kwonlyargs)
    count += (found.vararg is not None) + (found.kwarg is not None)
    # Without the many that have none, no answer is given to most questions.
    return (question, f"{kind} with {count} parameter{'s' if count > 1 else ''}") if count else None


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

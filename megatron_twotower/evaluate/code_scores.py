"""How answers to questions about Python source are scored, for `recipes/evaluation/code_small`.

Each function receives a question (`code_documents`) and what the harness has of the answer. It
returns a metric of this question by its name.
"""

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_twotower.evaluate.code_documents import parameter_names

# Lines at the end of a text of limited length that may be an unfinished statement.
_UNFINISHED_LINES = 3


def _tree(text: str) -> ast.Module | None:
    """The syntax tree of a text; None if it is not Python."""
    try:
        with warnings.catch_warnings():  # about escapes in strings
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def same_line(question: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the first line of the text is that of the source, without spaces at its end."""
    return {"exact": float(results[0].partition("\n")[0].rstrip() == question["answer"])}


def same_identifier(question: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the text begins with the identifier of the source; spaces may be before it."""
    found = re.match(r" *([^\W\d]\w*)", results[0])
    return {"exact": float(found is not None and found[1] == question["answer"])}


def same_brackets(question: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the closing brackets at the beginning of the text are those of the source."""
    found = re.match(r"[)\]}]*", results[0])
    return {"exact": float(found is not None and found[0] == question["answer"])}


def same_indent(question: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the first line of the text that is not empty has the indentation of the source."""
    line = next((line for line in results[0].split("\n") if line.strip()), None)
    return {"exact": float(line is not None and line[: len(line) - len(line.lstrip())] == question["answer"])}


def written_parameters(text: str) -> list[str]:
    """The names of the parameters in a text after `def name(`, up to the closing bracket."""
    for place in re.finditer(r"\)", text):
        tree = _tree(f"def f({text[: place.start()]}): pass")
        if tree is not None and isinstance(tree.body[0], ast.FunctionDef):
            return parameter_names(tree.body[0].args)
    return []


def parameters_f1(question: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """The F1 score of the names of the parameters."""
    wanted, found = question["answer"].split(", "), written_parameters(results[0])
    return {"f1": 2 * len(set(wanted) & set(found)) / (len(set(wanted)) + len(set(found)))}


def parses(question: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether prompt and text parse, up to the end of the function that the prompt has begun.

    The function ends before the first line that is not indented. Where there is none, the text was
    cut at its length: then the last line and up to three lines before it may be unfinished. At
    least one line of the text must be left.
    """
    *lines, _ = results[0].split("\n")
    end = next((n for n, line in enumerate(results[0].split("\n")) if line and not line[0].isspace()), None)
    kept, unfinished = (lines, _UNFINISHED_LINES) if end is None else (lines[:end], 0)
    for dropped in range(unfinished + 1):
        part = kept[: len(kept) - dropped]
        if not any(line.strip() for line in part):
            break
        if _tree(question["prompt"] + "\n".join(part) + "\n") is not None:
            return {"parses": 1.0}
    return {"parses": 0.0}


def nats_per_byte(question: Mapping[str, str], results: Sequence[Any]) -> dict[str, float]:
    """The negative log-likelihood of the text, per byte."""
    (score,) = results
    return {"nats_per_byte": -float(score) / len(question["prompt"].encode())}

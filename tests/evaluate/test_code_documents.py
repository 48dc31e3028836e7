"""Questions cut from Python source, and the scores of answers to them."""

import ast
import json
import re

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.evaluate import code_documents, code_scores
from megatron_twotower.evaluate.code_documents import KINDS, Source

MODULE = '''"""A module of the test, whose text is long enough for prompts of two hundred characters or more."""

import os
from pathlib import Path

LIMIT = dict(first=[1, 2, (3, 4)], second=max(10, min(20, 30)))


def total_size(folder, suffix):
    """The sum of the sizes of all files.

    Args:
        folder: Where the files are, at any depth below it.
        suffix: Only files whose folder entry ends with this suffix count.
    """
    found = 0
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name.endswith(suffix):
            found += os.stat(path).st_size
            # a comment
            print(str(path.relative_to(folder)))
        else:
            continue
    limit = LIMIT["second"]
    return min(found, limit)


@property
def decorated(self):
    return self


class Holder:
    def value(self):
        if self.ready:
            return 1
        return 0
'''


@pytest.fixture
def source():
    return Source("package/module.py", MODULE)


def places(kind, source):
    """The offset after the prompt of every question, and the answer."""
    found = []
    for question in KINDS[kind](source):
        place = MODULE.index(question.prompt) + len(question.prompt)
        assert code_documents.SHORTEST_PROMPT <= len(question.prompt) <= code_documents.LONGEST_PROMPT
        found.append((place, question.answer))
    return found


def test_next_lines_are_lines_of_code_after_a_line_of_code(source):
    found = places("next_lines", source)
    lines = [answer for _, answer in found]
    assert '    for path in Path(folder).rglob("*"):' in lines and '    limit = LIMIT["second"]' in lines
    assert not [line for line in lines if "#" in line or '"""' in line or "suffix:" in line]
    assert "            print(str(path.relative_to(folder)))" not in lines, "a comment is before it"
    for place, answer in found:
        assert MODULE[place - 1] == "\n" and MODULE[place:].startswith(answer + "\n")


def test_identifiers_are_names_that_the_prompt_has(source):
    found = list(KINDS["identifiers"](source))
    for question in found:
        end = MODULE.index(question.prompt) + len(question.prompt)
        assert MODULE[end:].lstrip(" ").startswith(question.answer) and not question.prompt.endswith(" ")
        assert re.search(rf"\b{question.answer}\b", question.prompt)
    assert {"path", "folder", "suffix", "found"} <= {question.answer for question in found}
    assert not {"return", "ready", "print"} & {question.answer for question in found}


def test_brackets_are_those_of_code(source):
    text = MODULE + 'x = f(g("))"), h([1]))\n'
    found = list(KINDS["brackets"](Source("a.py", text)))
    assert [q.answer for q in found if q.prompt.endswith('g("')] == []
    assert [q.answer for q in found if q.prompt.endswith("h([1")] == ["]))"]
    assert all(text[text.index(q.prompt) + len(q.prompt) :].startswith(q.answer) for q in found)


def test_indents_are_those_after_a_block(source):
    found = places("indents", source)
    after = {MODULE[place:].split("\n")[0].strip(): answer for place, answer in found}
    with_empty_line = Source("a.py", MODULE.replace("            return 1\n", "            return 1\n\n"))
    assert len(list(KINDS["indents"](with_empty_line))) == len(found) - 1
    assert after == {"else:": " " * 8, 'limit = LIMIT["second"]': " " * 4, "return 0": " " * 8}


def test_a_signature_follows_its_docstring(source):
    (question,) = KINDS["signatures"](source)
    assert question.answer == "folder, suffix"
    assert question.prompt.startswith('"""The sum of the sizes') and question.prompt.endswith(
        '"""\n\n\ndef total_size('
    )


def test_a_body_is_cut_at_a_statement_and_parses_with_its_rest(source):
    (question,) = KINDS["bodies"](source)
    rest = MODULE[MODULE.index(question.prompt) + len(question.prompt) :]
    assert rest.startswith(question.answer) and question.answer.endswith("return min(found, limit)\n")
    ast.parse(question.prompt + question.answer)
    assert code_scores.parses({"prompt": question.prompt}, [question.answer + "x"]) == {"parses": 1.0}


def test_texts_have_one_length(source, monkeypatch):
    monkeypatch.setattr(code_documents, "TEXT_CHARACTERS", 300)
    found = list(KINDS["texts"](source))
    assert found and {len(question.prompt) for question in found} == {300}
    assert all(question.prompt in MODULE for question in found)


# --- packages ---


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("first_package", "second_package"):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
        for number in range(3):
            (tmp_path / name / f"module{number}.py").write_text(
                MODULE.replace("folder", f"folder{number}") + "# the end\n" * 30
            )
        (tmp_path / name / "tests" / "test_x.py").write_text(MODULE)
        (tmp_path / name / "broken.py").write_text(MODULE + "def (\n")
    return ["first_package", "not_there", "second_package"]


def test_packages_take_turns_and_the_same_seed_gives_the_same_files(packages, tmp_path):
    code_documents_of = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        index = code_documents.write_documents(tmp_path / name, packages=packages, count=10, seed=seed)
        code_documents_of[name] = {kind: (tmp_path / name / f"{kind}.jsonl").read_bytes() for kind in index["kinds"]}
        assert index == code_documents.read_index(tmp_path / name)
    assert code_documents_of["one"] == code_documents_of["again"] != code_documents_of["other"]
    assert list(index["packages"]) == ["first_package", "second_package"] and index["not_installed"] == ["not_there"]
    rows = [json.loads(line) for line in code_documents_of["one"]["identifiers"].splitlines()]
    assert len(rows) == 10 and len({(row["prompt"], row["source"]) for row in rows}) == 10, "none twice"
    names = [row["source"].partition("/")[0] for row in rows]
    assert names[0] != names[1] and names[:2] * 5 == names, "the packages take turns"
    assert len({row["source"] for row in rows[:6]}) == 6, "all modules before one again"
    assert not [row for row in rows if "test" in row["source"] or "broken" in row["source"]]
    assert len(code_documents_of["one"]["signatures"].splitlines()) == 6, "there are no more"
    code_documents.write_documents(tmp_path / "all", packages=packages, count=1000)
    rows = (tmp_path / "all" / "next_lines.jsonl").read_text().splitlines()
    assert 12 < len(rows) == len(set(rows)) < 1000


def test_mistakes_are_one_line_and_write_nothing(packages, tmp_path):
    with pytest.raises(UserError, match="packages: found none of not_there"):
        code_documents.write_documents(tmp_path / "out", packages=["not_there"])
    assert not (tmp_path / "out").exists()
    code_documents.write_documents(tmp_path / "out", packages=packages, count=2)
    with pytest.raises(UserError, match="expected a folder without questions"):
        code_documents.write_documents(tmp_path / "out", packages=packages, count=2)
    (tmp_path / "out" / "bodies.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"bodies\.jsonl: found .*, expected sha256"):
        code_documents.read_index(tmp_path / "out")
    with pytest.raises(UserError, match=r"documents\.json: cannot be read"):
        code_documents.read_index(tmp_path)


# --- scores ---


@pytest.mark.parametrize(
    ("score", "answer", "text", "expected"),
    [
        (code_scores.same_line, "    x = 1", "    x = 1  \n  y", 1),
        (code_scores.same_line, "    x = 1", "   x = 1", 0),
        (code_scores.same_identifier, "value", " value.other", 1),
        (code_scores.same_identifier, "value", "values", 0),
        (code_scores.same_identifier, "value", "\nvalue", 0),
        (code_scores.same_brackets, "))", ")):", 1),
        (code_scores.same_brackets, "))", ")))", 0),
        (code_scores.same_brackets, "))", ", 1))", 0),
        (code_scores.same_indent, "    ", "\n    x", 1),
        (code_scores.same_indent, "    ", "        x\n    y", 0),
        (code_scores.same_indent, "    ", "    ", 0),
        (code_scores.parameters_f1, "a, b", "self, a: int = (1), *, b) -> None:", 1),
        (code_scores.parameters_f1, "a, b", "b, c, d)", 2 / 5),
        (code_scores.parameters_f1, "a, b", "a, b", 0),
    ],
)
def test_scores(score, answer, text, expected):
    assert list(score({"answer": answer}, [text]).values()) == [pytest.approx(expected)]


START = "def f(x):\n    y = 1\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    return y\n\n\ndef g(", 1),  # ends before the next function
        ("    return y y\n\n\ndef g(", 0),
        ("    z = 2\n    return (y,\n    1", 1),  # cut within a statement
        ("    z = 2\n    try:\n        a = 1\n        b", 1),
        ("    z = 2\n    return (\n" + "    1,\n" * 9, 0),  # never closed
        ("return y\n", 0),  # not in the function
        ("    z = 2", 0),  # no complete line
        ("    z = '\\0'\0\n    a\n", 0),
        ("    pass\n" + "(" * 300, 1),
    ],
)
def test_what_parses(text, expected):
    assert code_scores.parses({"prompt": START}, [text]) == {"parses": expected}


def test_nats_are_divided_by_bytes():
    assert code_scores.nats_per_byte({"prompt": "é\n"}, [-6.0]) == {"nats_per_byte": 2.0}

"""The conversations about the standard library."""

import json

import pytest

from megatron_twotower.data.library_conversations import question_and_answer, write_library_conversations


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("    def get(self, key, default=None):", "a method with 2 parameters"),
        ("def main():", None),
        ("def f(x: int, /, *args, key, **more) -> None:", "a function with 4 parameters"),
        ("def make(cls, value):", "a class method with 1 parameter"),
        ("def go(self):", None),
        ("def f(a,", None),
        ("defs = 3:", None),
        ("class A:", None),
        (f"def {'f' * 60}():", None),
    ],
)
def test_answers_follow_from_the_line(line, answer):
    assert question_and_answer(line) == (None if answer is None else (line.strip(), answer))


@pytest.mark.slow
def test_all_are_different(tmp_path):
    count = write_library_conversations(tmp_path / "library.jsonl")
    records = [json.loads(line) for line in (tmp_path / "library.jsonl").read_text().splitlines()]
    questions = {record["messages"][0]["content"] for record in records}
    assert len(records) == len(questions) == count > 10_000

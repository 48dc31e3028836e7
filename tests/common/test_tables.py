"""Numbers and tables on the console."""

import io
import sys

import pytest
from rich.console import Console

from megatron_twotower.common.tables import number, plain_table, wide_console, with_error


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(1234.567, 2, "1,234.57"), (10000, 0, "10,000"), (None, 2, "-"), (0.5, 3, "0.500")]
)
def test_numbers_are_separated_and_rounded(value, digits, text):
    assert number(value, digits) == text


def test_an_error_is_written_if_it_is_known():
    assert with_error(4.613, 0.041) == "4.61 ± 0.04"
    assert with_error(4.613, None) == "4.61"
    assert with_error(None, None) == "-"


def test_a_table_has_its_title_headings_and_rows():
    screen = io.StringIO()
    Console(file=screen, width=60).print(plain_table("Speeds", ("name", "tokens/s"), [("ar", "210.0")]))
    assert [line.split() for line in screen.getvalue().splitlines() if line.strip(" ─")] == [
        ["Speeds"],
        ["name", "tokens/s"],
        ["ar", "210.0"],
    ]


def test_a_console_for_a_file_is_wide(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert wide_console().width == 150

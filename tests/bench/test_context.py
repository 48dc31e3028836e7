import json

import pytest

from megatron_twotower.bench.context import ContextOptions, cases
from megatron_twotower.cli.main import main


def test_ranks_share_sequences_as_long_as_those_of_the_reference():
    found = [(case.objective, case.ranks, case.length) for case in cases(ContextOptions(length_tokens=32, ranks=4))]
    assert found[:3] == [("two_tower", 1, 32), ("two_tower", 1, 128), ("two_tower", 4, 128)]
    assert {objective for objective, *_ in found[3:]} == {"ar"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "24"], "data.sequence_length_tokens 24: expected a multiple of noise.block_size_tokens 16"),
        (["--length", "16"], "expected a multiple of noise.block_size_tokens 16 x 4 stretches of parallel.context 2 r"),
        (["parallel.context=2"], "parallel.context: found it among the settings, expected --ranks"),
        (["--ranks", "1"], "--ranks"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys, tmp_path):
    assert main(["bench", "context", *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())


def test_every_case_takes_steps(tmp_path, capsys):
    assert main(["bench", "context", "--quick", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "context.json").read_text())["cases"]
    assert [row["ranks"] for row in rows] == [1, 1, 2] * 2
    assert all(row["median_seconds"] > 0 and row["memory_bytes"] > 0 for row in rows)
    assert [row["time_ratio"] for row in rows][1::3] == [1.0, 1.0]
    assert "memory of a step" in capsys.readouterr().out

"""What a launcher has left in the environment."""

import pytest

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.mcore import parallel

LAUNCHED = {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_launcher_sets_the_number_of_ranks():
    assert parallel._launched_ranks({}) == parallel._launched_ranks({"RANK": "3"}) == 1
    assert parallel._launched_ranks(LAUNCHED) == 4


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE: found 4 .* without RANK, MASTER_ADDR, MASTER_PORT, .*unset WORLD_SIZE"),
        (LAUNCHED | {"WORLD_SIZE": "many"}, "WORLD_SIZE: found 'many'"),
        (LAUNCHED | {"RANK": "-1"}, "RANK: found '-1'"),
        (LAUNCHED | {"RANK": "4"}, "RANK: found 4 .* less than WORLD_SIZE 4"),
        (LAUNCHED | {"MASTER_PORT": ""}, "MASTER_PORT: found ''"),
    ],
)
def test_what_is_left_of_a_launcher_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        parallel._launched_ranks(environment)


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_number_of_ranks_without_a_launcher_is_one_line(words, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main.main(["train", "recipe=tiny_ar", f"output={tmp_path}/run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("twotower: WORLD_SIZE: found 4") and error.count("\n") == 1

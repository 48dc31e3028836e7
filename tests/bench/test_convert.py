"""The benchmark of conversion runs, at a very small size, and every way has converted all bytes."""

import json

import pytest
from rich.console import Console

from megatron_twotower.bench import convert as bench_convert
from megatron_twotower.bench.convert import MIB, Settings
from megatron_twotower.common.errors import UserError
from megatron_twotower.convert import hf_folder

SMALL = Settings(size_mib=1, repeats=1, budget_seconds=0.0)


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    from helpers.hf_folders import MODEL

    monkeypatch.setattr(bench_convert, "_SHAPE", MODEL)


def test_it_measures_every_way_and_prints_what_it_writes(tmp_path, monkeypatch):
    seen = {}
    in_turns = bench_convert.in_turns

    def looked_at(cases, **settings):
        out = tmp_path / "scratch"
        for case in cases:
            case.run()
            written = sum(path.stat().st_size for path in next(out.iterdir()).rglob("out/**/*.*") if path.is_file())
            seen[case.name] = written
        return in_turns(cases, **settings)

    monkeypatch.setattr(bench_convert, "in_turns", looked_at)
    console = Console(record=True, width=140)
    (tmp_path / "scratch").mkdir()
    bench_convert.run(tmp_path / "figures", folder=tmp_path / "scratch", settings=SMALL, console=console)
    figures = json.loads((tmp_path / "figures" / "convert.json").read_text())
    text = console.export_text()
    assert figures["bytes"] >= MIB and figures["ways"]["cp"]["times_cp"] == 1
    for name, row in figures["ways"].items():
        assert name in text and f"{row['times_cp']:.2f}" in text
        assert row["bytes_per_second"] * row["median_seconds"] == pytest.approx(figures["bytes"])
        assert name == "fingerprint alone" or seen[name] >= figures["bytes"], name
    assert not list((tmp_path / "scratch").iterdir())


def test_a_model_has_the_size_that_is_asked_for(tmp_path):
    for size in (MIB // 10, 2 * MIB):
        model = bench_convert.sized(size)
        shorter = bench_convert.dataclasses.replace(model, hybrid_override_pattern=model.hybrid_override_pattern[:-5])
        assert bench_convert.weight_bytes(shorter) < size <= bench_convert.weight_bytes(model)
    bench_convert.write_random(tmp_path / "source", model)
    folder = hf_folder.HfFolder.open(tmp_path / "source")
    assert sum(span.lazy().nbytes for span in folder.tensors.values()) == bench_convert.weight_bytes(model)


def test_too_little_room_is_refused(tmp_path, monkeypatch):
    disk = bench_convert.shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(bench_convert.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(UserError, match=r"found 0\.0 GiB free"):
        bench_convert.run(tmp_path / "figures", folder=tmp_path, settings=SMALL)
    assert not list(tmp_path.iterdir())

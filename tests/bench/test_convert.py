"""The benchmark of conversion at a very small size: every conversion writes all bytes."""

import json

import pytest
from rich.console import Console

from megatron_twotower.bench import convert as bench_convert
from megatron_twotower.bench.convert import MIB, ConvertOptions
from megatron_twotower.common.errors import UserError
from megatron_twotower.convert import hf_folder

SMALL = ConvertOptions(size_mib=1, repeats=1, budget_seconds=0.0)


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    from helpers.hf_folders import MODEL

    monkeypatch.setattr(bench_convert, "_SHAPE", MODEL)


@pytest.mark.slow
def test_it_measures_every_conversion_and_prints_what_it_writes(tmp_path, monkeypatch):
    seen = {}
    time_cases = bench_convert.time_cases

    def checked(cases, **options):
        out = tmp_path / "scratch"
        for case in cases:
            case.run()
            written = sum(path.stat().st_size for path in next(out.iterdir()).rglob("out/**/*.*") if path.is_file())
            seen[case.name] = written
        return time_cases(cases, **options)

    monkeypatch.setattr(bench_convert, "time_cases", checked)
    console = Console(record=True, width=140)
    (tmp_path / "scratch").mkdir()
    bench_convert.run(tmp_path / "results", folder=tmp_path / "scratch", options=SMALL, console=console)
    results = json.loads((tmp_path / "results" / "convert.json").read_text())
    text = console.export_text()
    assert results["bytes"] >= MIB and results["ways"]["cp"]["times_cp"] == 1
    for name, row in results["ways"].items():
        assert name in text and f"{row['times_cp']:.2f}" in text
        assert row["bytes_per_second"] * row["median_seconds"] == pytest.approx(results["bytes"])
        assert name == "fingerprint alone" or seen[name] >= results["bytes"], name
    assert not list((tmp_path / "scratch").iterdir())


def test_a_model_has_the_size_that_is_asked_for(tmp_path):
    for size in (MIB // 10, 2 * MIB):
        model = bench_convert.model_of_size(size)
        shorter = bench_convert.dataclasses.replace(model, hybrid_override_pattern=model.hybrid_override_pattern[:-5])
        assert bench_convert.weight_bytes(shorter) < size <= bench_convert.weight_bytes(model)
    bench_convert.write_random(tmp_path / "source", model)
    folder = hf_folder.HfFolder.open(tmp_path / "source")
    assert sum(span.lazy().nbytes for span in folder.tensors.values()) == bench_convert.weight_bytes(model)


def test_too_little_disk_space_is_an_error(tmp_path, monkeypatch):
    disk = bench_convert.shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(bench_convert.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(UserError, match=r"found 0\.0 GiB free"):
        bench_convert.run(tmp_path / "results", folder=tmp_path, options=SMALL)
    assert not list(tmp_path.iterdir())

import io
import json

import pytest
from rich.console import Console

from megatron_twotower.bench import measure
from megatron_twotower.bench import ops as bench_ops
from megatron_twotower.bench.ops import (
    OURS,
    OperationShape,
    add_ratios,
    build_cases,
    estimated_bytes,
    measure_shape,
    select_shapes,
)
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe


@pytest.fixture(scope="module")
def tiny():
    return load_recipe("bench_step", ["model=tiny"]).model


@pytest.fixture(scope="module")
def nano():
    return load_recipe("bench_step", [f"model={bench_ops.MODEL}"]).model


def selected(model, **given):
    defaults = {"operations": (), "lengths": (), "blocks": (), "dtype": "fp32", "model": model, "quick": False}
    return select_shapes(**(defaults | given))


def test_defaults_and_flags_say_what_is_measured(tiny):
    found = selected(tiny)
    assert {shape.operation for shape in found} == set(bench_ops.CASES)
    assert {(shape.length, shape.block) for shape in found if shape.operation == "scan"} >= {(1024, 4), (8192, 16)}
    given = selected(tiny, operations=["attention", "head"], lengths=[64, 128], blocks=[16])
    assert [(shape.operation, shape.length, shape.block) for shape in given] == [
        ("attention", 64, 16),
        ("attention", 128, 16),
        ("head", 64, 0),
        ("head", 128, 0),
    ]
    with pytest.raises(UserError, match="found 100, expected a multiple of --block 16"):
        selected(tiny, lengths=[100], blocks=[16])


@pytest.mark.parametrize("operation", list(bench_ops.CASES))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_case_runs_again_and_again(operation, dtype, tiny):
    cases = build_cases(OperationShape(operation, 32, 8, dtype, tiny))
    assert cases[0].name == OURS and len(cases) > 1
    for case in [*cases, *cases]:
        case.run()


def test_the_torch_scan_is_a_case_of_its_own_if_triton_is_used(tiny, monkeypatch):
    monkeypatch.setattr(bench_ops, "uses_triton_scan", lambda x, B, block, chunk: True)
    cases = build_cases(OperationShape("scan", 32, 8, "fp32", tiny))
    assert [case.name for case in cases][:2] == [OURS, "ours in torch"]
    cases[1].run()


def test_a_case_that_does_not_fit_is_skipped_with_its_reason(tiny, monkeypatch):
    shape = OperationShape("scan", 32, 8, "fp32", tiny)
    monkeypatch.setattr(measure, "fillable_bytes", lambda: estimated_bytes(shape, OURS))
    monkeypatch.setattr(measure, "in_new_process", lambda *_, preload: 7)
    ours, *baselines = add_ratios(measure_shape(shape, repeats=1, budget_seconds=0.0, threads=1))
    assert ours["skipped"] is None and ours["extra_peak_bytes"] == 7
    assert all(row["skipped"].startswith("needs about") and "time_ratio" not in row for row in baselines)
    assert "skipped: needs about 0 GiB" in rendered(bench_ops.ops_table([ours, *baselines], title="t"))


def rendered(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_estimates_of_memory_grow_as_the_algorithms_do(nano):
    def scan(block, name):
        return estimated_bytes(OperationShape("scan", 8192, block, "fp32", nano), name)

    assert scan(4, OURS) == scan(16, OURS)
    assert scan(4, "state per block") > 3 * scan(16, "state per block") > 3 * 4 * 2**30
    head = OperationShape("head", 8192, 0, "fp32", nano)
    assert estimated_bytes(head, "all logits") > 12 * 2**30 > 3 * estimated_bytes(head, OURS)


def test_ratios_are_the_baselines_over_ours():
    ours = {"skipped": None, "median_seconds": 2.0, "stage_seconds": {"all": 2.0}, "extra_peak_bytes": 10}
    baseline = {"skipped": None, "median_seconds": 5.0, "stage_seconds": {"all": 5.0}, "extra_peak_bytes": 30}
    first, second = add_ratios([ours, baseline])
    assert "time_ratio" not in first
    assert (second["time_ratio"], second["stage_ratios"], second["memory_ratio"]) == (2.5, {"all": 2.5}, 3.0)


def test_a_quick_run_prints_a_table_and_writes_json_and_a_picture(tmp_path):
    console = Console(file=io.StringIO(), width=160)
    bench_ops.run(
        tmp_path,
        operations=["attention"],
        blocks=[8],
        repeats=2,
        budget_seconds=1.0,
        threads=1,
        quick=True,
        console=console,
    )
    assert "dense mask" in console.file.getvalue() and "ops.json" in console.file.getvalue()
    found = json.loads((tmp_path / "ops.json").read_text())
    assert found["model"] == "tiny" and found["machine"]["threads"] == 1
    assert [row["case"] for row in found["rows"]] == [OURS, "dense mask"]
    assert all(row["rounds"] == 2 and row["extra_peak_bytes"] >= 0 for row in found["rows"])
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")

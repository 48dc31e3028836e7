"""Every operation against its reference implementation, value and all gradients.

On a GPU at the widths of the real model (`make test-gpu`), and on the CPU at small widths.
"""

import subprocess
import sys

import pytest
import torch

from helpers import gpu_checks
from helpers.gpu_checks import OPERATIONS, TOLERANCES, initial_state_errors
from megatron_twotower.ops import dispatch
from megatron_twotower.ops.scan import chunk_scan


def within(errors, precision):
    return {name: error for name, error in errors.items() if not error <= TOLERANCES[precision]} == {}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_follows_its_reference(name, precision, device):
    errors = gpu_checks.operation_errors(name, device=device, precision=precision)
    gpu_checks.report(f"operation: {name}, {precision}", errors=errors)
    assert within(errors, precision), errors


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_scan_of_the_context_tower_passes_the_right_states(precision, device):
    errors = gpu_checks.clean_state_errors(device=device, precision=precision)
    gpu_checks.report(f"states of the context tower's scan, {precision}", errors=errors)
    assert len(errors) > 2 and within(errors, precision), errors


def ours(x, dt, A, B, C, D, chunk, initial):
    y, _, final = chunk_scan(x, dt, A, B, C, D, chunk=chunk, initial=initial)
    return y, final


def theirs(x, dt, A, B, C, D, chunk, initial):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, initial_states=initial, return_final_states=True)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("tokens", [16, 40])
@pytest.mark.parametrize("chunk", [16, 64])
def test_short_sequences_with_initial_states(precision, chunk, tokens, device):
    errors = initial_state_errors(ours, device=device, precision=precision, chunk=chunk, tokens=tokens)
    assert within(errors, precision), errors


@pytest.mark.gpu
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("tokens", [16, 40, 256])
@pytest.mark.parametrize("chunk", [16, 64, 128, 256])
def test_mamba_ssm_with_initial_states(precision, chunk, tokens):
    """Report the errors of the scan of mamba-ssm with initial states.

    It is said to be wrong for sequences of 16 tokens on some GPUs. This package does not use it
    with initial states: there `chunk_scan` has its own implementation, which must be right.
    """
    assert torch.cuda.is_available(), "found no CUDA device, expected one"
    if reason := dispatch.unavailable("mamba-ssm"):
        gpu_checks.report("mamba-ssm with initial states", not_run=reason)
        pytest.skip(reason)
    shape = {"device": "cuda", "precision": precision, "chunk": chunk, "tokens": tokens}
    errors = initial_state_errors(theirs, **shape)
    gpu_checks.report("mamba-ssm with initial states", **shape, errors=errors, right=within(errors, precision))
    assert within(initial_state_errors(ours, **shape), precision)


def test_the_comparison_finds_an_error(device):
    right = OPERATIONS["norm"]

    def wrong(size):
        found = right(size)
        return gpu_checks.Operation(lambda *own: 1.001 * found.fast(*own), found.twin, found.tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPERATIONS, "norm", wrong)
        errors = gpu_checks.operation_errors("norm", device=device, precision="fp32")
    assert not within(errors, "fp32") and min(errors.values()) > 5e-4


def test_figures_are_written_to_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOTOWER_GPU_REPORT", str(tmp_path / "some" / "report.jsonl"))
    gpu_checks.report("one", errors={"y": 0.5})
    gpu_checks.report("two", right=True)
    lines = (tmp_path / "some" / "report.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"errors": {"y": 0.5}' in lines[0]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_tests_fail_and_are_not_skipped():
    command = [sys.executable, "-m", "pytest", __file__, "-m", "gpu", "-k", "gated", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "found no CUDA device, expected one" in done.stdout
    assert "2 errors" in done.stdout or "2 failed" in done.stdout

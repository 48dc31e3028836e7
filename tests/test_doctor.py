"""What the doctor says must be what the code does."""

import importlib
import importlib.metadata
import io

import pytest
import torch
from rich.console import Console

from megatron_twotower import doctor, host
from megatron_twotower.doctor import Role, diagnose, environment, one_line_summary, print_doctor

ROLES = [
    "denoiser attention", "denoiser scan", "context scan", "convolution",
    "norm", "grouped GEMM", "cross-entropy", "optimizer",
]  # fmt: skip


def pretend_installed(monkeypatch, versions):
    real = importlib.metadata.version

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_every_role_is_told():
    assert [role.role for role in diagnose()] == ROLES
    assert all(isinstance(role, Role) and role.serves and role.faster and role.how for role in diagnose())


@pytest.mark.parametrize("role", [*doctor.FIXED_ROLES, *doctor.KERNEL_ROLES], ids=lambda role: role.role)
def test_the_code_that_serves_a_role_exists(role):
    host.install()
    module, _, name = role.code.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("fixed", doctor.FIXED_ROLES, ids=lambda fixed: fixed.role)
def test_the_code_that_serves_a_role_does_not_call_the_faster_package(fixed):
    host.install()
    module = importlib.import_module(fixed.code.rpartition(".")[0])
    gpu_only = {"transformer_engine", "apex", "mamba_ssm", "causal_conv1d", "triton"}
    with open(module.__file__) as file:
        source = file.read()
    assert not [name for name in gpu_only if f"import {name}" in source or f"from {name}" in source]


def test_installed_but_unused_is_said_so(monkeypatch):
    pretend_installed(monkeypatch, {"transformer-engine": "2.9.0", "triton": None})
    roles = {role.role: role for role in diagnose()}
    assert roles["norm"].how == "not used yet; transformer-engine 2.9.0 is installed"
    assert roles["norm"].serves == "torch RMSNorm"
    assert roles["cross-entropy"].how == "not used yet; nothing to install"


def test_kernels_serve_where_their_package_does(monkeypatch):
    pretend_installed(monkeypatch, {"triton": "3.9.0", "mamba-ssm": "2.3.1", "causal-conv1d": None})
    missing = {"triton": None, "mamba-ssm": None, "causal-conv1d": "causal_conv1d is not installed"}
    monkeypatch.setattr(doctor.kernels, "unavailable", missing.get)
    monkeypatch.setattr(host, "is_host", lambda: False)
    denoiser, context, convolution = diagnose()[1:4]
    assert denoiser == Role("denoiser scan", "this project's Triton kernels (triton 3.9.0)", "nothing", "-")
    assert context == Role("context scan", "mamba-ssm kernels (mamba-ssm 2.3.1)", "nothing", "-")
    assert convolution.serves == "torch, sum of shifted copies"
    assert convolution.faster == "causal-conv1d kernels (context tower)"
    assert convolution.how == f"causal_conv1d is not installed: {doctor.GPU_EXTRA}"


def test_kernels_do_not_serve_without_a_device(monkeypatch):
    monkeypatch.setattr(doctor.kernels, "unavailable", lambda package: "no CUDA device")
    monkeypatch.setattr(host, "is_host", lambda: True)
    assert diagnose()[1] == Role(
        "denoiser scan", "torch, chunked two-stream scan", "this project's Triton kernels", "needs a CUDA device"
    )


def test_the_optimizer_is_the_one_that_megatron_picked(monkeypatch):
    host.install()
    from megatron.core import optimizer as megatron_optimizer

    class FusedAdam:
        pass

    FusedAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    assert diagnose()[-1].serves == "torch AdamW, fused"
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron_optimizer, "Adam", FusedAdam)
    assert diagnose()[-1].serves == "FusedAdam of transformer_engine"


def test_environment_tells_versions_and_resources(monkeypatch):
    pretend_installed(monkeypatch, {"mamba-ssm": None})
    found = environment()
    assert found["torch"].startswith(torch.__version__)
    assert found["megatron-core"] == importlib.metadata.version("megatron-core")
    assert found["mamba-ssm"] == "not installed"
    assert found["memory"].endswith("GiB available")
    assert int(found["CPU cores"].split(",")[0]) >= 1


def test_a_package_that_cannot_be_imported_does_not_count_as_working(monkeypatch):
    pretend_installed(monkeypatch, {"apex": "0.1"})
    broken = doctor._Package("apex", "apex_that_is_not_there.optimizers")
    assert doctor._package_line(broken) == (
        "0.1, cannot be imported (ModuleNotFoundError: No module named 'apex_that_is_not_there')"
    )


def test_summary_is_one_line_with_every_role():
    summary = one_line_summary()
    assert "\n" not in summary
    assert f"torch {torch.__version__}" in summary
    for role in diagnose():
        assert f"{role.role}: {role.serves}" in summary


def test_the_tables_hold_everything_at_80_columns():
    screen = io.StringIO()
    print_doctor(Console(file=screen, width=80))
    text = screen.getvalue()
    assert "…" not in text
    for name in [*ROLES, *environment()]:
        assert name in text

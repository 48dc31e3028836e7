"""The tables of the doctor: they say what the code does."""

import importlib
import importlib.metadata
import io
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from megatron_twotower import doctor
from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig, TrainConfig
from megatron_twotower.doctor import Role, diagnose, environment, one_line_summary, print_doctor
from megatron_twotower.mcore import modules

ROLES = [
    "denoiser attention",
    "denoiser scan",
    "context scan",
    "denoiser conv",
    "context conv",
    "gated norm",
    "modulation",
    "cross-entropy",
    "norm",
    "projections",
    "grouped GEMM",
    "token permutation",
    "router",
    "optimizer",
]


def pretend_installed(monkeypatch, versions):
    real = importlib.metadata.version

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_every_role_is_listed():
    assert [role.role for role in diagnose()] == ROLES
    assert all(role.implementation and role.faster and role.how_to_get for role in diagnose())


@pytest.mark.parametrize("role", [*doctor.KERNEL_ROLES, *doctor.MODULE_ROLES], ids=lambda role: role.role)
def test_the_code_of_a_role_exists(role):
    module, _, name = role.code.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def with_transformer_engine(monkeypatch):
    pretend_installed(monkeypatch, {"transformer-engine": "2.11.0"})
    for module in (doctor.dispatch, modules):
        monkeypatch.setattr(module, "unavailable", lambda package: None)


MODULE_ROLES = [role.role for role in doctor.MODULE_ROLES]


def test_transformer_engine_implements_the_module_roles_if_it_is_usable(monkeypatch):
    with_transformer_engine(monkeypatch)
    roles = {role.role: role for role in diagnose()}
    assert roles["norm"] == Role(
        "norm", "Transformer Engine, fused with the projection in M and * (transformer-engine 2.11.0)", "nothing", "-"
    )
    assert all("transformer-engine 2.11.0" in roles[name].implementation for name in MODULE_ROLES)


def test_a_configuration_that_switches_it_off_is_reported(monkeypatch):
    with_transformer_engine(monkeypatch)
    train = TrainConfig(precision="bf16", router_dtype="fp64")
    fp64 = {role.role: role for role in diagnose(RunConfig(train=train))}
    assert fp64["router"].implementation == "torch" and fp64["router"].how_to_get == "switched off by the configuration"
    assert "transformer-engine" in fp64["norm"].implementation
    local = RunConfig(train=TrainConfig(precision="bf16", transformer_impl="local"))
    for role in diagnose(local):
        assert "transformer-engine" not in role.implementation


def test_the_roles_without_transformer_engine_name_the_classes_that_are_built(monkeypatch):
    parts = modules.LAYER_MODULES["local"]()
    own = {role.role: role.code.rpartition(".")[2] for role in doctor.MODULE_ROLES}
    assert own["norm"] == parts.norm.__name__
    assert own["projections"] == parts.column_linear.__name__
    assert own["grouped GEMM"] == parts.experts.module.__name__


def test_kernels_are_used_if_their_package_is_usable(monkeypatch):
    pretend_installed(monkeypatch, {"triton": "3.9.0", "mamba-ssm": "2.3.2", "causal-conv1d": None})
    missing = {"triton": None, "mamba-ssm": None, "causal-conv1d": "causal_conv1d is not installed"}
    monkeypatch.setattr(doctor.dispatch, "unavailable", missing.get)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    denoiser, context, seeded, convolution = diagnose()[1:5]
    assert denoiser == Role("denoiser scan", "this project's Triton kernels (triton 3.9.0)", "nothing", "-")
    assert context == Role("context scan", "mamba-ssm kernels, in bfloat16 (mamba-ssm 2.3.2)", "nothing", "-")
    assert seeded.implementation == "this project's Triton kernels (triton 3.9.0)"
    assert convolution.implementation == "that of denoiser conv" and convolution.faster == "causal-conv1d kernels"
    assert convolution.how_to_get == f"causal_conv1d is not installed: {doctor.GPU_EXTRA}"


def test_kernels_are_not_used_without_a_device(monkeypatch):
    monkeypatch.setattr(doctor.dispatch, "unavailable", lambda package: "no CUDA device")
    monkeypatch.setattr(device, "is_cpu", lambda: True)
    assert diagnose()[1] == Role(
        "denoiser scan", "torch, chunked two-stream scan", "this project's Triton kernels", "needs a CUDA device"
    )


def test_the_optimizer_is_the_one_that_megatron_chose(monkeypatch):
    from megatron.core import optimizer as megatron_optimizer

    class FusedAdam:
        pass

    FusedAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    assert diagnose()[-1].implementation == "torch AdamW, fused"
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron_optimizer, "Adam", FusedAdam)
    assert diagnose()[-1].implementation == "FusedAdam of transformer_engine"


FUSED_ADAM = "class FusedAdam: ...\nclass FusedSGD: ...\n"
ASK = """
import megatron_twotower.mcore
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron_twotower.doctor import diagnose
assert optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam
assert distrib_optimizer.Adam.__module__.startswith("torch.")
assert diagnose()[-1].implementation == "torch AdamW, fused"
"""


@pytest.mark.skipif(not device.is_cpu(), reason="with a CUDA device the fused one is right")
def test_an_optimizer_for_cuda_is_not_chosen_without_a_device(tmp_path):
    """As on the login node of a cluster, where its package is installed and imports."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "optimizers.py").write_text(FUSED_ADAM)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", ASK], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_environment_has_versions_and_resources(monkeypatch):
    pretend_installed(monkeypatch, {"mamba-ssm": None})
    found = environment()
    assert found["torch"].startswith(torch.__version__)
    assert found["megatron-core"] == importlib.metadata.version("megatron-core")
    assert found["mamba-ssm"] == "not installed"
    assert found["memory"].endswith("GiB available")
    assert int(found["CPU cores"].split(",")[0]) >= 1


def test_a_package_that_cannot_be_imported_is_reported(monkeypatch):
    pretend_installed(monkeypatch, {"apex": "0.1"})
    broken = doctor._Package("apex", "apex_that_is_not_there.optimizers")
    assert doctor._package_line(broken) == (
        "0.1, cannot be imported (ModuleNotFoundError: No module named 'apex_that_is_not_there')"
    )


def test_a_version_that_is_not_accepted_is_shown_and_ends_in_one_line(monkeypatch):
    pretend_installed(monkeypatch, {"transformer-engine": "2.7.0+f8933bb", "mamba-ssm": "2.2.4"})
    screen = io.StringIO()
    with pytest.raises(UserError) as caught:
        print_doctor(Console(file=screen, width=80))
    assert str(caught.value) == (
        "transformer-engine: found 2.7.0+f8933bb, expected >=2.9,<2.21; mamba-ssm: found 2.2.4, expected >=2.3.2,<3"
    )
    assert "2.7.0+f8933bb, expected >=2.9,<2.21" in screen.getvalue()


def test_summary_is_one_short_line():
    summary = one_line_summary()
    assert "\n" not in summary and len(summary) < 80
    assert f"torch {torch.__version__}, megatron-core" in summary


def test_the_tables_show_everything_at_80_columns():
    screen = io.StringIO()
    print_doctor(Console(file=screen, width=80))
    text = screen.getvalue()
    assert "…" not in text
    for name in [*ROLES, *environment()]:
        assert name in text

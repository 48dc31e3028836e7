"""Layers and the loss with all Triton kernels of this project, in Triton's interpreter."""

import dataclasses

import pytest
import torch

from helpers import gpu_checks, kept_bytes
from helpers.models import build_two_tower, random_noisy_batch

pytest.importorskip("triton")
from helpers.triton_kernels import INTERPRETED
from megatron_twotower.ops import cross_entropy, dispatch
from megatron_twotower.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from megatron_twotower.ops.triton import convolution, modulation, norm, scan_kernels
from megatron_twotower.ops.triton import cross_entropy as triton_cross_entropy
from megatron_twotower.plan.activations import MicroBatchShape, layer_tensors

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="with a GPU, the tests of layers run the kernels")

OF_LAYERS = {
    scan_kernels: ("decay", "forward", "backward_clean", "backward_block", "decay_backward"),
    convolution: ("block_conv_forward", "block_conv_backward"),
    modulation: ("modulation_forward", "modulation_backward"),
    norm: ("gated_norm_forward", "gated_norm_backward"),
}


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Use the kernels for tensors of the CPU."""
    monkeypatch.setattr(dispatch, "uses_triton", lambda x, kernel: x.dtype in (torch.bfloat16, torch.float32))


@pytest.mark.parametrize("precision", gpu_checks.LAYER_TOLERANCES)
def test_layers_follow_their_reference(groups, monkeypatch, kernels_on_cpu, precision):
    launched = {}
    for module, names in OF_LAYERS.items():
        for name in names:
            launched[name] = Counted(getattr(module, f"{name}_kernel"))
            monkeypatch.setattr(module, f"{name}_kernel", launched[name])
    model = dataclasses.replace(gpu_checks.layer_model("cpu"), chunk_size=2 * gpu_checks.BLOCK)
    monkeypatch.setattr(gpu_checks, "layer_model", lambda device: model)
    # Two layers, so that gradients pass through all of the first. No expert layers: rounding may
    # change their routing.
    errors = gpu_checks.layer_errors("MM", groups, device="cpu", precision=precision)
    assert gpu_checks.too_large(errors, precision) == {}
    assert {name for name, kernel in launched.items() if not kernel.launches} == set()


@pytest.mark.parametrize("kind", ["*", *(pytest.param(each, marks=pytest.mark.slow) for each in "M-E")])
def test_layers_keep_no_more_than_the_formulas_say(groups, kernels_on_cpu, kind):
    config = kept_bytes.config_of(kind, block=16, length=128)
    model, _ = build_two_tower(config, groups, dtype=torch.bfloat16)
    size = MicroBatchShape(2, 128, 16, time_per_block=True, activation_bytes=2)
    predicted = sum(part.bytes for part in layer_tensors(config.model, kind, size))
    measured = kept_bytes.kept_bytes(model.train(), random_noisy_batch(config), torch.bfloat16)
    # For experts the formula of what the router keeps is approximate.
    assert (0.8 if kind == "M" else 0.98) * predicted <= measured <= (1.05 if kind == "E" else 1.0) * predicted


def test_the_loss_is_the_sum_over_chunks(monkeypatch, kernels_on_cpu):
    rows = Counted(triton_cross_entropy.cross_entropy_kernel)
    monkeypatch.setattr(triton_cross_entropy, "cross_entropy_kernel", rows)
    monkeypatch.setattr(cross_entropy, "KERNEL_CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(n, 6, generator=generator).requires_grad_() for n in (11, 20)]
    targets, weights = torch.arange(11), torch.rand(11, generator=generator)
    (got, losses), (want, each) = (
        of(*own, targets, weights) for of in (linear_cross_entropy, linear_cross_entropy_ref)
    )
    assert rows.launches == 3
    torch.testing.assert_close((got, losses), (want, each), rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(total, own) for total in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

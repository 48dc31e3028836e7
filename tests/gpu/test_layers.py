"""Every kind of layer of both towers against blocks that are computed one by one.

Logits and all gradients are compared: on a GPU at the widths of the real model (`make test-gpu`),
and on the CPU at small widths.
"""

import pytest

from helpers import gpu_checks
from helpers.gpu_checks import LAYER_TOLERANCES
from megatron_twotower.common import device as common_device
from megatron_twotower.model import layers


@pytest.mark.parametrize("precision", LAYER_TOLERANCES)
@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-M"])
def test_a_layer_follows_its_twin(pattern, precision, device, groups):
    if common_device.device().type != device:
        pytest.skip("layers are built on the GPU that is here, where the same is tested")
    errors = gpu_checks.layer_errors(pattern, groups, device=device, precision=precision)
    gpu_checks.report(f"layers: {pattern}, {precision}", errors=errors)
    assert len(errors) > 5 and gpu_checks.too_large(errors, precision) == {}


def test_an_error_shows(groups, monkeypatch):
    """A mixer that is one part in a hundred too large is no rounding."""
    right = layers.add_gated
    monkeypatch.setattr(layers, "add_gated", lambda hidden, gate, out: right(hidden, gate, 1.01 * out))
    errors = gpu_checks.layer_errors("M", groups, device=common_device.device().type, precision="fp32")
    assert "value" in gpu_checks.too_large(errors, "fp32")

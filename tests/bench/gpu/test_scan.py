"""The least memory traffic of a scan."""

from megatron_twotower.bench.gpu.scan import scan_traffic
from megatron_twotower.config.recipes import load_recipe


def test_the_least_traffic_of_a_scan_at_the_widths_of_nano():
    """By hand, in bytes per position: x 8192, B or C 2048, dt 256; a state per 128 positions."""
    model = load_recipe("bench_gpu").model
    states = 64 * 64 * 128 * 4 // 128
    forward = 3 * 8192 + 3 * 2048 + 2 * 256 + states
    backward = 4 * 8192 + 5 * 2048 + 3 * 256 + states
    assert scan_traffic(model, length=8192, block=16, element_bytes=2) == 8192 * (forward + backward)
    # What ops/triton/scan.py states for its kernels, in units of x: 5.75 and 9, of which 1.75
    # twice.
    assert (forward - 512) / 8192 == 5.75 and (backward - 768) / 8192 == 9 - 1.75

"""What is mended where there is a CUDA device, in a process that takes this machine for one."""

import subprocess
import sys

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.mcore import patches

WITH_A_DEVICE = """
import torch
torch.cuda.is_available = lambda: True
calls = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "Stream", "manual_seed")}
from megatron_twotower.mcore import patches
patches.install()
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.moe import moe_utils, token_dispatcher
assert not any(isinstance(finder, patches._HostFinder) for finder in patches.sys.meta_path)
assert all(getattr(torch.cuda, name) is call for name, call in calls.items())
assert token_dispatcher.maybe_move_tensor_to_cpu is not patches._splits_as_ints
asked = getattr(filesystem_async, patches.QUEUE)
assert asked() is asked() and type(asked()).__module__ == "queue"
weight, x = torch.ones(3, 2), torch.ones(4, 2)
print(moe_utils.router_gating_linear(x, weight, None, torch.float32).sum().item())
"""


def test_with_a_device_the_router_s_gemm_and_the_queue_of_a_save_are_mended_and_no_call_of_cuda_is_replaced():
    """Without Transformer Engine, as here, Megatron would end in a NameError at the first router."""
    done = subprocess.run([sys.executable, "-c", WITH_A_DEVICE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == 24.0


def test_another_release_of_megatron_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(patches, "RELEASE", "0.17")
    with pytest.raises(UserError, match=r"megatron-core: found 0\.17, expected 0\.16 or 0\.19"):
        patches.install()

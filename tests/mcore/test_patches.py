"""What is patched with a CUDA device, in a process that pretends to have one."""

import subprocess
import sys

import pytest

from megatron_twotower.common import versions
from megatron_twotower.common.errors import UserError
from megatron_twotower.mcore import patches, releases

WITH_A_DEVICE = """
import torch
torch.cuda.is_available = lambda: True
calls = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "Stream", "manual_seed")}
from megatron_twotower.mcore import patches, releases
patches.install()
assert "wandb" not in patches.sys.modules, "it takes a second, and is imported where a run wants it"
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.moe import moe_utils, token_dispatcher
assert not any(isinstance(finder, patches._PatchedSourceFinder) for finder in patches.sys.meta_path)
assert all(getattr(torch.cuda, name) is call for name, call in calls.items())
assert token_dispatcher.maybe_move_tensor_to_cpu is not patches._splits_as_ints
queue_function = getattr(filesystem_async, releases.installed_release().results_queue_function)
assert queue_function() is queue_function() and type(queue_function()).__module__ == "queue"
weight, x = torch.ones(3, 2), torch.ones(4, 2)
print(moe_utils.router_gating_linear(x, weight, None, torch.float32).sum().item())
"""


@pytest.mark.slow
def test_with_a_device_only_what_fails_on_every_device_is_patched():
    """Without Transformer Engine, the unpatched router would raise a NameError."""
    done = subprocess.run([sys.executable, "-c", WITH_A_DEVICE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == 24.0


def test_a_torch_that_is_not_accepted_is_refused_before_anything_is_imported(monkeypatch):
    monkeypatch.setitem(versions.ACCEPTED, "torch", ">=99")
    with pytest.raises(UserError, match=r"^torch: found .*, expected >=99$"):
        patches.install()


def test_an_unsupported_release_of_megatron_is_rejected_in_one_line(monkeypatch):
    monkeypatch.setattr(releases, "RELEASE", "0.17")
    with pytest.raises(UserError, match=r"megatron-core: found 0\.17, expected 0\.16 or 0\.19"):
        patches.install()

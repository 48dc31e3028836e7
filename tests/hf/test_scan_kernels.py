"""A kernel of the scan is compared with the recurrence before it is trusted."""

import sys

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from helpers.modeling import random_ids, tiny_model
from megatron_twotower.hf import MODELING_FILE
from megatron_twotower.hf import modeling_nemotron_h_twotower as modeling
from megatron_twotower.hf.modeling_nemotron_h_twotower import Mamba, is_exact, recurrence, scan_chunk, trusted_scan

SIZES = {"groups": 2, "heads": 2, "head_dim": 8, "state_dim": 8}
CPU = torch.device("cpu")


def right(*arguments):
    return scan_chunk(*arguments, update=True)


def rounded(*arguments):
    """Products of numbers with ten bits, as TF32 has."""
    cut = [(each.view(torch.int32) & ~0x1FFF).view(torch.float32) for each in arguments]
    return right(*cut)


def without_state(x, dt, A, B, C, state):
    return right(x, dt, A, B, C, torch.zeros_like(state))


def old_state(*arguments):
    return right(*arguments)[0], arguments[-1]


def not_a_number(*arguments):
    y, state = right(*arguments)
    return y.index_fill(1, torch.tensor([7]), float("nan")), state


def one_position(*arguments):
    y, state = right(*arguments)
    return torch.cat([y[:, :15], y[:, 14:15]], dim=1), state


def fails(*arguments):
    raise RuntimeError("no such kernel")


WRONG = [rounded, without_state, old_state, not_a_number, one_position, fails]


def test_a_right_kernel_is_exact():
    assert is_exact(right, **SIZES, device=CPU)
    assert is_exact(recurrence, **SIZES, device=CPU)


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_not_exact(kernel):
    assert not is_exact(kernel, **SIZES, device=CPU)


def not_installed():
    raise ImportError("no such package")


@pytest.fixture
def kernels(monkeypatch):
    def use(*makers):
        monkeypatch.setattr(modeling, "SCAN_KERNELS", {str(n): maker for n, maker in enumerate(makers)})
        trusted_scan.cache_clear()

    yield use
    trusted_scan.cache_clear()


def test_the_first_exact_kernel_is_trusted(kernels):
    sizes = (*SIZES.values(), CPU)
    kernels(not_installed, lambda: rounded, lambda: right, lambda: recurrence)
    assert trusted_scan(*sizes) is right
    kernels(not_installed, lambda: rounded)
    assert trusted_scan(*sizes) is None
    kernels()
    assert trusted_scan(*sizes) is None


def test_a_trusted_kernel_scans_blocks_and_texts(kernels, monkeypatch):
    """With the checks for a GPU left out; the state is that of the recurrence too."""
    model, ids, block = tiny_model("MM*", dtype=torch.float32), random_ids(2, 21), random_ids(2, 5, seed=2)

    def both():
        cache = model.prefill(ids)
        return model.denoise_block(block, torch.ones(2), cache), cache.context[0].ssm

    called = []
    expected = both()
    kernels(lambda: lambda *arguments: called.append(arguments[0].shape[1]) or recurrence(*arguments))
    monkeypatch.setattr(Mamba, "_kernel", lambda self, values, B: trusted_scan(*SIZES.values(), CPU))
    for found, wanted in zip(both(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    # Of the check itself one block; a prompt of 21 in chunks of 8 and a block, in two layers.
    assert called == [16, *[8, 8, 5] * 2, 5, 5]


def test_on_a_cpu_no_kernel_is_asked(kernels):
    kernels(lambda: pytest.fail("asked"))
    model = tiny_model(dtype=torch.float32)
    model.denoise_block(random_ids(1, 4), torch.ones(1), model.prefill(random_ids(1, 9)))


def test_the_modelling_file_imports_torch_and_transformers_alone():
    """A folder whose file imports another package, in a function too, is refused."""
    found = set(get_imports(MODELING_FILE)) - sys.stdlib_module_names
    assert found == {"safetensors", "torch", "transformers"}

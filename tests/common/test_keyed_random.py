"""Uniform numbers from integer keys: their distribution, and known values."""

import torch

from megatron_twotower.common.keyed_random import keyed_uniform

# keyed_uniform(1234, 1, torch.arange(4))
KNOWN = [0.16698934580101943, 0.6327393774804005, 0.8296892634023215, 0.7853828361519181]


def test_uniform_numbers_are_uniform_and_known():
    values = keyed_uniform(7, torch.arange(200_000))
    assert abs(values.mean() - 0.5) < 0.003 and abs(values.var() - 1 / 12) < 0.001
    histogram = torch.histc(values, bins=20, min=0, max=1)
    assert (histogram / 10_000 - 1).abs().max() < 0.05
    lag = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(lag) < 0.01
    # A change here changes the noise of every run.
    expected = torch.tensor(KNOWN, dtype=torch.float64)
    torch.testing.assert_close(keyed_uniform(1234, 1, torch.arange(4)), expected, rtol=0, atol=0)


def test_every_key_changes_the_numbers():
    keys = torch.arange(4)
    first = keyed_uniform(1234, 1, keys)
    for other in (keyed_uniform(1235, 1, keys), keyed_uniform(1234, 2, keys), keyed_uniform(1234, keys, 1)):
        assert not torch.equal(first, other)


def test_keys_broadcast_and_each_number_depends_on_its_own_keys():
    table = keyed_uniform(7, torch.arange(3)[:, None], torch.arange(5))
    assert table.shape == (3, 5) and table.dtype == torch.float64
    assert table[2, 4] == keyed_uniform(7, 2, torch.tensor(4))

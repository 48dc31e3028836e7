"""The table of names against the published sizes, and how ranks cut parameters."""

import dataclasses
import math

import pytest
import torch

from helpers.models import TINY
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.model import parameter_map


@pytest.fixture(scope="module")
def nano():
    from omegaconf import OmegaConf

    fields = OmegaConf.load(recipes_folder() / "model" / "nemotron_3_nano_30b_a3b.yaml")
    return ModelConfig(**OmegaConf.to_container(fields))


def parameters(entries):
    return sum(math.prod(entry.shape) for entry in entries if not entry.megatron.endswith("expert_bias"))


def test_nano_has_the_published_number_of_parameters(nano):
    assert parameters(parameter_map.backbone_entries(nano)) == 31_577_937_344
    per_layer = {"M": 38_742_208, "E": 1_297_465_344, "*": 23_396_352}
    for kind, count in per_layer.items():
        one = dataclasses.replace(nano, hybrid_override_pattern=kind)
        none = dataclasses.replace(nano, hybrid_override_pattern="")
        layer = parameters(parameter_map.backbone_entries(one)) - parameters(parameter_map.backbone_entries(none))
        assert layer == count + nano.hidden_size, "the mixer and its norm"


def test_time_conditioning_has_the_published_shapes(nano):
    entries = [e for e in parameter_map.denoiser_entries(nano, 256) if e.hf[0].startswith(("t_", "scale_shift"))]
    assert parameters(entries) == 30_022_272
    assert {e.hf[0]: e.shape for e in entries if not e.hf[0].startswith("scale")} == {
        "t_embedder.mlp.0.weight": (2688, 256),
        "t_embedder.mlp.0.bias": (2688,),
        "t_embedder.mlp.2.weight": (2688, 2688),
        "t_embedder.mlp.2.bias": (2688,),
        "t_block.1.weight": (8064, 2688),
        "t_block.1.bias": (8064,),
    }


def test_query_key_value_rows_go_there_and_back():
    entry = next(e for e in parameter_map.backbone_entries(TINY) if e.layout == "qkv")
    parts = [torch.randn(n, TINY.hidden_size) for n in (24, 12, 12)]
    join, split = parameter_map.LAYOUTS["qkv"]
    mixed = join(parts, TINY)
    assert mixed.shape == entry.shape
    # The first kv head's two queries of six rows, then its key.
    assert torch.equal(mixed[:12], parts[0][:12]) and torch.equal(mixed[12:18], parts[1][:6])
    for part, back in zip(parts, split(mixed, TINY), strict=True):
        assert torch.equal(part, back)


def test_every_part_of_a_fused_projection_is_split_by_itself():
    entry = next(e for e in parameter_map.backbone_entries(TINY) if e.megatron.endswith("in_proj.weight"))
    whole = torch.randn(entry.shape)
    first, second = (parameter_map.shard(whole, entry, rank=rank, ranks=2) for rank in (0, 1))
    z, x, *_ = whole.split(list(entry.sections))
    assert torch.equal(first[:12], z[:12]) and torch.equal(first[12:24], x[:12])
    assert torch.equal(second[:12], z[12:]) and first.shape == second.shape == (whole.shape[0] // 2, 24)


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_of_all_ranks_join_to_the_whole(ranks):
    for entry in parameter_map.denoiser_entries(TINY, 16):
        whole = torch.randn(entry.shape)
        parts = [parameter_map.shard(whole, entry, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert torch.equal(parameter_map.joined(parts, entry), whole), entry.megatron


def test_experts_live_on_one_rank_each():
    entries = [e for e in parameter_map.backbone_entries(TINY) if e.expert is not None]
    for entry in entries:
        owners = [parameter_map.local_expert_name(entry, experts=6, rank=r, ranks=3) for r in range(3)]
        assert sum(owner is not None for owner in owners) == 1
    name = parameter_map.local_expert_name(entries[-1], experts=6, rank=2, ranks=3)
    assert name is not None and ".local_experts.1." in name

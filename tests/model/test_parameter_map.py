"""The table of parameters against the published sizes, and how ranks split parameters."""

import dataclasses
import math

import pytest
import torch

from helpers.layouts import join_shards
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
    return sum(math.prod(entry.shape) for entry in entries if not entry.megatron_name.endswith("expert_bias"))


def test_nano_has_the_published_number_of_parameters(nano):
    assert parameters(parameter_map.backbone_entries(nano)) == 31_577_937_344
    per_layer = {"M": 38_742_208, "E": 1_297_465_344, "*": 23_396_352}
    for kind, count in per_layer.items():
        one = dataclasses.replace(nano, hybrid_override_pattern=kind)
        none = dataclasses.replace(nano, hybrid_override_pattern="")
        layer = parameters(parameter_map.backbone_entries(one)) - parameters(parameter_map.backbone_entries(none))
        assert layer == count + nano.hidden_size, "the mixer and its norm"


def test_time_conditioning_has_the_published_shapes(nano):
    entries = [e for e in parameter_map.denoiser_entries(nano, 256) if e.hf_names[0].startswith(("t_", "scale_shift"))]
    assert parameters(entries) == 30_022_272
    assert {e.hf_names[0]: e.shape for e in entries if not e.hf_names[0].startswith("scale")} == {
        "t_embedder.mlp.0.weight": (2688, 256),
        "t_embedder.mlp.0.bias": (2688,),
        "t_embedder.mlp.2.weight": (2688, 2688),
        "t_embedder.mlp.2.bias": (2688,),
        "t_block.1.weight": (8064, 2688),
        "t_block.1.bias": (8064,),
    }


def test_the_conversion_of_query_key_and_value_is_inverted_exactly():
    entry = next(e for e in parameter_map.backbone_entries(TINY) if e.conversion == "qkv")
    tensors = [torch.randn(n, TINY.hidden_size) for n in (24, 12, 12)]
    fused = parameter_map.parameter_from_hf(entry, tensors, TINY)
    assert fused.shape == entry.shape
    # The two queries of the first kv head have six rows each; its key is next.
    assert torch.equal(fused[:12], tensors[0][:12]) and torch.equal(fused[12:18], tensors[1][:6])
    for tensor, converted in zip(tensors, parameter_map.hf_from_parameter(entry, fused, TINY), strict=True):
        assert torch.equal(tensor, converted)


def test_each_section_of_a_fused_projection_is_split_separately():
    entry = next(e for e in parameter_map.backbone_entries(TINY) if e.megatron_name.endswith("in_proj.weight"))
    whole = torch.randn(entry.shape)
    first, second = (parameter_map.shard(whole, entry, rank=rank, ranks=2) for rank in (0, 1))
    z, x, *_ = whole.split(list(entry.section_sizes))
    assert torch.equal(first[:12], z[:12]) and torch.equal(first[12:24], x[:12])
    assert torch.equal(second[:12], z[12:]) and first.shape == second.shape == (whole.shape[0] // 2, 24)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_shards_of_all_ranks_join_to_the_complete_parameter(ranks):
    for entry in parameter_map.denoiser_entries(TINY, 16):
        complete = torch.randn(entry.shape)
        shards = [parameter_map.shard(complete, entry, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert torch.equal(join_shards(shards, entry), complete), entry.megatron_name


def test_each_expert_is_on_exactly_one_rank():
    entries = [e for e in parameter_map.backbone_entries(TINY) if e.expert is not None]
    for entry in entries:
        owners = [parameter_map.name_on_rank(entry, experts=6, rank=r, ranks=3) for r in range(3)]
        assert sum(owner is not None for owner in owners) == 1
    name = parameter_map.name_on_rank(entries[-1], experts=6, rank=2, ranks=3)
    assert name is not None and ".local_experts.1." in name

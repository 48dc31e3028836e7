"""Pipeline stages contain all layers in order, and every parameter is on one stage."""

import dataclasses

import pytest

from helpers.models import TINY
from megatron_twotower.config.pipeline_stages import pipeline_stages, stages_of_rank, whole_model
from megatron_twotower.config.schema import ParallelConfig
from megatron_twotower.model import parameter_map

MODEL = dataclasses.replace(TINY, hybrid_override_pattern="ME*-M*EM")
LAYOUTS = {
    "one": ParallelConfig(),
    "two": ParallelConfig(pipeline=2),
    "uneven": ParallelConfig(pipeline=3, pipeline_layers=[1, 5, 2]),
    "interleaved": ParallelConfig(pipeline=2, pipeline_chunks=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_have_all_layers_in_order(layout):
    cut = pipeline_stages(MODEL, LAYOUTS[layout])
    assert [i for stage in cut for i in stage.layers] == list(range(8))
    assert [stage.first for stage in cut] == [True, *[False] * (len(cut) - 1)]
    assert [stage.last for stage in cut] == [*[False] * (len(cut) - 1), True]


def test_lengths_are_those_of_the_recipe_or_equal():
    assert [len(stage.layers) for stage in pipeline_stages(MODEL, LAYOUTS["uneven"])] == [1, 5, 2]
    assert [len(stage.layers) for stage in pipeline_stages(MODEL, LAYOUTS["interleaved"])] == [2, 2, 2, 2]
    assert pipeline_stages(MODEL, LAYOUTS["one"]) == (whole_model(MODEL),)


def test_interleaved_model_chunks_alternate_between_ranks():
    ranks = [stages_of_rank(MODEL, LAYOUTS["interleaved"], rank) for rank in (0, 1)]
    assert [[list(stage.layers) for stage in own] for own in ranks] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "entries",
    [
        parameter_map.denoiser_entries(MODEL, 16),
        parameter_map.context_entries(MODEL),
        parameter_map.trained_backbone_entries(MODEL),
    ],
    ids=["denoiser", "context", "backbone"],
)
def test_every_parameter_is_on_one_stage(layout, entries):
    cut = pipeline_stages(MODEL, LAYOUTS[layout])
    parts = [parameter_map.entries_of_stage(entries, stage) for stage in cut]
    assert sorted(e.megatron_name for own in parts for e in own) == sorted(entry.megatron_name for entry in entries)
    first, last = ({entry.megatron_name.removeprefix("tower.") for entry in parts[i]} for i in (0, -1))
    assert "embedding.weight" in first and {"final_norm.weight", "output_layer.weight"} <= last
    assert all(name in first for name in first | last if name.startswith("conditioning"))

"""The recipes of the real model: all are valid on every layout, and have the public settings."""

import pytest

from megatron_twotower.config.idle import refuse_idle
from megatron_twotower.config.phases import resolve_phases
from megatron_twotower.config.recipes import load_recipe, recipes_folder
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore.modules import implementation_fields
from megatron_twotower.plan.estimate import Assumptions, estimate
from megatron_twotower.plan.layout import GIB, layout_of
from megatron_twotower.plan.weights import bucket_elements, rank_parameters

PHASES = ["nano_30b_a3b", "nano_30b_a3b_phase1", "nano_30b_a3b_phase2", "nano_30b_a3b_phase3"]
ALL_LAYOUTS = sorted(path.stem for path in (recipes_folder() / "parallel").glob("*.yaml"))
LAYOUTS = [name for name in ALL_LAYOUTS if not name.endswith("_long")]
LONG, LONG_LAYOUTS = "nano_30b_a3b_long", [name for name in ALL_LAYOUTS if name.endswith("_long")]


def nano(recipe, layout="h100x64"):
    return load_recipe(recipe, [f"parallel={layout}"], planning=True)


def test_there_are_layouts_for_the_usual_sizes():
    assert {"h100x8", "h100x64", "h100x256", "h100x1024"} <= set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", PHASES)
def test_every_phase_is_valid_on_every_layout_at_its_ranks(recipe, layout):
    config = nano(recipe, layout)
    card, _, ranks = layout.partition("x")
    assert (config.parallel.card, config.parallel.ranks) == (card, int(ranks))
    validate(config, world_size=int(ranks))
    assert config.train.validation_sequences % (config.data.micro_batch_size * int(ranks)) == 0, "whole batches"


@pytest.mark.parametrize("layout", ["h100x8", "h100x64", "h200x8"])
def test_instruction_tuning_of_the_real_model_is_valid(layout):
    config = nano("nano_30b_a3b_sft", layout)
    validate(config, world_size=config.parallel.ranks)
    refuse_idle(config)
    assert config.init.backbone != config.init.denoiser, "a post-trained context tower under the base denoiser"
    assert config.model == nano(PHASES[0]).model and not config.phases
    assert config.data.documents == "respect" and config.schedule.warmup_steps < 50


def test_a_layout_changes_the_hardware_and_nothing_of_the_objective():
    configs = [nano(PHASES[0], layout) for layout in LAYOUTS]
    for section in ("model", "noise", "schedule", "conditioning", "phases", "init"):
        assert all(getattr(config, section) == getattr(configs[0], section) for config in configs)
    assert len({config.data.sequence_length_tokens for config in configs}) == 1
    batches = {config.parallel.ranks: config.data.global_batch_size for config in configs}
    assert batches == {8: 1024, 64: 1024, 256: 1024, 1024: 3072}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_overlaps_what_data_parallel_ranks_send(layout):
    """In buckets of which there are enough for the backward pass to hide them."""
    config = nano(PHASES[0], layout)
    parallel = config.parallel
    assert parallel.overlap_grad_reduce and parallel.overlap_param_gather
    ranks = layout_of(config, ranks=parallel.ranks)
    (parameters,) = rank_parameters(config, ranks).chunks
    for expert in (False, True):
        elements = sum(parameter.elements for parameter in parameters if parameter.expert == expert)
        assert elements / bucket_elements(config, ranks) > 10


def test_a_router_in_fp32_keeps_the_fused_kernel():
    fields = [
        implementation_fields(
            load_recipe(PHASES[0], [f"train.router_dtype={dtype}"], planning=True),
            transformer_impl="transformer_engine",
        )
        for dtype in ("fp32", "fp64")
    ]
    assert [each["moe_router_fusion"] for each in fields] == [True, False]


def test_the_curriculum_is_that_of_the_paper():
    config = nano(PHASES[0])
    phases = resolve_phases(config)
    assert [phase.noise.block_size_tokens for phase in phases] == [32, 32, 16]
    assert [phase.mixture for phase in phases] == ["breadth", "quality", "quality"]
    tokens = sum(phase.sequences for phase in phases) * config.data.sequence_length_tokens
    assert tokens == pytest.approx(2.1e12, rel=1e-4)
    assert {phase.learning_rate for phase in phases} == {1e-4}
    assert {phase.minimum_learning_rate for phase in phases} == {1e-6}
    assert all(phase.warmup_steps and phase.decay_steps for phase in phases)
    assert config.train.precision == "bf16" and config.noise.time_per == "sequence"


def test_a_later_phase_resumes_from_the_phase_before():
    """Each recipe trains up to the end of its phase, all in one output folder."""
    whole = nano(PHASES[0])
    for number, recipe in enumerate(PHASES[1:], start=1):
        config = nano(recipe)
        assert config.phases == whole.phases[:number]
        assert config.output == whole.output and config.init == whole.init
    assert nano(PHASES[3]) == whole


@pytest.mark.parametrize("layout", LONG_LAYOUTS)
def test_long_sequences_fit_on_their_layouts(layout):
    config = nano(LONG, layout)
    ranks = config.parallel.ranks
    assert layout == f"{config.parallel.card}x{ranks}_long"
    validate(config, world_size=ranks)
    assert config.data.sequence_length_tokens == 131_072 and config.data.documents == "respect"
    step = config.data.global_batch_size * config.data.sequence_length_tokens
    assert step == 1024 * 8192, "the tokens of a step of the other recipes"
    found = estimate(config, ranks=ranks)
    data = found.layout.data
    assert config.data.global_batch_size % data == config.train.validation_sequences % data == 0
    # Two GiB are left, and experts may be uneven.
    busy = estimate(config, ranks=ranks, assumptions=Assumptions(expert_imbalance=1.5))
    assert found.fits and busy.memory.total < busy.accelerator.memory_bytes - 2 * GIB
    alone = ["parallel.context=1", "train.recompute_layers='ME*-'", f"data.global_batch_size={ranks}"]
    whole = load_recipe(LONG, [f"parallel={layout}", *alone], planning=True)
    assert estimate(whole, ranks=ranks).memory.total > 2 * found.accelerator.memory_bytes


def test_there_are_layouts_for_long_sequences():
    assert {"h100x64_long", "h100x256_long"} <= set(LONG_LAYOUTS)

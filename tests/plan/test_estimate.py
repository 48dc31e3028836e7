"""Plans: operations against torch's counter, figures of the real model, search, the command."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.models import build_two_tower, planned_config, random_noisy_batch
from megatron_twotower.cli import main
from megatron_twotower.config.pipeline_stages import stages_of_rank
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.validation import validate
from megatron_twotower.plan import search as searching
from megatron_twotower.plan.estimate import Assumptions, estimate, in_flight
from megatron_twotower.plan.flops import step_flops
from megatron_twotower.plan.layout import ACCELERATORS, GIB, layout_of
from megatron_twotower.plan.traffic import crosses_nodes
from megatron_twotower.plan.weights import buffer, parameter_count, tower_entries
from megatron_twotower.train.losses import masked_diffusion_loss

NANO = "nano_30b_a3b_phase1"


def nano(*overrides, recipe=NANO, ranks=64):
    config = load_recipe(recipe, overrides, planning=True)
    validate(config, world_size=ranks)
    return config


@pytest.mark.parametrize(("recompute", "distillation"), [("", 0.0), ("ME", 0.0), ("", 1.0)])
def test_operations_are_those_that_torch_counts(groups, recompute, distillation):
    config = planned_config(
        {"train.recompute_layers": recompute, "data.sequence_length_tokens": 256, "noise.distillation": distillation}
    )
    model, _ = build_two_tower(config, groups, dtype=torch.float32)
    batch = random_noisy_batch(config)
    with FlopCounterMode(display=False) as counter:
        hidden = model.train()(batch)
        report = masked_diffusion_loss(model.tower, hidden, batch, config.noise, groups, context=model.context)
        report.total.backward()
    share = len(batch.scored_positions) / batch.tokens.numel()
    levels = dataclasses.replace(config.noise, time_min=share, time_max=share)
    found = step_flops(dataclasses.replace(config, noise=levels))
    assert found.executed * batch.tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_real_model_has_its_parameters():
    context, trained = tower_entries(nano())
    assert parameter_count(context) == 31_577_937_344
    assert parameter_count(trained) - parameter_count(context) == 30_022_272


def test_a_two_tower_step_costs_less_than_four_thirds_of_an_ar_step():
    config = nano()
    two, ar = step_flops(config), step_flops(config, objective="ar")
    # Half of the positions go through the denoiser's head, and the context tower has none.
    assert 1.2 < two.model / ar.model < 4 / 3
    assert two.executed > two.model
    # 6 N of the active parameters, and attention, scan and convolution beside them.
    assert 1.0 < ar.model / (6 * 3.2e9) < 1.2


def test_padding_and_shares_of_a_distributed_buffer():
    """By hand: 100, 30 and 70 elements in reverse, at multiples of 64, ends at multiples of 128."""
    padded = buffer((70, 30, 100), ranks=2, distributed=True)
    assert (padded.elements, padded.owned) == (384, (100 + 30, 70))
    # 0-100 | 128-158 | 192-262: the second rank's share begins at 192
    assert buffer((70, 30, 100), ranks=3, distributed=True).owned == (100, 30 + 64, 6)
    assert buffer((70, 30, 100), ranks=2, distributed=False).owned == (200, 200)
    bucketed = buffer((70, 30, 100), ranks=2, distributed=True, bucket_elements=90)
    assert bucketed.elements == 128 + 256 and sum(bucketed.owned) == 200


def test_memory_and_time_of_the_real_model():
    config = nano()
    found = estimate(config, ranks=64)
    memory, layout = found.memory, layout_of(config, ranks=64)
    assert (layout.data, layout.expert_data) == (64, 8)
    assert found.fits and memory.total < found.accelerator.memory_bytes
    assert memory.gradients == pytest.approx(2 * memory.parameters, rel=1e-6), "fp32 beside bf16"
    assert found.checkpoint == 14 * (31_577_937_344 + 30_022_272)
    faster = estimate(config, ranks=64, assumptions=Assumptions(utilisation=0.5))
    assert faster.phases[0].compute_seconds == pytest.approx(found.phases[0].compute_seconds / 2)
    assert sum(phase.tokens for phase in found.phases) == pytest.approx(1.4e12, rel=1e-4)


def test_what_an_override_does_to_memory_shows():
    base = estimate(nano(), ranks=64).memory
    kept = estimate(nano("train.recompute_layers=''"), ranks=64).memory
    assert kept.kept > 2 * base.kept and kept.handoff == base.handoff
    whole = estimate(nano("optimizer.distributed=false", "parallel.overlap_param_gather=false"), ranks=64).memory
    assert whole.optimizer > 7 * base.optimizer
    spread = estimate(nano("parallel.expert=16"), ranks=64).memory
    assert spread.context < base.context and spread.gradients < base.gradients


def test_a_context_tower_in_fp8_takes_a_byte_for_each_element_of_its_matrices():
    bf16 = estimate(nano(), ranks=64).memory
    fp8 = estimate(nano("train.context_precision=fp8_current"), ranks=64).memory
    # A rank of 8 has 16 of 128 experts: 1 / 8 of their share of a layer, and all of the rest.
    routed, shared = 2 * 1856 * 2688 * 16, 2 * 3712 * 2688
    mamba, attention = 10304 * 2688 + 4096 * 2688, (36 + 32) * 128 * 2688
    assert bf16.context - fp8.context == 23 * (routed + shared) + 23 * mamba + 6 * attention
    ends = estimate(nano("train.context_precision=fp8_current", "fp8.last_layers_bf16=1"), ranks=64).memory
    assert ends.context - fp8.context == routed + shared, "the last layer is one of experts"
    assert {fp8.parameters, ends.parameters} == {bf16.parameters}


@pytest.mark.parametrize(
    ("overrides", "bytes_each"),
    [
        (["train.precision=fp8_current"], 2),
        (["train.precision=fp8_blockwise"], 2),
        (["train.precision=fp8_delayed", "parallel.card=b200"], 1),
        (["train.precision=fp8_blockwise", "parallel.card=b200"], 2),
        (["train.precision=bf16", "train.context_precision=fp8_current"], 0),
    ],
)
def test_fp8_keeps_copies_of_the_trained_matrices(overrides, bytes_each):
    """Transformer Engine makes them once a step, in the orders that the GPU multiplies."""
    found = estimate(nano(*overrides), ranks=64).memory
    routed, shared = 2 * 1856 * 2688 * 16, 2 * 3712 * 2688
    mamba, attention = 10304 * 2688 + 4096 * 2688, (36 + 32) * 128 * 2688
    assert found.fp8_copies == bytes_each * (23 * (routed + shared) + 23 * mamba + 6 * attention)
    assert bytes_each != 2 or 9.6 < found.fp8_copies / GIB < 9.7
    bf16 = estimate(nano(), ranks=64).memory
    assert found.total - bf16.total == found.fp8_copies + found.context - bf16.context


def test_the_busiest_rank_of_experts_determines_memory_and_time():
    kept = nano("train.recompute_layers=M")
    even, busy = (estimate(kept, ranks=64, assumptions=Assumptions(expert_imbalance=x)) for x in (1.0, 1.5))
    # Of each of 23 layers, per position of 8192 and choice of 6: the token at its expert, and three
    # times the width of the expert.
    routed = 23 * 8192 * 6 * (2688 + 3 * 1856) * 2
    assert busy.memory.kept - even.memory.kept == routed / 2
    assert busy.sent["expert"] == pytest.approx(1.5 * even.sent["expert"])
    flops = 4 * 2688 * 6 * 1856 * 23 * (1 + 3 + 1)  # the context tower, the denoiser, and E again
    more, fewer = (step_flops(nano(), load=load).executed for load in (2.0, 1.0))
    last = 4 * 2688 * 6 * 1856  # the last layer of experts of the context tower does not run
    assert more - fewer == pytest.approx(flops - last)
    assert busy.phases[0].compute_seconds > 1.1 * even.phases[0].compute_seconds
    assert busy.phases[0].flops == even.phases[0].flops, "operations a token are those of all ranks"
    alone = nano("parallel.expert=1", "parallel.tensor=2", "parallel.sequence=true", "parallel.expert_tensor=2")
    one, other = (estimate(alone, ranks=64, assumptions=Assumptions(expert_imbalance=x)) for x in (1.0, 9.0))
    assert one.memory == other.memory and one.seconds == other.seconds, "each rank has a part of every expert"


def test_communication_is_hidden_by_as_much_as_is_computed_meanwhile():
    """Gradients by the last backward pass of a step, parameters by its first forward pass."""
    names = ("parallel.overlap_grad_reduce", "parallel.overlap_param_gather")

    def cost(*values, ranks):
        overrides = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        config = load_recipe(NANO, [f"parallel=h100x{ranks}", *overrides], planning=True)
        return estimate(config, ranks=ranks).phases[0]

    for ranks in (64, 1024):
        none, gradients, both = (
            cost(*values, ranks=ranks) for values in (("false", "false"), ("true", "false"), ("true", "true"))
        )
        assert none.transfer_seconds > gradients.transfer_seconds > both.transfer_seconds > 0
        assert none.compute_seconds == both.compute_seconds
    # A network that is too slow: what is hidden is the time of one micro-batch, whatever is sent.
    config = load_recipe(NANO, ["parallel=h100x1024"], planning=True)
    slow, slower = (estimate(config, ranks=1024, assumptions=Assumptions(link_share=x)).phases[0] for x in (0.02, 0.01))
    assert 2 * slow.transfer_seconds - slower.transfer_seconds == pytest.approx(-slow.compute_seconds / 3)


def test_a_pipeline_shares_weights_and_keeps_several_micro_batches():
    config = nano("parallel.pipeline=4", "parallel.expert=2")
    one, four = estimate(nano("parallel.expert=2"), ranks=64), estimate(config, ranks=64)
    assert four.memory.parameters < one.memory.parameters / 3
    assert four.layout.data == 16 and four.sent["pipeline"] > 0 and "pipeline" not in one.sent
    assert [in_flight(four.layout, pipeline_rank=rank, micro_batches=64) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(four.layout, pipeline_rank=0, micro_batches=2) == 2
    of_rank = [stages_of_rank(config.model, config.parallel, rank) for rank in range(4)]
    parts = [step_flops(config, stages=stages).executed for stages in of_rank]
    assert sum(parts) == pytest.approx(step_flops(config).executed)
    # The slowest stage determines the time. Filling and emptying the pipeline takes 3 micro-batches
    # more than the 64 of a step.
    pace = max(parts) / (sum(parts) / 4) * (1 + 3 / 64)
    assert four.phases[0].compute_seconds == pytest.approx(one.phases[0].compute_seconds * pace)


def test_context_ranks_divide_activations_and_gather_keys_values_and_states():
    """By hand, for one sequence of 131,072 tokens of the real model on 8 context-parallel ranks."""
    length, ranks = 131_072, 8
    long = ("data.global_batch_size=64", f"data.sequence_length_tokens={length}", "noise.block_size_tokens=16")
    one, eight = (estimate(nano(*long, f"parallel.context={c}"), ranks=64) for c in (1, ranks))
    assert eight.layout.data == 8 and eight.layout.copies == one.layout.copies == 64
    for weights in ("context", "parameters", "gradients", "optimizer"):
        # Up to padding: Megatron makes larger buckets for more data-parallel ranks.
        assert getattr(eight.memory, weights) == pytest.approx(getattr(one.memory, weights), rel=1e-6)
    # Whole on every rank: the gradient of the head in fp32, and the keys and values of 6 layers.
    head, keys = 4 * 131_072 * 2688, 6 * 2 * 2 * 128 * 2 * length
    assert eight.memory.kept - head == pytest.approx((one.memory.kept - head) / ranks, rel=1e-3)
    assert eight.memory.handoff - keys == pytest.approx((one.memory.handoff - keys) / ranks, rel=1e-3)
    # Of 8 micro-batches, 23 layers M and 6 layers *: what all ranks gather, less a rank's own.
    states, ends = 2 * ranks * 64 * (64 * 128 + 1) * 4, 2 * ranks * 3 * 6144 * 2
    gathered = 23 * (states + ends) + keys
    assert eight.sent["context"] == pytest.approx(8 * gathered * (ranks - 1) / ranks)
    assert "context" not in one.sent
    assert eight.phases[0].compute_seconds == pytest.approx(one.phases[0].compute_seconds)
    assert eight.phases[0].flops == one.phases[0].flops


def test_the_denoiser_hides_what_the_clean_stream_sends():
    """By hand: on slow links what is sent takes longer than the forward passes of the denoiser."""
    long = ("data.global_batch_size=64", "data.sequence_length_tokens=131072", "parallel.context=8")
    alone = ("parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false")
    for objective, share in (("two_tower", 1e-3), ("two_tower", 0.7), ("ar", 0.7)):
        config = nano(*long, *alone, f"objective={objective}")
        found = estimate(config, ranks=64, assumptions=Assumptions(link_share=share))
        [phase], near, far = found.phases, 450e9 * share, 50e9 * share  # eight H100s in a node
        seconds = {
            group: sent / (far if crosses_nodes(group, found.layout, found.accelerator) else near)
            for group, sent in found.sent.items()
        }
        forward = phase.compute_seconds * (phase.flops.model - phase.flops.context) / 3 / phase.flops.executed
        hidden = min(seconds["context"], forward) if objective == "two_tower" else 0
        assert (hidden < seconds["context"]) == (objective == "ar" or share < 0.01)
        assert phase.transfer_seconds == pytest.approx(sum(seconds.values()) - hidden)


def test_a_context_group_may_cross_nodes():
    long = ("data.global_batch_size=64", "data.sequence_length_tokens=131072", "parallel.ranks=64")
    for overrides, crosses in (
        (["parallel.context=8"], False),
        (["parallel.context=16"], True),
        (["parallel.context=8", "parallel.tensor=2", "parallel.sequence=true"], True),
    ):
        found = estimate(nano(*long, *overrides), ranks=64)
        assert crosses_nodes("context", found.layout, found.accelerator) is crosses


def test_a_search_finds_context_ranks_for_long_sequences():
    config = load_recipe("nano_30b_a3b_long", ["parallel.context=1"], planning=True)
    # In a small part of the search.
    with pytest.MonkeyPatch.context() as patch:
        for name, values in {"TENSOR": (1,), "PIPELINE": (1,), "EXPERT": (8,), "RECOMPUTE": ("ME",)}.items():
            patch.setattr(searching, name, values)
        found = searching.search(config, ranks=64)
        short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length_tokens=4096))
        assert {each.parallel.context for each in searching.candidates(short, ranks=64)} == {1}
    fitting = [each.config.parallel.context for each in found if each.fits]
    assert fitting and min(fitting) > 4
    assert any("parallel.context=" in text for text in searching.overrides(config, found[0].config))


@pytest.fixture(params=["few", pytest.param("all", marks=pytest.mark.slow)])
def sizes(request, monkeypatch):
    """The sizes that a search combines. All of them take long."""
    if request.param == "few":
        few = {"TENSOR": (1, 2), "PIPELINE": (1, 2), "EXPERT": (1, 8), "CONTEXT": (1, 2)}
        few |= {"MICRO_BATCH": (1,), "RECOMPUTE": ("", "ME")}
        for name, values in few.items():
            assert set(values) < set(getattr(searching, name))
            monkeypatch.setattr(searching, name, values)


def test_a_search_ranks_valid_layouts_those_that_fit_first(sizes):
    config = nano()
    found = searching.search(config, ranks=64)
    fits = [each.fits for each in found]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    times = [each.seconds for each in found if each.fits]
    assert times == sorted(times)
    changed = [tuple(searching.overrides(config, each.config)) for each in found]
    assert len(set(changed)) == len(changed), "no layout twice"
    for each in found[:5]:
        again = nano(*searching.overrides(config, each.config))
        assert estimate(again, ranks=64).memory == each.memory, "the printed overrides give the printed estimate"


def plan(capsys, *arguments):
    status = main.main(["plan", *arguments])
    return status, capsys.readouterr()


def test_the_command_prints_json_of_the_real_model(capsys):
    status, said = plan(capsys, f"recipe={NANO}", "parallel=h100x64", "--json")
    told = json.loads(said.out)
    assert status == 0
    assert told["parameters"] == {"tower": 31_577_937_344, "time_conditioning": 30_022_272}
    assert told["fits"] and told["remedies"] == []
    assert told["memory_bytes"]["total"] == sum(v for k, v in told["memory_bytes"].items() if k != "total")


def test_the_command_says_what_would_fit(sizes, capsys):
    status, said = plan(capsys, f"recipe={NANO}", "parallel=h100x64", "train.recompute_layers=''", "--json")
    told = json.loads(said.out)
    assert status == 0 and not told["fits"]
    assert told["remedies"] and all(each["fits"] and each["overrides"] for each in told["remedies"])
    assert told["remedies"][0]["overrides"] == min((each["overrides"] for each in told["remedies"]), key=len)


def test_the_command_names_the_accelerators_that_would_fit(sizes, capsys):
    status, said = plan(capsys, f"recipe={NANO}", "parallel=h100x8")
    assert status == 0
    assert "does not fit" in said.out and "31,577,937,344" in said.out
    assert "no layout of 8 GPUs was found that fits" in said.out and "h200" in said.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["recipe=tiny", "model=tiny"], "model"),
        (["recipe=tiny_ar", "--ranks", "1"], "objective: found ar"),
        ([f"recipe={NANO}", "parallel.ranks=0"], "parallel.ranks: found 0"),
        ([f"recipe={NANO}", "--ranks", "48"], "data.global_batch_size"),
        ([f"recipe={NANO}", "parallel.card=h1000"], "parallel.card: found 'h1000'"),
        ([f"recipe={NANO}", "--expert-imbalance", "0.5"], "--expert-imbalance: found 0.5, expected at least 1"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, capsys):
    status, said = plan(capsys, *arguments)
    assert status == 2
    assert named in said.err and said.err.count("\n") == 1


def test_every_accelerator_that_a_recipe_can_name_is_known():
    from megatron_twotower.config.schema import ParallelConfig
    from megatron_twotower.config.setting import accepts

    assert set(accepts(ParallelConfig, "card").choices) == set(ACCELERATORS)

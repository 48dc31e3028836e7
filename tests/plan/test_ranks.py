"""What a plan says of a rank against what real ranks hold and send: bytes of weights, and of collectives."""

import json
import subprocess
import sys

import pytest
import torch

from helpers import TESTS
from helpers.models import planned_config
from megatron_twotower.config.pipeline_stages import stages_of_rank
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore.releases import RELEASE
from megatron_twotower.plan.estimate import kept_bytes
from megatron_twotower.plan.layout import layout_of
from megatron_twotower.plan.meta_build import build
from megatron_twotower.plan.traffic import sent_by_group, transfers
from megatron_twotower.plan.weights import rank_parameters, weight_bytes

DISTRIBUTED, WIDE = {"optimizer.distributed": True}, {"train.precision": "bf16"}
TENSOR = {"parallel.tensor": 2, "parallel.sequence": True}
LAYOUTS = {
    1: [{}, {"noise.time_per": "block"} | WIDE, {"train.recompute_layers": "ME"} | DISTRIBUTED | WIDE],
    2: [
        {},
        DISTRIBUTED | WIDE,
        {"parallel.expert": 2, "train.router_dtype": "fp64"} | DISTRIBUTED,
        {"parallel.expert": 2, "parallel.moe_dispatcher": "allgather"} | WIDE,
        {"train.recompute_layers": "ME"} | TENSOR,
        {"parallel.expert": 2, "parallel.expert_tensor": 1} | TENSOR | DISTRIBUTED,
        {"parallel.pipeline": 2, "parallel.pipeline_layers": [4, 2], "noise.time_per": "block"} | DISTRIBUTED | WIDE,
    ],
    4: [
        {"parallel.expert": 2} | DISTRIBUTED | WIDE,
        {"parallel.expert": 2, "parallel.expert_tensor": 1, "data.micro_batch_size": 1} | TENSOR | DISTRIBUTED | WIDE,
        {"parallel.expert": 2, "parallel.pipeline": 2} | DISTRIBUTED | WIDE,
        {"parallel.expert": 4, "parallel.expert_tensor": 1, "train.recompute_layers": "ME*-"} | TENSOR,
    ],
}


# How near activations must come. Some layers of Megatron 0.19 keep up to a fifth more than the
# formulas, which are of 0.16.
ACTIVATIONS = 0.15 if RELEASE == "0.16" else 0.2


# Several ranks on two cores take a minute.
@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n > 1 else n for n in LAYOUTS])
def measured(request, tmp_path_factory):
    """Ranks, and what each of them measured on each layout."""
    ranks, output = request.param, tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*torchrun, "-m", "helpers.measure_ranks", json.dumps(LAYOUTS[ranks]), str(output)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads((output / f"{rank}.json").read_text()) for rank in range(ranks)]
    return ranks, list(zip(*records, strict=True))


def layouts(measured):
    """Each layout with its configuration and the records of its ranks."""
    ranks, records = measured
    for changes, of_ranks in zip(LAYOUTS[ranks], records, strict=True):
        config = planned_config(changes)
        validate(config, world_size=ranks)
        yield config, layout_of(config, ranks=ranks), of_ranks


def test_weights_gradients_and_optimizer_state_are_those_of_real_ranks(measured):
    for config, layout, records in layouts(measured):
        for rank, record in enumerate(records):
            of, stage = build(config, layout, rank=rank), record["pipeline_rank"]
            told = weight_bytes(config, layout, of, pipeline_rank=stage, places=tuple(record["places"]))
            for what in ("context", "parameters", "gradients", "optimizer"):
                assert getattr(told, what) == record[what], (what, rank, config.parallel)


def test_the_table_of_names_says_what_modules_hold(measured):
    for config, layout, records in layouts(measured):
        for rank, record in enumerate(records):
            built = build(config, layout, rank=rank)
            named = rank_parameters(config, layout, pipeline_rank=record["pipeline_rank"])
            assert built.context == named.context and built.projections == named.projections
            for one, other in zip(built.chunks, named.chunks, strict=True):
                assert sorted((p.elements, p.expert) for p in one) == sorted((p.elements, p.expert) for p in other)


def by_stage(config, layout, records):
    """Each pipeline rank with its stretches of layers and the records of its ranks."""
    for stage in range(layout.pipeline):
        own = stages_of_rank(config.model, config.parallel, stage)
        yield stage, own, [record for record in records if record["pipeline_rank"] == stage]


def mean(records, value):
    return sum(map(value, records)) / len(records)


def test_activations_are_what_autograd_keeps(measured):
    """On average over ranks, for experts are not equally busy. Small tensors weigh more than at large sizes."""
    for config, layout, records in layouts(measured):
        for _, own, of_stage in by_stage(config, layout, records):
            scored = of_stage[0]["kept_scored"]
            told = sum(kept_bytes(config, block=config.noise.block_size_tokens, own=own, scored=scored))
            # Megatron's recompute keeps two random states a layer, as much as an activation at this
            # size.
            kinds = "".join(config.model.hybrid_override_pattern[layer] for stretch in own for layer in stretch.layers)
            again = sum(kinds.count(kind) for kind in config.train.recompute_layers)
            told += again * 2 * torch.get_rng_state().nbytes
            assert told == pytest.approx(mean(of_stage, lambda r: r["kept"]), rel=ACTIVATIONS), config.parallel


def test_a_rank_sends_what_the_formulas_say(measured):
    """On average over the ranks of a stage, and but for counts of a few numbers."""
    for config, layout, records in layouts(measured):
        for stage, own, of_stage in by_stage(config, layout, records):
            weights = weight_bytes(
                config, layout, rank_parameters(config, layout, pipeline_rank=stage), pipeline_rank=stage
            )
            scored = mean(of_stage, lambda r: r["scored"])
            told = sent_by_group(transfers(config, layout, weights, own=own, scored=scored), layout)
            groups = set(told) | {group for record in of_stage for group in record["sent"]}
            for group in groups:
                sent = mean(of_stage, lambda r, group=group: r["sent"].get(group, 0))
                assert told.get(group, 0) == pytest.approx(sent, rel=1e-3, abs=2000), (group, config.parallel)
            assert layout.ranks == 1 or max(told.values()) > 100_000

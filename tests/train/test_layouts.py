"""Every layout has the same losses, gradient norms and parameters after five steps."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from helpers import TESTS, layouts
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore import parallel

WORKER = "import megatron_twotower.mcore; from helpers import layouts; layouts.main()"

TENSOR = {"tensor": 2, "sequence": True}
ONE_CHUNK = {"pipeline": 2, "pipeline_layers": [3, 5]}
TWO_CHUNKS = {"pipeline": 2, "pipeline_chunks": 2}
ALL_GATHER = {"moe_dispatcher": "allgather"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_parameters": 500}
DISTRIBUTED = {"optimizer": {"distributed": True}}

# ranks: {layout: (run, settings of `parallel`, other settings)}; all but those of 2 are slow.
LAYOUTS = {
    1: {
        "one sequence at a time": ("hard", {}, {"data": {"micro_batch_size": 1}}),
        "all at once": ("hard", {}, {"data": {"micro_batch_size": 8}}),
        "distributed optimizer, overlapped": ("plain", OVERLAP, DISTRIBUTED),
    },
    2: {
        "data": ("hard", {}, {"data": {"micro_batch_size": 1}}),
        "data, overlapped": ("hard", OVERLAP, DISTRIBUTED),
        "tensor": ("hard", TENSOR, {}),
        "expert, all-to-all": ("hard", {"expert": 2}, {}),
        "pipeline, interleaved": ("hard", TWO_CHUNKS, {}),
        "context": ("hard", {"context": 2}, {}),
        "context, without documents": ("plain", {"context": 2}, DISTRIBUTED),
        "context, next token, without documents": ("ar without documents", {"context": 2}, {}),
    },
    (2, "more"): {
        "data, distributed optimizer": ("plain", {}, DISTRIBUTED),
        "tensor, next token": ("ar", TENSOR, {}),
        "tensor, whole experts": ("plain", {**TENSOR, "expert_tensor": 1}, {}),
        "expert, all-gather": ("plain", {"expert": 2, **ALL_GATHER}, {}),
        "pipeline": ("hard", ONE_CHUNK, {}),
        "pipeline, next token": ("ar", ONE_CHUNK, {}),
        "pipeline in bf16": ("bf16", ONE_CHUNK, {}),
        "context, next token": ("ar", {"context": 2}, {}),
        "context x expert": ("hard", {"context": 2, "expert": 2, **OVERLAP}, DISTRIBUTED),
    },
    4: {
        "context of four": ("small blocks", {"context": 4}, {}),
        "context x data": ("hard", {"context": 2, **OVERLAP}, DISTRIBUTED),
        "context x tensor": ("hard", {"context": 2, **TENSOR}, {}),
        "context x pipeline": ("hard", {"context": 2, **ONE_CHUNK}, {}),
        "context x pipeline, interleaved, x expert": ("hard", {"context": 2, **TWO_CHUNKS, "expert": 2}, DISTRIBUTED),
        "context x tensor, next token": ("ar", {"context": 2, **TENSOR}, {}),
        "context x pipeline, next token": ("ar", {"context": 2, **ONE_CHUNK}, {}),
        "context of four, next token": ("ar", {"context": 4}, {}),
        "tensor x pipeline": ("hard", {**TENSOR, **ONE_CHUNK}, {}),
        "tensor x data, distributed optimizer, overlapped": ("hard", {**TENSOR, **OVERLAP}, DISTRIBUTED),
        "tensor x expert, whole experts": ("hard", {**TENSOR, "expert": 4, "expert_tensor": 1}, {}),
        "tensor x expert, split experts": ("plain", {**TENSOR, "expert": 2}, {}),
        "pipeline x expert, interleaved, overlapped": ("hard", {**TWO_CHUNKS, **OVERLAP, "expert": 2}, DISTRIBUTED),
        "pipeline x data, distributed optimizer, overlapped": ("plain", {**ONE_CHUNK, **OVERLAP}, DISTRIBUTED),
        "pipeline of four": ("plain", {"pipeline": 4, "pipeline_layers": [1, 3, 2, 2]}, {}),
    },
    8: {
        "tensor x pipeline x data": ("hard", {**TENSOR, **ONE_CHUNK, **OVERLAP}, DISTRIBUTED),
        "tensor x pipeline x expert, interleaved": ("hard", {**TENSOR, **TWO_CHUNKS, "expert": 2}, DISTRIBUTED),
        "pipeline of four, interleaved, x expert": (
            "hard",
            {"pipeline": 4, "pipeline_chunks": 2, "expert": 2, **ALL_GATHER},
            {"data": {"micro_batch_size": 1}},
        ),
        "tensor of four x data, whole experts": (
            "hard",
            {"tensor": 4, "sequence": True, "expert": 4, "expert_tensor": 1},
            DISTRIBUTED,
        ),
    },
}


def config_of(backbone, run, layout=None, other=None):
    config = layouts.changed(layouts.base(backbone), layouts.RUNS[run])
    return layouts.changed(config, {"parallel": layout or {}, **(other or {})})


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_layouts(ranks, configs, folder):
    """Run configurations one after the other on ranks in other processes.

    Returns the results of `layouts.run`.
    """
    torch.save(configs, folder / "configs.pt")
    address = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", WORKER, str(folder / "configs.pt"), str(folder / "results.pt")]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **address, "RANK": str(rank)},
            cwd=TESTS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [output[-3000:] for process, output in zip(processes, outputs, strict=True) if process.returncode]
    assert not failed, "\n----\n".join(failed)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return layouts.write_backbone(tmp_path_factory.mktemp("layouts") / "backbone")


@pytest.fixture(scope="module")
def one_rank(backbone):
    """Each run on one rank, in this process, on first use."""
    known = {}

    def of(run):
        if run not in known:
            known[run] = layouts.run(config_of(backbone, run))
            parallel.shutdown()
        return known[run]

    return of


@pytest.fixture(scope="module")
def results_on(backbone, tmp_path_factory):
    """All layouts of a number of ranks, on first use."""
    known = {}

    def of(ranks):
        if ranks not in known:
            configs = {name: config_of(backbone, *layout) for name, layout in LAYOUTS[ranks].items()}
            known[ranks] = run_layouts(count_of(ranks), configs, tmp_path_factory.mktemp("ranks"))
        return known[ranks]

    return of


# Largest differences of parameters from those of one rank, relative to the parameter, and relative
# to its change. A bf16 parameter is rounded to 4e-3 of itself in each step, and a few are rounded
# to the other side.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (1e-3, 1e-1)}


def assert_same(got, want, precision):
    """Losses and norms agree to 1e-5, counts exactly; parameters are close, frozen ones equal."""
    of_itself, of_the_way = TOLERANCES[precision]
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)
    assert torch.equal(got["loads"], want["loads"]) and got["loads"].any()
    assert got["loads by noise"] == want["loads by noise"]
    assert got["frozen"]
    assert got["parameters"].keys() == want["parameters"].keys()
    for name, start in want["start"].items():
        assert torch.equal(got["start"][name], start), name
        moved, expected = got["parameters"][name], want["parameters"][name]
        assert not torch.equal(expected, start), f"{name}: did not move"
        error = (moved - expected).norm()
        assert error <= of_itself * expected.norm(), (name, error / expected.norm())
        assert error <= of_the_way * (expected - start).norm(), (name, error / (expected - start).norm())


def count_of(ranks):
    """The number of ranks of a key of `LAYOUTS`."""
    return ranks if isinstance(ranks, int) else ranks[0]


def cases():
    for ranks, layouts_of_ranks in LAYOUTS.items():
        marks = [] if ranks == 2 else [pytest.mark.slow]
        for name in layouts_of_ranks:
            yield pytest.param(ranks, name, id=f"{count_of(ranks)} ranks: {name}", marks=marks)


@pytest.mark.parametrize(("ranks", "name"), list(cases()))
def test_a_layout_gives_the_numbers_of_one_rank(ranks, name, one_rank, results_on):
    run, layout, _ = LAYOUTS[ranks][name]
    got, want = results_on(ranks)[name], one_rank(run)
    assert_same(got, want, "bf16" if run == "bf16" else "fp32")
    shares = count_of(ranks) // (layout.get("tensor", 1) * layout.get("pipeline", 1))
    if shares > 1:
        assert any(len(set(counts)) > 1 for counts in got["shares"]), "ranks must have different counts"


def test_a_denoiser_sends_nothing_to_context_ranks_in_its_backward_pass(results_on):
    """Each micro-batch: in M a gather of inputs and one of states, in * one of keys and values."""
    results = results_on(2)
    micro_batches = layouts.STEPS * layouts.SEQUENCES // 2
    gathers = {"M": 2, "*": 1}
    expected = sum(gathers.get(kind, 0) for kind in layouts.MODEL.hybrid_override_pattern)
    # Validation has as many micro-batches as a step.
    forward = expected * (micro_batches + layouts.SEQUENCES // 2)
    assert results["context, without documents"]["sent"] == {("all_gather_into_tensor", "forward"): forward}
    kinds = {name for name, phase in results["context"]["sent"] if phase == "backward"}
    assert kinds == {"all_reduce"}, "the sum of the auxiliary loss, when an expert layer is recomputed"
    ar = results["context, next token, without documents"]["sent"]
    assert ar == {
        ("all_gather_into_tensor", "forward"): expected * micro_batches,
        # States once; inputs, and keys and values, as sums that go back to their ranks.
        ("all_gather_into_tensor", "backward"): layouts.MODEL.hybrid_override_pattern.count("M") * micro_batches,
        ("reduce_scatter_tensor", "backward"): expected_sums(micro_batches),
    }


def expected_sums(micro_batches):
    pattern = layouts.MODEL.hybrid_override_pattern
    return (pattern.count("M") + pattern.count("*")) * micro_batches


# A layout of a model of 8 layers on a number of ranks, and what the error must say.
MISTAKES = {
    "tensor x pipeline": (
        6,
        {"tensor": 2, "sequence": True, "pipeline": 2},
        "parallel.tensor 2 x parallel.pipeline 2: does not divide 6 ranks",
    ),
    "experts": (
        4,
        {"expert": 8},
        "parallel.expert 8 x parallel.expert_tensor 1 x parallel.pipeline 1: does not divide 4 ranks",
    ),
    "layers": (
        3,
        {"pipeline": 3},
        "8 layers do not divide into 3 model chunks (parallel.pipeline 3 x parallel.pipeline_chunks 1)",
    ),
    "layers of chunks": (
        2,
        {"pipeline": 2, "pipeline_chunks": 3},
        "8 layers do not divide into 6 model chunks (parallel.pipeline 2 x parallel.pipeline_chunks 3)",
    ),
    "too few lengths": (2, {"pipeline": 2, "pipeline_layers": [8]}, "found [8], expected a number of layers for each"),
    "an empty stage": (2, {"pipeline": 2, "pipeline_layers": [8, 0]}, "found [8, 0], expected a number of layers"),
    "too many layers": (2, {"pipeline": 2, "pipeline_layers": [4, 5]}, "found 9 layers in all, expected the 8"),
    "chunks of one stage": (1, {"pipeline_chunks": 2}, "found 2 with parallel.pipeline 1"),
    "heads": (8, {"tensor": 8, "sequence": True}, "model.num_attention_heads 4: does not divide over 8 ranks"),
    "expert count": (8, {"expert": 8}, "model.n_routed_experts 4: does not divide over 8 ranks"),
    "data": (16, {}, "data.global_batch_size 8: expected a multiple of 32 (data.micro_batch_size 2 x 16 data-parallel"),
    "rounds": (
        8,
        {"pipeline": 4, "pipeline_chunks": 2},
        "data.global_batch_size 8: expected a multiple of 16 (data.micro_batch_size 2 x 2 data-parallel ranks x 4 sta",
    ),
    "context ranks": (3, {"context": 2}, "x parallel.context 2: does not divide 3 ranks"),
    "context": (
        4,
        {"context": 4},
        "data.sequence_length_tokens 32: expected a multiple of noise.block_size_tokens 8 x 8 s",
    ),
    "sequence alone": (2, {"sequence": True}, "found true with parallel.tensor 1"),
    "gather without": (1, {"overlap_param_gather": True}, "found true with optimizer.distributed false"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_layout_that_does_not_divide_is_refused_in_one_line(mistake, backbone):
    ranks, layout, expected = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        validate(config_of(backbone, "plain", layout), world_size=ranks)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_validation_has_complete_micro_batches_on_pipeline_stages(backbone):
    train = {"validate_every_steps": 1, "validation_sequences": 7}
    validate(config_of(backbone, "plain", {}, {"train": train}), world_size=1)
    with pytest.raises(UserError, match=r"train\.validation_sequences 7: expected a multiple of 2"):
        validate(config_of(backbone, "plain", ONE_CHUNK, {"train": train}), world_size=2)

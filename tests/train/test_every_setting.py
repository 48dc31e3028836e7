"""Every setting has an effect, is refused, or has a written reason: at the start and at a resume.

Each test changes one field of one configuration dataclass in a short run. What is observed of a run
is its records, the files it writes, and what it passes to Megatron, the data and the checkpoints.
`REASONS` has the settings that change none of it. A reason that is no longer true fails too.
"""

import contextlib
import dataclasses
import functools
import math
import shutil

import pytest

from helpers.models import write_backbone
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import ModelConfig, PhaseConfig, RunConfig, flatten
from megatron_twotower.config.setting import accepts
from megatron_twotower.data.shards import Corpus
from megatron_twotower.mcore import parallel
from megatron_twotower.model import towers
from megatron_twotower.train import checkpoints, loop, optimizer
from megatron_twotower.train import run as train_run
from megatron_twotower.train.metrics import Metrics

PHASES = "phases=[{name: a, tokens: 128},{name: b, tokens: 64}]"
KEYS = [*dict(flatten(RunConfig())), *(f"phases.0.{item.name}" for item in dataclasses.fields(PhaseConfig))]
KEYS.remove("phases")

# Overrides of both runs that are compared, for fields that have an effect only in certain runs.
BASES = {
    "noise.late_bias": ["noise.mask_counts=exact"],
    "noise.paired_draws": ["noise.draws_per_context=2"],
    "train.validation_sequences": ["train.validate_every_steps=2"],
    "data.shuffle_run_tokens": ["data.shuffle=windowed"],
    "data.shuffle_window_runs": ["data.shuffle=windowed", "data.shuffle_run_tokens=64"],
    "schedule.decay_shape": ["schedule.decay_steps=3"],
    "schedule.minimum_learning_rate": ["schedule.decay_steps=2"],
    "phases.0.decay_tokens": [PHASES],
    "phases.0.warmup_tokens": ["phases=[{name: a, tokens: 192}]"],
    "phases.0.minimum_learning_rate": [PHASES, "schedule.decay_steps=1"],
}
# Values that fit the rest of the run, where "the next value of its kind" does not.
VALUES = {
    "model.hybrid_override_pattern": "ME*-E",
    "conditioning.without": "states",
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 4,
    "model.num_experts_per_tok": 1,
    "model.conv_kernel": 3,
    "model.time_step_clamp": 0.05,
    "model.time_step_floor": 0.5,
    "init.backbone": "OTHER",
    "init.denoiser": "DENOISER",
    "noise.block_size_tokens": 16,
    "noise.time_min": 0.5,
    "noise.time_max": 0.5,
    "data.folder": "/no/such",
    "data.blend": "/no/such.yaml",
    "data.micro_batch_size": 1,
    "optimizer.clip_gradient_norm": 1e-3,
    "optimizer.epsilon": 1e-2,
    "schedule.kind": "cosine",
    "schedule.warmup_steps": 3,
    "train.steps": 3,
    "parallel.expert_tensor": 2,
    "parallel.ranks": 2,
    "parallel.pipeline_layers": "[3,2]",
    "parallel.threads_per_rank": 2,
    "train.transformer_impl": "transformer_engine",
    "train.recompute_layers": "M",
    "train.sequence_aux_loss": 0.5,
    "train.validation_sequences": 4,
    "logging.console": "true",
    "phases.0.block_size_tokens": 16,
    "phases.0.tokens": 64,
    "phases.0.learning_rate": 1e-3,
    "phases.0.warmup_tokens": 128,
    "phases.0.decay_tokens": 64,
    "phases.0.minimum_learning_rate": 1e-3,
}
SPEED = "The numbers are the same: it only divides the work."
PACKAGE = "It needs Transformer Engine, and `twotower doctor` shows what is used (tests/mcore)."
# Why a setting changes nothing that is observed here.
REASONS = {
    "resume": "A new run folder has no checkpoint to resume from.",
    "model.chunk_size": SPEED + " tests/ops/test_scan.py compares chunks.",
    "model.max_position_embeddings": "For readers of the exported config.json; no layer has positions.",
    "parallel.card": "For `twotower plan` alone, as its text says.",
    **{f"fusion.{item}": PACKAGE for item in ("permutation", "router", "gradient_accumulation", "squared_relu")},
}
REASONS_AT_RESUME = {key: reason for key, reason in REASONS.items() if key.startswith(("parallel.", "fusion."))} | {
    "conditioning.initialisation": "The time conditioning is in the checkpoint."
}


def another(key):
    """Another value of a setting than the one it has."""
    if key in VALUES:
        return VALUES[key]
    owner, name = (PhaseConfig, key.split(".")[-1]) if key.startswith("phases.") else owner_of(key)
    value, limits = getattr(owner(), name), accepts(owner, name)
    if limits.choices:
        return next(choice for choice in limits.choices if choice != value)
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, (int, float)):
        larger = value * 2 or type(value)(1)
        return larger if limits.below is None else (value + limits.below) / 2
    return "changed"


def owner_of(key):
    section, _, name = key.rpartition(".")
    return (type(getattr(RunConfig(), section)) if section else RunConfig), name


# --- runs ---


class Recorder:
    """Stands for the writer of checkpoints."""

    def __init__(self, run, state, **settings):
        seen.append(("writer", {key: value for key, value in settings.items() if key != "check_lock"}))

    def begin(self, state, schedule):
        seen.append(("save", state.step))
        return []

    def finish(self):
        return []

    poll = finish

    def confirm(self, updates):
        pass

    def work_done(self):
        return 0

    def close(self):
        pass


seen = []


def spied(monkeypatch, owner, name, *, only=(), call=True):
    """Record the keywords of the calls of a function; with `call=False` do nothing else."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def spy(*args, **keywords):
        seen.append((name, {key: value for key, value in keywords.items() if not only or key in only}))
        if not keywords and not only:
            seen.append((name, args))
        return original(*args, **keywords) if call else None

    monkeypatch.setattr(owner, name, spy)


@pytest.fixture
def spies(monkeypatch):
    """Record what a run passes on, instead of writing checkpoints and records to the disk."""
    seen.clear()

    class Sink:
        def log(self, record):
            clock = ("seconds", "tokens_per_second", "memory_gib")
            seen.append(("record", {key: value for key, value in record.items() if key not in clock}))

        def step_done(self, step):
            pass

    def open_metrics(output, *, console, wandb, **_):
        seen.append(("metrics", (console, wandb)))
        return Metrics((Sink(),), contextlib.ExitStack())

    monkeypatch.setattr(train_run, "open_metrics", open_metrics)
    monkeypatch.setattr(checkpoints, "CheckpointWriter", Recorder)
    spied(monkeypatch, train_run, "batches", only=("micro_batch_size", "workers", "depth"))
    spied(monkeypatch, train_run, "watching", only=("limit_seconds", "save_limit_seconds"))
    spied(monkeypatch, train_run, "collected_together")
    spied(monkeypatch, parallel.parallel_state, "initialize_model_parallel", only=("distributed_timeout_minutes",))
    spied(monkeypatch, checkpoints.files, "newest_complete", only=("verify", "on_damaged"))
    spied(monkeypatch, Corpus, "open", only=("damaged", "verify_shards"))
    spied(monkeypatch, parallel, "DistributedDataParallelConfig")
    spied(monkeypatch, parallel.torch, "set_num_threads", call=False)
    spied(monkeypatch, optimizer, "MegatronOptimizerConfig")
    spied(monkeypatch, towers.modules, "run_with_recompute", only=("nothing",))
    limits, original = [], loop._check_finite

    def check_finite(progress, result, batches, limit, hooks):
        if not limits:
            seen.append(("stop after", limit))
        limits.append(limit)
        return original(progress, result, batches, limit, hooks)

    monkeypatch.setattr(loop, "_check_finite", check_finite)
    megatron = train_run.transformer_config

    def transformer_config(config, **keywords):
        made = megatron(config, **keywords)
        values = {key: value for key, value in vars(made).items() if isinstance(value, (bool, int, float, str))}
        seen.append(("megatron", values | {"params_dtype": str(made.params_dtype)}))
        return made

    monkeypatch.setattr(train_run, "transformer_config", transformer_config)


def observed(words):
    """What is observed of a run, or the error of a refusal."""
    recipe = "tiny_ar" if "AR" in words else "tiny"
    seen.clear()
    try:
        config = load_recipe(recipe, [word for word in words if word != "AR"])
        train_run.run_training(config)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    finally:
        parallel.shutdown()
    run = train_run.Path(config.output)
    seen.append(("folder", config.output))
    seen.append(("files", sorted(path.name for path in run.rglob("*") if "step-" not in str(path))))
    return list(seen)


def same(a, b):
    """Whether two observations are the same; figures to 1e-6, because last bits differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))
    return a == b


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_data, tiny_backbone, two_tower_folder):
    """Words of the base run of a key, and the value of a path."""
    folder = tmp_path_factory.mktemp("settings")
    model = dataclasses.replace(load_recipe("tiny_ar").model, initializer_range=0.05)
    other = write_backbone(folder / "other", model)
    names = {"OTHER": str(other), "DENOISER": str(two_tower_folder)}
    common = [f"data.folder={tiny_data}", "train.steps=4", "schedule.warmup_steps=0", "train.validate_every_steps=0"]
    common += ["data.global_batch_size=2", "data.micro_batch_size=2", "train.checkpoint_every_steps=0"]

    def words(key):
        owner, _ = owner_of(key) if not key.startswith("phases.") else (PhaseConfig, "")
        alone = ["AR"] if owner is ModelConfig else [f"init.backbone={tiny_backbone}"]
        extra = BASES.get(key, [PHASES] if owner is PhaseConfig else [])
        steps = ["train.steps=0"] if owner is PhaseConfig else []
        return [*alone, *common, *extra, *steps]

    return folder, names, words


def change(key, names):
    """The overrides that change a setting."""
    value = another(key)
    changed = [f"{key}={names.get(value, value)}"]
    return ["init.backbone=null", *changed] if key == "init.denoiser" else changed


def check(key, base, found, reasons):
    """An effect, a refusal that names something, or a reason."""
    assert not isinstance(base, str), base
    if key in reasons:
        assert reasons[key] and not isinstance(found, str) and same(found, base), f"the reason of {key} is not true"
        return
    assert isinstance(found, str) or not same(found, base), f"{key} has no effect and is not refused"


BASE_RUNS = {}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_at_the_start(key, places, spies, tmp_path):
    _, names, words = places
    run, base = tmp_path / "run", tuple(words(key))
    if base not in BASE_RUNS:
        BASE_RUNS[base] = observed([*base, f"output={run}"])
        shutil.rmtree(run)
    output = [] if key == "output" else [f"output={run}"]
    with contextlib.chdir(tmp_path):
        found = observed([*base, *change(key, names), *output])
    before = [(kind, str(run) if kind == "folder" else value) for kind, value in BASE_RUNS[base]]
    check(key, before, found, REASONS)


@pytest.fixture(scope="module")
def begun(places):
    """The function that returns a run folder with a checkpoint, for a base."""
    folder, _, _ = places
    made = {}

    def run_of(base):
        if base not in made:
            made[base] = folder / f"begun-{len(made)}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_run, "open_metrics", lambda *_, **__: Metrics((), contextlib.ExitStack()))
                stopped = iter([True])
                patch.setattr(train_run, "StopSignal", lambda: lambda: next(stopped))
                assert not isinstance(observed([*base, f"output={made[base]}"]), str)
        return made[base]

    return run_of


RESUMED_RUNS = {}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_at_a_resume(key, places, begun, request, tmp_path):
    _, names, words = places
    base, run = tuple(words(key)), tmp_path / "run"
    first = begun(base)
    request.getfixturevalue("spies")

    def resumed(extra):
        shutil.copytree(first, run)
        try:
            return observed([*base, *extra])
        finally:
            shutil.rmtree(run)

    if base not in RESUMED_RUNS:
        RESUMED_RUNS[base] = resumed([f"output={run}"])
    output = [] if key == "output" else [f"output={run}"]
    with contextlib.chdir(tmp_path):
        found = resumed([*change(key, names), *output])
    before = [(kind, str(run) if kind == "folder" else value) for kind, value in RESUMED_RUNS[base]]
    check(key, before, found, REASONS_AT_RESUME)


def test_every_setting_is_changed():
    assert {*REASONS, *REASONS_AT_RESUME, *BASES, *VALUES} <= {*KEYS}
    assert all(reason for reason in REASONS.values())

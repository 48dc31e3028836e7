"""Five steps of training on a layout, and their figures that do not depend on the layout.

For `test_layouts`.
"""

import collections
import contextlib
import dataclasses
import random
import sys

import torch
import torch.distributed as dist

from megatron_twotower.config.phases import resolve_phases
from megatron_twotower.config.schema import (
    ConditioningConfig,
    DataConfig,
    InitConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from megatron_twotower.config.validation import validate
from megatron_twotower.convert import hf_folder, initial_weights, model_card
from megatron_twotower.data.dataset import rank_slice, split_batch
from megatron_twotower.mcore import parallel
from megatron_twotower.model import parameter_map
from megatron_twotower.train import loop
from megatron_twotower.train import run as train_run
from megatron_twotower.train.optimizer import build_optimizer, build_schedule
from megatron_twotower.types import Batch

STEPS, SEQUENCES, LENGTH, VOCABULARY = 5, 8, 32, 64
MODEL = ModelConfig(
    hybrid_override_pattern="ME*-M*EM",
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=4,
    mamba_num_heads=4,
    mamba_head_dim=4,
    ssm_state_size=4,
    n_groups=4,
    chunk_size=8,
    intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
)
TOKENS = SEQUENCES * LENGTH

# The kinds of runs; each is compared with its run on one rank. `hard` has everything whose result
# could depend on the layout.
RUNS = {
    "plain": {},
    "hard": {
        "noise": {
            "time_per": "block",
            "time_sampling": "stratified",
            "weighting": "elbo",
            "draws_per_context": 2,
            "distillation": 0.9,
            "distillation_elsewhere": 0.3,
            "certainty": 0.5,
            "mask_counts": "exact",
            "paired_draws": "mirrored",
        },
        "train": {"recompute_layers": "ME", "sequence_aux_loss": 0.1},
        "phases": [PhaseConfig("first", 3 * TOKENS), PhaseConfig("second", 2 * TOKENS, block_size_tokens=4)],
    },
    "ar": {"objective": "ar", "train": {"sequence_aux_loss": 0.1}},
    "small blocks": {
        "noise": {"block_size_tokens": 4, "distance_decay": 3.0, "token_shift": True, "distillation": 0.9}
    },
    "ar without documents": {"objective": "ar"},
    # A rate at which five steps of bf16 change every parameter.
    "bf16": {"train": {"precision": "bf16"}, "optimizer": {"learning_rate": 1e-2}},
}


# With this seed the scores of chosen experts differ by more than 1e-5 from others: rounding on
# another layout cannot change a choice.
SEED = 7


def base(backbone):
    return RunConfig(
        seed=SEED,
        model=MODEL,
        init=InitConfig(str(backbone)),
        conditioning=ConditioningConfig("released", 16),
        noise=NoiseConfig(block_size_tokens=8),
        data=DataConfig(sequence_length_tokens=LENGTH, micro_batch_size=2, global_batch_size=SEQUENCES),
        # At this rate five steps amplify no rounding; with this epsilon noise of 1e-9 in a gradient
        # is no step.
        optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1e-5, clip_gradient_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=0),
        train=TrainConfig(steps=STEPS, router_bias_update_rate=1e-2, validation_sequences=SEQUENCES),
    )


def changed(config, changes):
    """Replace fields of a configuration: {"section": {"field": value}} or {"field": value}."""
    for key, value in changes.items():
        old = getattr(config, key)
        new = dataclasses.replace(old, **value) if dataclasses.is_dataclass(old) else value
        config = dataclasses.replace(config, **{key: new})
    return config


def write_backbone(folder):
    """Write a backbone with random values in every tensor, also in selection biases."""
    entries = parameter_map.backbone_entries(MODEL)
    random_start = initial_weights.random_backbone(dataclasses.replace(MODEL, initializer_range=0.2), seed=3)

    def source(name):
        tensor = random_start(name)
        if name.endswith(("norm.weight", "norm_f.weight", "correction_bias", ".D")):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        return tensor

    hf_folder.write_folder(
        folder,
        hf_folder.lazy_tensors(source, entries, MODEL, dtype=torch.float32),
        config=model_card.backbone_config_json(MODEL, dtype=torch.float32),
        files={},
        copies=[],
    )
    return folder


def global_batch(step, *, documents):
    """The sequences of a step.

    With documents, some of them end before the sequence and leave padding, and some are
    conversations.
    """
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(4, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    numbers = torch.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
    if not documents:
        return Batch(tokens, numbers, torch.zeros_like(numbers), numbers)
    starts = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int32)
    padding = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
    draw = random.Random(step)
    for row in range(SEQUENCES):
        for place in draw.sample([8, 16, 24], row % 3):
            starts[row, place] = 1
        padding[row, LENGTH - draw.choice([0, 2, 5, 13]) :] = True
    # Half of the sequences are conversations, in which some stretches are answers.
    scored = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    scored[1::2] = torch.rand(SEQUENCES // 2, LENGTH // 4, generator=generator).lt(0.6).repeat_interleave(4, dim=1)
    return Batch(
        tokens,
        numbers,
        torch.zeros_like(numbers),
        numbers,
        starts.cumsum(1, dtype=torch.int32),
        padding,
        scored=scored & ~padding,
    )


def micro_batches(config, groups, step):
    whole = global_batch(step, documents=bool(config.train.sequence_aux_loss))
    if config.objective == "ar":  # with these answers five steps amplify rounding above the tolerance
        whole = dataclasses.replace(whole, scored=None)
    first, share = rank_slice(0, SEQUENCES, rank=groups.dp.rank(), world=groups.dp.size())
    (mine,) = split_batch(Batch(*(None if t is None else t[first : first + share] for t in fields(whole))), share)
    return split_batch(mine, config.data.micro_batch_size)


def fields(record):
    return [getattr(record, field.name) for field in dataclasses.fields(record)]


def join_shards(shards, entry):
    """Join the shards of all tensor-parallel ranks: the inverse of `parameter_map.shard`."""
    axis = entry.split_dim
    if axis is None or len(shards) == 1:
        return shards[0]
    sizes = [size // len(shards) for size in entry.section_sizes] or [shards[0].shape[axis]]
    sections = zip(*(shard.split(sizes, dim=axis) for shard in shards), strict=True)
    return torch.cat([part for section in sections for part in section], dim=axis)


def whole_parameters(model, config, groups):
    """Gather all parameters and selection biases on rank 0, by name in the parameter map.

    Replicas must be equal bit for bit.
    """
    held = {}
    for chunk in model.chunks:
        held |= {name: tensor.detach() for name, tensor in chunk.named_parameters()}
        held |= {name: tensor for name, tensor in chunk.named_buffers() if name.endswith("expert_bias")}
    mine = {}
    for entry in model.entries:
        ep = groups.ep
        local = parameter_map.name_on_rank(entry, experts=MODEL.n_routed_experts, rank=ep.rank(), ranks=ep.size())
        if local in held:
            group = groups.tp if entry.expert is None else groups.expt_tp
            mine[entry.megatron_name] = (group.rank(), held[local].clone())
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    whole = {}
    for entry in model.entries:
        copies = [rank[entry.megatron_name] for rank in everywhere if entry.megatron_name in rank]
        parts = {}
        for place, tensor in copies:
            other = parts.setdefault(place if entry.split_dim is not None else 0, tensor)
            assert torch.equal(other, tensor), f"{entry.megatron_name}: replicas differ"
        whole[entry.megatron_name] = join_shards([parts[place] for place in sorted(parts)], entry)
        assert whole[entry.megatron_name].shape == entry.shape, entry.megatron_name
    return whole


def frozen_state(model):
    chunks = [chunk.context.state_dict() for chunk in model.chunks if hasattr(chunk, "context")]
    return [tensor.clone() for state in chunks for tensor in state.values() if isinstance(tensor, torch.Tensor)]


# Calls of collectives of the ranks that share sequences, as (name, "forward" or "backward").
SENT = collections.Counter()
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single", "all_gather")


@contextlib.contextmanager
def counting(groups):
    """Count what context-parallel ranks send to each other in `SENT`."""
    SENT.clear()
    watched = [group for group in (groups.cp, groups.tp_cp) if groups.cp.size() > 1]
    calls = {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name):
        def call(*args, group=None, **more):
            if any(group is each for each in watched):
                SENT[name, "forward" if torch._C._current_graph_task_id() < 0 else "backward"] += 1
            return calls[name](*args, group=group, **more)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        yield
    finally:
        for name, call in calls.items():
            setattr(dist, name, call)


def run(config):
    """Train `STEPS` steps. Returns figures that are the same on every rank."""
    validate(config, world_size=parallel.world_size())
    groups = parallel.initialise(config)
    with counting(groups):
        return _run(config, groups)


def _run(config, groups):
    model = train_run.build_model(config, groups)
    frozen = frozen_state(model)
    wrapped = parallel.wrap(model.chunks, config, groups)
    optimizer = build_optimizer(config, wrapped, groups)
    schedule = build_schedule(config, optimizer)
    trainer = loop.Trainer(config, wrapped, optimizer, schedule, groups, resolve_phases(config))
    start, losses, norms, loads, shares = whole_parameters(model, config, groups), [], [], [], []
    for step in range(STEPS):
        result = loop.train_step(trainer.in_phase_of(step * SEQUENCES), micro_batches(config, groups, step))
        total = parallel.sum_over_stages(result.sums, groups)
        losses.append((total[0] / total[1]).item())
        norms.append(result.grad_norm)
        loads.append(parallel.sum_over_ranks(wrapped.expert_tokens))
        counts = [None] * dist.get_world_size()
        dist.all_gather_object(counts, result.sums[1].item())
        shares.append([count for count in counts if count])
    wrapped.gather_parameters()
    validation = {} if config.objective == "ar" else loop.validate(trainer, micro_batches(config, groups, 0))
    same = all(torch.equal(*pair) for pair in zip(frozen, frozen_state(model), strict=True))
    return {
        "losses": losses + [validation[name] for name in ("loss",) if name in validation],
        "loads by noise": validation.get("expert_load_by_noise"),
        "norms": norms,
        "loads": torch.stack(loads),
        "shares": shares,
        "start": start,
        "parameters": whole_parameters(model, config, groups),
        "frozen": same,
        "sent": dict(SENT),
    }


def main():
    """One rank of several. It runs all layouts of a file, because the imports take the longest."""
    torch.set_num_threads(1)
    results = {}
    for name, config in torch.load(sys.argv[1], weights_only=False).items():
        try:
            results[name] = run(config)
        except BaseException as error:
            error.add_note(f"layout: {name}")
            raise
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[2])
    dist.barrier()
    parallel.shutdown()

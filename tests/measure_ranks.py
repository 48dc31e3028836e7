"""One rank of a real job: what it holds and sends in a step, in bytes, for each of some layouts. Run by torchrun.

    python -m torch.distributed.run --nproc-per-node=2 tests/measure_ranks.py '[{"parallel.expert": 2}, ...]' OUTPUT

Every rank writes OUTPUT/RANK.json with one record a layout. Collectives are counted where torch is called, so that
nothing of what Megatron sends is missed.
"""

import collections
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

SENT = collections.Counter()
NAMES = {}
# Of (arguments) what all ranks of the group have together, or each sends, as `plan.traffic` counts it.
OPERATIONS = {
    "all_reduce": lambda args, ranks: args[0].nbytes,
    "all_gather_into_tensor": lambda args, ranks: args[0].nbytes,
    "reduce_scatter_tensor": lambda args, ranks: args[1].nbytes,
    "all_to_all_single": lambda args, ranks: args[1].nbytes,
    "reduce_scatter": lambda args, ranks: sum(t.nbytes for t in args[1]),
    "all_gather": lambda args, ranks: args[1].nbytes * ranks,
}


def _counted(name, size):
    call = getattr(dist, name)

    def counting(*args, group=None, **more):
        if group in NAMES:
            ranks = dist.get_world_size(group)
            SENT[NAMES[group], name] += size(args, ranks) * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
        return call(*args, group=group, **more)

    setattr(dist, name, counting)


for operation, measure in OPERATIONS.items():
    _counted(operation, measure)

from megatron_twotower import host  # noqa: E402

host.install()

import models  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_twotower import convert, layers, names, optimizer, parallel, towers, trainer  # noqa: E402
from megatron_twotower.phases import plan  # noqa: E402
from megatron_twotower.records import Batch  # noqa: E402


def storages(tensors):
    """Bytes of the storages behind some tensors, each once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


def built(config, groups):
    """The towers with random weights, wrapped, with their optimizer, as a run builds them."""
    megatron = towers.transformer_config(config)
    context = towers.build_context_tower(config, megatron, groups)
    module = towers.TwoTower(config, megatron, groups, context)
    entries = names.denoiser_entries(config.model, config.conditioning.frequencies)
    frozen = names.context_entries(config.model)
    source = models.with_shapes(models.random_source(), [*frozen, *entries], config.model)
    convert.load_weights(context, frozen, source, model=config.model, groups=groups)
    convert.load_weights(module, entries, source, model=config.model, groups=groups)
    return module, parallel.wrap(module, config, groups)


def kept_bytes(parts, batch):
    """Storages that the graph of one micro-batch holds, and the hand-offs, which recomputation holds in a closure."""
    module = parts.model.module
    towers_own = (*module.parameters(), *module.buffers(), *module.context.parameters(), *module.context.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in towers_own}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address is not used twice while its tensor lives
        return tensor

    original = layers.DenoiserLayer.denoise

    def denoise(self, hidden, conditioning, handoff, blocks):
        for item in dataclasses.fields(handoff) if handoff is not None else ():
            keep(getattr(handoff, item.name))
        return original(self, hidden, conditioning, handoff, blocks)

    layers.DenoiserLayer.denoise = denoise
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            report = trainer.two_tower_forward(module, batch, parts.config, parts.groups, None)
            assert report.total.requires_grad
    finally:
        layers.DenoiserLayer.denoise = original
    return sum(kept.values())


def measured(changes):
    """One layout: build, take a step, and count."""
    config = models.planned_config(changes)
    groups = parallel.initialise(config)
    NAMES.clear()
    NAMES.update({groups.tp: "tensor", groups.ep: "expert", groups.expt_tp: "expert tensor", groups.dp_cp: "data",
                  groups.tp_ep: "tensor x expert", groups.expt_dp: "expert data"})  # fmt: skip
    module, wrapped = built(config, groups)
    adam = optimizer.build_optimizer(config, wrapped, groups)
    parts = trainer.Trainer(
        config=config, model=wrapped, optimizer=adam, schedule=optimizer.build_schedule(config, adam),
        groups=groups, phases=plan(config),
    )  # fmt: skip
    count = config.data.global_batch_size // groups.dp_cp.size()
    shape = (count, config.data.sequence_length_tokens)
    draw = torch.Generator().manual_seed(groups.dp_cp.rank())
    tokens = torch.randint(4, config.model.vocab_size, shape, generator=draw)
    numbers = torch.arange(count) + count * groups.dp_cp.rank()
    each = config.data.micro_batch_size
    batches = [
        Batch(*(t[i : i + each] for t in (tokens, numbers, torch.zeros_like(numbers), numbers)))
        for i in range(0, count, each)
    ]
    scored = []
    plain_loss = trainer.masked_diffusion_loss
    trainer.masked_diffusion_loss = _noting(plain_loss, scored)
    kept = kept_bytes(parts, batches[0])
    kept_scored = scored.pop()
    SENT.clear()
    trainer.train_step(parts, batches)
    sent = collections.Counter()
    for (group, _), count in SENT.items():
        sent[group] += count
    state = []
    for inner in adam.chained_optimizers:
        torch_optimizer = inner.optimizer
        mains = [p for group in torch_optimizer.param_groups for p in group["params"]]
        state += [p for p in mains if p.dtype == torch.float32 and not _within(p, module)]
        state += [v for values in torch_optimizer.state.values() for k, v in values.items() if k.startswith("exp_")]
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    record = {
        "context": storages(module.context.parameters()),
        "parameters": storages(module.parameters()),
        "gradients": storages([b.grad_data for b in buffers]),
        "optimizer": sum(t.nbytes for t in state),
        "kept": kept, "kept_scored": kept_scored, "sent": sent, "scored": sum(scored) / len(scored),
        "places": [groups.dp_cp.rank(), groups.expt_dp.rank()],
    }  # fmt: skip
    trainer.masked_diffusion_loss = plain_loss
    parallel_state.destroy_model_parallel()
    return record


def _within(tensor, module):
    """Whether a main parameter is a view of a model parameter's storage, and so not memory of its own."""
    held = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return tensor.untyped_storage().data_ptr() in held


def _noting(loss, scored):
    def noting(tower, hidden, batch, *rest):
        scored.append(len(batch.scored))
        return loss(tower, hidden, batch, *rest)

    return noting


if __name__ == "__main__":
    torch.set_num_threads(1)
    layouts, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    records = [measured(changes) for changes in layouts]
    (output / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(records))
    parallel.shutdown()

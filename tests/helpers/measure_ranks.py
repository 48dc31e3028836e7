"""One rank of a real job: what it stores and sends in a step, in bytes, for several layouts.

Run by torchrun.

    python -m torch.distributed.run --nproc-per-node=2 -m helpers.measure_ranks
    '[{"parallel.expert": 2}, ...]' OUTPUT

Every rank writes OUTPUT/RANK.json with one record per layout. Collectives are counted at the calls
of torch, so that everything that Megatron sends is counted.
"""

import collections
import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

SENT = collections.Counter()
NAMES = {}
# Bytes from the arguments of a call: of all ranks of the group together, or of one send, as
# `plan.traffic` counts them.
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
            # mcore/patches.py sums complete tensors, because Gloo cannot scatter uneven parts of
            # experts.
            twice = name == "all_reduce" and NAMES[group] != "expert tensor"
            SENT[NAMES[group], name] += size(args, ranks) * (ranks - 1) / ranks * (2 if twice else 1)
        return call(*args, group=group, **more)

    setattr(dist, name, counting)


for operation, measure in OPERATIONS.items():
    _counted(operation, measure)


def _counted_sends():
    call = dist.batch_isend_irecv

    def counting(operations):
        for each in operations:
            if each.op is dist.isend and each.group in NAMES:
                SENT[NAMES[each.group], "send"] += each.tensor.nbytes
        return call(operations)

    dist.batch_isend_irecv = counting


_counted_sends()

import megatron_twotower.mcore  # noqa: E402, F401, I001
from megatron.core import parallel_state  # noqa: E402

from helpers import models  # noqa: E402
from megatron_twotower.config.phases import resolve_phases  # noqa: E402
from megatron_twotower.config.pipeline_stages import stages_of_rank  # noqa: E402
from megatron_twotower.convert import load  # noqa: E402
from megatron_twotower.mcore import parallel  # noqa: E402
from megatron_twotower.mcore import transformer_config  # noqa: E402
from megatron_twotower.model import towers  # noqa: E402
from megatron_twotower.model import parameter_map  # noqa: E402
from megatron_twotower.train import loop  # noqa: E402
from megatron_twotower.train import optimizer  # noqa: E402
from megatron_twotower.types import Batch  # noqa: E402


def storages(tensors):
    """The storages of some tensors, by address."""
    return {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def nbytes(held):
    return sum(storage.nbytes() for storage in held.values())


def built(config, groups):
    """The model chunks of this rank with random weights, wrapped, as a run builds them."""
    model, megatron = config.model, transformer_config.transformer_config(config)
    entries, frozen = (
        parameter_map.denoiser_entries(model, config.conditioning.frequencies),
        parameter_map.context_entries(model),
    )
    source = models.with_shapes(models.random_source(), [*frozen, *entries], model)
    modules = []
    for stage in stages_of_rank(model, config.parallel, groups.pp.rank()):
        context = towers.build_context_tower(config, megatron, groups, stage)
        module = towers.TwoTower(config, megatron, groups, context)
        for tower, table in ((context, frozen), (module, entries)):
            own = parameter_map.entries_of_stage(table, stage)
            load.load_weights(tower, own, source, model=model, groups=groups)
        modules.append(module)
    return modules, parallel.wrap(modules, config, groups)


def alive():
    """The storages of all tensors that Python knows.

    While they are kept, their addresses are not used again.
    """
    gc.collect()
    return storages(found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter))


def kept_bytes(trainer, modules, batch):
    """Bytes that graph and closures keep between forward and backward pass of a micro-batch."""
    rows = towers.rows_between_stages(
        trainer.config,
        sequences=len(batch.tokens),
        times=None,
        ranks=trainer.groups.tp.size() if trainer.config.parallel.sequence else 1,
    )
    hidden, dtype = trainer.config.model.hidden_size, modules[0].config.params_dtype

    def forward(module):
        if not module.tower.stage.first:
            module.set_input_tensor([torch.randn(rows, 1, hidden, dtype=dtype).requires_grad_()])
        micro_batch = loop.MicroBatch(batch, trainer.config.seed)
        return loop.two_tower_forward(_Chunk(module), micro_batch, trainer.config, trainer.groups)

    total = 0
    for module in modules:
        forward(module)  # masks are made once
        before, kept = alive(), {}

        def keep(tensor, before=before, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in before:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # Training frees the output of a stage once it is sent, and final states once there is a
            # loss.
            graph = [output.grad_fn for output in forward(module)[:1]]
        assert graph[0] is not None
        total += nbytes(kept | {address: held for address, held in alive().items() if address not in before})
    return total


class _Chunk:
    """A module as training uses it: with the attribute `module`, but without gradient buffers."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *arguments):
        return self.module(*arguments)


def measured(changes):
    """Build one layout, take a step, and count."""
    config = models.planned_config(changes)
    groups = parallel.initialise(config)
    NAMES.clear()
    NAMES.update(
        {
            groups.tp: "tensor",
            groups.ep: "expert",
            groups.expt_tp: "expert tensor",
            groups.dp_cp: "data",
            groups.cp: "context",
            groups.tp_ep: "tensor x expert",
            groups.expt_dp: "expert data",
            groups.pp: "pipeline",
        }
    )
    modules, wrapped = built(config, groups)
    adam = optimizer.build_optimizer(config, wrapped, groups)
    trainer = loop.Trainer(
        config=config,
        model=wrapped,
        optimizer=adam,
        schedule=optimizer.build_schedule(config, adam),
        groups=groups,
        phases=resolve_phases(config),
    )
    count = config.data.global_batch_size // groups.dp.size()
    shape = (count, config.data.sequence_length_tokens)
    draw = torch.Generator().manual_seed(groups.dp.rank())
    tokens = torch.randint(4, config.model.vocab_size, shape, generator=draw)
    numbers = torch.arange(count) + count * groups.dp.rank()
    each = config.data.micro_batch_size
    batches = [
        Batch(*(t[i : i + each] for t in (tokens, numbers, torch.zeros_like(numbers), numbers)))
        for i in range(0, count, each)
    ]
    scored = []
    plain_loss = loop.masked_diffusion_loss
    loop.masked_diffusion_loss = _noting(plain_loss, scored)
    kept = kept_bytes(trainer, modules, batches[0])
    kept_scored = scored[-1] if scored else 0
    scored.clear()
    SENT.clear()
    loop.train_step(trainer, batches)
    sent = collections.Counter()
    for (group, _), count in SENT.items():
        sent[group] += count
    own, state = storages(p for module in modules for p in module.parameters()), []
    for inner in adam.chained_optimizers:
        mains = [p for group in inner.optimizer.param_groups for p in group["params"]]
        # Main parameters that are views of model parameters need no memory.
        state += [p for p in mains if p.untyped_storage().data_ptr() not in own]
        state += [v for values in inner.optimizer.state.values() for k, v in values.items() if k.startswith("exp_")]
    buffers = [buffer for chunk in wrapped.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    record = {
        "context": nbytes(storages(p for module in modules for p in module.context.parameters())),
        "parameters": nbytes(own),
        "gradients": nbytes(storages(b.grad_data for b in buffers)),
        "optimizer": sum(t.nbytes for t in state),
        "kept": kept,
        "kept_scored": kept_scored,
        "sent": sent,
        "scored": sum(scored) / max(len(scored), 1),
        "data_ranks": [groups.dp_cp.rank(), groups.expt_dp.rank()],
        "pipeline_rank": groups.pp.rank(),
    }
    loop.masked_diffusion_loss = plain_loss
    parallel_state.destroy_model_parallel()
    return record


def _noting(loss, scored):
    def noting(tower, hidden, batch, *rest, **more):
        scored.append(len(batch.scored_positions))
        return loss(tower, hidden, batch, *rest, **more)

    return noting


if __name__ == "__main__":
    torch.set_num_threads(1)
    layouts, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    records = [measured(changes) for changes in layouts]
    (output / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(records))
    parallel.shutdown()

"""Bytes that one layer keeps between its forward and backward pass."""

import dataclasses
import gc

import torch

from helpers.models import TINY, tiny_config
from megatron_twotower.types import Blocks

MODEL = dataclasses.replace(
    TINY,
    vocab_size=64,
    hidden_size=64,
    head_dim=16,
    mamba_head_dim=16,
    ssm_state_size=16,
    chunk_size=32,
    intermediate_size=96,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=48,
)


def config_of(kind, *, block, length, recompute=""):
    config = tiny_config(kind, block=block, length=length, recompute_layers=recompute)
    train = dataclasses.replace(config.train, router_dtype="fp32")
    return dataclasses.replace(config, model=dataclasses.replace(MODEL, hybrid_override_pattern=kind), train=train)


def storages():
    """All storages of tensors that Python knows, by address.

    While they are kept, no address is used again.
    """
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def kept_bytes(model, batch, dtype):
    """Bytes of all storages that one layer keeps between the passes.

    They are in the graph, or in a closure: there recompute keeps the handoff.
    """
    blocks = Blocks(batch.block)
    with torch.no_grad():
        clean = model.context.embed(batch.tokens).to(dtype)
    noisy = model.tower.embed(batch.noisy).to(dtype).detach().requires_grad_()
    conditioning = model.conditioning(batch.times).detach().requires_grad_()
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage
        return tensor

    def forward():
        with torch.no_grad():
            _, handoff = model.context.layers["0"](clean, blocks)
        return model._denoiser_layer(0, noisy, conditioning, handoff, blocks)

    forward()  # masks are made once
    before = storages()
    before.pop(noisy.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    own = out.untyped_storage().data_ptr()
    held = {address: storage for address, storage in storages().items() if address not in before and address != own}
    return sum(storage.nbytes() for storage in (kept | held).values())

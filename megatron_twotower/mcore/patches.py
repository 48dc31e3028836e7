"""Megatron Core on a machine without CUDA. The only room that patches anything.

Megatron Core takes a CUDA device for granted in three ways, and each has its table here:

* source literals (`device="cuda"`, the type string `'torch.cuda.FloatTensor'`), imports of fused
  optimizers and a compiler's switch in a few modules: `_LITERALS` rewrites them while the module is
  imported, so that the arithmetic is Megatron's own and costs nothing at run time;
* `torch.cuda` calls (current device, streams, events, random state): `_CUDA_CALLS` answers them for
  the host;
* what only goes wrong with Gloo: `_mend_for_gloo`.

What goes wrong or slowly on any device: `_mend_everywhere`. Call `install()` before the first
import of Megatron Core; with a CUDA device present it mends that and nothing else.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import queue
import re
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from megatron_twotower.common.device import CPU, is_cpu
from megatron_twotower.common.errors import UserError

# The releases of megatron-core that this project runs on: 0.16.1, the last for Python 3.11, and
# 0.19.2.
RELEASES = ("0.16", "0.19")


def _release() -> str:
    """Of the megatron-core that is installed, as in `RELEASES`; `none` where none is."""
    try:
        return ".".join(importlib.metadata.version("megatron-core").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "none"


RELEASE = _release()

# The function of filesystem_async.py that gives the queue of a save.
QUEUE = "_get_write_results_queue" if RELEASE == "0.16" else "get_write_results_queue"

_DEVICE = (r"""device=(['"])cuda\1""", "device=torch.cuda.current_device()")
_TYPE = (r"""torch\.cuda\.(Float|Half|BFloat16)Tensor(?=['"])""", r"torch.\1Tensor")
# Megatron takes fused optimizers wherever their package imports, as on the login node of a cluster.
_FUSED = (r"from (transformer_engine\.pytorch\.optimizers|apex\.\w+) import", r"raise ImportError; from \1 import")

# Some small functions are compiled where they are defined. None that a step calls is worth a
# compiler on a CPU, whose import alone takes a second of every process.
_COMPILED = (r"(?m)^enable_jit_fuser\(\)$", "disable_jit_fuser()")

# What stands in the source of each module. A pattern that is not found is an error: the module has
# changed upstream and must be looked at again.
_LITERALS: dict[str, tuple[tuple[str, str], ...]] = {
    "megatron.core.jit": (_COMPILED,),
    "megatron.core.optimizer": (_FUSED,),
    "megatron.core.optimizer.clip_grads": (_DEVICE, _TYPE, _FUSED),
    "megatron.core.optimizer.distrib_optimizer": (_TYPE, _FUSED),
    "megatron.core.optimizer.grad_scaler": (_DEVICE,),
    "megatron.core.optimizer.optimizer": (_DEVICE, _TYPE, _FUSED),
    "megatron.core.pipeline_parallel.schedules": (_DEVICE,),
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": (_DEVICE,),
    "megatron.core.utils": (_DEVICE,),
    # What only some releases have.
    **{
        "0.16": {"megatron.core.transformer.moe.moe_utils": (_DEVICE,)},
        "0.19": {"megatron.core.transformer.moe.token_dispatcher": (_DEVICE,)},
    }.get(RELEASE, {}),
}

# Of Megatron Core and its use of torch, on every start, about nothing that a user could change.
_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r"Transformer Engine and Apex are not installed", UserWarning),
    (r"(Apex is not installed|full scope is deprecated)", UserWarning),
    (r"\w+ is experimental and still under active development", UserWarning),
    # What it reads and writes checkpoints with, and the distributed optimizer.
    (r"`load_state_dict` is deprecated", FutureWarning),
    (r"`torch.distributed.\w+` is deprecated", FutureWarning),
    (r"The argument order of load has been changed", UserWarning),
    (r"torch.distributed is disabled, unavailable or uninitialized", UserWarning),
)


class _HostLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module's source with its device literals rewritten; never reads or writes a `.pyc`."""

    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_data(self.path).decode()
        for pattern, replacement in _LITERALS[fullname]:
            source, count = re.subn(pattern, replacement, source)
            if count == 0:
                raise ImportError(f"{fullname}: {pattern!r} not found in megatron-core {RELEASE}")
        return self.source_to_code(source.encode(), self.path)


class _HostFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _LITERALS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        return importlib.util.spec_from_file_location(fullname, loader=_HostLoader(fullname, spec.origin))


class _HostStream:
    """Stands for a CUDA stream or event: everything on the host is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, event: "_HostStream | None" = None) -> "_HostStream":
        return event or self

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True


_STREAM = _HostStream()
_RESULTS: queue.Queue[Any] = queue.Queue()


@contextlib.contextmanager
def _host_stream(_: Any = None):
    yield


def _set_host_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


_CUDA_CALLS: dict[str, Any] = {
    "current_device": lambda: CPU,
    "device_count": lambda: 1,
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "Stream": _HostStream,
    "Event": _HostStream,
    "current_stream": lambda *_: _STREAM,
    "default_stream": lambda *_: _STREAM,
    "stream": _host_stream,
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": _set_host_rng_state,
    "manual_seed": torch.manual_seed,
}


def install() -> None:
    """Make Megatron Core importable and runnable here. Idempotent; touches no device call where CUDA is present.

    Raises:
        RuntimeError: a module that needs rewriting was imported before.
        UserError: Megatron Core is none of `RELEASES`.
    """
    if RELEASE not in RELEASES:
        raise UserError(f"megatron-core: found {RELEASE}, expected {' or '.join(RELEASES)}")
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # Megatron's wrapper says here that it lays its buffers out itself, which is what is wanted of
    # it.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    # A CUDA build of torch says here that there is no device; the doctor does.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not is_cpu():
        _mend_everywhere()
        return
    if any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        return
    early = sorted(name for name in _LITERALS if name in sys.modules)
    if early:
        raise RuntimeError(f"megatron_twotower.mcore must be imported before Megatron Core; found {early}")
    for name, call in _CUDA_CALLS.items():
        setattr(torch.cuda, name, call)
    sys.meta_path.insert(0, _HostFinder())
    _mend_everywhere()
    _mend_for_gloo()


def _mend_everywhere() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.utils import local_multi_tensor_l2_norm

    # megatron-core 0.16.1, moe_utils.py: the name is used wherever the router has a dtype of its
    # own, but only defined when Transformer Engine imports.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    # megatron-core 0.16.1, utils.py: where neither Transformer Engine nor Apex is, the host waits
    # for the norm of every single gradient.
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm

    # megatron-core 0.16.1, filesystem_async.py starts a manager process for a queue that a
    # synchronous save reads in the same process; it costs seconds, and outlives a training process
    # that is killed.
    assert hasattr(filesystem_async, QUEUE)
    setattr(filesystem_async, QUEUE, lambda *_: _RESULTS)


def _l2_norm(_: int, __: torch.Tensor, lists: list[list[torch.Tensor]], *___: Any) -> tuple[torch.Tensor, None]:
    """The L2 norm (1,) over all tensors, where they are."""
    norms = [norm for tensors in lists for norm in torch._foreach_norm(tensors)]
    return torch.stack(norms).norm().view(1), None


def _mend_for_gloo() -> None:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    # The random tracker reads and writes the device generator's state: here the host generator is
    # that device's.
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = _set_host_rng_state

    # megatron-core 0.16.1, token_dispatcher.py hands numpy split sizes to all_to_all_single; Gloo
    # wants ints. maybe_move_tensor_to_cpu also leaves host tensors as they are, where the
    # dispatcher goes on with arrays.
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_as_ints

    # megatron-core 0.16.1, mappings.py gathers and scatters parts of different length between the
    # ranks that split an expert, which NCCL can and Gloo cannot.
    mappings._gather_along_first_dim = _with_uneven(mappings._gather_along_first_dim, _gather_uneven)
    mappings._reduce_scatter_along_first_dim = _with_uneven(
        mappings._reduce_scatter_along_first_dim, _reduce_scatter_uneven
    )


class _Splits(list[int]):
    """Split sizes as ints, with the one array method that the dispatcher calls."""

    def tolist(self) -> list[int]:
        return list(self)


def _splits_as_ints(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    if as_numpy and isinstance(tensor, torch.Tensor):
        return _Splits(tensor.tolist())
    return tensor


def _with_uneven(even: Any, uneven: Any) -> Any:
    """Megatron's collective along the first dimension, but for parts of given lengths."""

    def collective(input_: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        return uneven(input_, group, [int(size) for size in sizes])

    return collective


def _gather_uneven(part: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """All parts in the order of ranks, `sizes` rows each: sent as long as the longest."""
    longest = max(sizes)
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    if padded.numel():
        torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([whole[:size] for whole, size in zip(parts, sizes, strict=True)])


def _reduce_scatter_uneven(whole: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """This rank's `sizes` rows of the sum."""
    total = whole.clone()
    if total.numel():
        torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()

"""Patches of Megatron Core. No other module of this project patches anything.

Megatron Core assumes a CUDA device in three ways. Each way has its own patches here, which are
applied only without a CUDA device:

* Source literals (`device="cuda"`, the type string `'torch.cuda.FloatTensor'`), imports of fused
  optimizers, and a compiler switch in a few modules. `_source_patches` lists the replacements. They
  are applied to the source while the module is imported, so the arithmetic is Megatron's own and
  nothing is slower at run time.
* Calls of `torch.cuda` (current device, streams, events, random state). `_CUDA_REPLACEMENTS` has a
  CPU function for each.
* Calls that fail only with the Gloo backend. `_patch_for_gloo` replaces them.

`_patch_for_all_devices` corrects what fails or is slow on every device. `install` is called when
the folder `mcore` is imported.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import queue
import re
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_twotower.common import versions
from megatron_twotower.common.device import CPU, is_cpu
from megatron_twotower.mcore.releases import RELEASE, Release, installed_release

_DEVICE = (r"""device=(['"])cuda\1""", "device=torch.cuda.current_device()")
_TYPE = (r"""torch\.cuda\.(Float|Half|BFloat16)Tensor(?=['"])""", r"torch.\1Tensor")
# Megatron uses fused optimizers if their package can be imported, also on a node without a GPU,
# such as the login node of a cluster.
_FUSED = (r"from (transformer_engine\.pytorch\.optimizers|apex\.\w+) import", r"raise ImportError; from \1 import")

# Megatron compiles some small functions where they are defined. On a CPU none of those that a
# training step calls is worth it: importing the compiler alone takes a second in every process.
_COMPILED = (r"(?m)^enable_jit_fuser\(\)$", "disable_jit_fuser()")

_Substitution = tuple[str, str]


def _source_patches(release: Release) -> dict[str, tuple[_Substitution, ...]]:
    """The substitutions (pattern, replacement) in the source of each module.

    A pattern that is not found is an error: Megatron has changed the module, and the patch must be
    checked again.
    """
    return {
        "megatron.core.jit": (_COMPILED,),
        "megatron.core.optimizer": (_FUSED,),
        "megatron.core.optimizer.clip_grads": (_DEVICE, _TYPE, _FUSED),
        "megatron.core.optimizer.distrib_optimizer": (_TYPE, _FUSED),
        "megatron.core.optimizer.grad_scaler": (_DEVICE,),
        "megatron.core.optimizer.optimizer": (_DEVICE, _TYPE, _FUSED),
        "megatron.core.pipeline_parallel.schedules": (_DEVICE,),
        "megatron.core.dist_checkpointing.strategies.state_dict_saver": (_DEVICE,),
        "megatron.core.utils": (_DEVICE,),
        release.device_literal_module: (_DEVICE,),
    }


# Warnings of Megatron Core and of its use of torch. They appear on every start, and a user cannot
# change what they are about.
_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r"Transformer Engine and Apex are not installed", UserWarning),
    (r"(Apex is not installed|full scope is deprecated)", UserWarning),
    (r"\w+ is experimental and still under active development", UserWarning),
    # From reading and writing checkpoints, and from the distributed optimizer.
    (r"`load_state_dict` is deprecated", FutureWarning),
    (r"`torch.distributed.\w+` is deprecated", FutureWarning),
    (r"The argument order of load has been changed", UserWarning),
    (r"torch.distributed is disabled, unavailable or uninitialized", UserWarning),
)


class _PatchedSourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module from its patched source; never reads or writes a `.pyc` file."""

    def __init__(self, fullname: str, path: str, substitutions: Sequence[_Substitution]) -> None:
        super().__init__(fullname, path)
        self._substitutions = substitutions

    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_data(self.path).decode()
        for pattern, replacement in self._substitutions:
            source, count = re.subn(pattern, replacement, source)
            if count == 0:
                raise ImportError(f"{fullname}: {pattern!r} not found in megatron-core {RELEASE}")
        return self.source_to_code(source.encode(), self.path)


class _PatchedSourceFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of Megatron whose source is patched."""

    def __init__(self, patches: Mapping[str, Sequence[_Substitution]]) -> None:
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        loader = _PatchedSourceLoader(fullname, spec.origin, self._patches[fullname])
        return importlib.util.spec_from_file_location(fullname, loader=loader)


class _CpuStream:
    """Replaces a CUDA stream or event: work on the CPU is always in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, event: "_CpuStream | None" = None) -> "_CpuStream":
        return event or self

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True


_STREAM = _CpuStream()
_WRITE_RESULTS: queue.Queue[Any] = queue.Queue()


@contextlib.contextmanager
def _cpu_stream_context(_: Any = None):
    yield


def _set_cpu_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


_CUDA_REPLACEMENTS: dict[str, Any] = {
    "current_device": lambda: CPU,
    "device_count": lambda: 1,
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "Stream": _CpuStream,
    "Event": _CpuStream,
    "current_stream": lambda *_: _STREAM,
    "default_stream": lambda *_: _STREAM,
    "stream": _cpu_stream_context,
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": _set_cpu_rng_state,
    "manual_seed": torch.manual_seed,
}


def install() -> None:
    """Patch Megatron Core so that it can be imported and runs on this machine.

    The function may be called again: later calls change nothing. With a CUDA device no call of
    `torch.cuda` and no source is patched.

    Raises:
        RuntimeError: A module whose source must be patched is already imported.
        UserError: The installed release of torch or of Megatron Core is not supported.
    """
    versions.require_fit("torch")
    release = installed_release()
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # Megatron's DDP logs that it creates its own buffers, which is intended.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    # A CUDA build of torch logs that there is no device. `twotower doctor` reports it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not is_cpu():
        with _without_wandb():
            _patch_for_all_devices(release)
        return
    if any(isinstance(finder, _PatchedSourceFinder) for finder in sys.meta_path):
        return
    source_patches = _source_patches(release)
    early = sorted(name for name in source_patches if name in sys.modules)
    if early:
        raise RuntimeError(f"megatron_twotower.mcore must be imported before Megatron Core; found {early}")
    for name, replacement in _CUDA_REPLACEMENTS.items():
        setattr(torch.cuda, name, replacement)
    sys.meta_path.insert(0, _PatchedSourceFinder(source_patches))
    with _without_wandb():
        _patch_for_all_devices(release)
        _patch_for_gloo()


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """Import Megatron Core as if wandb were not installed.

    Its inference engine and timers import wandb, which takes a sixth of the start of a process.
    This project uses neither; `train.metrics` imports wandb if a run wants it.
    """
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


def _patch_for_all_devices(release: Release) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.utils import local_multi_tensor_l2_norm

    # megatron-core 0.16.1, moe_utils.py: the router uses this name if it has its own dtype, but the
    # name is only defined if Transformer Engine can be imported.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    # megatron-core 0.16.1, utils.py: without Transformer Engine and Apex, the host waits for the
    # norm of each gradient.
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm

    # megatron-core 0.16.1, filesystem_async.py starts a manager process for the results queue, but
    # this project writes in the same process that reads the queue. The manager takes seconds to
    # start, and it survives a training process that is killed.
    assert hasattr(filesystem_async, release.results_queue_function)
    setattr(filesystem_async, release.results_queue_function, lambda *_: _WRITE_RESULTS)


def _l2_norm(_: int, __: torch.Tensor, lists: list[list[torch.Tensor]], *___: Any) -> tuple[torch.Tensor, None]:
    """The L2 norm (1,) over all tensors, on their device."""
    norms = [norm for tensors in lists for norm in torch._foreach_norm(tensors)]
    return torch.stack(norms).norm().view(1), None


def _patch_for_gloo() -> None:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    # The random tracker reads and sets the state of the CUDA generator. Without CUDA it uses the
    # CPU generator.
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = _set_cpu_rng_state

    # megatron-core 0.16.1, token_dispatcher.py passes split sizes as numpy arrays to
    # all_to_all_single; Gloo expects ints. In addition, maybe_move_tensor_to_cpu returns CPU
    # tensors unchanged, although the dispatcher then expects arrays.
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_as_ints

    # megatron-core 0.16.1, mappings.py gathers and scatters parts of different length between the
    # ranks that split an expert. NCCL supports this, Gloo does not.
    mappings._gather_along_first_dim = _with_uneven_sizes(mappings._gather_along_first_dim, _gather_uneven)
    mappings._reduce_scatter_along_first_dim = _with_uneven_sizes(
        mappings._reduce_scatter_along_first_dim, _reduce_scatter_uneven
    )


class _Splits(list[int]):
    """Split sizes as ints, with `tolist`, the only array method that the dispatcher calls."""

    def tolist(self) -> list[int]:
        return list(self)


def _splits_as_ints(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    if as_numpy and isinstance(tensor, torch.Tensor):
        return _Splits(tensor.tolist())
    return tensor


def _with_uneven_sizes(even: Any, uneven: Any) -> Any:
    """Megatron's collective `even`, replaced by `uneven` if the parts have given lengths."""

    def collective(input_: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        return uneven(input_, group, [int(size) for size in sizes])

    return collective


def _gather_uneven(part: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """Concatenate the parts of all ranks in rank order; rank i has `sizes[i]` rows.

    Each part is sent padded to the length of the longest.
    """
    longest = max(sizes)
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    if padded.numel():
        torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)])


def _reduce_scatter_uneven(tensor: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """Sum a tensor over the ranks and return this rank's rows; rank i has `sizes[i]` rows."""
    total = tensor.clone()
    if total.numel():
        torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()

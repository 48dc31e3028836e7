"""A pretended CUDA device: it computes on the CPU with the rules of a GPU, to find device errors.

Inside `pretended_cuda()` a tensor that is made on "cuda" or moved there is a `Pretended` tensor:
its device is cuda:0, and it computes with an ordinary CPU tensor. As on a GPU,

* an operation that mixes it with tensors of the host fails, except for 0-dim numbers in pointwise
  operations and for indices;
* each operation for which the host waits is recorded with its line: `.item()`, copies between host
  and device, boolean indexing, `nonzero`, and so on. Non-blocking copies from pinned memory are not
  recorded.

For C++ these tensors are on the meta device, the one that every build of torch can send through
autograd; the classes and modes here never show it. What is not pretended: streams, memory, Triton,
NCCL, and the order of sums.
"""

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo  # before `pretended_cuda`: its import checks the signature of a function patched there
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import megatron_twotower
from megatron_twotower.common import device as common_device
from megatron_twotower.hf import modeling_nemotron_h_twotower as modeling
from megatron_twotower.mcore import patches

CUDA = torch.device("cuda", 0)
HERE, PACKAGE = Path(__file__), str(Path(megatron_twotower.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
aten = torch.ops.aten


class WrongDevice(RuntimeError):
    """The error that torch raises on a GPU."""


class Pretended(torch.Tensor):
    """A tensor on cuda:0. `held` is the CPU tensor with its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise WrongDevice(f"{func}: a tensor of the pretended device, outside of pretended_cuda()")

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        """Set the data; torch does this in C++, invisible to the dispatch mode."""
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def type(self, dtype=None, **settings):
        """Megatron's sources are rewritten here to ask for the names of CPU tensors."""
        return self.held.type() if dtype is None else super().type(dtype, **settings)

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        return self.to("cpu").tolist()

    def cuda(self, *_, **__):
        return self

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __repr__(self):
        return f"{self.held!r} on cuda:0"


@dataclass(frozen=True)
class Wait:
    """An operation for which the host waits.

    owner: whose code called it; where: file, line and function.
    """

    kind: str
    owner: str
    where: str


@dataclass
class Waits:
    """The recorded waits, in order."""

    found: list[Wait] = field(default_factory=list)

    def of(self, owner: str) -> list[Wait]:
        return [wait for wait in self.found if wait.owner == owner]

    def counted(self, *owners: str) -> dict[str, int]:
        """The number of waits by kind and function, without line numbers."""
        kept = [wait for wait in self.found if not owners or wait.owner in owners]
        return dict(collections.Counter(f"{wait.kind}: {wait.where.partition(' ')[2]}" for wait in kept))

    @contextlib.contextmanager
    def during(self) -> Iterator["Waits"]:
        """Yields the waits inside the `with` block only."""
        start, part = len(self.found), Waits()
        yield part
        part.found = self.found[start:]


def _asker() -> tuple[str, str]:
    """The caller of torch: the innermost frame outside of torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != str(HERE) and not name.startswith((TORCH, "<")):
            break
        frame = frame.f_back
    if frame is None:
        return "torch", "? torch"
    path = Path(frame.f_code.co_filename)
    ours = name.startswith(PACKAGE) or path.name == "modeling_nemotron_h_twotower.py"
    owner = "ours" if ours else "megatron" if "megatron" in path.parts else "others"
    return owner, f"{path.name}:{frame.f_lineno} {path.stem}.{frame.f_code.co_name}"


# These operations read values of the device that determine a shape or the next action of the host.
WAITING = {
    "_local_scalar_dense": "a number",
    "nonzero": "nonzero",
    "nonzero_static": "nonzero",
    "masked_select": "nonzero",
    "_unique2": "nonzero",
    "unique_dim": "nonzero",
    "unique_consecutive": "nonzero",
    "bincount": "nonzero",
    "equal": "a number",
    "is_nonzero": "a number",
}
# Operations that accept a number of the host instead of a tensor of the device, as all pointwise
# operations do.
NUMBERS_ALLOWED = {"fill_", "fill", "masked_fill", "masked_fill_", "index_put_", "index_put", "_index_put_impl_"}
# Operations whose indices may be on the host: they are copied.
INDICES_ALLOWED = {"index", "index_put_", "index_put", "_index_put_impl_"}


def _addmm_in_wide(total, left, right, dtype, *, beta=1, alpha=1, out):
    return out.copy_(torch.addmm(total, left.to(dtype), right.to(dtype), beta=beta, alpha=alpha))


# Operations that torch has only for a GPU, as operations of the host.
ONLY_THERE = {"aten::addmm.dtype_out": _addmm_in_wide}


def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


@cache
def _returned(func: Any) -> tuple[str | None, ...]:
    """The argument that each result of an operation was written into; None for a new tensor."""
    written = {
        next(iter(a.alias_info.before_set)): a.name
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.alias_info.before_set
    }
    return tuple(
        written.get(next(iter(r.alias_info.before_set)))
        if r.alias_info is not None and r.alias_info.is_write and r.alias_info.before_set
        else None
        for r in func._schema.returns
    )


def _argument(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], default: Any = None) -> Any:
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, default)
    return default


class _Generator(torch.Generator):
    """A generator that draws the numbers of the host.

    devices: addresses of the generators of the device.
    """

    devices: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls)
        (cls.devices.add if torch.device(device).type == "cuda" else cls.devices.discard)(made._cdata)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass


class _Device(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits = Waits()

    def note(self, kind: str) -> None:
        self.waits.found.append(Wait(kind, *_asker()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, named = _name(func), kwargs.get("device")
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        here = any(isinstance(tensor, Pretended) for tensor in tensors)
        if named is not None:
            kwargs["device"] = torch.device("cpu")
        if name in ("_to_copy", "copy_"):
            on_device = self._copied(func, name, named, args, kwargs)
        else:
            on_device = here if named is None else torch.device(named).type != "cpu"
            self._check(func, name, args, tensors, here)
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in _Generator.devices) != on_device:
            raise WrongDevice(f"{func}: a generator of the one, expected it where the numbers are drawn")
        compute = ONLY_THERE.get(func.name(), func) if here else func
        out = compute(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name in WAITING and here:
            self.note(WAITING[name])
        return self._results(func, args, kwargs, out) if on_device else out

    def _copied(self, func, name, named, args, kwargs) -> bool:
        """Record a copy between host and device. Returns whether the result is on the device."""
        source = args[1] if name == "copy_" else args[0]
        before = isinstance(source, Pretended)
        if name == "copy_":
            after = isinstance(args[0], Pretended)
        else:
            after = before if named is None else torch.device(named).type != "cpu"
        patient = not _argument(func, "non_blocking", args, kwargs, False)
        if before and not after:
            self.note("a copy to the host")
        elif after and not before and (patient or not source.is_pinned()):
            self.note("a copy from the host" if patient else "a copy from pageable memory")
        return after

    def _check(self, func, name, args, tensors, here) -> None:
        """Check that all tensors of an operation are on one device.

        Raises:
            WrongDevice: It mixes tensors of the device and of the host.
        """
        if not here:
            if "c10d" in func._schema.name and tensors and name != "barrier":
                raise WrongDevice(f"{func}: no backend for tensors of the host, expected them on {CUDA} (NCCL)")
            return
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
        if name in INDICES_ALLOWED and isinstance(args[0], Pretended):
            indices = [index for index in args[1] if index is not None]
            self._indices(name, args, indices)
            strangers = [tensor for tensor in strangers if not any(tensor is index for index in indices)]
        if torch.Tag.pointwise in func.tags or name in NUMBERS_ALLOWED:
            strangers = [tensor for tensor in strangers if tensor.dim()]
        if strangers:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise WrongDevice(
                f"{func}: expected all tensors to be on the same device, found {CUDA} and cpu, there {shapes}"
            )

    def _indices(self, name, args, indices) -> None:
        if not all(isinstance(index, Pretended) for index in indices):
            self.note("a copy from the host")
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        # index_put of one number under one mask is masked_fill, also on a GPU.
        filled = name != "index" and len(indices) == 1 and args[2].numel() == 1 and not (args[3:4] and args[3])
        if masks and not filled:
            self.note("nonzero")

    def _results(self, func, args, kwargs, out):
        places = _returned(func)
        if not places:
            return out
        if len(places) == 1 and not isinstance(out, (list, tuple)):
            return self._result(func, places[0], args, kwargs, out)
        if len(places) == 1:
            return type(out)(_shown(each) for each in out)
        each = [self._result(func, place, args, kwargs, one) for place, one in zip(places, out, strict=True)]
        return tuple(each)

    def _result(self, func, place, args, kwargs, out):
        if place is None:
            return tree_map(_shown, out)
        argument = _argument(func, place, args, kwargs)
        if isinstance(argument, Pretended):
            assert argument.shape == argument.held.shape, f"{func} changes a shape in place: not pretended"
        return argument


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def _shown(value: Any) -> Any:
    return Pretended(value) if isinstance(value, torch.Tensor) else value


def _indexed(value: Any) -> Any:
    """`cuda` as `cuda:0`.

    Without a number, a build for the CPU asks for a runtime that it does not have.
    """
    named = isinstance(value, (str, torch.device)) and str(value) == "cuda"
    return CUDA if named else value


def _moving(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = tuple(map(_indexed, args)), {key: _indexed(value) for key, value in kwargs.items()}
        if isinstance(tensor, Pretended):  # is there already
            there = ("cuda:0", CUDA)
            args = tuple("meta" if isinstance(a, (str, torch.device)) and a in there else a for a in args)
            if kwargs.get("device") in there:
                kwargs["device"] = "meta"
        return to(tensor, *args, **kwargs)

    return moved


def _told(tensor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor` with a device: made on the host and copied, as on a GPU."""

    def told(data: Any, *, device: Any = None, **settings: Any) -> torch.Tensor:
        requires_grad = settings.pop("requires_grad", False)
        made = tensor(tree_map(lambda x: x.item() if isinstance(x, Pretended) else x, data), **settings)
        return (made if device is None else made.to(device)).requires_grad_(requires_grad)

    return told


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    copy = tensor.clone()
    copy.is_pinned = lambda *_: True
    return copy


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Waits]:
    """Pretend that `common.device.device()` is a CUDA device. Yields what the host waits for."""
    mode = _Device()
    compatible = torch._has_compatible_shallow_copy_type
    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        for module in (common_device, patches):
            patch.setattr(module, "CPU", CUDA)
        patch.setattr(torch.Tensor, "to", _moving(torch.Tensor.to))
        patch.setattr(torch, "tensor", _told(torch.tensor))
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.Tensor, "pin_memory", _pinned)
        patch.setattr(torch.Tensor, "is_pinned", lambda *_: False)
        # Kept in the class from step to step, on the device of the first step.
        patch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
        # Objects travel through NCCL as tensors of the device.
        patch.setattr(torch.distributed.distributed_c10d, "_get_object_coll_device", lambda *_: str(CUDA))
        # A module that moves replaces parameters that cannot be changed in place.
        patch.setattr(
            torch,
            "_has_compatible_shallow_copy_type",
            lambda a, b: isinstance(a, Pretended) == isinstance(b, Pretended) and compatible(a, b),
        )
        yield mode.waits


@contextlib.contextmanager
def as_there() -> Iterator[None]:
    """On the host, attention and experts are computed by the operations of the pretended device."""
    with sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "waits_for_nothing", lambda device: False)
        patch.setattr(modeling, "has_grouped_product", lambda matrices, dtype: dtype == torch.bfloat16)
        yield


def on_host(value: Any) -> Any:
    """The tensors of the host in a nested value, without a recorded copy."""
    return tree_map(_held, value)

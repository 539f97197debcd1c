"""A device ``pretend`` whose tensors lie on the CPU but behave as on a GPU: what would fail there fails here.

Operations between devices, generators of the CPU, and ``.numpy()`` raise as CUDA does; moments in which the host waits
for the device are counted by the line that causes them. It is registered with torch as a backend of its own, so that
modules, autograd, optimizers, ``torch.device("pretend")`` contexts and Lightning's trainer use it as any device::

    with pretend_device():
        L.Trainer(**pretend_trainer_options(), max_epochs=1).fit(method, datamodule=data)

Limits: it knows no inference mode, autocast changes no precision, and kernels are those of the CPU, so that numbers say
nothing about a GPU's rounding.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
_INDEXED = ("aten.index.Tensor", "aten.index_put", "aten._index_put", "aten._unsafe_index")
"""Operations that take indices of the CPU, or a boolean mask, on either device."""
_CROSSING = ("aten.copy_.default", "aten._to_copy.default", "aten._copy_from", "aten.set_.source_Storage")
"""Operations whose arguments may lie on two devices: the copies."""
_JOINING = ("aten.stack", "aten.cat", "aten.index_select")
"""Operations for which a number of the CPU is a tensor of another device like any other."""
_RESIZING = (
    *("arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye", "eye.m"),
    *("randperm", "randperm.generator", "normal.float_float", "range", "range.step"),
)
"""Operations that torch would carry out by resizing an empty tensor, which a wrapper cannot follow."""
_waits: Counter[str] | None = None


class PretendTensor(torch.Tensor):
    """A tensor on the device, around the CPU tensor that holds its numbers."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> PretendTensor:
        """Wrap a tensor of the CPU."""
        wrapped: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=torch.device(NAME, 0),
        )
        wrapped.elem = elem.detach()
        return wrapped

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operation that has a tensor of the device among its arguments."""
        return _run(func, args, kwargs or {})

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as tensors of a GPU do."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        """The numbers as Python lists; the host waits for them."""
        _count()
        return self.elem.tolist()

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """A tensor of the data, on this device unless another is named."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device if device is None else device, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        """The numbers, and that they lie on the device."""
        return f"{NAME}({self.elem})"


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check an operation as a GPU would, and carry it out on the CPU."""
    name = str(func)
    leaves = list(_leaves((args, tuple(kwargs.values()))))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    target = kwargs.get("device")
    on_device = bool(here) if target is None else torch.device(target).type == NAME
    if (on_device or here) and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' [{name}]")
    if here:
        _check_devices(name, tensors)
        if not on_device or name == "aten._local_scalar_dense.default" or _gathers_by_mask(name, tensors):
            _count()
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    out = func(*_each(_on_cpu, args), **{key: _each(_on_cpu, value) for key, value in kwargs.items()})
    if not func._schema.returns:
        return None
    if func._schema.is_mutable and name.split(".")[1].endswith("_") and tensors:
        return args[0]
    inputs = {id(tensor.elem): tensor for tensor in here}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return inputs[id(value)] if id(value) in inputs else PretendTensor(value) if on_device else value

    return _each(wrapped, out)


def _leaves(value: Any) -> Iterator[Any]:
    """The values in nested lists and tuples, the only containers that operations of torch take and return."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to every leaf, as ``torch.utils._pytree`` does in more time."""
    if isinstance(value, list | tuple):
        return type(value)([_each(function, part) for part in value])
    return function(value)


def _on_cpu(value: Any) -> Any:
    return value.elem if isinstance(value, PretendTensor) else value


def _gathers_by_mask(name: str, tensors: list[torch.Tensor]) -> bool:
    """Whether the size of the result is known only after the device has counted."""
    masked = name.startswith(_INDEXED[0]) and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    return masked or name in ("aten.nonzero.default", "aten.masked_select.default")


def _check_devices(name: str, tensors: list[torch.Tensor]) -> None:
    """Raise where tensors of two devices meet and none of them is a number or an index."""
    if name.startswith(_CROSSING):
        return
    first_is_here = isinstance(tensors[0], PretendTensor)
    for tensor in tensors:
        if isinstance(tensor, PretendTensor) or (tensor.dim() == 0 and not name.startswith(_JOINING)):
            continue
        if name.startswith(_INDEXED) and first_is_here and tensor is not tensors[0] and not tensor.is_floating_point():
            continue
        if name.startswith(_INDEXED) and not first_is_here:
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor [{name}]")
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! [{name}] shapes {[tuple(tensor.shape) for tensor in tensors]}"
        )


def _count() -> None:
    """Note that the host waits, under the line of plm that made it wait."""
    if _waits is None:
        return
    lines = [frame for frame in traceback.extract_stack() if "/plm/" in frame.filename and __file__ != frame.filename]
    where = f"{lines[-1].filename.rpartition('/plm/')[2]}:{lines[-1].lineno}" if lines else "outside plm"
    _waits[where] += 1


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count how often the host waits for the device, by file and line of plm."""
    global _waits
    before, _waits = _waits, Counter()
    try:
        yield _waits
    finally:
        _waits = before


class _Backend(_DummyBackendModule):
    """What torch asks a backend: one device, no autocast of its own."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are the CPU's."""

    def synchronize(self, device: Any = None) -> None:
        _count()


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """Make the device known; inside the block it is as complete as any."""
    _register()
    constructors = torch.tensor, torch.as_tensor
    torch.tensor, torch.as_tensor = map(_made_here, constructors)
    try:
        yield torch.device(NAME, 0)
    finally:
        torch.tensor, torch.as_tensor = constructors


@cache
def _register() -> tuple[Any, Any]:
    """Tell torch of the device; once in a process, and for good. Returns what must be kept for that."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    make_library: Any = torch.library.Library
    library, aten = make_library("_", "IMPL"), make_library("aten", "IMPL")
    kernel: Callable[..., Any] = lambda op, *args, **kwargs: _run(op, args, kwargs)  # noqa: E731
    library.fallback(kernel, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _RESIZING:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, partial(kernel, operation), "PrivateUse1")
    return library, aten


def _made_here(construct: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.tensor`` and its like, which cannot make tensors of a Python backend: made on the CPU and moved."""

    @wraps(construct)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        target = torch.device(device) if device is not None else None
        if target is None and not isinstance(data, torch.Tensor):
            target = torch.empty(0).device  # of the context, if there is one
        if target is None or target.type != NAME:
            return construct(data, *args, device=device, **kwargs)
        if isinstance(data, PretendTensor):
            return data.to(target, *args, **kwargs)
        with torch.device("cpu"):
            return construct(data, *args, **kwargs).to(target)

    return made


class PretendAccelerator(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing has to be prepared."""

    def teardown(self) -> None:
        """Nothing has to be given back."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """Devices as they are asked for."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The one device there is."""
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def name() -> str:
        """The name of the device."""
        return NAME


def pretend_trainer_options() -> dict[str, Any]:
    """Options of `lightning.Trainer` for a fit on the device, inside a block of `pretend_device`."""
    accelerator = PretendAccelerator()
    strategy = SingleDeviceStrategy(device=torch.device(NAME, 0), accelerator=accelerator)
    return {"strategy": strategy, "devices": 1, "inference_mode": False}

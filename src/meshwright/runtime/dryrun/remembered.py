"""Results of ops on fake tensors, remembered by what goes in: a step runs a few hundred ops again and again.

PyTorch remembers them too, but works out for each call what it depends on. Here that is the op, the sizes,
strides and types of its tensors, and its other arguments; ops with anything else among their arguments or
results are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Args = tuple[Any, ...]
Make = Callable[[Args], Any]
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout}


class RememberedResults:
    """Runs ops on fake tensors, each with the same kind of inputs once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.makes: dict[Any, dict[Any, Make | None]] = {}
        self.whole_numbers: dict[Any, Any] = {}
        self.device = torch.device("cpu")
        with mode:
            self.usual = dict(vars(torch.empty(0, device=self.device)))

    def run(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        """func(*args, **kwargs)."""
        key = _key(args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        makes = self.makes.get(func)
        if makes is None:
            makes = self.makes[func] = {}
        if key in makes:
            make = makes[key]
            if make is None:
                return func(*args, **kwargs)
            return make((*args, *kwargs.values()) if kwargs else args)
        out = func(*args, **kwargs)
        makes[key] = self._how(func, (*args, *kwargs.values()), out)
        return out

    def _how(self, func: Any, args: Args, out: Any) -> Make | None:
        """How to make such a result again; None where PyTorch has to."""
        if out is None and func._schema.is_mutable:
            return lambda _: None
        if isinstance(out, tuple | list):
            makes = [self._one(func, args, one) for one in out]
            if any(make is None for make in makes):
                return None
            kind = type(out)
            return lambda now: kind(make(now) for make in makes if make is not None)
        return self._one(func, args, out)

    def _one(self, func: Any, args: Args, out: Any) -> Make | None:
        if type(out) is not FakeTensor:
            return None
        for place, arg in enumerate(args):
            if arg is out:
                return lambda now: now[place]
        if func._schema.is_mutable:
            return None
        shape, stride, offset = tuple(out.shape), out.stride(), int(out.storage_offset())
        kind = out.dtype
        if out.device != self.device:
            return None
        storage = out.untyped_storage()
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor) and arg.untyped_storage()._cdata == storage._cdata:
                return lambda now: self._view(now[place], shape, stride, offset, kind)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if out.numel() else 0
        if offset or storage.nbytes() != extent * out.element_size():
            return None
        return lambda now: self._fresh(shape, stride, kind)

    def _fresh(self, shape: tuple[int, ...], stride: tuple[int, ...], kind: torch.dtype) -> Tensor:
        with torch._C._DisableTorchDispatch():
            inner = torch.empty_strided(shape, stride, dtype=kind, device="meta")
        return self._fake(inner)

    def _view(
        self, base: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, kind: torch.dtype
    ) -> Tensor:
        storage = base.untyped_storage()
        with torch._C._DisableTorchDispatch():
            inner = torch.empty(0, dtype=kind, device="meta").set_(storage, offset, shape, stride)
        return self._fake(inner)

    def _fake(self, inner: Tensor) -> Tensor:
        """A fake tensor around one without memory, as FakeTensor's own constructor makes it."""
        made = Tensor._make_subclass(
            FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        vars(made).update(self.usual)
        return made


def _key(args: Args, kwargs: dict[str, Any]) -> Any:
    parts: list[Any] = []
    for arg in args:
        part = _part(arg)
        if part is None:
            return None
        parts.append(part)
    for name, arg in kwargs.items():
        part = _part(arg)
        if part is None:
            return None
        parts.append((name, part))
    return tuple(parts)


def _part(arg: Any) -> Any:
    """What a result can depend on of one argument; None where that is more than can be told here."""
    kind = type(arg)
    if kind is FakeTensor:
        if arg.constant is not None:
            return None
        return arg.dtype, tuple(arg.shape), arg.stride(), arg.storage_offset()
    if kind in _PLAIN:
        return kind, arg
    if kind is list or kind is tuple:
        inner = tuple(map(_part, arg))
        return None if None in inner else inner
    return None

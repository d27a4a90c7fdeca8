"""Whole numbers that are known although tensors are fake: choices of experts, and what follows from them.

Real tensors of numbers stand beside the fake ones. An op whose inputs are all known is done for real too, so
that the code that permutes and counts copies runs as it is. What other ranks send follows from the rule by
which they choose (`routes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from meshwright.runtime.dryrun.routes import Routes

aten = torch.ops.aten
_CPU = torch.device("cpu")
MOST_KEPT = 4096
"""Results that are kept before all are made anew."""
LARGEST = 2**21
"""Elements beyond which a tensor's values are not kept: attention masks of whole sequences."""
_VALUE = "known_value"
"""The attribute of a fake tensor that holds its value: gone with it."""
_WHOLE = {torch.int64, torch.int32, torch.bool}
_BY_VALUE = {aten.bincount.default, aten.repeat_interleave.Tensor}
"""Ops whose result's size depends on values."""
_MAKERS = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.scalar_tensor.default,
}


class KnownNumbers:
    """The values of fake tensors of whole numbers."""

    def __init__(self, routes: Routes, run: Callable[..., Any], done: dict[Any, Any] | None = None) -> None:
        """`run` runs an op on fake tensors. `done` holds what was done for real: every layer, micro-batch and
        rank counts and sorts the same numbers."""
        self.routes, self.run_fake = routes, run
        self.done: dict[Any, Any] = {} if done is None else done

    def chosen(self, num_tokens: int, layer: int, place: int) -> Tensor:
        """A fake tensor of the experts that the rank at a place along ep chooses, with its value."""
        place = self.routes.alike(num_tokens, place)
        real = self._once(
            (self.routes.rule, num_tokens, layer if self.routes.differs_by_layer else 0, place),
            lambda: self.routes.decision(num_tokens, layer, place, _CPU).choices,
        )
        fake = torch.empty(real.shape, dtype=real.dtype, device=_CPU)
        vars(fake)[_VALUE] = real
        return fake

    def _once(self, key: Any, make: Callable[[], Any], *inputs: Any) -> Any:
        """What `make` makes of these inputs, made once. Inputs are kept: keys name them by their places in
        memory."""
        found = self.done.get(key)
        if found is None:
            if len(self.done) > MOST_KEPT:
                self.done.clear()
            with _disable_current_modes():
                found = self.done[key] = make(), inputs
        return found[0]

    def value(self, tensor: Tensor) -> Tensor | None:
        """The real tensor of a fake one, where it is known."""
        found: Tensor | None = vars(tensor).get(_VALUE)
        return found

    def item(self, tensor: Tensor) -> Any:
        """A number that the host reads: its value where it is known, else 1 of whole numbers, False of truth
        values and 0.0 of others."""
        known = self.value(tensor)
        if known is not None:
            with _disable_current_modes():
                return known.item()
        if tensor.dtype == torch.bool:
            return False
        return 0.0 if tensor.is_floating_point() else 1

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op on fake tensors, and for real where its inputs are known."""
        every, some = self._inputs(args, kwargs)
        if not some:
            if every and func in _MAKERS:
                return self._made(func, args, kwargs)
            return self.run_fake(func, args, kwargs)
        if not every:
            out = self.run_fake(func, args, kwargs)
            if func._schema.is_mutable:
                self._forget_changed(args, out)
            return out
        real = self._real(func, args, kwargs)
        if func in _BY_VALUE:
            out = torch.empty(real.shape, dtype=real.dtype, device=args[0].device)
        else:
            out = self.run_fake(func, args, kwargs)
        self._keep(out, real)
        return out

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = self.run_fake(func, args, kwargs)
        if out.dtype in _WHOLE and out.numel() <= LARGEST:
            self._keep(out, self._real(func, args, kwargs))
        return out

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, bool]:
        """Whether every tensor among the inputs is known, and whether any is."""
        every, some = True, False
        for leaf in _tensors(args, kwargs):
            known = _VALUE in vars(leaf)
            every, some = every and known, some or known
        return every, some

    def _real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changes = func._schema.is_mutable
        inputs: list[Tensor] = []

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            inputs.append(vars(leaf)[_VALUE])
            return inputs[-1].clone() if changes else inputs[-1]

        def run() -> Any:
            return func(*real_args, **real_kwargs)

        with _disable_current_modes():
            real_args, real_kwargs = tree_map(value, (args, kwargs))
            if "device" in real_kwargs:
                real_kwargs["device"] = _CPU
            key = _key(func, real_args, real_kwargs)
            return run() if changes or key is None else self._once(key, run, *inputs)

    def _keep(self, out: Any, real: Any) -> None:
        for fake, known in zip(tree_flatten(out)[0], tree_flatten(real)[0], strict=True):
            if isinstance(fake, Tensor) and fake.dtype in _WHOLE and fake.numel() <= LARGEST:
                vars(fake)[_VALUE] = known

    def _forget_changed(self, args: tuple[Any, ...], out: Any) -> None:
        """A known tensor into which an op wrote what is not known."""
        changed = tree_flatten(out)[0]
        self.forget([leaf for leaf in tree_flatten(args)[0] if any(leaf is one for one in changed)])

    def forget(self, written: Any) -> None:
        """Tensors into which somebody else writes."""
        for leaf in tree_flatten(written)[0]:
            if isinstance(leaf, Tensor):
                vars(leaf).pop(_VALUE, None)

    # what other ranks send

    def gathered(self, out: Tensor, own: Tensor, axis: str, num_ranks: int) -> None:
        """All ranks' choices along ep; along etp, whose ranks all choose as one does, everybody's counts."""
        known = self.value(own)
        if known is None:
            return

        def gathered() -> Tensor:
            places = range(num_ranks)
            return torch.cat([self.routes.choices_of(known, p) if axis == "ep" else known for p in places])

        vars(out)[_VALUE] = self._once(
            (self.routes.rule, "gathered", axis, num_ranks, id(known)), gathered, known
        )

    def exchanged(self, out: Tensor, own: Tensor, place: int, num_ranks: int) -> None:
        """Of every rank along ep, how many copies come for this rank's experts."""
        known = self.value(own)
        if known is None:
            return

        def exchanged() -> Tensor:
            local = known.numel() // num_ranks
            mine = slice(place * local, (place + 1) * local)
            return torch.cat([self.routes.counts_of(known, p)[mine] for p in range(num_ranks)])

        vars(out)[_VALUE] = self._once(
            (self.routes.rule, "exchanged", place, num_ranks, id(known)), exchanged, known
        )


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What names a call: tensors by where they are, all else by value; None for what cannot be told."""
    try:
        key = func, _named(args), tuple((name, _named(value)) for name, value in kwargs.items())
        hash(key)
    except TypeError:
        return None
    return key


def _named(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return "tensor", id(arg)
    if isinstance(arg, list | tuple):
        return tuple(map(_named, arg))
    return type(arg), arg


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, which are there or in a list."""
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (one for one in arg if isinstance(one, Tensor))

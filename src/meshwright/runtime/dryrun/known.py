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

    def __init__(self, routes: Routes, run: Callable[..., Any]) -> None:
        """`run` runs an op on fake tensors."""
        self.routes, self.run_fake = routes, run

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
        def value(leaf: Any) -> Any:
            return vars(leaf)[_VALUE] if isinstance(leaf, Tensor) else leaf

        real_args, real_kwargs = tree_map(value, (args, kwargs))
        if "device" in real_kwargs:
            real_kwargs["device"] = torch.device("cpu")
        with _disable_current_modes():
            return func(*real_args, **real_kwargs)

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
        with _disable_current_modes():
            places = range(num_ranks)
            parts = [self.routes.choices_of(known, p) if axis == "ep" else known for p in places]
            vars(out)[_VALUE] = torch.cat(parts)

    def exchanged(self, out: Tensor, own: Tensor, place: int, num_ranks: int) -> None:
        """Of every rank along ep, how many copies come for this rank's experts."""
        known = self.value(own)
        if known is None:
            return
        with _disable_current_modes():
            local = known.numel() // num_ranks
            mine = slice(place * local, (place + 1) * local)
            counts = [self.routes.counts_of(known, p)[mine] for p in range(num_ranks)]
            vars(out)[_VALUE] = torch.cat(counts)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, which are there or in a list."""
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (one for one in arg if isinstance(one, Tensor))

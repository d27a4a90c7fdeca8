"""Selective recompute: what a cheap op makes is made again in backward instead of being kept.

Later ops keep such a result as their input. While the result is alive it is known by its storage; when an op
saves it, a recipe is kept in its place, and unpacking runs the op again on its own inputs, which are kept
anyway. Nothing that communicates is repeated (docs/how-it-works.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class _Recipe:
    """How to make a tensor again: what its op does, and on what."""

    compute: Compute
    inputs: tuple[Tensor, ...]

    def result(self) -> Tensor:
        with torch.no_grad():
            return self.compute(*self.inputs)


_recipes: dict[int, tuple[weakref.ref[Tensor], _Recipe]] = {}
"""By a living result's storage."""


def _storage(tensor: Tensor) -> int:
    """A number that the storages alive have each for themselves; tensors without values have one too, and no
    address."""
    return tensor.untyped_storage()._cdata


class _Remade(torch.autograd.Function):
    """Keeps the op's inputs alone, and runs it again under autograd for its gradients."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return compute(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.compute(*inputs)
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        made = iter(torch.autograd.grad(out, wanted, grads[0]))
        return None, *(next(made) if needed else None for needed in ctx.needs_input_grad[1:])


def remade(compute: Compute, *inputs: Tensor) -> Tensor:
    """compute(*inputs), made again wherever backward needs it. `compute` must not communicate nor draw."""
    out = _Remade.apply(compute, *inputs)
    if torch.is_grad_enabled():
        place = _storage(out)
        recipe = _Recipe(compute, tuple(x.detach() for x in inputs))
        _recipes[place] = (weakref.ref(out, lambda _: _recipes.pop(place, None)), recipe)
    return out


_Kept = Tensor | tuple[_Recipe, Any, Any, Any]
"""A saved tensor itself, or how to make it again and how it lies in what is made: size, strides, offset."""


def _pack(tensor: Tensor) -> _Kept:
    known = _recipes.get(_storage(tensor))
    made = None if known is None else known[0]()
    if known is None or made is None or made.dtype != tensor.dtype:
        return tensor
    return known[1], tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(kept: _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, size, stride, offset = kept
    return recipe.result().as_strided(size, stride, offset)


@contextmanager
def remaking() -> Iterator[None]:
    """While active, ops that would save a remade result keep its recipe."""
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield

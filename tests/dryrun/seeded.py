"""Faults put on one rank that stands for no class, in the process that tests; forked ones inherit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from meshwright.runtime import build, dispatch, mesh, moe

VICTIM = 3
"""The second rank of the second stage, where there are two of two."""


def _on_victim(owner: Any, name: str, wrong: Callable[..., Any], patch: Any) -> None:
    """Replace a function where the fake world's rank is the victim."""
    right = getattr(owner, name)

    def either(*args: Any, **options: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() == VICTIM:
            return wrong(right, *args, **options)
        return right(*args, **options)

    patch.setattr(owner, name, either)


def skips_an_all_to_all(patch: Any) -> None:
    def kept(right: Any, x: Any, received: list[int], sent: list[int], group: Any) -> Any:
        return x if sum(received) == sum(sent) else right(x, received, sent, group)

    _on_victim(dispatch, "exchange", kept, patch)


def has_a_wrong_group(patch: Any) -> None:
    def shifted(right: Any, ranks: list[int], axis: str) -> Any:
        if axis == "ep":
            ranks = [VICTIM - 2, VICTIM]
        return right(ranks, axis)

    _on_victim(mesh, "_group", shifted, patch)


def shards_a_parameter_twice(patch: Any) -> None:
    def halved(right: Any, *shape: int) -> Any:
        return right(shape[0] // 2, *shape[1:])

    _on_victim(moe, "_weight", halved, patch)


def is_a_layer_off(patch: Any) -> None:
    def stage(right: Any, setting: Any, layers: tuple[int, ...], *ends: bool) -> Any:
        return right(setting, tuple(layer - 1 for layer in layers) if layers[0] else layers, *ends)

    _on_victim(build, "Stage", stage, patch)


def has_another_type(patch: Any) -> None:
    def other(right: Any, held: Any, mesh: Any, kind: Any, *rest: Any) -> Any:
        return right(held, mesh, torch.float16, *rest)

    _on_victim(build, "Store", other, patch)


FAULTS: tuple[tuple[Callable[[Any], None], str, str], ...] = (
    (skips_an_all_to_all, "matching", "where the others of ranks 2 all_to_all"),
    (has_a_wrong_group, "groups", "speaks along ep with ranks 1, 3, where the layout has ranks 2, 3"),
    (shards_a_parameter_twice, "build", "(2, 16, 32) where the graph has (4, 16, 32)"),
    (is_a_layer_off, "build", "stage 1: missing layers.3."),
    (has_another_type, "element types", "holds layers.2.attention_norm.weight in fp16, not fp32"),
)
"""Each with the check that names it, and what it says."""

"""The two places at which a dry run differs from training, and what follows from tensors without values.

1. Routing: every rank's choices of experts are given, exactly balanced or by the workload's histogram
   (`routes.py`), and known to all ranks; training lets the router choose.
2. Grouped matmul: fake tensors of PyTorch take it in bf16 only; here its result has a shape for every type.

Nothing else is replaced. Tensors have no values, so that a number which the host reads is one of those that
`known.py` gives: no step is skipped, nothing overflows. First weights are never drawn. The vote that torch's
pipelining holds before its first step runs and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from meshwright.runtime.dryrun.known import KnownNumbers
from meshwright.runtime.moe import MoE
from meshwright.runtime.routing import Decision


@contextmanager
def routing(known: KnownNumbers) -> Iterator[None]:
    """While active, expert layers that route evenly take their choices from what all ranks know."""
    even = MoE._even

    def chosen(self: MoE, logits_TE: Tensor, valid_T: Tensor | None) -> Decision:
        place = self.setting.mesh.position("ep")
        return Decision(known.chosen(logits_TE.shape[0], self.layer, place))

    MoE._even = chosen  # type: ignore[method-assign]
    try:
        yield
    finally:
        MoE._even = even  # type: ignore[method-assign]


def grouped_mm(
    x: Tensor,
    y: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of `aten._grouped_mm` without values: rows of x times a matrix each, [M, N]; where groups
    divide the inner dim, a matrix for each group, [G, M, N]; where they divide the columns of y, [M, N]."""
    shape: tuple[int, ...]
    if x.dim() == 3 and y.dim() == 3:
        shape = (x.shape[0], x.shape[1], y.shape[-1])
    elif x.dim() == 2 and y.dim() == 2:
        assert offs is not None
        shape = (offs.shape[0], x.shape[0], y.shape[1])
    else:
        shape = (x.shape[-2], y.shape[-1])
    return torch.empty(shape, dtype=out_dtype or x.dtype, device=x.device)


FAKE_OPS: dict[Any, Callable[..., Tensor]] = {torch.ops.aten._grouped_mm.default: grouped_mm}
"""Ops whose fake result is made here, for every type."""

"""Bytes of living tensors through real steps: what a process without a GPU's allocator cannot be asked for.

What operators take for themselves while they run is not seen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from meshwright.runtime.dryrun.storages import Storages


class Living(TorchDispatchMode):
    """Counts the storages that ops make while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = Storages()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_iter(out):
            if isinstance(one, Tensor):
                self.storages.note(one, "tensors")
        return out

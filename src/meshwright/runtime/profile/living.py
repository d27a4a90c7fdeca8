"""Bytes of living tensors, at their most: what a process without a GPU's allocator cannot be asked for.

A storage counts from the op that makes it until Python and autograd let go of it, however many views it has.
What operators take for themselves while they run is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Living(TorchDispatchMode):
    """Counts storages that ops make while it is active; `most` is the peak since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.most = 0
        self.known: dict[int, tuple[int, Any]] = {}

    def restart(self) -> None:
        """Forget the fullest moment so far."""
        self.most = self.total

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self.known:
            before, reference = self.known[key]
            if before != size:  # FSDP2 resizes in place
                self.known[key] = size, reference
                self._add(size - before)
            return
        self.known[key] = size, weakref.ref(storage, lambda _: self._gone(key))
        self._add(size)

    def _add(self, size: int) -> None:
        self.total += size
        self.most = max(self.most, self.total)

    def _gone(self, key: int) -> None:
        size, _ = self.known.pop(key)
        self._add(-size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_iter(out):
            if isinstance(one, Tensor) and type(one) is not torch.nn.Parameter:
                self.note(one)
        return out

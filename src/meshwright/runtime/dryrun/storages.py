"""Bytes of living tensors by class, from the storages that ops make and let go.

A storage counts once, however many views it has, from the op that makes it until Python lets go of it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from meshwright.ir.observed import Peak

CLASSES = ("parameters", "gradients", "optimizer", "activations", "other")
"""`activations`: what a forward makes, and what recompute makes again. `other`: what backward and the update
make and let go again."""


class Storages:
    """Living bytes by class, and the fullest moment since `restart`."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.total = 0
        self.most = 0
        self.at_most: dict[str, int] = {}
        self.moment = ""
        self.now = "build"
        self.named: dict[int, tuple[int, str, Any]] = {}

    def note(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.named:
            return
        size = storage.nbytes()
        self.named[key] = size, kind, weakref.ref(storage, lambda _: self._gone(key))
        self._add(kind, size)

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage to another class."""
        key = tensor.untyped_storage()._cdata
        if key not in self.named:
            self.note(tensor, kind)
            return
        size, before, ref = self.named[key]
        self.named[key] = size, kind, ref
        self.live[before] -= size
        self.live[kind] += size

    def restart(self, now: str) -> None:
        """Forget the fullest moment so far; what is now, in words."""
        self.now = self.moment = now
        self.most, self.at_most = self.total, dict(self.live)

    def peak(self) -> Peak:
        """The fullest moment."""
        return Peak({name: self.at_most.get(name, 0) for name in CLASSES}, self.moment)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self.total += size
        if self.total > self.most:
            self.most, self.at_most, self.moment = self.total, dict(self.live), self.now

    def _gone(self, key: int) -> None:
        size, kind, _ = self.named.pop(key)
        self._add(kind, -size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self.named.get(storage._cdata)
        if known is not None:
            before, kind, ref = known
            size = storage.nbytes()
            self.named[storage._cdata] = size, kind, ref
            self._add(kind, size - before)

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """While active, storages that are resized in place, as FSDP2's are, count with their new size."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

"""Watching the collectives of a run: kind, axis and bytes of every call, whoever makes it.

A dispatch mode sees the calls of this runtime, of FSDP2 and of torch's pipelining alike, so that what is
counted is what ran and not what code says of itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.ir.graph import CollectiveKind

_KINDS = {
    "allreduce_": CollectiveKind.ALL_REDUCE,
    "_allgather_base_": CollectiveKind.ALL_GATHER,
    "_reduce_scatter_base_": CollectiveKind.REDUCE_SCATTER,
    "alltoall_base_": CollectiveKind.ALL_TO_ALL,
    "send": CollectiveKind.SEND_RECV,
}
"""Operators of c10d by what they are; `recv_` is the other end of a `send` and is not counted again."""


@dataclass(frozen=True, slots=True)
class Call:
    """One collective that ran. `bytes` as CollectiveKind defines them."""

    kind: CollectiveKind
    axis: str
    num_ranks: int
    bytes: int


class Watch(TorchDispatchMode):
    """Lists the collectives that run while it is active.

    `groups` names the axis of each group; a call in a group that has no name there is listed under the
    group's own name, so that nothing is lost.
    """

    def __init__(self, groups: Mapping[str, ProcessGroup]) -> None:
        super().__init__()
        self.axis_of = {group.group_name: axis for axis, group in groups.items()}
        self.calls: list[Call] = []

    def counted(self) -> Counter[Call]:
        """How often each kind of call ran."""
        return Counter(self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        kind = _KINDS.get(name)
        if kind is None:
            return
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        group = ProcessGroup.unbox(boxed)
        axis = self.axis_of.get(group.group_name, group.group_name)
        self.calls.append(Call(kind, axis, group.size(), _payload(kind, args)))


def _is_group(arg: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(arg._type()) if hasattr(arg, "_type") else False


def _payload(kind: CollectiveKind, args: tuple[Any, ...]) -> int:
    """Output of an all-gather; input of a reduce-scatter and of an all-to-all; else the buffer."""
    place = 1 if kind in (CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_TO_ALL) else 0
    return _bytes(args[place])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(part) for part in value)

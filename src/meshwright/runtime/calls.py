"""What a call of `torch.distributed` is, seen where all of them pass: this runtime's, FSDP2's and those of
torch's pipelining alike, so that what is counted is what ran and not what code says of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from meshwright.ir.graph import CollectiveKind
from meshwright.ir.observed import Call

_KINDS = {
    "allreduce_": CollectiveKind.ALL_REDUCE,
    "_allgather_base_": CollectiveKind.ALL_GATHER,
    "_reduce_scatter_base_": CollectiveKind.REDUCE_SCATTER,
    "alltoall_base_": CollectiveKind.ALL_TO_ALL,
    "send": CollectiveKind.SEND_RECV,
    "recv_": CollectiveKind.SEND_RECV,
}
"""Operators of c10d by what they are."""
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "int64"}


def element_name(kind: torch.dtype) -> str:
    """A type of elements as results name it."""
    return _NAMES.get(kind, str(kind).removeprefix("torch."))


def call_of(func: Any, args: tuple[Any, ...], axis_of: Mapping[str, str]) -> tuple[Call, ProcessGroup]:
    """An operator of c10d with its arguments as a Call, and the group that it runs in.

    `axis_of` names the axis of a group by the group's name; one that is not in it stands under its own name.
    """
    name = func._schema.name.removeprefix("c10d::")
    kind = _KINDS.get(name)
    if kind is None:
        raise AssertionError(f"no collective is known by the name of {name}")
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
    group = ProcessGroup.unbox(boxed)
    axis = axis_of.get(group.group_name, group.group_name)
    return _call(kind, name, axis, args), group


def _call(kind: CollectiveKind, name: str, axis: str, args: tuple[Any, ...]) -> Call:
    match kind:
        case CollectiveKind.SEND_RECV:
            (tensor,) = args[0]
            size, is_receive = _bytes(tensor), name == "recv_"
            return Call(
                kind, axis, element_name(tensor.dtype), size, size, peer=args[2], is_receive=is_receive
            )
        case CollectiveKind.ALL_REDUCE:
            (tensor,) = args[0]
            return Call(kind, axis, element_name(tensor.dtype), _bytes(tensor), _bytes(tensor))
        case CollectiveKind.ALL_TO_ALL:
            out, own, _, received, sent = args[:5]
            rows = tuple(sent), tuple(received)
            return Call(kind, axis, element_name(own.dtype), _bytes(own), _bytes(out), *rows)
    out, own = args[0], args[1]
    most, other = (own, out) if kind is CollectiveKind.REDUCE_SCATTER else (out, own)
    return Call(kind, axis, element_name(own.dtype), _bytes(most), _bytes(other))


def _is_group(arg: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(arg._type()) if hasattr(arg, "_type") else False


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())

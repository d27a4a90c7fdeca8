"""Labels in a profile: each collective by its axis, kind and bytes, each module by its name.

They are put on from outside while a profile runs, so that training pays nothing for them, and so that the
calls of FSDP2 and of torch's pipelining carry them as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import schedules
from torch.profiler import record_function

from meshwright.ir.graph import CollectiveKind

_REDUCE, _GATHER = CollectiveKind.ALL_REDUCE, CollectiveKind.ALL_GATHER
_SCATTER, _EXCHANGE = CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_TO_ALL
CALLS: dict[str, tuple[CollectiveKind, int]] = {
    "all_reduce": (_REDUCE, 0),
    "all_gather_single": (_GATHER, 0),
    "all_gather_into_tensor": (_GATHER, 0),
    "reduce_scatter_single": (_SCATTER, 1),
    "reduce_scatter_tensor": (_SCATTER, 1),
    "all_to_all_single": (_EXCHANGE, 1),
}
"""Functions of torch.distributed with their kind, and which argument's bytes count: see CollectiveKind."""
_NAMES = ("output", "input", "tensor", "output_tensor", "input_tensor")


@contextmanager
def labelled_collectives() -> Iterator[None]:
    """Label every collective that is called while this is active."""
    with ExitStack() as stack:
        for name, (kind, place) in CALLS.items():
            if hasattr(dist, name):
                stack.enter_context(replaced(dist, name, partial(_labelled, kind, place)))
        stack.enter_context(replaced(*sends_of(), _labelled_sends))
        yield


def sends_of() -> tuple[Any, str]:
    """Where torch's pipelining sends and receives, by torch's version: the owner and name of a function."""
    return (schedules, "_batch_p2p") if hasattr(schedules, "_batch_p2p") else (dist, "batch_isend_irecv")


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call of torch.distributed: the result first, if it is another one."""
    return [one for one in (*args, *(kwargs.get(name) for name in _NAMES)) if isinstance(one, Tensor)]


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """While this is active, a function is what `wrap` makes of it."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _labelled(kind: CollectiveKind, place: int, call: Any) -> Any:
    def labelled(*args: Any, **kwargs: Any) -> Any:
        tensors = tensors_of(args, kwargs)
        payload = tensors[min(place, len(tensors) - 1)]
        with record_function(label(axis_of(kwargs.get("group")), kind, _bytes(payload))):
            return call(*args, **kwargs)

    return labelled


def _labelled_sends(call: Any) -> Any:
    """One label for each send of a batch; a receive is the other end of one."""

    def labelled(ops: list[Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for op in ops:
                if op.op is dist.isend:
                    name = label(axis_of(op.group), CollectiveKind.SEND_RECV, _bytes(op.tensor))
                    stack.enter_context(record_function(name))
            return call(ops, *args, **kwargs)

    return labelled


def label(axis: str, kind: CollectiveKind, size: int) -> str:
    """The label of a collective."""
    return f"collective:{axis} {kind.value} {size}"


def axis_of(group: ProcessGroup | None) -> str:
    """The axis that a group was made for: its description."""
    return group.group_desc if isinstance(group, ProcessGroup) else "world"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def labelled_modules(stages: dict[int, nn.Module]) -> Iterator[None]:
    """Label the forward pass of every module by its name in the stage, which is the graph's."""
    hooks = []
    for stage in stages.values():
        for name, module in stage.named_modules():
            hooks += _hooked(name, module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooked(name: str, module: nn.Module) -> list[Any]:
    open_: list[Any] = []

    def before(*_: Any) -> None:
        span = record_function(f"module:{name}")
        span.__enter__()
        open_.append(span)

    def after(*_: Any) -> None:
        if open_:
            open_.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_hook(after, always_call=True),
    ]


@contextmanager
def labelled_method(owner: Any, name: str, word: str) -> Iterator[None]:
    """Label one object's method."""
    call = getattr(owner, name)

    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"module:{word}"):
            return call(*args, **kwargs)

    setattr(owner, name, labelled)
    try:
        yield
    finally:
        delattr(owner, name)

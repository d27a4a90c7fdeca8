"""One look at every op of a dry run: collectives, FLOPs, living bytes, and numbers that the host reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from meshwright.ir.graph import CollectiveKind, attention_pairs
from meshwright.ir.observed import Call, Event, Work
from meshwright.runtime.calls import call_of
from meshwright.runtime.dryrun.flops import GROUPED, MATMULS, attention, attention_shape, is_attention
from meshwright.runtime.dryrun.known import KnownNumbers
from meshwright.runtime.dryrun.seams import FAKE_OPS
from meshwright.runtime.dryrun.storages import Storages
from meshwright.runtime.mesh import Mesh

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Stands above fake tensors and sees every op, whoever calls it."""

    def __init__(self, known: KnownNumbers) -> None:
        super().__init__()
        self.known, self.storages = known, Storages()
        self.axis_of: Mapping[str, str] = {}
        self.events: list[Event] = []
        self.work = {"matmul": 0, "grouped_matmul": 0, "attention": 0}
        self.phase, self.paused, self.counts_bytes = "build", False, True
        self.window: int | None = None
        self._pairs: dict[int, int] = {}
        self._meanings: dict[Any, Callable[[Any, Any, Any], Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's guard against it would cost as much as an op."""
        return False

    def name_groups(self, mesh: Mesh) -> None:
        """Take the names of groups from a mesh."""
        self.axis_of = {group.group_name: axis for axis, group in mesh.groups.items()}

    def step_begins(self) -> None:
        """What is made from now on belongs to a step."""
        self.phase = "step"
        self.storages.restart("beginning of the step")

    def done(self) -> Work:
        """FLOPs so far."""
        return Work(**self.work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        meant = self._meanings.get(func)
        if meant is None:
            meant = self._meanings[func] = self._meaning(func)
        return meant(func, args, kwargs)

    def _meaning(self, func: Any) -> Callable[[Any, Any, Any], Any]:
        """What is to be done with calls of an op."""
        if func is torch.ops.prim.device.default:
            return lambda func, args, kwargs: args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return lambda func, args, kwargs: self.known.item(args[0])
        if func.namespace == "c10d":
            return self._communicated
        if func in FAKE_OPS or func in MATMULS or func in GROUPED or is_attention(func):
            return self._worked
        return self._passed

    def _passed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op whose FLOPs are not counted."""
        out = self.known.run(func, args, kwargs)
        if args and out is args[0]:
            return out
        self._hold(out)
        return out

    def _worked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op whose FLOPs are counted."""
        fake = FAKE_OPS.get(func)
        out = fake(*args, **kwargs) if fake is not None else self.known.run_fake(func, args, kwargs)
        self._count(func, args, out)
        self._hold(out)
        return out

    def _hold(self, out: Any) -> None:
        if not self.counts_bytes:
            return
        if isinstance(out, Tensor):
            self.storages.note(out, self._class())
        elif isinstance(out, list | tuple):
            for one in out:
                self._hold(one)

    def _class(self) -> str:
        """Of what is made now. Backward runs without gradients unless it makes something again."""
        if self.phase == "build":
            return "parameters"
        in_backward = torch._C._current_graph_task_id() != -1
        if self.phase == "update" or (in_backward and not torch.is_grad_enabled()):
            return "other"
        return "activations"

    def _count(self, func: Any, args: Any, out: Any) -> None:
        if func in MATMULS:
            self.work["matmul"] += MATMULS[func](args, out)
        elif func in GROUPED:
            self.work["grouped_matmul"] += GROUPED[func](args, out)
        elif (seen := attention_shape(func, args)) is not None:
            q, k, v, is_backward = seen
            made = args[5] if is_backward else out[1]  # the log-sum-exps, which backward is given
            place = made.untyped_storage()._cdata
            if is_backward:
                pairs = self._pairs[place]
            else:
                pairs = self._pairs[place] = attention_pairs(int(k.shape[2]), self.window)
            self.work["attention"] += attention(q, v, pairs, is_backward)

    # collectives

    def _communicated(self, func: Any, args: Any, kwargs: Any) -> Any:
        call, group = self._noted(func, args)
        out = _sent(func, args, kwargs)
        self._follow(call.kind, call.axis, group, args)
        return out

    def _noted(self, func: Any, args: Any) -> tuple[Call, ProcessGroup]:
        """What a collective is; it is among the events from now on."""
        call, group = call_of(func, args, self.axis_of)
        if not self.paused:
            self.events.append(call)
        return call, group

    def _follow(self, kind: CollectiveKind, axis: str, group: ProcessGroup, args: Any) -> None:
        """What whole numbers are known after it, and whose storage its result is."""
        self.known.forget(args[0])
        if kind is CollectiveKind.ALL_GATHER:
            self.known.gathered(args[0], args[1], axis, group.size())
            if axis in ("dp_cp", "edp", "dp_shard", "edp_shard"):
                self.storages.rename(args[0], "parameters")
        elif kind is CollectiveKind.ALL_TO_ALL and args[0].dtype == torch.int64:
            self.known.exchanged(args[0], args[1], group.rank(), group.size())
        elif kind is CollectiveKind.REDUCE_SCATTER and axis in ("dp_cp", "edp", "dp_shard", "edp_shard"):
            self.storages.rename(args[0], "gradients")


def _sent(func: Any, args: Any, kwargs: Any) -> Any:
    """The call to a fake process group, which looks at sizes alone: tensors on the device `meta` stand in for
    those without values, and what comes back is a handle to wait for."""

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")

    with _disable_current_modes():
        return func(*tree_map(stand_in, args), **kwargs)

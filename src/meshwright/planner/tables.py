"""Bytes and seconds of every kind of block for every layout of a space, each distinct block priced once.

A block depends on tp, cp, sequence parallelism and micro-batch; with experts also on ep, etp and the
dispatcher; and where ZeRO gathers or reduces in every micro-batch, on dp. Layouts that agree on these share
an entry. Entries are made for all of them in one call, by arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.cost.collectives import Fanout
from meshwright.cost.parts import BlockBytes, Setting, block_bytes, head_bytes
from meshwright.cost.placement import Group
from meshwright.ir.blocks import embedding_block, head_block, layer_block
from meshwright.ir.dense import Shape
from meshwright.ir.graph import Block, CollectiveKind
from meshwright.ir.lowering import LoweredBlock, block_at_levels, gradient_reductions, parameter_gathers
from meshwright.ir.parameters import block_parameters
from meshwright.ir.program import input_bytes, send_bytes
from meshwright.ir.step import phases_that_gather, reduces_in_backward
from meshwright.ir.tasks import CommTask, Phase, Task
from meshwright.planner.keys import Keys, counted, op_degrees, positions
from meshwright.planner.prices import Prices
from meshwright.planner.routing import fanout_of, has_fixed_capacity, load_over
from meshwright.planner.space import Bases, Choice, Space
from meshwright.planner.stages import Kind, block_kinds, layer_kinds
from meshwright.planner.times import (
    DATA_AXES,
    KernelTimes,
    Running,
    axis_groups,
    block_times,
    is_routed,
    kernel_times,
    price_collective,
)
from meshwright.policy import Dispatcher, Recompute

Array = Any
Seconds = Array
"""Forward, input-gradient (with recompute) and weight-gradient seconds of each kind: (3, kinds, N)."""

PER_RANK: tuple[Dispatcher, ...] = ("deepep", "hybridep")
"""Dispatchers that send a token once to each rank: how often depends on ep in a way of its own."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What ZeRO adds to a block in every micro-batch."""

    gathers: tuple[Phase, ...]
    reduces: bool

    def __bool__(self) -> bool:
        return bool(self.gathers) or self.reduces


NO_TRAFFIC = Traffic((), False)


@dataclass(frozen=True)
class _Entries:
    """One kind of block for every distinct key: `seconds` by recompute and overlap as (3, keys), `work` their
    sums, `bytes` by recompute."""

    seconds: dict[tuple[Recompute, bool], Array]
    bytes: dict[Recompute, BlockBytes]
    work: dict[tuple[Recompute, bool], Array] = field(default_factory=dict)

    def fill(self, chosen: Array, part: _Entries, count: int) -> None:
        """Put a part in its place among `count` keys."""
        for key, seconds in part.seconds.items():
            self.seconds.setdefault(key, np.zeros((3, count)))[:, chosen] = seconds
        for level, size in part.bytes.items():
            if level not in self.bytes:
                blank: list[Any] = [np.zeros(count) for _ in BlockBytes.__slots__]
                self.bytes[level] = BlockBytes(*blank)
            for name in BlockBytes.__slots__:
                getattr(self.bytes[level], name)[chosen] = getattr(size, name)


class Tables:
    """Entries of a space at one sequence length, made when they are first asked for."""

    def __init__(self, space: Space, priced: Prices, sequence_length: int, needs_bytes: bool = True) -> None:
        self.space, self.priced, self.sequence_length = space, priced, sequence_length
        self.needs_bytes = needs_bytes
        self.kinds = block_kinds(space.model)
        self.first_layer = layer_kinds(space.model)
        self._keys: dict[tuple[tuple[int, ...], tuple[str, ...]], Keys] = {}
        self._entries: dict[tuple[Kind, Dispatcher, Traffic], _Entries] = {}
        self._with: dict[Traffic, tuple[int, ...]] = {}
        self._shared: dict[tuple[Kind, bool, bool], dict[Recompute, KernelTimes]] = {}

    def traffic(self, pp: int, choice: Choice) -> Traffic:
        """What ZeRO adds to a block under a pipeline of a degree."""
        engine, zero = self.space.engine, choice.zero_stage
        return Traffic(phases_that_gather(engine, zero, pp), reduces_in_backward(engine, zero, pp))

    def seconds(self, pp: int, choice: Choice, rows: Array) -> Seconds:
        """Seconds of each kind of block for some bases of a pipeline degree, by their positions."""
        traffic = self.traffic(pp, choice)
        found = []
        for kind in self.kinds:
            entries = self._of(kind, choice.dispatcher, traffic)
            where = self._key_of(kind, traffic).of[pp][rows]
            found.append(entries.seconds[self._level(kind, choice)][:, where])
        return np.stack(found, axis=1)

    def work(self, pp: int, choice: Choice, rows: Array) -> Array:
        """Seconds of each kind of block, all phases together: (kinds, N)."""
        traffic = self.traffic(pp, choice)
        found = []
        for kind in self.kinds:
            entries = self._of(kind, choice.dispatcher, traffic)
            key = self._level(kind, choice)
            if key not in entries.work:
                entries.work[key] = entries.seconds[key].sum(axis=0)
            found.append(entries.work[key][self._key_of(kind, traffic).of[pp][rows]])
        return np.stack(found)

    def _level(self, kind: Kind, choice: Choice) -> tuple[Recompute, bool]:
        """What of a choice a kind of block depends on, beside its dispatcher."""
        level: Recompute = choice.recompute if not isinstance(kind, str) else "none"
        return level, choice.expert_overlap and self._has_experts(kind)

    def bytes(self, pp: int, choice: Choice) -> tuple[BlockBytes, ...]:
        """Bytes of each kind of block for all bases of a pipeline degree."""
        found = []
        for kind in self.kinds:
            entries = self._of(kind, choice.dispatcher, NO_TRAFFIC)
            size = entries.bytes[self._level(kind, choice)[0]]
            where = self._key_of(kind, NO_TRAFFIC).of[pp]
            found.append(BlockBytes(*(getattr(size, name)[where] for name in BlockBytes.__slots__)))
        return tuple(found)

    def send_bytes(self, pp: int) -> Array:
        """Bytes that one rank sends to a neighbouring stage, for the bases of a pipeline degree."""
        bases = self.space.bases[pp]
        shape = self._shape(bases, "alltoall", 1)
        return send_bytes(self.space.model, shape, op_degrees(bases)) * np.ones(len(bases))

    def send_seconds(self, pp: int) -> Array:
        """Seconds of such a send, none of it hidden."""
        bases = self.space.bases[pp]
        groups = axis_groups(self.space.cluster, bases.degrees())
        task = CommTask("send", "forward", CollectiveKind.SEND_RECV, "pp", pp, self.send_bytes(pp))
        return sum(price_collective(task, self.priced, groups, Running("alltoall")))

    def _has_experts(self, kind: Kind) -> bool:
        return not isinstance(kind, str) and kind[0]

    def _key_of(self, kind: Kind, traffic: Traffic) -> Keys:
        names: tuple[str, ...] = ("tp", "cp", "micro_batch", "sequence_parallel")
        if self._has_experts(kind):
            names += ("ep", "etp")
        if traffic:
            names += ("dp",)
        degrees = self._degrees_with(traffic)
        key = (degrees, names)
        if key not in self._keys:
            self._keys[key] = Keys({pp: self.space.bases[pp] for pp in degrees}, names)
        return self._keys[key]

    def _degrees_with(self, traffic: Traffic) -> tuple[int, ...]:
        """The pipeline degrees at which some choice has this traffic; all of them where there is none."""
        if traffic not in self._with:
            self._with[traffic] = tuple(
                pp
                for pp in self.space.bases
                if not traffic or any(self.traffic(pp, choice) == traffic for choice in self.space.choices)
            )
        return self._with[traffic]

    def _of(self, kind: Kind, dispatcher: Dispatcher, traffic: Traffic) -> _Entries:
        if not self._has_experts(kind):
            dispatcher = "alltoall"
        key = (kind, dispatcher, traffic)
        if key not in self._entries:
            family = PER_RANK if dispatcher in PER_RANK else (dispatcher,)
            for one, entries in self._made(kind, family, traffic).items():
                self._entries[kind, one, traffic] = entries
        return self._entries[key]

    def _made(
        self, kind: Kind, family: tuple[Dispatcher, ...], traffic: Traffic
    ) -> dict[Dispatcher, _Entries]:
        """The entries of dispatchers whose blocks have the same nodes."""
        rows = self._key_of(kind, traffic).rows
        whole = {dispatcher: _Entries({}, {}) for dispatcher in family}
        for chosen, ep in self._alike(rows, kind, family[0]):
            for dispatcher, part in self._lowered(rows.where(chosen), kind, family, traffic, ep).items():
                whole[dispatcher].fill(chosen, part, len(rows))
        return whole

    def _alike(self, rows: Bases, kind: Kind, dispatcher: Dispatcher) -> Iterator[tuple[Array, int]]:
        """Positions of rows whose blocks have the same nodes, each with an ep that stands for them."""
        experts = self.space.model.num_experts
        if not self._has_experts(kind):
            stands = np.ones(len(rows), np.int64)
        elif dispatcher in PER_RANK:
            stands = rows.ep
        else:
            stands = np.where(rows.ep == experts, experts, 1)
        for sequence_parallel in (False, True):
            for alone in (False, True):
                own = (rows.sequence_parallel == sequence_parallel) & ((rows.tp == 1) == alone)
                for ep in np.unique(stands[own]).tolist():
                    yield np.flatnonzero(own & (stands == ep)), ep

    def _lowered(
        self, rows: Bases, kind: Kind, family: tuple[Dispatcher, ...], traffic: Traffic, ep: int
    ) -> dict[Dispatcher, _Entries]:
        """The entries of rows whose blocks have the same nodes."""
        engine, unit = self.space.engine, self.space.workload.compute_bytes
        sizes: Any = counted(rows, self.sequence_length)
        block = self._block(kind, self._shape(sizes, family[0], ep))
        params = block_parameters(self.space.model, block.name)
        added = [*parameter_gathers(block, params, sizes, traffic.gathers, unit)]
        if traffic.reduces:
            added += gradient_reductions(block.name, params, sizes, engine.gradient_bytes.value)
        lowered = block_at_levels(block, op_degrees(sizes), engine, self._levels(kind), added)
        found = {one: _Entries(self._seconds(rows, kind, lowered, one, bool(traffic)), {}) for one in family}
        if self.needs_bytes and not traffic:
            tp: Any = rows.tp
            load = self._loads[np.searchsorted(self._loaded, rows.ep)]
            size = {level: self._bytes(one, tp, level, load) for level, one in lowered.items()}
            for entries in found.values():
                entries.bytes.update(size)
        return found

    def _bytes(self, block: LoweredBlock, tp: int, level: Recompute, load: float) -> BlockBytes:
        setting = Setting(self.space.engine, self.space.workload, 0, 1)
        if block.name == "head":
            return head_bytes(block, setting, tp)
        return block_bytes(block, setting, level, load)

    def _levels(self, kind: Kind) -> dict[Recompute, None]:
        """The levels of recompute at which a kind of block is asked for."""
        if isinstance(kind, str):
            return {"none": None}
        return dict.fromkeys(["none", *(choice.recompute for choice in self.space.choices)])

    def _seconds(
        self,
        rows: Bases,
        kind: Kind,
        lowered: Mapping[Recompute, LoweredBlock],
        dispatcher: Dispatcher,
        with_dp: bool,
    ) -> dict[tuple[Recompute, bool], Array]:
        load = self._loads[np.searchsorted(self._loaded, rows.ep)]
        running = Running(dispatcher, False, load, self.fanout, self.fixed, rows.ep)
        own = self._kernels(rows, lowered, _depends_on_experts, running, with_dp)
        kernels = _added(own, *self._beside(kind, rows))
        found = {}
        for level in lowered:
            at_level = {**kernels["none"], "recompute": kernels[level]["recompute"]}
            for overlaps in dict.fromkeys(choice.expert_overlap for choice in self.space.choices):
                times = block_times(at_level, self.priced, replace(running, overlaps_experts=overlaps))
                totals = {phase: sum(parts.values()) for phase, parts in times.items()}
                backward = totals["recompute"] + totals["input_gradient"]
                phases = (totals["forward"], backward, totals["weight_gradient"])
                found[level, overlaps] = np.array(np.broadcast_arrays(*phases, rows.tp * 1.0)[:3])
            found.setdefault((level, False), found[level, overlaps])
        return found

    def _kernels(
        self,
        rows: Bases,
        lowered: Mapping[Recompute, LoweredBlock],
        which: Callable[[Task], bool],
        running: Running,
        with_dp: bool,
    ) -> dict[Recompute, KernelTimes]:
        """Kernel times of some of a block's tasks: all of them, and at other levels what is repeated."""
        groups = self._groups(rows, with_dp)
        found = {}
        for level, block in lowered.items():
            tasks = [t for t in block.tasks if which(t) and (level == "none" or t.phase == "recompute")]
            found[level] = kernel_times(tasks, self.priced, groups, running)
        return found

    def _beside(self, kind: Kind, rows: Bases) -> tuple[dict[Recompute, KernelTimes], Array]:
        """Kernel times of what stands before and beside the experts, and which of them each row has. How
        experts are divided does not matter there, so few rows differ."""
        sequence_parallel, alone = bool(rows.sequence_parallel[0]), bool(rows.tp[0] == 1)
        plain = self._key_of("embedding", NO_TRAFFIC).rows
        mine = plain.where((plain.sequence_parallel == sequence_parallel) & ((plain.tp == 1) == alone))
        key = (kind, sequence_parallel, alone)
        if key not in self._shared:
            sizes = counted(mine, self.sequence_length)
            block = self._block(kind, self._shape(sizes, "alltoall", 1))
            lowered = block_at_levels(block, op_degrees(sizes), self.space.engine, self._levels(kind))
            running = Running("alltoall", False, 1.0, self.fanout, self.fixed)
            self._shared[key] = self._kernels(
                mine, lowered, lambda task: not _depends_on_experts(task), running, False
            )
        return self._shared[key], positions(rows, mine, ("tp", "cp", "micro_batch"))

    def _groups(self, rows: Bases, with_dp: bool) -> dict[str, Group]:
        """Groups of rows. Axes inside a block stand where they do for any dp: then one is taken that the
        experts fold into."""
        degrees = rows.degrees()
        if not with_dp:
            degrees |= {"dp": rows.ep * rows.etp, "pp": np.ones_like(rows.tp), "dp_replicas": 1}
        return axis_groups(self.space.cluster, degrees)

    @cached_property
    def _loaded(self) -> Array:
        return np.unique(np.concatenate([bases.ep for bases in self.space.bases.values()]))

    @cached_property
    def fixed(self) -> bool:
        """Whether every expert takes a fixed number of tokens."""
        return has_fixed_capacity(self.space.model)

    @cached_property
    def fanout(self) -> Fanout:
        """How a token's experts spread."""
        return fanout_of(self.space.model)

    @cached_property
    def _loads(self) -> Array:
        model, routing = self.space.model, self.space.workload.routing
        return np.array([load_over(model, routing, ep, self.priced) for ep in self._loaded.tolist()])

    def _shape(self, rows: Bases, dispatcher: Dispatcher, ep: int) -> Shape:
        """A shape that stands for rows which agree on sequence parallelism, and on whether tp is 1."""
        alone = bool(np.all(rows.tp == 1))
        tp: Any = 1 if alone else rows.tp
        sizes: Any = rows.micro_batch
        return Shape(
            micro_batch_size=sizes,
            sequence_length=self.sequence_length,
            element_bytes=self.space.workload.compute_bytes,
            engine=self.space.engine,
            sequence_parallel=bool(np.any(rows.sequence_parallel)),
            dispatcher=dispatcher,
            ep=ep,
            tp=tp,
            input_bytes=input_bytes(self.space.workload, self.space.engine),
        )

    def _block(self, kind: Kind, shape: Shape) -> Block:
        if isinstance(kind, str):
            build = embedding_block if kind == "embedding" else head_block
            return build(self.space.model, shape)
        return layer_block(self.space.model, self.first_layer[kind], shape)


def _depends_on_experts(task: Task) -> bool:
    """Whether a task works on routed tokens, or on parameters that are divided over the data axes."""
    return is_routed(task) or (isinstance(task, CommTask) and task.axis in DATA_AXES)


def _added(
    own: Mapping[Recompute, KernelTimes], beside: Mapping[Recompute, KernelTimes], where: Array
) -> dict[Recompute, KernelTimes]:
    """Kernel times of two groups of tasks together, the second taken from these positions."""

    def taken(seconds: Array) -> Array:
        return seconds[where] if np.ndim(seconds) else seconds

    return {
        level: {
            phase: {name: seconds + taken(beside[level][phase][name]) for name, seconds in parts.items()}
            for phase, parts in times.items()
        }
        for level, times in own.items()
    }

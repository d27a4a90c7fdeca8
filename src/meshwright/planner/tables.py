"""Bytes and seconds of every kind of block for every layout of a space, each distinct block priced once.

A block depends on tp, cp, sequence parallelism and micro-batch; with experts also on ep, etp and the
dispatcher; and where ZeRO gathers or reduces in every micro-batch, on dp. Layouts that agree on these share
an entry. Entries are made for all of them in one call, by arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.cost.collectives import Fanout
from meshwright.cost.parts import BlockBytes, Setting, block_bytes, head_bytes
from meshwright.ir.blocks import embedding_block, head_block, layer_block
from meshwright.ir.dense import Shape
from meshwright.ir.graph import Block, CollectiveKind
from meshwright.ir.lowering import LoweredBlock, block_at_levels, gradient_reductions, parameter_gathers
from meshwright.ir.parameters import block_parameters
from meshwright.ir.program import input_bytes, send_bytes
from meshwright.ir.step import phases_that_gather, reduces_in_backward
from meshwright.ir.tasks import CommTask, Phase
from meshwright.planner.prices import Prices
from meshwright.planner.routing import fanout_of, has_fixed_capacity, load_over
from meshwright.planner.space import Bases, Choice, Space
from meshwright.planner.stages import Kind, block_kinds, layer_kinds
from meshwright.planner.times import Running, axis_groups, block_times, kernel_times, price_collective
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
    """One kind of block for every distinct key: `seconds` by recompute and overlap as (3, keys), `bytes` by
    recompute."""

    seconds: dict[tuple[Recompute, bool], Array]
    bytes: dict[Recompute, BlockBytes]

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


class _Keys:
    """The distinct values of some columns of the bases of some pipeline degrees, and which each base has."""

    def __init__(self, bases: Mapping[int, Bases], names: tuple[str, ...]) -> None:
        every = Bases(
            *(np.concatenate([getattr(one, name) for one in bases.values()]) for name in Bases.__slots__)
        )
        columns = np.stack([getattr(every, name).astype(np.int64) for name in names], axis=1)
        _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        self.rows = every.where(first)
        ends = np.cumsum([len(one) for one in bases.values()])
        self.of = dict(zip(bases, np.split(inverse.reshape(-1), ends[:-1]), strict=True))


class Tables:
    """Entries of a space at one sequence length, made when they are first asked for."""

    def __init__(self, space: Space, priced: Prices, sequence_length: int, needs_bytes: bool = True) -> None:
        self.space, self.priced, self.sequence_length = space, priced, sequence_length
        self.needs_bytes = needs_bytes
        self.kinds = block_kinds(space.model)
        self.first_layer = layer_kinds(space.model)
        self._keys: dict[tuple[tuple[int, ...], tuple[str, ...]], _Keys] = {}
        self._entries: dict[tuple[Kind, Dispatcher, Traffic], _Entries] = {}
        self._with: dict[Traffic, tuple[int, ...]] = {}

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
            overlaps = choice.expert_overlap and self._has_experts(kind)
            level: Recompute = choice.recompute if not isinstance(kind, str) else "none"
            where = self._key_of(kind, traffic).of[pp][rows]
            found.append(entries.seconds[level, overlaps][:, where])
        return np.stack(found, axis=1)

    def bytes(self, pp: int, choice: Choice) -> tuple[BlockBytes, ...]:
        """Bytes of each kind of block for all bases of a pipeline degree."""
        found = []
        for kind in self.kinds:
            entries = self._of(kind, choice.dispatcher, NO_TRAFFIC)
            level: Recompute = choice.recompute if not isinstance(kind, str) else "none"
            size = entries.bytes[level]
            where = self._key_of(kind, NO_TRAFFIC).of[pp]
            found.append(BlockBytes(*(getattr(size, name)[where] for name in BlockBytes.__slots__)))
        return tuple(found)

    def send_bytes(self, pp: int) -> Array:
        """Bytes that one rank sends to a neighbouring stage, for the bases of a pipeline degree."""
        bases = self.space.bases[pp]
        shape = self._shape(bases, "alltoall", 1)
        return send_bytes(self.space.model, shape, _degrees(bases)) * np.ones(len(bases))

    def send_seconds(self, pp: int) -> Array:
        """Seconds of such a send, none of it hidden."""
        bases = self.space.bases[pp]
        groups = axis_groups(self.space.cluster, bases.degrees())
        task = CommTask("send", "forward", CollectiveKind.SEND_RECV, "pp", pp, self.send_bytes(pp))
        return sum(price_collective(task, self.priced, groups, Running("alltoall")))

    def _has_experts(self, kind: Kind) -> bool:
        return not isinstance(kind, str) and kind[0]

    def _key_of(self, kind: Kind, traffic: Traffic) -> _Keys:
        names: tuple[str, ...] = ("tp", "cp", "micro_batch", "sequence_parallel")
        if self._has_experts(kind):
            names += ("ep", "etp")
        if traffic:
            names += ("dp",)
        degrees = self._degrees_with(traffic)
        key = (degrees, names)
        if key not in self._keys:
            self._keys[key] = _Keys({pp: self.space.bases[pp] for pp in degrees}, names)
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
        sizes: Any = _counted(rows, self.sequence_length)
        block = self._block(kind, self._shape(sizes, family[0], ep))
        params = block_parameters(self.space.model, block.name)
        added = [*parameter_gathers(block, params, sizes, traffic.gathers, unit)]
        if traffic.reduces:
            added += gradient_reductions(block.name, params, sizes, engine.gradient_bytes.value)
        levels = dict.fromkeys(["none", *(c.recompute for c in self.space.choices)])
        if isinstance(kind, str):
            levels = {"none": None}
        lowered = block_at_levels(block, _degrees(sizes), engine, levels, added)
        found = {one: _Entries(self._seconds(rows, lowered, one, bool(traffic)), {}) for one in family}
        if self.needs_bytes and not traffic:
            tp: Any = rows.tp
            load = self._loads[np.searchsorted(self._loaded, rows.ep)]
            size = {level: self._bytes(one, tp, load) for level, one in lowered.items()}
            for entries in found.values():
                entries.bytes.update(size)
        return found

    def _bytes(self, block: LoweredBlock, tp: int, load: float) -> BlockBytes:
        space = self.space
        if block.name == "head":
            return head_bytes(block, Setting(space.engine, space.workload, 0, 1), tp)
        return block_bytes(block, space.workload.compute_bytes, load)

    def _seconds(
        self, rows: Bases, lowered: dict[Recompute, LoweredBlock], dispatcher: Dispatcher, with_dp: bool
    ) -> dict[tuple[Recompute, bool], Array]:
        degrees = rows.degrees()
        if not with_dp:  # axes inside a block stand where they do for any dp: one that the experts fold into
            degrees |= {"dp": rows.ep * rows.etp, "pp": np.ones_like(rows.tp)}
        groups = axis_groups(self.space.cluster, degrees)
        load = self._loads[np.searchsorted(self._loaded, rows.ep)]
        kernels = kernel_times(
            lowered["none"].tasks,
            self.priced,
            groups,
            Running(dispatcher, False, load, self.fanout, self.fixed),
        )
        found = {}
        for level, block in lowered.items():
            if level != "none":
                again = [task for task in block.tasks if task.phase == "recompute"]
                repeated = kernel_times(
                    again, self.priced, groups, Running(dispatcher, False, load, self.fanout, self.fixed)
                )
                kernels = {**kernels, "recompute": repeated["recompute"]}
            for overlaps in dict.fromkeys(choice.expert_overlap for choice in self.space.choices):
                times = block_times(
                    kernels, self.priced, Running(dispatcher, overlaps, load, self.fanout, self.fixed)
                )
                totals = {phase: sum(parts.values()) for phase, parts in times.items()}
                backward = totals["recompute"] + totals["input_gradient"]
                phases = (totals["forward"], backward, totals["weight_gradient"])
                found[level, overlaps] = np.array(np.broadcast_arrays(*phases, rows.tp * 1.0)[:3])
            found.setdefault((level, False), found[level, overlaps])
        return found

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


LONGEST_COUNTED = 2**22
"""Tokens of a sequence up to which FLOPs of attention are counted in whole numbers of 64 bits."""


def _counted(rows: Bases, sequence_length: int) -> Bases:
    """Rows as they are, in whole numbers, whose division is fast; as floats where products would overflow."""
    if sequence_length <= LONGEST_COUNTED:
        return rows
    return Bases(*(getattr(rows, name) * 1.0 for name in Bases.__slots__))


def _degrees(rows: Bases) -> Any:
    sp = np.where(rows.sequence_parallel, rows.tp, 1)
    return {"tp": rows.tp, "cp": rows.cp, "ep": rows.ep, "etp": rows.etp, "sp": sp}

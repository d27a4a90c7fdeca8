"""What a rank was seen to hold and to do, as data: what a dry run observes and checks are made on.

A rank's conduct names its peers by their place in a group, so that ranks that differ only in who they are
behave alike. Who they speak to stands beside it, rank by rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from meshwright.ir.graph import CollectiveKind

Ranges = tuple[tuple[int, int], ...]
"""Half-open index ranges, one for each dim."""


class Call(NamedTuple):
    """One collective that ran, or one end of a send.

    `bytes` as CollectiveKind defines them, `other_bytes` those of the buffer on the other side: the input of
    an all-gather, the output of a reduce-scatter or of an all-to-all. `sent` and `received`: rows by peer of
    an all-to-all that divides them unevenly. `peer`: the place in the group that a send goes to, or a receive
    comes from.
    """

    kind: CollectiveKind
    axis: str
    element: str
    bytes: int
    other_bytes: int
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    peer: int | None = None
    is_receive: bool = False


class Did(NamedTuple):
    """An action of the pipeline that ran, by the names of `ir/orders.py`: F, B, I or W."""

    kind: str
    stage: int
    micro_batch: int


Event = Call | Did


@dataclass(frozen=True, slots=True)
class HeldParameter:
    """One parameter on one rank. `shape` before ZeRO divides it, `elements` after."""

    name: str
    shape: tuple[int, ...]
    element: str
    elements: int
    bytes: int


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage as it was built: its layers, its ends, and what it takes from and gives to its neighbours, as
    (element type, shape)."""

    index: int
    layers: tuple[int, ...]
    has_embedding: bool
    has_head: bool
    takes: tuple[str, tuple[int, ...]]
    gives: tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs by kind of op, a multiply-add counted as two. `attention` counts the pairs that a query sees."""

    matmul: int = 0
    grouped_matmul: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.matmul + self.grouped_matmul + self.attention


@dataclass(frozen=True)
class Conduct:
    """What a rank holds and does, without who it is. `failed`: why it could not be built or run."""

    stages: tuple[StageFacts, ...] = ()
    parameters: tuple[HeldParameter, ...] = ()
    group_sizes: tuple[tuple[str, int], ...] = ()
    events: tuple[Event, ...] = ()
    work: Work = field(default_factory=Work)
    failed: str = ""

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(held.bytes for held in self.parameters)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Its collectives in order."""
        return tuple(event for event in self.events if isinstance(event, Call))

    @property
    def order(self) -> tuple[Did, ...]:
        """Its pipeline actions in order."""
        return tuple(event for event in self.events if isinstance(event, Did))

    def counted(self) -> Counter[tuple[str, str, int]]:
        """How often each kind of collective ran on each axis with so many bytes; a receive counts with the
        send that it is the other end of."""
        return Counter((c.kind.value, c.axis, c.bytes) for c in self.calls if not c.is_receive)


@dataclass(frozen=True)
class RankFacts:
    """What is one rank's own: its place, whom it speaks to by axis, and which part of each parameter it
    holds."""

    rank: int
    coordinates: dict[str, int]
    groups: dict[str, tuple[int, ...]]
    slices: dict[str, Ranges]


@dataclass(frozen=True)
class Peak:
    """Bytes of tensors at the fullest moment, by class, and where it was."""

    by_class: dict[str, int]
    moment: str

    @property
    def bytes(self) -> int:
        """All classes."""
        return sum(self.by_class.values())


@dataclass(frozen=True)
class Observed:
    """A rank through a step: its facts, its conduct, and the memory of a whole step and of building."""

    facts: RankFacts
    conduct: Conduct
    peak: Peak | None = None
    build_bytes: int = 0

"""Whether the ranks of a group call the same collectives in the same order, and whether all get to the end.

Ranks that enter different collectives, or the same ones in another order, wait for one another for ever.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.dryrun.expected import Groups
from meshwright.ir.graph import CollectiveKind
from meshwright.ir.observed import Call, Conduct, Did

Calls = tuple[Call, ...]
Signatures = tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Mismatch:
    """Ranks of a group that call otherwise than most of its members, in words."""

    axis: str
    ranks: tuple[int, ...]
    words: str


def mismatches(groups: Groups, conducts: Sequence[Conduct]) -> Iterator[Mismatch]:
    """Every group whose members' sequences differ or do not fit together. `conducts` by rank; a rank that
    failed is left out."""
    sequences = {id(c): _by_axis(c) for c in conducts}
    for axis, members in groups.items():
        world = Counter(_signatures(sequences[id(c)][axis]) for c in conducts)
        if axis == "pp":
            calls = {key: tuple(c for c in own[axis] if c.peer is None) for key, own in sequences.items()}
        else:
            calls = {key: own[axis] for key, own in sequences.items()}
        agreed: set[tuple[int, ...]] = set()
        for group in members:
            there = tuple(rank for rank in group if not conducts[rank].failed)
            kinds = tuple(id(conducts[rank]) for rank in there)
            if kinds in agreed:
                continue
            found = [
                *_compared(axis, there, [calls[kind] for kind in kinds], world, len(there) == len(group))
            ]
            if not found:
                agreed.add(kinds)
            yield from found


def _by_axis(conduct: Conduct) -> dict[str, Calls]:
    found: dict[str, list[Call]] = defaultdict(list)
    for call in conduct.calls:
        found[call.axis].append(call)
    return defaultdict(tuple, {axis: tuple(calls) for axis, calls in found.items()})


def _compared(
    axis: str, group: tuple[int, ...], calls: Sequence[Calls], world: Counter[Signatures], is_whole: bool
) -> Iterator[Mismatch]:
    """Members that call otherwise than most of the group, or, where it is divided, than most of the world."""
    signatures = [_signatures(own) for own in calls]
    counted = Counter(signatures)
    usual = max(counted, key=lambda one: (counted[one], world[one], len(one)), default=())
    odd = [place for place, own in enumerate(signatures) if own != usual]
    if odd:
        place = odd[0]
        ranks = tuple(group[one] for one in odd)
        yield Mismatch(axis, ranks, _difference(axis, group, place, calls, usual, signatures))
        return
    for number in range(len(usual) if is_whole else 0):
        yield from _unfitting(axis, group, [own[number] for own in calls], number)


def _signatures(calls: Calls) -> Signatures:
    return tuple(map(_signature, calls))


def _signature(call: Call) -> tuple[str, str, int]:
    """What members have to agree on. The bytes of an uneven all-to-all are each rank's own."""
    own = bool(call.sent or call.received)
    return call.kind.value, call.element, 0 if own else call.bytes


def _difference(
    axis: str,
    group: tuple[int, ...],
    place: int,
    calls: Sequence[Calls],
    usual: Signatures,
    signatures: Sequence[Signatures],
) -> str:
    own = signatures[place]
    pairs = zip(own, usual, strict=False)
    number = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(own), len(usual)))
    alike = next(p for p, one in enumerate(signatures) if one == usual)
    others = [r for r in group if r != group[place]]
    here = _named(calls[place][number]) if number < len(own) else "has ended"
    there = _named(calls[alike][number]) if number < len(usual) else "have ended"
    who = f"the others of {_ranks(others)}"
    return (
        f"rank {group[place]}, call {number + 1} along {axis}: {here}, where {who} {there}; "
        f"{len(own)} calls against {len(usual)}"
    )


def _named(call: Call) -> str:
    return f"{call.kind.value} of {call.bytes:,} B of {call.element}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{', …' if len(ranks) > 8 else ''}"


def _unfitting(axis: str, group: tuple[int, ...], calls: Sequence[Call], number: int) -> Iterator[Mismatch]:
    """Where one rank's buffers do not fit the group, or what one sends is not what the other receives."""
    ranks = len(group)
    for rank, call in zip(group, calls, strict=True):
        divides = call.kind in (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER)
        if divides and call.other_bytes * ranks != call.bytes:
            words = f"{_named(call)} over {ranks} ranks with {call.other_bytes:,} B for each"
            yield Mismatch(axis, (rank,), f"rank {rank}, call {number + 1} along {axis}: {words}")
            return
    for place, call in enumerate(calls):
        for peer, rows in enumerate(call.sent):
            expected = calls[peer].received
            if expected and expected[place] != rows:
                words = f"sends {rows:,} rows to rank {group[peer]}, which expects {expected[place]:,}"
                yield Mismatch(
                    axis,
                    (group[place], group[peer]),
                    f"rank {group[place]}, call {number + 1} along {axis}: {words}",
                )
                return


# progress


@dataclass(frozen=True)
class Stuck:
    """Ranks that never get to the end, and where the first of them stands."""

    ranks: tuple[int, ...]
    words: str


def stuck(groups: Groups, conducts: Sequence[Conduct]) -> Stuck | None:
    """Run all ranks' events until none can go on; who has not reached the end. A send does not wait for its
    receiver; receives wait once what stands beside them has been sent too."""
    run = _Run(groups, conducts)
    run.to_the_end()
    waiting = [rank for rank, place in enumerate(run.places) if place < len(run.steps[rank])]
    if not waiting:
        return None
    rank = waiting[0]
    step = run.steps[rank][run.places[rank]]
    return Stuck(tuple(waiting), f"rank {rank} waits for ever in {_step_words(step)}")


Step = tuple[Call, ...]
"""A collective alone, or sends and receives between two actions, which are posted together."""


def _step_words(step: Step) -> str:
    call = next((c for c in step if c.is_receive), step[0])
    if call.peer is not None:
        return f"a receive from place {call.peer} along {call.axis}"
    return f"{_named(call)} along {call.axis}"


def steps_of(conduct: Conduct) -> tuple[Step, ...]:
    """A rank's events as steps."""
    steps: list[Step] = []
    batch: list[Call] = []
    for event in conduct.events:
        if isinstance(event, Call) and event.peer is not None:
            batch.append(event)
            continue
        if batch:
            steps.append(tuple(batch))
            batch = []
        if not isinstance(event, Did):
            steps.append((event,))
    if batch:
        steps.append(tuple(batch))
    return tuple(steps)


class _Run:
    """All ranks' steps, each rank as far as it gets."""

    def __init__(self, groups: Groups, conducts: Sequence[Conduct]) -> None:
        kinds = {id(c): steps_of(c) for c in conducts}
        self.steps = [kinds[id(c)] for c in conducts]
        self.places = [0] * len(conducts)
        self.group_of = {
            (axis, rank): group for axis, members in groups.items() for group in members for rank in group
        }
        self.arrived: Counter[tuple[str, int, int]] = Counter()
        self.entered: Counter[tuple[str, int]] = Counter()
        self.sent: Counter[tuple[int, int]] = Counter()
        self.taken: Counter[tuple[int, int]] = Counter()
        self.posted = [False] * len(conducts)
        self.sleepers: dict[object, list[int]] = defaultdict(list)

    def to_the_end(self) -> None:
        """Until nobody can go on."""
        ready = deque(range(len(self.steps)))
        while ready:
            rank = ready.popleft()
            while self.places[rank] < len(self.steps[rank]):
                step = self.steps[rank][self.places[rank]]
                key = (
                    self._messages(rank, step, ready)
                    if step[0].peer is not None
                    else self._enter(rank, step[0], ready)
                )
                if key is not None:
                    self.sleepers[key].append(rank)
                    break
                self.places[rank] += 1
                self.posted[rank] = False

    def _enter(self, rank: int, call: Call, ready: deque[int]) -> object | None:
        """Enter a collective; what to wait for, None where all are there."""
        group = self.group_of.get((call.axis, rank), (rank,))
        if not self.posted[rank]:
            self.posted[rank] = True
            number = self.entered[call.axis, rank]
            self.entered[call.axis, rank] += 1
            self.arrived[call.axis, group[0], number] += 1
        key = (call.axis, group[0], self.entered[call.axis, rank] - 1)
        if self.arrived[key] < len(group):
            return key
        ready.extend(self.sleepers.pop(key, ()))
        return None

    def _messages(self, rank: int, step: Step, ready: deque[int]) -> object | None:
        """Post sends, then wait for what is received; what to wait for, None where all has come."""
        if not self.posted[rank]:
            self.posted[rank] = True
            for call in step:
                if not call.is_receive:
                    channel = rank, self._peer(rank, call)
                    self.sent[channel] += 1
                    ready.extend(self.sleepers.pop(channel, ()))
        wanted: Counter[tuple[int, int]] = Counter(
            (self._peer(rank, call), rank) for call in step if call.is_receive
        )
        for channel, count in wanted.items():
            if self.sent[channel] - self.taken[channel] < count:
                return channel
        self.taken.update(wanted)
        return None

    def _peer(self, rank: int, call: Call) -> int:
        group = self.group_of.get((call.axis, rank), (rank,))
        place = call.peer or 0
        return group[place] if place < len(group) else -1

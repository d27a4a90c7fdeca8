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
class _Own:
    """A conduct's calls along one axis. `number` names the signatures: equal ones have the same."""

    calls: Calls
    signatures: Signatures
    number: int


def mismatches(groups: Groups, conducts: Sequence[Conduct]) -> Iterator[str]:
    """Every group whose members' sequences differ or do not fit together, in words. `conducts` by rank; a
    rank that failed is left out."""
    sequences = {id(c): _by_axis(c) for c in conducts}
    for axis, members in groups.items():
        numbers: dict[Signatures, int] = {}
        own = {key: _own(by_axis.get(axis, ()), numbers) for key, by_axis in sequences.items()}
        world = Counter(own[id(c)].number for c in conducts)
        agreed: set[tuple[int, ...]] = set()
        fits: set[Calls] = set()
        for group in members:
            there = tuple(rank for rank in group if not conducts[rank].failed)
            kinds = tuple(id(conducts[rank]) for rank in there)
            if kinds in agreed:
                continue
            calls = [own[kind] for kind in kinds]
            found = [*_compared(axis, there, calls, world)]
            if not found and len(there) == len(group):
                found = [*_all_unfitting(axis, group, [one.calls for one in calls], fits)]
            if not found:
                agreed.add(kinds)
            yield from found


def _by_axis(conduct: Conduct) -> dict[str, Calls]:
    """A conduct's collectives; sends and receives are no matter of a whole group."""
    found: dict[str, list[Call]] = defaultdict(list)
    for call in conduct.calls:
        if call.peer is None:
            found[call.axis].append(call)
    return {axis: tuple(calls) for axis, calls in found.items()}


def _own(calls: Calls, numbers: dict[Signatures, int]) -> _Own:
    signatures = tuple(map(_signature, calls))
    return _Own(calls, signatures, numbers.setdefault(signatures, len(numbers)))


def _signature(call: Call) -> tuple[str, str, int]:
    """What members have to agree on. The bytes of an uneven all-to-all are each rank's own."""
    own = bool(call.sent or call.received)
    return call.kind.value, call.element, 0 if own else call.bytes


def _compared(axis: str, group: tuple[int, ...], calls: Sequence[_Own], world: Counter[int]) -> Iterator[str]:
    """A member that calls otherwise than most of the group, or, where it is divided, than most of the
    world."""
    counted = Counter(one.number for one in calls)
    length = {one.number: len(one.calls) for one in calls}
    usual = max(counted, key=lambda one: (counted[one], world[one], length[one]), default=-1)
    odd = [place for place, one in enumerate(calls) if one.number != usual]
    if odd:
        alike = next(one for one in calls if one.number == usual)
        yield _difference(axis, group, odd[0], calls[odd[0]], alike)


def _difference(axis: str, group: tuple[int, ...], place: int, own: _Own, alike: _Own) -> str:
    pairs = zip(own.signatures, alike.signatures, strict=False)
    ends = min(len(own.calls), len(alike.calls))
    number = next((n for n, (one, other) in enumerate(pairs) if one != other), ends)
    here = _named(own.calls[number]) if number < len(own.calls) else "has ended"
    there = _named(alike.calls[number]) if number < len(alike.calls) else "have ended"
    who = f"the others of {_ranks([r for r in group if r != group[place]])}"
    return (
        f"rank {group[place]}, call {number + 1} along {axis}: {here}, where {who} {there}; "
        f"{len(own.calls)} calls against {len(alike.calls)}"
    )


def _named(call: Call) -> str:
    return f"{call.kind.value} of {_size(call)}"


def _size(call: Call) -> str:
    return f"{call.bytes:,} B of {call.element}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{', …' if len(ranks) > 8 else ''}"


def _all_unfitting(
    axis: str, group: tuple[int, ...], calls: Sequence[Calls], fits: set[Calls]
) -> Iterator[str]:
    """Call by call; `fits` keeps those that were looked at and fit."""
    for number, at_once in enumerate(zip(*calls, strict=True)):
        if at_once not in fits:
            found = [*_unfitting(axis, group, at_once, number)]
            if not found:
                fits.add(at_once)
            yield from found


def _unfitting(axis: str, group: tuple[int, ...], calls: Calls, number: int) -> Iterator[str]:
    """Where one rank's buffers do not fit the group, or what one sends is not what the other receives."""
    ranks = len(group)
    for rank, call in zip(group, calls, strict=True):
        divides = call.kind in (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER)
        if divides and call.other_bytes * ranks != call.bytes:
            words = f"{_named(call)} over {ranks} ranks with {call.other_bytes:,} B for each"
            yield f"rank {rank}, call {number + 1} along {axis}: {words}"
            return
    for place, call in enumerate(calls):
        for peer, rows in enumerate(call.sent):
            expected = calls[peer].received
            if expected and expected[place] != rows:
                words = f"sends {rows:,} rows to rank {group[peer]}, which expects {expected[place]:,}"
                yield f"rank {group[place]}, call {number + 1} along {axis}: {words}"
                return


# progress


@dataclass(frozen=True)
class Stuck:
    """Ranks that never get to the end, or whose calls meet others than they should, and the first of them in
    words."""

    ranks: tuple[int, ...]
    words: str


def stuck(groups: Groups, conducts: Sequence[Conduct]) -> Stuck | None:
    """Run all ranks' events until none can go on; who has not reached the end, met another collective than
    its own or a message of another size, or sent what nobody received.

    A send does not wait for its receiver; receives wait once what stands beside them has been sent too.
    Messages from one rank to another are received in the order in which they were sent.
    """
    run = _Run(groups, conducts)
    run.to_the_end()
    found: dict[int, str] = {}
    for part in (run.odd, run.waiting(), run.unreceived()):
        for rank, words in part.items():
            found.setdefault(rank, words)
    return Stuck(tuple(sorted(found)), next(iter(found.values()))) if found else None


Step = tuple[Call, ...]
"""A collective alone, or sends and receives between two actions, which are posted together."""
Channel = tuple[str, int, int]
"""Axis, sender, receiver."""


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
    """All ranks' steps, each rank as far as it gets. `odd`: ranks whose calls met other ones, in words."""

    def __init__(self, groups: Groups, conducts: Sequence[Conduct]) -> None:
        kinds = {id(c): steps_of(c) for c in conducts}
        self.steps = [kinds[id(c)] for c in conducts]
        self.places = [0] * len(conducts)
        self.group_of = {
            (axis, rank): group for axis, members in groups.items() for group in members for rank in group
        }
        self.arrived: Counter[tuple[str, int, int]] = Counter()
        self.first: dict[tuple[str, int, int], tuple[int, Call]] = {}
        self.entered: Counter[tuple[str, int]] = Counter()
        self.under_way: dict[Channel, deque[Call]] = defaultdict(deque)
        self.posted = [False] * len(conducts)
        self.sleepers: dict[object, list[int]] = defaultdict(list)
        self.odd: dict[int, str] = {}

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

    def waiting(self) -> dict[int, str]:
        """Who has not reached the end, and for what it waits."""
        return {
            rank: f"rank {rank} waits for ever in {self._step_words(rank, self.steps[rank][place])}"
            for rank, place in enumerate(self.places)
            if place < len(self.steps[rank])
        }

    def _step_words(self, rank: int, step: Step) -> str:
        """The collective, or the receive for which nothing has come."""
        if step[0].peer is None:
            return f"{_named(step[0])} along {step[0].axis}"
        wanted = self._wanted(rank, step)
        channel = next(one for one, calls in wanted.items() if len(self.under_way[one]) < len(calls))
        call = wanted[channel][len(self.under_way[channel])]
        return f"a receive of {_size(call)} from rank {channel[1]} along {call.axis}"

    def unreceived(self) -> dict[int, str]:
        """Who has sent what nobody received."""
        return {
            sender: f"rank {sender} sends {_size(calls[0])} to rank {receiver} along {axis}, "
            f"which does not receive it ({len(calls):,} such)"
            for (axis, sender, receiver), calls in sorted(self.under_way.items())
            if calls
        }

    def _enter(self, rank: int, call: Call, ready: deque[int]) -> object | None:
        """Enter a collective; what to wait for, None where all are there."""
        group = self.group_of.get((call.axis, rank), (rank,))
        if not self.posted[rank]:
            self.posted[rank] = True
            number = self.entered[call.axis, rank]
            self.entered[call.axis, rank] += 1
            self.arrived[call.axis, group[0], number] += 1
            self._compare(rank, call, (call.axis, group[0], number))
        key = (call.axis, group[0], self.entered[call.axis, rank] - 1)
        if self.arrived[key] < len(group):
            return key
        self.first.pop(key, None)
        ready.extend(self.sleepers.pop(key, ()))
        return None

    def _compare(self, rank: int, call: Call, key: tuple[str, int, int]) -> None:
        """With the call of the first that came."""
        other, theirs = self.first.setdefault(key, (rank, call))
        if theirs is not call and _signature(theirs) != _signature(call):
            words = f"{_named(call)}, where rank {other} calls {_named(theirs)}"
            self.odd.setdefault(rank, f"rank {rank}, call {key[2] + 1} along {call.axis}: {words}")

    def _messages(self, rank: int, step: Step, ready: deque[int]) -> object | None:
        """Post sends, then wait for what is received; what to wait for, None where all has come."""
        if not self.posted[rank]:
            self.posted[rank] = True
            for call in step:
                if not call.is_receive:
                    channel = call.axis, rank, self._peer(rank, call)
                    self.under_way[channel].append(call)
                    ready.extend(self.sleepers.pop(channel, ()))
        wanted = self._wanted(rank, step)
        for channel, calls in wanted.items():
            if len(self.under_way[channel]) < len(calls):
                return channel
        for channel, calls in wanted.items():
            for call in calls:
                self._receive(rank, call, channel[1], self.under_way[channel].popleft())
        return None

    def _receive(self, rank: int, call: Call, sender: int, sent: Call) -> None:
        if (sent.bytes, sent.element) != (call.bytes, call.element):
            words = f"receives {_size(call)} from rank {sender}, which sends {_size(sent)}"
            self.odd.setdefault(rank, f"rank {rank} {words} along {call.axis}")

    def _wanted(self, rank: int, step: Step) -> dict[Channel, list[Call]]:
        """The receives of a step by whom they come from."""
        found: dict[Channel, list[Call]] = {}
        for call in step:
            if call.is_receive:
                found.setdefault((call.axis, self._peer(rank, call), rank), []).append(call)
        return found

    def _peer(self, rank: int, call: Call) -> int:
        group = self.group_of.get((call.axis, rank), (rank,))
        place = call.peer or 0
        return group[place] if place < len(group) else -1

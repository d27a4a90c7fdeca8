"""The critical path of a step: from its end back over what each event waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.cluster import Cluster
from meshwright.simulator.ending import Ending, RankStep
from meshwright.simulator.engine import Run
from meshwright.simulator.events import LAUNCHES, SEND, Inside
from meshwright.simulator.parts import COMPUTE, NO_TIER


class Link(NamedTuple):
    """One link of the path: what it was, where, and its seconds."""

    kind: str
    axis: str
    tier: int
    rank: int
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of event takes of the path: by kind, axis, and inside a node or between nodes."""

    kind: str
    axis: str
    between_nodes: bool | None
    seconds: float
    fraction: float

    @property
    def words(self) -> str:
        """`all-to-all over ep between nodes`."""
        text = _WORDS.get(self.kind, self.kind.replace("_", "-"))
        if self.axis and self.kind not in _WHOLE:
            text += f" over {self.axis}"
        if self.between_nodes is not None:
            text += " between nodes" if self.between_nodes else " inside a node"
        return text


_WORDS = {
    COMPUTE: "compute",
    LAUNCHES: "waiting for launches",
    SEND: "sends to other stages",
    "all_to_all": "all-to-all",
    "gradients": "gradient reduction",
    "parameters": "parameter gathering",
    "outside": "what is outside the model",
    "scalars": "gradient norm and counts",
}
_WHOLE = (SEND, "gradients", "parameters", "scalars")

_NOTHING_S = 1e-12
"""What is shorter than this is what floats lose."""

ADVICE = {
    COMPUTE: "faster GPUs, less recompute, or stages with more even work",
    LAUNCHES: "larger micro-batches, or captured graphs",
    SEND: "fewer stages, or an engine that sends beside compute",
    "all_to_all": "expert groups on fewer nodes, another dispatcher, or an exchange beside compute",
    "gradients": "overlap with the last backward, or fewer bytes for each gradient",
    "parameters": "overlap with the first forward",
    "optimizer": "ZeRO over more ranks",
}


@dataclass(frozen=True)
class CriticalPath:
    """The links of a path in order of time, which fill the step without a gap, and its shares, largest
    first."""

    links: tuple[Link, ...]
    shares: tuple[Share, ...]

    @property
    def total_s(self) -> float:
        """Seconds of the whole path: those of the step."""
        return sum(link.end_s - link.start_s for link in self.links)

    def words(self, least: float = 0.05) -> tuple[str, ...]:
        """What would shorten the step, for each share of at least `least`. Without it the step is shorter by
        that share at most: another path may take its place."""
        lines = []
        for share in self.shares:
            if share.fraction >= least:
                text = f"{share.words} is {100 * share.fraction:.0f} % of it"
                advice = ADVICE.get(share.kind)
                lines.append(f"{text}: {advice}" if advice else text)
        return tuple(lines)


def critical_path(
    cluster: Cluster,
    runs: Sequence[Run],
    insides: Sequence[Inside],
    ends: Sequence[Ending],
    steps: Sequence[Sequence[RankStep]],
    pipeline: int,
) -> CriticalPath:
    """The path that ends with the last rank of a pipeline's step. `pipeline` is the one that ends last."""
    links = list(_back_from_end(runs, ends, steps, pipeline))
    # The reductions of one stage wait for all pipelines together; its path goes on in the slowest of them.
    rank = links[-1].rank
    latest = pipeline
    if ends[pipeline].started_s[rank] > _done_s(runs[pipeline], rank):
        latest = max(range(len(runs)), key=lambda one: _done_s(runs[one], rank))
    run = runs[latest]
    if run.drained_s(rank) > (last := run.done[rank][-1].end_s):
        links.append(Link("gradients", "dp", steps[latest][rank].tier, rank, "", last, run.drained_s(rank)))
    links += _back_from(run, insides[latest], steps[latest], rank)
    links.reverse()
    kept = tuple(link for link in links if link.end_s - link.start_s > _NOTHING_S)
    return CriticalPath(kept, _shares(cluster, kept))


def _done_s(run: Run, rank: int) -> float:
    return max(run.done[rank][-1].end_s, run.drained_s(rank))


def _back_from_end(
    runs: Sequence[Run], ends: Sequence[Ending], steps: Sequence[Sequence[RankStep]], pipeline: int
) -> list[Link]:
    """From the last rank's end back to the start of the reduction that everyone waited for."""
    end, own = ends[pipeline], steps[pipeline]
    rank = max(range(len(own)), key=lambda one: end.finished_s[one])
    finished = end.finished_s[rank]
    updated = finished - own[rank].outside_s
    scalars = updated - own[rank].optimizer_s
    agreed = end.agreed_s[rank]
    links = [
        Link("outside", "", NO_TIER, rank, "outside the model", updated, finished),
        Link("optimizer", "", NO_TIER, rank, "optimizer", scalars, updated),
        Link("scalars", "dp", NO_TIER, rank, "scalars", agreed, scalars),
    ]
    if end.reduced_s[rank] < agreed:
        rank = max(range(len(own)), key=lambda one: end.reduced_s[one])
    started, reduced = end.started_s[rank], end.reduced_s[rank]
    links.append(Link("gradients", "dp", own[rank].tier, rank, "reducing gradients", started, reduced))
    return links


def _back_from(run: Run, inside: Inside, steps: Sequence[RankStep], rank: int) -> list[Link]:
    """From a rank's last action back to the start of the step, latest first."""
    links: list[Link] = []
    position = len(run.done[rank]) - 1
    while position >= 0:
        done = run.done[rank][position]
        pieces, start = inside.pieces(done)
        main = [piece for piece in pieces if piece.main]
        last = start + max((piece.end_s for piece in main), default=0.0)
        links.append(Link(SEND, "pp", _tier_of_sends(inside), rank, str(done.action), last, done.end_s))
        for piece in reversed(main):
            begins, ends = start + piece.start_s, start + piece.end_s
            links.append(Link(piece.kind, piece.axis, piece.tier, rank, piece.name, begins, ends))
        if done.cause < 0:
            position -= 1
            continue
        arrived = run.arrived_s[done.cause]
        rank, position = run.made_by[done.cause]
        left = run.done[rank][position]
        tier = _tier_of_sends(inside)
        links.append(Link(SEND, "pp", tier, rank, str(left.action), left.end_s, arrived))
    gathered = steps[rank]
    links.append(Link("parameters", "dp", gathered.tier, rank, "gathering", 0.0, gathered.gather_s))
    return links


def _tier_of_sends(inside: Inside) -> int:
    sends = (send for stages in inside.priced.sends.values() for send in stages)
    return next((send.tier for send in sends if send is not None), NO_TIER)


def _shares(cluster: Cluster, links: Sequence[Link]) -> tuple[Share, ...]:
    seconds: dict[tuple[str, str, bool | None], float] = {}
    total = sum(link.end_s - link.start_s for link in links)
    for link in links:
        leaves = None if link.tier < 0 else cluster.tier_size(link.tier) > cluster.gpus_per_node
        key = (link.kind, link.axis, leaves)
        seconds[key] = seconds.get(key, 0.0) + link.end_s - link.start_s
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return tuple(Share(*key, spent, spent / total) for key, spent in ordered)

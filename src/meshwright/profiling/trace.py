"""One rank's profile as spans: its steps, its collectives by axis, its compute, and the modules that ran.

What is read is the trace that torch's profiler exports (Chrome's format, times in µs). Collectives and
modules carry labels that `runtime/profile/labels.py` gives them. On processors an op is compute while one of
torch's operators runs, and communication lasts from its call, or its request in the background, to its end;
on a GPU both are kernels on the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from meshwright.profiling.spans import Merged, Span, beyond, length, merged

LABEL, MODULE, STEP = "collective:", "module:", "step:"
"""How labels begin: `collective:AXIS KIND BYTES`, `module:NAME`, `step:NUMBER`."""

_KIND_OF = {
    "gloo:all_reduce": "all_reduce",
    "gloo:all_gather": "all_gather",
    "gloo:_all_gather_base": "all_gather",
    "gloo:reduce_scatter": "reduce_scatter",
    "gloo:_reduce_scatter_base": "reduce_scatter",
    "gloo:all_to_all": "all_to_all",
    "gloo:send": "send_recv",
    "gloo:recv": "send_recv",
}
"""What gloo calls its work in the background."""
_ACCUMULATE = "AccumulateGrad"
_EVALUATE = "autograd::engine::evaluate_function: "
_US = 1e-6


class Collective(NamedTuple):
    """One collective of a rank: its axis, kind and bytes, and from when to when it ran, in seconds."""

    axis: str
    kind: str
    bytes: int
    start_s: float
    end_s: float


@dataclass
class RankTrace:
    """What one rank did in its profiled steps. `forward` and `backward`: seconds by module, none of those in
    its own modules and in collectives; all steps together. Of a GPU they are empty: what the host takes to
    launch a module is not what the module takes."""

    rank: int
    steps: Merged
    collectives: list[Collective]
    compute: Merged
    forward: Mapping[str, float] = field(default_factory=dict)
    backward: Mapping[str, float] = field(default_factory=dict)

    @property
    def window(self) -> Span:
        """From the start of the first step to the end of the last."""
        return self.steps[0][0], self.steps[-1][1]


def rank_trace(rank: int, events: Iterable[Mapping[str, Any]], answered: bool = False) -> RankTrace:
    """Read a trace's events. Times count from the first profiled step. `answered`: the rank ran alone, and
    kernels of a GPU that made its collectives' results are no compute. Raises ValueError without steps."""
    own = [event for event in events if event.get("ph") == "X"]
    on_gpu = any(event.get("cat") == "kernel" for event in own)
    steps = merged(_span(e) for e in own if e["name"].startswith(STEP) and _is_host(e))
    if not steps:
        raise ValueError(f"the trace of rank {rank} has no step")
    origin = steps[0][0]
    labels = [e for e in own if e["name"].startswith(LABEL) and _is_host(e) is not on_gpu]
    collectives = _on_gpu(labels) if on_gpu else _on_host(own, labels)
    compute = merged(_span(e) for e in own if _computes(e, on_gpu))
    blocked = merged(_span(e) for e in own if e["name"].startswith(LABEL) and _is_host(e))
    if not on_gpu:
        compute = beyond(compute, blocked)
    elif answered:
        compute = beyond(compute, merged((c.start_s, c.end_s) for c in collectives))
    forward, backward = _modules(own, blocked) if not on_gpu else ({}, {})
    return RankTrace(
        rank,
        [_moved(step, origin) for step in steps],
        [c._replace(start_s=c.start_s - origin, end_s=c.end_s - origin) for c in collectives],
        [_moved(span, origin) for span in compute],
        forward,
        backward,
    )


def _moved(span: Span, origin: float) -> Span:
    return span[0] - origin, span[1] - origin


def _span(event: Mapping[str, Any]) -> Span:
    start = float(event["ts"]) * _US
    return start, start + float(event["dur"]) * _US


def _is_host(event: Mapping[str, Any]) -> bool:
    return event.get("cat") != "gpu_user_annotation"


def _computes(event: Mapping[str, Any], on_gpu: bool) -> bool:
    if on_gpu:
        return event.get("cat") == "kernel" and "nccl" not in event["name"]
    return event.get("cat") == "cpu_op" and event["name"].startswith("aten::")


def _on_gpu(labels: Sequence[Mapping[str, Any]]) -> list[Collective]:
    return [_collective(event["name"], _span(event)) for event in labels]


def _collective(name: str, span: Span) -> Collective:
    axis, kind, size = name.removeprefix(LABEL).rsplit(" ", 2)
    return Collective(axis, kind, int(size), *span)


def _on_host(events: Sequence[Mapping[str, Any]], labels: Sequence[Mapping[str, Any]]) -> list[Collective]:
    """Each labelled call, to the end of its work in the background: the n-th of a kind is the n-th work of
    that kind. A receive has no label; it takes the axis of the sends."""
    works: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in sorted(events, key=lambda e: float(e["ts"])):
        if event["name"] in _KIND_OF:
            works["recv" if event["name"] == "gloo:recv" else _KIND_OF[event["name"]]].append(event)
    calls: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for label in sorted(labels, key=lambda e: float(e["ts"])):
        calls[label["name"].rsplit(" ", 2)[1]].append(label)
    found = []
    for kind, own in calls.items():
        paired = works[kind] if len(works[kind]) == len(own) else own
        for label, work in zip(own, paired, strict=True):
            (start, end), (begins, ends) = _span(label), _span(work)
            found.append(_collective(label["name"], (min(start, begins), max(end, ends))))
    axes = {c.axis for c in found if c.kind == "send_recv"} or {"pp"}
    found += [Collective(sorted(axes)[0], "recv", 0, *_span(event)) for event in works["recv"]]
    return sorted(found, key=lambda c: c.start_s)


def _modules(
    events: Sequence[Mapping[str, Any]], blocked: Merged
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by module, forward and backward. A node of autograd belongs to the module in whose forward it
    was made, by its sequence number; what adds up a weight's gradient, to the node before it."""
    forward: defaultdict[str, float] = defaultdict(float)
    made_in: dict[tuple[int, int], str] = {}
    open_: list[tuple[str, float, list[Span]]] = []
    host = sorted(
        (e for e in events if _is_host(e) and _is_call(e)), key=lambda e: (float(e["ts"]), -float(e["dur"]))
    )

    def close(until: float) -> None:
        while open_ and open_[-1][1] <= until:
            name, end, covered = open_.pop()
            start = covered.pop()[0]
            own = beyond(beyond([(start, end)], merged(covered)), blocked)
            forward[name] += length(own)

    for event in host:
        start, end = _span(event)
        close(start)
        if event["name"].startswith(MODULE):
            if open_:
                open_[-1][2].insert(0, (start, end))
            open_.append((event["name"].removeprefix(MODULE), end, [(start, end)]))
            continue
        number = _sequence(event)
        if number is not None and open_ and not event["name"].startswith(_EVALUATE):
            made_in[number] = open_[-1][0]
    close(float("inf"))
    return dict(forward), _backward(host, made_in, blocked)


def _is_call(event: Mapping[str, Any]) -> bool:
    return event["name"].startswith(MODULE) or event.get("cat") == "cpu_op"


def _sequence(event: Mapping[str, Any]) -> tuple[int, int] | None:
    number = event.get("args", {}).get("Sequence number")
    return None if number is None or number < 0 else (0, int(number))


def _backward(
    host: Sequence[Mapping[str, Any]], made_in: Mapping[tuple[int, int], str], blocked: Merged
) -> dict[str, float]:
    seconds: defaultdict[str, float] = defaultdict(float)
    last = ""
    for event in host:
        if not event["name"].startswith(_EVALUATE):
            continue
        number = _sequence(event)
        if _ACCUMULATE not in event["name"]:
            last = made_in.get(number, "") if number is not None else ""
        seconds[last] += length(beyond([_span(event)], blocked))
    return dict(seconds)


def labelled_calls(trace: RankTrace) -> Iterator[tuple[str, str, int]]:
    """Axis, kind and bytes of each collective that a rank calls; receives are the other end of a send."""
    yield from ((c.axis, c.kind, c.bytes) for c in trace.collectives if c.kind != "recv")

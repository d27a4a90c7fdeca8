"""Fits the curves of links to the carried measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fit_kernels import Row, column, sources
from least_squares import Free, Values, errors_of, fit
from meshwright.calibration import Fit, Flow, LinkCurve
from meshwright.cost.collectives import UNIFORM, Fanout, LinkRates, TierRates, collective_seconds, tier_rates
from meshwright.cost.placement import Group
from meshwright.hardware import Link
from meshwright.ir.graph import CollectiveKind

Known = Mapping[tuple[str, float], LinkCurve]
"""The curve of each kind and bandwidth."""

NVLINK_LATENCY = 3e-6
NETWORK_LATENCY = 8e-6
"""What the catalogue states for NVLink and xGMI, and for a network: curves count latencies in these."""
NODE = 8
LARGE_BYTES = 4 * 2**20
SMALL_WEIGHT = 0.5
"""Training moves megabytes to gigabytes: smaller messages count less in the fit."""
RINGS = ("all_gather", "reduce_scatter", "all_reduce")
DISPATCHERS = ("deepep", "hybridep")
NO_FIT = Fit(points=0, source="")


def stated_latency(kind: str) -> float:
    """The latency that the curve of a kind counts in, in seconds."""
    return NVLINK_LATENCY if kind in ("nvlink", "xgmi") else NETWORK_LATENCY


def _tier(kind: Any, bandwidth: float, size: int, curve: LinkCurve, algorithm: str) -> TierRates:
    flows = {n: f for n, f in curve.flows.items() if not (algorithm == "ring" and n == "nvls")}
    latency = f"{stated_latency(kind) * 1e6:g} us"
    link = Link(name="tier", kind=kind, bandwidth=f"{bandwidth:.0f} B/s", latency=latency)
    return tier_rates(link, curve.model_copy(update={"flows": flows}), NODE if curve.full_mesh else size)


def fanout_of(text: str) -> Fanout:
    """`experts/chosen`, with `/groups/chosen groups` where the router limits them."""
    return Fanout(*(int(number) for number in text.split("/"))) if text else UNIFORM


def predict(rows: Sequence[Row], known: Known) -> np.ndarray:
    """Seconds of each row."""
    names = (
        "inner_kind",
        "inner_bandwidth",
        "outer_kind",
        "outer_bandwidth",
        "collective",
        "algorithm",
        "fanout",
    )
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(tuple(row[name] for name in names), []).append(i)
    seconds = np.zeros(len(rows))
    for chosen in alike.values():
        seconds[chosen] = _predict_alike([rows[i] for i in chosen], known)
    return seconds


def _predict_alike(rows: Sequence[Row], known: Known) -> np.ndarray:
    first = rows[0]
    algorithm, size = first["algorithm"], int(first["domain"])
    inner, bandwidth = first["inner_kind"], float(first["inner_bandwidth"])
    tiers = [_tier(inner, bandwidth, size, known[inner, bandwidth], algorithm)]
    ranks, domain = column(rows, "ranks"), column(rows, "domain")
    within: tuple[np.ndarray, ...] = (ranks,)
    if first["outer_kind"]:
        outer, bandwidth = first["outer_kind"], float(first["outer_bandwidth"])
        tiers.append(_tier(outer, bandwidth, int(ranks.max()), known[outer, bandwidth], algorithm))
        within = (domain, ranks)
    dispatcher: Any = algorithm if algorithm in DISPATCHERS else None
    kind, group = CollectiveKind(first["collective"]), Group(ranks, within)
    fanout = fanout_of(first["fanout"])
    rates = LinkRates(tuple(tiers))
    return np.asarray(collective_seconds(rates, kind, column(rows, "bytes"), group, dispatcher, fanout))


def flow_of(values: Values, name: str, **about: Any) -> Flow:
    """A flow from parameters that are named `flow.parameter`."""
    numbers = {
        p: values[f"{name}.{p}"]
        for p in ("efficiency", "ramp_s", "extra", "start")
        if f"{name}.{p}" in values
    }
    return Flow(**numbers, **({"fit": NO_FIT} | about))


def assumed(efficiency: float, start: float, why: str, ramp_s: float = 0.0) -> Flow:
    """A flow that no measurement stands behind."""
    return Flow(
        efficiency=efficiency, ramp_s=ramp_s, start=start, fit=Fit(points=0, source=f"assumed: {why}")
    )


def _finished(rows: Sequence[Row], known: Known, flow: Flow) -> Flow:
    """A flow with its errors on its rows and the largest group among them."""
    times = column(rows, "us") * 1e-6
    median, largest = errors_of(predict(rows, known), times)
    found = Fit(points=len(rows), median_error=median, max_error=largest, source=sources(rows))
    return flow.model_copy(update={"fit": found, "ranks": int(column(rows, "ranks").max())})


def fit_flows(
    rows: Sequence[Row],
    curve: LinkCurve,
    known: Known,
    free: Mapping[str, Free],
    of_flow: Mapping[str, str],
    latency: str | None = None,
) -> LinkCurve:
    """`curve` with the flows of `free` fitted to `rows`, beside the links that are known already.

    `of_flow` says which rows judge a flow: the collective or the dispatcher by flow. `latency` names the
    curve's own latency parameter (`hop` or `peer`) when it is among `free`.
    """
    times = column(rows, "us") * 1e-6
    keys = sorted(
        {
            (r[f"{w}_kind"], float(r[f"{w}_bandwidth"]))
            for r in rows
            for w in ("inner", "outer")
            if r[f"{w}_kind"]
        }
    )
    own = [key for key in keys if key[0] == curve.kind and key not in known]

    def changed(values: Values) -> LinkCurve:
        flows = {**curve.flows, **{name: flow_of(values, name) for name in of_flow}}
        update: dict[str, Any] = {"flows": flows}
        if latency is not None:
            update[latency] = values[latency]
        return curve.model_copy(update=update)

    def with_own(found: LinkCurve) -> Known:
        return {**known, **dict.fromkeys(own, found)}

    weights = np.where(column(rows, "bytes") >= LARGE_BYTES, 1.0, SMALL_WEIGHT)
    values = fit(lambda v: predict(rows, with_own(changed(v))), times, free, weights)
    found = changed(values)
    flows = dict(found.flows)
    for name, judged in of_flow.items():
        chosen = [row for row in rows if judged in (row["algorithm"] or row["collective"], row["collective"])]
        flows[name] = _finished(chosen, with_own(found), flows[name])
    return found.model_copy(update={"flows": flows})

"""The curves of every kind of link: what is fitted, and what is assumed."""

from __future__ import annotations

from collections.abc import Sequence

from fit_kernels import Row
from fit_links import DISPATCHERS, NO_FIT, RINGS, Known, assumed, fit_flows
from least_squares import Free
from meshwright.calibration import Flow, LinkCurve
from meshwright.hardware import LinkKind

NVLINKS = {300e9: ("a100-80gb",), 450e9: ("h100-sxm", "h200"), 900e9: ("b200", "b300", "gb200")}
CROSS_CHECK = "vtrain"
"""A table of one node's all-reduce that was taken with an older NCCL: compared with, not fitted."""
EFA_RING = 0.95
"""What four nodes reach at 16 GiB (382 of 400 GB/s); in the fit trees hide it."""
NETWORK_HOP = 0.6
NETWORK_PEER = 0.1


def free_flow(
    name: str, efficiency: float, ramp_s: float, start: float, extra: bool = False
) -> dict[str, Free]:
    """The free parameters of one flow."""
    free = {
        f"{name}.efficiency": Free(efficiency, 0.1, 0.98, 0.02),
        f"{name}.ramp_s": Free(ramp_s, 1e-8, 2e-3, 0.05),
        f"{name}.start": Free(start, 0.05, 30, 0.05),
    }
    return free | ({f"{name}.extra": Free(0.3, 0.01, 0.99, 0.05)} if extra else {})


FEW = 10
"""Below so many points, and where all have one size, start and ramp are held."""


def _few(free: dict[str, Free]) -> dict[str, Free]:
    return {n: f if n.endswith("efficiency") else Free(f.start, f.start, f.start) for n, f in free.items()}


def links(rows: Sequence[Row]) -> tuple[LinkCurve, ...]:
    """Every link curve, those of NVLink first: the others are fitted beside them."""
    nvlinks = _nvlinks(rows)
    known: dict[tuple[str, float], LinkCurve] = {("nvlink", curve.bandwidth): curve for curve in nvlinks}
    known["nvlink", 200e9] = nvlinks[0]  # the H800's: nearest by bandwidth
    ib = _ib(rows, known)
    efa = _efa(rows, known)
    return (*nvlinks, ib, efa, *_assumed_networks(ib), _xgmi(rows, nvlinks[1]), _pcie(), _memory())


def _blank(kind: LinkKind, bandwidth: float, hop: float, peer: float, source: str) -> LinkCurve:
    return LinkCurve(kind=kind, bandwidth=bandwidth, hop=hop, peer=peer, flows={}, source=source)


def _nvlinks(rows: Sequence[Row]) -> list[LinkCurve]:
    found: list[LinkCurve] = []
    for bandwidth, gpus in NVLINKS.items():
        inside = [
            r
            for r in rows
            if r["gpu"] in gpus and not r["outer_kind"] and not r["source"].startswith(CROSS_CHECK)
        ]
        curve = _blank("nvlink", bandwidth, 0.3, 0.03, "fitted: NCCL in one node, and dispatchers")
        curve = _fit_rings(inside, curve, with_nvls=bandwidth > 300e9)
        exchanges = [r for r in inside if r["collective"] == "all_to_all" and not r["algorithm"]]
        free = free_flow("all_to_all", 0.75, 2e-5, 3, extra=True) | {"peer": Free(0.03, 0.003, 1)}
        curve = fit_flows(exchanges, curve, {}, free, {"all_to_all": "all_to_all"}, "peer")
        for name in (*DISPATCHERS, "send_recv"):
            chosen = [r for r in inside if name in (r["algorithm"], r["collective"])]
            if chosen:
                free = free_flow(name, 0.6, 2e-5, 4)
                curve = fit_flows(
                    chosen,
                    curve,
                    {},
                    _few(free) if name in DISPATCHERS and len(chosen) < FEW else free,
                    {name: name},
                )
        found.append(curve)
    return [_completed(curve, found) for curve in found]


def _fit_rings(rows: Sequence[Row], curve: LinkCurve, with_nvls: bool) -> LinkCurve:
    """All-gather, reduce-scatter and all-reduce, which share the latency of a hop."""
    free = {"hop": Free(0.3, 0.01, 2)}
    for name in RINGS:
        free |= free_flow(name, 0.75, 2e-5, 2, extra=True)
    flows = {name: name for name in RINGS}
    if with_nvls:
        free |= {k: v for k, v in free_flow("nvls", 0.55, 2e-5, 2).items() if not k.endswith("start")}
        flows["nvls"] = "all_reduce"
    return fit_flows([r for r in rows if r["collective"] in RINGS], curve, {}, free, flows, "hop")


def _completed(curve: LinkCurve, found: Sequence[LinkCurve]) -> LinkCurve:
    """What a generation has no rows for, as its neighbour's."""
    flows = dict(curve.flows)
    for name in (*DISPATCHERS, "send_recv"):
        near = next(
            c for c in sorted(found, key=lambda c: abs(c.bandwidth - curve.bandwidth)) if name in c.flows
        )
        if name not in flows:
            why = f"as NVLink of {near.bandwidth / 1e9:.0f} GB/s"
            flows[name] = _as(near.flows[name], why)
    flows["tree"] = _as(flows["all_reduce"], "as its ring")
    return curve.model_copy(update={"flows": flows})


def _as(flow: Flow, why: str, scale: float = 1.0) -> Flow:
    efficiency = min(flow.efficiency * scale, 0.98)
    fit = NO_FIT.model_copy(update={"source": f"assumed: {why}"})
    return flow.model_copy(update={"efficiency": efficiency, "fit": fit, "ranks": 0})


def _ib(rows: Sequence[Row], known: Known) -> LinkCurve:
    """InfiniBand: all-to-alls, dispatchers and sends are measured; rings and trees are not."""
    curve = _blank(
        "ib",
        50e9,
        NETWORK_HOP,
        NETWORK_PEER,
        "latency of a hop after NCCL's own, 4 to 14 us (src/graph/tuning.cc)",
    )
    over = [r for r in rows if r["outer_kind"] == "ib"]
    for name in ("all_to_all", *DISPATCHERS, "send_recv"):
        chosen = [r for r in over if name == (r["algorithm"] or r["collective"])]
        free = free_flow(name, 0.85, 2e-5, 3)
        one_size = name in (*DISPATCHERS, "all_to_all")
        curve = fit_flows(chosen, curve, known, _few(free) if one_size else free, {name: name})
    ring = assumed(
        0.92, 1.0, "well-tuned rings reach 90 to 96 %; EFA is measured at 95 % on four nodes", 3e-5
    )
    tree = assumed(0.8, 1.0, "between the ring and what EFA reaches by trees", 3e-5)
    return curve.model_copy(update={"flows": {**curve.flows, **dict.fromkeys(RINGS, ring), "tree": tree}})


def _efa(rows: Sequence[Row], known: Known) -> LinkCurve:
    """Elastic Fabric Adapter: all-reduce, all-to-all and DeepEP are measured."""
    curve = _blank("efa", 50e9, 7.0, 0.2, "fitted: NCCL and DeepEP over EFA")
    over = [r for r in rows if r["outer_kind"] == "efa"]
    reduced = [r for r in over if r["collective"] == "all_reduce"]
    free = {"hop": Free(5.0, 0.5, 30)}
    free |= free_flow("all_reduce", 0.9, 1e-4, 2) | free_flow("tree", 0.65, 1e-4, 2)
    free["all_reduce.efficiency"] = Free(EFA_RING, EFA_RING, EFA_RING)
    curve = fit_flows(reduced, curve, known, free, {"all_reduce": "all_reduce", "tree": "all_reduce"}, "hop")
    plain = [r for r in over if r["collective"] == "all_to_all" and not r["algorithm"]]
    free = free_flow("all_to_all", 0.85, 1e-4, 2) | {"peer": Free(0.1, 0.01, 2)}
    curve = fit_flows(plain, curve, known, free, {"all_to_all": "all_to_all"}, "peer")
    deep = [r for r in over if r["algorithm"] == "deepep"]
    free = _few(free_flow("deepep", 0.7, 2e-5, 5))
    curve = fit_flows(deep, curve, known, free, {"deepep": "deepep"})
    ring = curve.flows["all_reduce"]
    flows = {
        **curve.flows,
        "all_gather": _as(ring, "as the ring of all-reduce"),
        "reduce_scatter": _as(ring, "as the ring of all-reduce"),
        "hybridep": _as(curve.flows["deepep"], "as DeepEP"),
        "send_recv": _as(ring, "as the ring of all-reduce"),
    }
    return curve.model_copy(update={"flows": flows})


def _assumed_networks(ib: LinkCurve) -> list[LinkCurve]:
    def after(kind: LinkKind, bandwidth: float, scale: float, slower: float, why: str) -> LinkCurve:
        flows = {name: _as(flow, why, scale) for name, flow in ib.flows.items()}
        return LinkCurve(
            kind=kind,
            bandwidth=bandwidth,
            hop=ib.hop * slower,
            peer=ib.peer * slower,
            flows=flows,
            source=f"assumed: {why}",
        )

    return [
        after("roce", 50e9, 0.97, 1.2, "InfiniBand, a little less"),
        after("ethernet", 12.5e9, 0.85, 3.0, "InfiniBand, less what TCP costs"),
    ]


def _xgmi(rows: Sequence[Row], nvlink: LinkCurve) -> LinkCurve:
    """xGMI: two figures of all-reduce, two and eight GPUs of a full mesh; ramps and latencies as NVLink's."""
    chosen = [r for r in rows if r["inner_kind"] == "xgmi"]
    flows = {
        n: _as(f, "as NVLink of 450 GB/s, at xGMI's all-reduce", 0.8)
        for n, f in nvlink.flows.items()
        if n != "nvls"
    }
    curve = LinkCurve(
        kind="xgmi",
        bandwidth=448e9,
        hop=nvlink.hop,
        peer=nvlink.peer,
        full_mesh=True,
        flows=flows,
        source="all-reduce measured, the rest assumed after NVLink",
    )
    free = {"all_reduce.efficiency": Free(0.7, 0.1, 0.98)}
    return fit_flows(chosen, curve, {}, free, {"all_reduce": "all_reduce"})


def _pcie() -> LinkCurve:
    why = "SimuMax's fits for eight A100 on PCIe 4.0 (configs/system/a100_pcie.json)"
    ring, exchange = assumed(0.69, 1.0, why, 2e-5), assumed(0.64, 1.0, why, 2e-5)
    flows = dict.fromkeys((*RINGS, "tree", "send_recv"), ring)
    flows |= dict.fromkeys(("all_to_all", *DISPATCHERS), exchange)
    return LinkCurve(kind="pcie", bandwidth=32e9, hop=0.6, peer=0.1, flows=flows, source=f"assumed: {why}")


def _memory() -> LinkCurve:
    why = "processes of one machine through shared memory"
    names = (*RINGS, "tree", "send_recv", "all_to_all", *DISPATCHERS)
    return LinkCurve(
        kind="memory",
        bandwidth=1e9,
        hop=1.0,
        peer=1.0,
        flows={name: assumed(0.8, 1.0, why) for name in names},
        source=f"assumed: {why}",
    )

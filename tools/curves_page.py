"""The text of docs/curves.md: every curve with its error, its points and its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from meshwright.calibration import AttentionCurve, Curves, Fit, Flow, LinkCurve, MatmulCurve

TEMPLATE = Path(__file__).with_name("curves.template.md")


def page(curves: Curves, sources: Sequence[Mapping[str, str]]) -> str:
    """The whole page."""
    sustained = ", ".join(
        f"{100 * g.sustained:.0f} % on {'B200' if name == 'blackwell' else 'A100 (PCIe)'}"
        for name, g in curves.generations.items()
        if g.sustained is not None
    )
    filled = {
        "sustained": sustained,
        "kernels": "\n".join(_kernel_table(curves)),
        "links": "\n".join(_link_table(curves)),
        "sources": "\n".join(_source_table(sources)),
    }
    text = TEMPLATE.read_text("utf-8")
    for name, part in filled.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def _fit_cells(fit: Fit) -> str:
    if not fit.points:
        return f"– | – | 0 | {fit.source}"
    return f"{100 * fit.median_error:.1f} % | {100 * fit.max_error:.0f} % | {fit.points} | {fit.source}"


def _kernel_table(curves: Curves) -> Iterator[str]:
    yield "| curve | parameters | median error | largest | points | source |"
    yield "|---|---|---|---|---|---|"
    for name, generation in curves.generations.items():
        for title, by_type in (("matmul", generation.matmul), ("grouped", generation.grouped_matmul)):
            for dtype, curve in by_type.items():
                yield f"| {name} {title} {dtype} | {_matmul(curve)} | {_fit_cells(curve.fit)} |"
        for direction, attention in generation.attention.items():
            yield f"| {name} attention {direction} | {_attention(attention)} | {_fit_cells(attention.fit)} |"
    for kind, memory in next(iter(curves.generations.values())).memory.items():
        yield f"| all {kind} | share {memory.share:.2f} | {_fit_cells(memory.fit)} |"


def _matmul(curve: MatmulCurve) -> str:
    halves = ", ".join(f"{value:.0f}" for value in (curve.half_m, curve.half_n, curve.half_k))
    backward = f"{curve.input_gradient:.2f}, {curve.weight_gradient:.2f}"
    launch = f"{1e6 * curve.launch_s:.1f}"
    if curve.group_launch_s:
        launch += f" + {1e6 * curve.group_launch_s:.1f} a group"
    rates = f"rate {curve.rate:.2f} (gradients × {backward}), ½ {halves}, memory {curve.memory:.2f}"
    return f"{rates}, launch {launch} µs"


def _attention(curve: AttentionCurve) -> str:
    widths = ", ".join(f"{share:.2f} at {width}" for width, share in curve.widths.items() if width != "128")
    return f"rate {curve.rate:.2f} ({widths}), keys {curve.keys:.0f}, fill {curve.fill:,.0f}"


def _link_table(curves: Curves) -> Iterator[str]:
    yield "| link | traffic | parameters | median error | largest | points | source |"
    yield "|---|---|---|---|---|---|---|"
    for link in curves.links:
        latency = 3.0 if link.kind in ("nvlink", "xgmi") else 8.0
        title = f"{link.kind} {link.bandwidth / 1e9:g} GB/s"
        steps = f"hop {latency * link.hop:.1f}, peer {latency * link.peer:.1f} µs"
        yield f"| {title} | | {steps} | | | | {link.source} |"
        for traffic, flow in _grouped_alike(link):
            yield f"| {title} | {traffic} | {_flow(flow, latency)} | {_fit_cells(flow.fit)} |"


def _grouped_alike(link: LinkCurve) -> Iterator[tuple[str, Flow]]:
    """The flows of a link, those that are the same in one line."""
    names: dict[str, list[str]] = {}
    for name, flow in link.flows.items():
        names.setdefault(flow.model_dump_json(), []).append(name)
    for alike in names.values():
        yield ", ".join(alike), link.flows[alike[0]]


def _flow(flow: Flow, latency: float) -> str:
    text = f"{flow.efficiency:.2f}, ramp {1e6 * flow.ramp_s:.0f} µs, start {latency * flow.start:.0f} µs"
    return text + (f", extra {flow.extra:.2f}" if flow.extra else "")


def _source_table(sources: Sequence[Mapping[str, str]]) -> Iterator[str]:
    yield "| key | from | what |"
    yield "|---|---|---|"
    for row in sources:
        place = " ".join(part for part in (row["repository"], f"`{row['path']}`", row["commit"]) if part)
        yield f"| {row['source']} | {place} | {row['note']} |"

"""Where a stated layout cannot exist: the nearest that can, fewest changed figures first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import log2

from meshwright.cluster import Cluster
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.layout import Layout, divisors, nearest_divisors
from meshwright.model import Model
from meshwright.verify import Finding, cluster_findings, layout_findings

AXES = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp")
REPAIRED_AXES = ("tp", "pp", "dp", "ep", "cp")


@dataclass(frozen=True, slots=True)
class Repair:
    """A layout that can exist, and what it changes of the stated one: axis → (stated, now)."""

    layout: Layout
    changes: Mapping[str, tuple[int, int]]
    kept_figures: int
    peak_memory_bytes: int | None = None
    fits: bool | None = None

    def document(self) -> dict[str, object]:
        """The repair as JSON keys of `audit`."""
        words = [f"{axis}: {old} -> {new}" for axis, (old, new) in self.changes.items()]
        return {
            "layout": self.layout.degrees(),
            "changes": words,
            "kept_figures": self.kept_figures,
            "peak_memory_bytes": self.peak_memory_bytes,
            "fits": self.fits,
        }


def broken_rules(model: Model, cluster: Cluster, degrees: Mapping[str, int], batch: int) -> list[Finding]:
    """Every rule that keeps degrees from existing as they are: none when they can."""
    try:
        layout = decode(Layout, {axis: degrees[axis] for axis in AXES}, "layout")
    except InputError as error:
        return [Finding(error.key, error.value, error.rule, error.nearest)]
    findings = [*cluster_findings(cluster, layout), *layout_findings(model, layout)]
    if batch % layout.dp:
        rule = f"must divide the global batch of {batch} sequences"
        findings.append(Finding("layout.dp", layout.dp, rule, tuple(nearest_divisors(batch, layout.dp))))
    return [finding for finding in findings if finding.level == "error"]


def nearest_layouts(
    model: Model,
    cluster: Cluster,
    stated: Mapping[str, int],
    batch: int,
    kept_figures: Callable[[Layout], int],
    count: int = 5,
) -> list[Repair]:
    """Possible layouts nearest to the stated degrees.

    Order: fewest changed degrees, then most other stated figures still true, then the smallest change
    (sum of |log2 new/old|), then the degrees themselves, so that the answer is deterministic.
    """
    found = []
    for degrees in _candidates(model, cluster, stated):
        layout = _layout(degrees)
        if layout is None or not _fits(model, layout, batch):
            continue
        changes = {a: (stated[a], layout.size(a)) for a in REPAIRED_AXES if stated[a] != layout.size(a)}
        found.append((len(changes), _distance(changes), layout, changes))
    found.sort(key=lambda item: (item[0], item[1], tuple(item[2].degrees().values())))
    fewest = [item for item in found if item[0] <= found[0][0] + 1][: 40 * count] if found else []
    repairs = [Repair(layout, changes, kept_figures(layout)) for _, _, layout, changes in fewest]
    repairs.sort(key=lambda r: (len(r.changes), -r.kept_figures, _distance(r.changes)))
    return repairs[:count]


def _distance(changes: Mapping[str, tuple[int, int]]) -> float:
    return sum(abs(log2(new / old)) for old, new in changes.values())


def _candidates(model: Model, cluster: Cluster, stated: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Every way to fill the cluster with tensor, context, pipeline and data parallelism, and experts."""
    world = cluster.num_gpus
    layers = model.num_hidden_layers
    experts = divisors(model.num_experts) if model.is_moe else [1]
    contexts = sorted({1, stated["cp"]})
    for tp in divisors(world):
        if model.num_attention_heads % tp:
            continue
        for pp in (d for d in divisors(world // tp) if d * stated["vpp"] <= layers):
            for cp in (c for c in contexts if world // (tp * pp) % c == 0):
                dp = world // (tp * pp * cp)
                for ep in experts:
                    etp = stated["etp"] if stated["etp"] in (1, stated["tp"]) else 1
                    etp = tp if etp == stated["tp"] and etp > 1 else 1
                    yield {"tp": tp, "pp": pp, "cp": cp, "dp": dp, "ep": ep, "vpp": stated["vpp"], "etp": etp}


def _layout(degrees: Mapping[str, int]) -> Layout | None:
    try:
        return Layout(**{axis: degrees[axis] for axis in AXES})
    except ValueError:  # pydantic wraps the rule on etp·ep, and a world beyond the cap
        return None


def _fits(model: Model, layout: Layout, batch: int) -> bool:
    return batch % layout.dp == 0 and not any(f.level == "error" for f in layout_findings(model, layout))

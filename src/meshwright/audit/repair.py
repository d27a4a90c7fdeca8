"""Where a stated layout cannot exist: the nearest that can, fewest changed figures first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import log2

from meshwright.cluster import Cluster
from meshwright.errors import InputError
from meshwright.layout import Layout, divisors, nearest_divisors
from meshwright.model import Model
from meshwright.verify import Finding, cluster_findings, layout_findings

AXES = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp")
REPAIRED_AXES = ("tp", "pp", "dp", "ep", "cp", "etp", "vpp")


@dataclass(frozen=True, slots=True)
class Repair:
    """A layout that can exist, and what it changes of the stated one: axis → (stated, now)."""

    layout: Layout
    changes: Mapping[str, tuple[int, int]]
    kept_figures: int
    micro_batch_size: int | None = None
    peak_memory_bytes: int | None = None
    fits: bool | None = None

    def document(self) -> dict[str, object]:
        """The repair as JSON keys of `audit`."""
        words = [f"{axis}: {old} -> {new}" for axis, (old, new) in self.changes.items()]
        return {
            "layout": self.layout.degrees(),
            "changes": words,
            "kept_figures": self.kept_figures,
            "micro_batch_size": self.micro_batch_size,
            "peak_memory_bytes": self.peak_memory_bytes,
            "fits": self.fits,
        }


def broken_rules(model: Model, cluster: Cluster, degrees: Mapping[str, int], batch: int) -> list[Finding]:
    """Every rule that keeps degrees from existing as they are, the world first: none when they can."""
    layout = _unchecked(degrees)
    findings = [*cluster_findings(cluster, layout), *layout_findings(model, layout)]
    try:
        layout.require_fold()
    except InputError as error:
        findings.append(Finding(f"layout.{error.key}", error.value, error.rule, error.nearest))
    if batch % layout.dp:
        rule = f"must divide the global batch of {batch} sequences"
        findings.append(Finding("layout.dp", layout.dp, rule, tuple(nearest_divisors(batch, layout.dp))))
    return [finding for finding in findings if finding.level == "error"]


def nearest_layouts(
    model: Model,
    cluster: Cluster,
    stated: Mapping[str, int],
    given: Collection[str],
    batch: int,
    kept_figures: Callable[[Layout], int],
    count: int = 5,
) -> list[Repair]:
    """Possible layouts nearest to the stated degrees. Of those, `given` names the ones that somebody stated:
    a dp, etp or vpp that only followed from the others is free.

    Order: fewest changed degrees, then most other stated figures still true, then the smallest change
    (sum of |log2 new/old|), then the degrees themselves, so that the answer is deterministic.
    """
    found = []
    counted = [axis for axis in REPAIRED_AXES if axis in given or axis not in ("dp", "etp", "vpp")]
    for degrees in _candidates(model, cluster, stated):
        layout = _unchecked(degrees)
        if not _fits(model, layout, batch):
            continue
        changes = {a: (stated[a], layout.size(a)) for a in counted if stated[a] != layout.size(a)}
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
    experts = divisors(model.num_experts) if model.is_moe else [1]
    contexts, chunks = sorted({1, stated["cp"]}), sorted({1, stated["vpp"]})
    for tp in (d for d in divisors(world) if model.num_attention_heads % d == 0):
        for pp in (d for d in divisors(world // tp) if d <= model.num_hidden_layers):
            for cp in (c for c in contexts if world // (tp * pp) % c == 0):
                dense = {"tp": tp, "pp": pp, "cp": cp, "dp": world // (tp * pp * cp)}
                for ep, vpp in product(experts, chunks):
                    for etp in sorted({1, tp if ep == 1 else 1, stated["etp"]}):
                        yield {**dense, "ep": ep, "vpp": vpp, "etp": etp}


def _unchecked(degrees: Mapping[str, int]) -> Layout:
    """A layout as stated, impossible ones included: its rules are asked one by one."""
    return Layout.model_construct(None, **{axis: degrees[axis] for axis in AXES})


def _fits(model: Model, layout: Layout, batch: int) -> bool:
    """Whether a layout that fills the cluster can exist."""
    if batch % layout.dp or layout.tp * layout.cp * layout.dp % (layout.etp * layout.ep):
        return False
    return not any(finding.level == "error" for finding in layout_findings(model, layout))

"""What one cluster, number type and engine charge: kernel rates, link rates, what overlaps, the constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from meshwright.cluster import Cluster
from meshwright.cost.collectives import LinkRates, link_rates
from meshwright.cost.compute import ComputeRates, Recipe, compute_rates
from meshwright.cost.constants import Constants, constants, generation_of
from meshwright.cost.measured import MeasuredRates, measured_rates
from meshwright.eras import Era, era_named, era_of
from meshwright.policy import EngineName
from meshwright.workload import Precision

GraphScope = Literal["none", "partial", "full"]
"""What captured CUDA graphs launch: nothing, all but the experts' part of a layer, or everything."""
Overlap = Mapping[str, bool]
"""What runs beside compute: `tensor`, `data`, `gather`, `pipeline`, `context`."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a run states about how it was executed, beyond its plan.

    `overlap` replaces facts of the era, and so does `graphs`: what captured CUDA graphs launch.
    `fp8_recipe` is how fp8 is scaled: by default per tensor on Hopper, per block (MXFP8) on Blackwell.
    `balanced` is False for real routing that nobody described; `static_experts` is True where every expert
    takes a fixed number of tokens, so that no size has to come back from the GPU.
    """

    era: str | None = None
    overlap: Overlap = field(default_factory=dict)
    graphs: GraphScope | None = None
    fp8_recipe: Recipe | None = None
    balanced: bool = True
    static_experts: bool = False


@dataclass(frozen=True, slots=True)
class Prices:
    """Everything that turns tasks into seconds. `precise` prices what an fp8 or fp4 recipe leaves in bf16;
    `measured` is what a calibration of the machine says, which goes before curves and constants."""

    cluster: Cluster
    compute: ComputeRates
    precise: ComputeRates
    links: LinkRates
    constants: Constants
    overlap: Overlap
    slowdown: float
    grouped: float
    memory: float
    attention: float
    network: float
    exchange_s: float
    step_s: float
    graphs: GraphScope
    static_experts: bool
    casts: bool
    fp8_recipe: Recipe
    flat: bool
    flash_attention: bool
    measured: MeasuredRates | None = None

    @property
    def is_serial(self) -> bool:
        """Whether ops wait for their own launches: on processors, where that was measured."""
        return self.measured is not None and self.measured.is_serial

    @property
    def memory_bytes_per_s(self) -> float:
        """Bytes per second that ops reach which memory bandwidth bounds."""
        return self.precise.memory_bytes_per_s

    @property
    def update(self) -> float:
        """Factor by which an update takes longer inside a step than its price: none where it was measured."""
        return 1.0 if self.measured is not None and self.measured.has_update else self.memory

    def hidden(self, what: str) -> float:
        """Share of a kind of communication that runs beside compute: 0 where nothing overlaps it.

        The exchange of context parallelism and the sends of a pipeline hide as well as what tensor
        parallelism sends: no run tells them apart.
        """
        name = "tensor" if what in ("context", "pipeline") else what
        return self.constants.hidden[name].value if self.overlap.get(what, False) else 0.0


def prices(
    cluster: Cluster,
    precision: Precision,
    engine: EngineName,
    conditions: Conditions | None = None,
    values: Constants | None = None,
) -> Prices:
    """The prices of a cluster for one number type and engine. Raises InputError for an unknown era."""
    stated = conditions or Conditions()
    fitted = values or constants()
    era = era_named(stated.era or era_of(engine))
    low = precision in ("fp8", "fp4")
    fine: Precision = "bf16" if low else precision
    # A file that states one flat efficiency has said what kernels reach: nothing is put on top of it.
    flat = cluster.efficiency is not None and cluster.efficiency.compute is not None
    generation = generation_of(cluster.gpu.name)
    usual: Recipe = "block" if generation.startswith("blackwell") else "tensor"
    recipe = stated.fp8_recipe or usual
    found = Prices(
        cluster=cluster,
        compute=compute_rates(cluster.gpu, precision, cluster.efficiency, recipe),
        precise=compute_rates(cluster.gpu, fine, cluster.efficiency),
        links=link_rates(cluster),
        constants=fitted,
        overlap={**_overlap(era), **stated.overlap},
        slowdown=1.0 if flat else fitted.slowdown[generation].value / cluster.gpu.sustained,
        grouped=1.0 if flat else fitted.grouped.value,
        memory=1.0 if flat else fitted.memory.value,
        attention=era.attention_slowdown(generation),
        network=fitted.network.value,
        exchange_s=fitted.efa.value if any(link.kind == "efa" for link in cluster.links) else 0.0,
        step_s=0.0 if flat else fitted.step["usual" if era.step is None else era.step.value].value,
        graphs=stated.graphs or ("partial" if era.launches_graphs(cluster.gpu.name) else "none"),
        static_experts=stated.static_experts,
        casts=low,
        fp8_recipe=recipe,
        flat=flat,
        flash_attention=era.flash_attention.value,
    )
    table = cluster.calibration
    if table is None:
        return found
    return _calibrated(found, measured_rates(table, precision, cluster.gpus_per_node))


def _calibrated(found: Prices, measured: MeasuredRates) -> Prices:
    """The same prices with those of a calibration before them, and its costs of launches and of a step. The
    factors stay: they are for what the table does not hold."""
    values = found.constants
    for kind, seconds in measured.kernels.host_s.items():
        source = f"measured on {measured.table.date}"
        values = values.replaced(f"host.{kind}", {"value": seconds, "source": source})
    return replace(found, constants=values, step_s=measured.kernels.step_s, measured=measured)


def _overlap(era: Era) -> dict[str, bool]:
    names = ("tensor", "data", "gather", "pipeline", "context")
    return {name: getattr(era, name).value for name in names}

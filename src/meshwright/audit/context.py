"""What the figures of a document are recomputed from: its description, its stated degrees, a real layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from meshwright.audit.repair import AXES, Repair, broken_rules, nearest_layouts
from meshwright.audit.speed import Step
from meshwright.claims import Claims, Conditions, Figure
from meshwright.cluster import Cluster
from meshwright.cost.memory import RankMemory, memory, worst
from meshwright.deployment import Deployment
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.ir.parameters import ParameterCounts, count_parameters
from meshwright.ir.program import Program, lower, model_flops
from meshwright.ir.schedule import require_buildable
from meshwright.layout import Layout, LayoutRequest
from meshwright.model import Model
from meshwright.plan import Plan, resolve_layout, resolve_policy
from meshwright.verify import Finding, stage_findings
from meshwright.workload import Workload

ALL = Conditions()
MAX_CONDITIONS = 16
"""Different conditions that the figures of one document may be stated under: each is a plan of its own."""


@dataclass(frozen=True)
class Context:
    """A deployment with its stated degrees and, where those cannot exist, the nearest that can.

    `stated` holds every degree, a missing one by its default, and `given` names those that somebody stated;
    `num_micro_batches` is what the document states, else what its micro-batch size gives.
    """

    deployment: Deployment
    cluster: Cluster
    defaults: Mapping[str, str]
    stated: Mapping[str, int]
    num_micro_batches: int
    given: frozenset[str]
    broken_rules: tuple[Finding, ...]
    repairs: tuple[Repair, ...] = ()
    steps: dict[tuple[Conditions, int], Step] = field(default_factory=dict)
    """Step times by conditions and sequence length, as far as somebody asked."""
    _flops: dict[int, int] = field(default_factory=dict)
    _plans: dict[Conditions, tuple[Plan, Program]] = field(default_factory=dict)
    _memories: dict[Conditions, tuple[RankMemory, ...]] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The described model."""
        return self.deployment.model

    @property
    def workload(self) -> Workload:
        """The described workload."""
        return self.deployment.workload

    @property
    def claims(self) -> Claims:
        """What the document states; empty for a deployment without claims."""
        return self.deployment.claims or Claims()

    @property
    def possible(self) -> bool:
        """Whether the stated layout can exist on this cluster."""
        return not self.broken_rules

    @cached_property
    def parameters(self) -> ParameterCounts:
        """Parameters of the described model."""
        return count_parameters(self.model)

    @cached_property
    def layout(self) -> Layout | None:
        """The stated layout where it can exist, else the nearest that can; None where nothing can."""
        if self.possible:
            return Layout(**{axis: self.stated[axis] for axis in AXES})
        return self.repairs[0].layout if self.repairs else None

    @property
    def layout_words(self) -> str:
        """The layout that memory and step times are computed on, stated or nearest, for a sentence."""
        layout = self.layout
        if layout is None:
            return "no possible layout"
        return " ".join(f"{axis.upper()}{layout.size(axis)}" for axis in ("tp", "pp", "dp", "ep"))

    def plan_for(self, figure: Figure) -> tuple[Plan, Program]:
        """The plan and program that a figure speaks of, under its own conditions where it names them."""
        layout = self.layout
        if layout is None:
            raise InputError("layout", dict(self.stated), "no layout of this model fills this cluster")
        if figure.at not in self._plans:
            if len(self._plans) == MAX_CONDITIONS:
                rule = f"figures may be stated under at most {MAX_CONDITIONS} different conditions"
                raise InputError("claims.figures.at", figure.at.model_dump(exclude_none=True), rule)
            plan = self.plan_on(layout, figure.at)
            for finding in stage_findings(plan.model, plan.layout, plan.policy):
                raise finding.raised()
            length = figure.at.sequence_length or self.workload.max_sequence_length
            self._plans[figure.at] = (plan, lower(plan, length))
        return self._plans[figure.at]

    def plan_on(self, layout: Layout, at: Conditions = ALL) -> Plan:
        """The plan of this deployment on a layout.

        A figure's own share of a replica, or its own micro-batch, comes with as many micro-batches as the
        document states; the file's own micro-batch is kept as it is; else the replica's share is cut into the
        stated number where that divides and can be scheduled, or into single sequences.
        """
        batch = self.batch_on(layout.dp, at)
        size = at.micro_batch_size or self.deployment.policy.micro_batch_size
        if size is not None:
            return self._with(layout, batch, size)
        per_replica = batch // layout.dp
        if per_replica % self.num_micro_batches == 0:
            plan = self._with(layout, batch, per_replica // self.num_micro_batches)
            if _buildable(plan):
                return plan
        return self._with(layout, batch, 1)

    def batch_on(self, dp: int, at: Conditions = ALL) -> int:
        """Sequences of a step: the workload's, or those that a figure's own conditions make over dp ranks."""
        if at.sequences_per_replica is not None:
            return at.sequences_per_replica * dp
        if at.micro_batch_size is not None:
            return at.micro_batch_size * dp * self.num_micro_batches
        return self.workload.global_batch_size

    def _with(self, layout: Layout, global_batch_size: int, micro_batch_size: int) -> Plan:
        request = self.deployment.policy.model_copy(update={"micro_batch_size": micro_batch_size})
        policy, _ = resolve_policy(self.deployment.model_copy(update={"policy": request}), layout)
        fields = {
            "name": self.deployment.name,
            "cluster": self.cluster,
            "model": self.model,
            "workload": self.workload.model_copy(update={"global_batch_size": global_batch_size}),
            "layout": layout,
            "policy": policy,
        }
        return decode(Plan, fields)

    def memory_for(self, figure: Figure) -> tuple[RankMemory, ...]:
        """Memory of every pipeline rank, for the workload that a figure speaks of."""
        if figure.at not in self._memories:
            self._memories[figure.at] = memory(self.plan_for(figure)[1])
        return self._memories[figure.at]

    def worst_memory(self, figure: Figure) -> RankMemory:
        """Memory of the pipeline rank that needs most, for the workload that a figure speaks of."""
        return worst(self.memory_for(figure))

    def batch_of(self, figure: Figure) -> int:
        """Sequences of the step that a figure speaks of."""
        dp = self.stated["dp"] if self.layout is None else self.layout.dp
        return self.batch_on(dp, figure.at)

    def bound_s(self, figure: Figure, sequence_length: int, efficiency: float = 1.0) -> float:
        """Seconds that the FLOPs of a figure's step alone take on all GPUs at a share of their peak."""
        rate = self.cluster.gpu.peak_flops_per_s(self.workload.precision) * self.cluster.num_gpus * efficiency
        share = self.batch_of(figure) / self.workload.global_batch_size
        if sequence_length not in self._flops:
            self._flops[sequence_length] = model_flops(self._whole_model, sequence_length)
        return share * self._flops[sequence_length] / rate

    @cached_property
    def _whole_model(self) -> Plan:
        """The plan on one rank: FLOPs of a step do not depend on the layout, nor on whether there is one."""
        return self._with(Layout(), self.workload.global_batch_size, 1)

    def longest_length_within(self, figure: Figure, seconds: float, efficiency: float) -> int:
        """The longest sequence whose FLOPs alone fit a time; 0 where even one token per sequence does not."""
        low, high = 0, self.workload.max_sequence_length
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.bound_s(figure, middle, efficiency) <= seconds
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _buildable(plan: Plan) -> bool:
    try:
        require_buildable(plan.policy.schedule, plan.layout.pp, plan.num_micro_batches, plan.layout.vpp)
    except InputError:
        return False
    return True


def context_of(deployment: Deployment) -> Context:
    """Everything that the figures of a deployment are recomputed from, nearest layouts not yet looked for."""
    cluster, defaults = deployment.cluster.resolve()
    given = _given(deployment)
    stated, layout_defaults = _stated_degrees(deployment, cluster, given)
    count = _claims(deployment).layout.num_micro_batches or _micro_batches(deployment, stated["dp"])
    broken = broken_rules(deployment.model, cluster, stated, deployment.workload.global_batch_size)
    used = {**defaults, **layout_defaults}
    return Context(deployment, cluster, used, stated, count, frozenset(given), tuple(broken))


def with_repairs(ctx: Context, kept_figures: Callable[[Layout], int]) -> Context:
    """The context with the nearest possible layouts where the stated one cannot exist, and the defaults of
    the policy on the layout that is then looked at."""
    repairs: list[Repair] = []
    if not ctx.possible:
        batch = ctx.workload.global_batch_size
        repairs = nearest_layouts(ctx.model, ctx.cluster, ctx.stated, ctx.given, batch, kept_figures)
    found = replace(ctx, repairs=tuple(repairs), _plans={}, _memories={})
    layout = found.layout
    used = _policy_defaults(ctx.deployment, layout) if layout is not None else {}
    return replace(found, defaults={**ctx.defaults, **used}, _plans={}, _memories={})


def _claims(deployment: Deployment) -> Claims:
    return deployment.claims or Claims()


def _given(deployment: Deployment) -> dict[str, int]:
    """The degrees that somebody stated: the document's over the file's layout."""
    layout, claimed = deployment.layout.model_dump(), _claims(deployment).layout.model_dump()
    degrees = {axis: claimed[axis] or layout[axis] for axis in AXES}
    return {axis: size for axis, size in degrees.items() if size is not None}


def _stated_degrees(
    deployment: Deployment, cluster: Cluster, given: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, str]]:
    """Every degree, a missing one by its default; they need not be possible together."""
    try:
        layout, defaults = resolve_layout(LayoutRequest(**given), cluster, deployment.policy.schedule)
    except InputError:  # impossible degrees are a finding of the audit, not an error
        degrees = {"tp": 1, "cp": 1, "pp": 1, "ep": 1, "vpp": 1, **given}
        degrees.setdefault("etp", 1 if degrees["ep"] > 1 else degrees["tp"])
        inner = degrees["tp"] * degrees["cp"] * degrees["pp"]
        degrees.setdefault("dp", max(1, cluster.num_gpus // inner))
        return degrees, {f"layout.{a}": f"{v}: not stated" for a, v in degrees.items() if a not in given}
    return {axis: layout.size(axis) for axis in AXES}, defaults


def _policy_defaults(deployment: Deployment, layout: Layout) -> dict[str, str]:
    with suppress(InputError):
        _, used = resolve_policy(deployment, layout)
        if _claims(deployment).layout.num_micro_batches:
            used.pop("policy.micro_batch_size", None)  # the stated number of micro-batches decides it
        return used
    return {}


def _micro_batches(deployment: Deployment, dp: int) -> int:
    per_replica = max(1, deployment.workload.global_batch_size // dp)
    return max(1, per_replica // (deployment.policy.micro_batch_size or 1))

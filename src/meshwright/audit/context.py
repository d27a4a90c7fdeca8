"""What the figures of a document are recomputed from: its description, its stated degrees, a real layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from meshwright.audit.repair import AXES, Repair, broken_rules, nearest_layouts
from meshwright.claims import Claims, Figure
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
from meshwright.units import SECONDS
from meshwright.verify import Finding, stage_findings
from meshwright.workload import Workload


@dataclass(frozen=True)
class Context:
    """A deployment with its stated degrees and, where those cannot exist, the nearest that can.

    `stated` holds every degree, a missing one by its default; `num_micro_batches` is what the document
    states, else what its micro-batch size gives.
    """

    deployment: Deployment
    cluster: Cluster
    defaults: Mapping[str, str]
    stated: Mapping[str, int]
    num_micro_batches: int
    broken_rules: tuple[Finding, ...]
    repairs: tuple[Repair, ...]
    _plans: dict[tuple[int, int | None], tuple[Plan, Program]] = field(default_factory=dict)
    _memories: dict[tuple[int, int | None], tuple[RankMemory, ...]] = field(default_factory=dict)

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
        """The layout that memory figures are computed on, stated or nearest, for a sentence."""
        layout = self.layout
        if layout is None:
            return "no possible layout"
        return " ".join(f"{axis.upper()}{layout.size(axis)}" for axis in ("tp", "pp", "dp", "ep"))

    def stated_step_time_s(self) -> float | None:
        """The step time that the document states, in seconds."""
        for figure in self.claims.figures:
            if figure.id == "step_time" and isinstance(figure.value, str):
                return SECONDS.parse(figure.value, "step_time")
        return None

    def plan_for(self, figure: Figure) -> tuple[Plan, Program]:
        """The plan and program that a figure speaks of, with its own length and micro-batch if named."""
        layout = self.layout
        if layout is None:
            raise InputError("layout", dict(self.stated), "no layout of this model fills this cluster")
        key = self._key(figure)
        if key not in self._plans:
            plan = self.plan_on(layout, figure.at.micro_batch_size)
            for finding in stage_findings(plan.model, plan.layout, plan.policy):
                raise finding.raised()
            self._plans[key] = (plan, lower(plan, key[0]))
        return self._plans[key]

    def plan_on(self, layout: Layout, micro_batch_size: int | None = None) -> Plan:
        """The plan of this deployment on a layout.

        A figure's own micro-batch comes with as many of them as the document states; the file's own is kept
        as it is; else the replica's share is cut into the stated number where that divides and can be
        scheduled, or into single sequences.
        """
        deployment, batch = self.deployment, self.workload.global_batch_size
        if micro_batch_size is not None:
            batch = micro_batch_size * layout.dp * self.num_micro_batches
        size = micro_batch_size or deployment.policy.micro_batch_size
        if size is not None:
            return self._with(layout, batch, size)
        per_replica = batch // layout.dp
        if per_replica % self.num_micro_batches == 0:
            plan = self._with(layout, batch, per_replica // self.num_micro_batches)
            if _buildable(plan):
                return plan
        return self._with(layout, batch, 1)

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

    def _key(self, figure: Figure) -> tuple[int, int | None]:
        return figure.at.sequence_length or self.workload.max_sequence_length, figure.at.micro_batch_size

    def memory_for(self, figure: Figure) -> tuple[RankMemory, ...]:
        """Memory of every pipeline rank, for the workload that a figure speaks of."""
        key = self._key(figure)
        if key not in self._memories:
            self._memories[key] = memory(self.plan_for(figure)[1])
        return self._memories[key]

    def worst_memory(self, figure: Figure) -> RankMemory:
        """Memory of the pipeline rank that needs most, for the workload that a figure speaks of."""
        return worst(self.memory_for(figure))

    def compute_bound_s(self, sequence_length: int, efficiency: float = 1.0) -> float:
        """Seconds that the FLOPs of one step alone take on all GPUs at a share of their peak."""
        rate = self.cluster.gpu.peak_flops_per_s(self.workload.precision) * self.cluster.num_gpus * efficiency
        return self.step_flops(sequence_length) / rate

    def step_flops(self, sequence_length: int) -> int:
        """Model FLOPs of one step at a sequence length."""
        return model_flops(self._whole_model, sequence_length)

    @cached_property
    def _whole_model(self) -> Plan:
        """The plan on one rank: FLOPs of a step do not depend on the layout, nor on whether there is one."""
        return self._with(Layout(), self.workload.global_batch_size, 1)

    def longest_length_within(self, seconds: float, efficiency: float) -> int:
        """The longest sequence whose FLOPs alone fit a time; 0 where even one token per sequence does not."""
        low, high = 0, self.workload.max_sequence_length
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.compute_bound_s(middle, efficiency) <= seconds
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _buildable(plan: Plan) -> bool:
    try:
        require_buildable(plan.policy.schedule, plan.layout.pp, plan.num_micro_batches, plan.layout.vpp)
    except InputError:
        return False
    return True


def context_of(deployment: Deployment) -> Context:
    """Everything that the figures of a deployment are recomputed from."""
    cluster, defaults = deployment.cluster.resolve()
    stated, layout_defaults = _stated_degrees(deployment, cluster)
    claimed = (deployment.claims or Claims()).layout
    count = claimed.num_micro_batches or _micro_batches(deployment, stated["dp"])
    batch = deployment.workload.global_batch_size
    repairs: list[Repair] = []
    broken = broken_rules(deployment.model, cluster, stated, batch)
    if broken:
        repairs = nearest_layouts(
            deployment.model, cluster, stated, batch, lambda layout: _kept(deployment, stated, layout)
        )
    _, policy_defaults = _policy_defaults(deployment, repairs[0].layout if repairs else None, stated)
    used = {**defaults, **layout_defaults, **policy_defaults}
    return Context(deployment, cluster, used, stated, count, tuple(broken), tuple(repairs))


def _stated_degrees(deployment: Deployment, cluster: Cluster) -> tuple[dict[str, int], dict[str, str]]:
    """The document's degrees over the file's layout over the defaults; they need not be possible."""
    claimed = (deployment.claims or Claims()).layout
    given = {name: value for name, value in deployment.layout.model_dump().items() if value is not None}
    given |= {
        name: value
        for name, value in claimed.model_dump(exclude={"num_micro_batches"}).items()
        if value is not None
    }
    try:
        layout, defaults = resolve_layout(LayoutRequest(**given), cluster, deployment.policy.schedule)
    except InputError:  # impossible degrees are a finding of the audit, not an error
        degrees = {"tp": 1, "cp": 1, "pp": 1, "ep": 1, "vpp": 1} | given
        degrees.setdefault("etp", 1 if degrees["ep"] > 1 else degrees["tp"])
        inner = degrees["tp"] * degrees["cp"] * degrees["pp"]
        degrees.setdefault("dp", max(1, cluster.num_gpus // inner))
        return degrees, {f"layout.{a}": f"{v}: not stated" for a, v in degrees.items() if a not in given}
    return {axis: layout.size(axis) for axis in AXES}, defaults


def _policy_defaults(
    deployment: Deployment, repaired: Layout | None, stated: Mapping[str, int]
) -> tuple[object, dict[str, str]]:
    layout = repaired
    if layout is None:
        try:
            layout = Layout(**{a: stated[a] for a in AXES})
        except ValueError:
            return None, {}
    try:
        policy, used = resolve_policy(deployment, layout)
    except InputError:
        return None, {}
    if (deployment.claims or Claims()).layout.num_micro_batches:
        used.pop("policy.micro_batch_size", None)  # the stated number of micro-batches decides it
    return policy, used


def _micro_batches(deployment: Deployment, dp: int) -> int:
    per_replica = max(1, deployment.workload.global_batch_size // dp)
    return max(1, per_replica // (deployment.policy.micro_batch_size or 1))


def _kept(deployment: Deployment, stated: Mapping[str, int], layout: Layout) -> int:
    """How many of the document's other figures stay true on a layout: those that its degrees decide."""
    axis_of = {
        "layers_per_stage": "pp",
        "stage_ranks": "pp",
        "pipeline_parallel": "pp",
        "bubble_fraction": "pp",
        "experts_per_gpu": "ep",
        "expert_parallel": "ep",
        "hidden_per_tp_rank": "tp",
        "heads_per_tp_rank": "tp",
        "tensor_parallel": "tp",
        "sequences_per_replica": "dp",
        "micro_batch_size": "dp",
        "data_parallel": "dp",
    }
    axes = [axis_of[f.id] for f in (deployment.claims or Claims()).figures if f.id in axis_of]
    return sum(stated[axis] == layout.size(axis) for axis in axes)

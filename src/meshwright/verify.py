"""Whether a layout can exist: every rule that a model, a workload and an engine put on it.

Rules return findings instead of raising, so that a document with an impossible layout can still be audited
and a search can count why layouts were refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from meshwright.cluster import Cluster
from meshwright.engines import Engine, engine_named, unknown_settings
from meshwright.errors import InputError
from meshwright.ir.schedule import require_buildable
from meshwright.layout import Layout, divisors, nearest_divisors, nearest_to
from meshwright.model import Model
from meshwright.plan import Plan, split_layers
from meshwright.policy import SPLIT_BACKWARD, EngineName, Policy, ZeroStage
from meshwright.workload import Workload


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that does not hold (`error`), or holds at a price worth knowing (`warning`)."""

    key: str
    value: object
    rule: str
    nearest: tuple[object, ...] = ()
    level: Literal["error", "warning"] = "error"

    def raised(self) -> InputError:
        """The finding as the error of a command that cannot go on."""
        return InputError(self.key, self.value, self.rule, self.nearest)


def verify(plan: Plan) -> list[Finding]:
    """Every rule that a plan breaks, and every warning, errors first."""
    findings = [
        *layout_findings(plan.model, plan.layout, num_empty_stages(plan.policy)),
        *cluster_findings(plan.cluster, plan.layout),
        *workload_findings(plan.workload, plan.layout, plan.policy),
        *stage_findings(plan.model, plan.layout, plan.policy),
        *precision_findings(plan.cluster, plan.workload),
        *engine_findings(plan.model, plan.workload, plan.layout, plan.policy),
    ]
    return sorted(findings, key=lambda finding: finding.level)


def require_valid(plan: Plan) -> list[Finding]:
    """The warnings of a plan. Raises InputError for the first rule that it breaks."""
    findings = verify(plan)
    for finding in findings:
        if finding.level == "error":
            raise finding.raised()
    return findings


def num_empty_stages(policy: Policy) -> int:
    """Stages of a policy that may hold no layer and hold none."""
    return empty_ends(policy.engine, policy.layers_per_stage)


def empty_ends(engine: EngineName, stages: Sequence[int]) -> int:
    """How many of these stages hold no layer and may: Megatron's first and last, left to the embedding and
    the head (account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split of Megatron
    Core)."""
    ends = (*stages[:1], *stages[-1:]) if len(stages) > 1 else ()
    return ends.count(0) if engine == "megatron" else 0


def layout_findings(model: Model, layout: Layout, empty_stages: int = 0) -> Iterator[Finding]:
    """Whether heads, widths, experts and layers divide by the degrees; `empty_stages` need no layer."""
    yield from _divides("layout.tp", layout.tp, model.num_attention_heads, "num_attention_heads")
    if not model.is_mla and model.kv_heads % layout.tp and layout.tp % model.kv_heads:
        degrees = divisors(model.num_attention_heads)
        near = [d for d in degrees if model.kv_heads % d == 0 or d % model.kv_heads == 0]
        rule = f"must divide, or be a multiple of, num_key_value_heads = {model.kv_heads}"
        yield Finding("layout.tp", layout.tp, rule, tuple(nearest_to(layout.tp, near)))
    for width, name in (
        (model.intermediate_size, "intermediate_size"),
        (model.shared_width, "shared expert width"),
    ):
        used = model.num_dense_layers if name == "intermediate_size" else model.is_moe
        if width and used:
            yield from _divides("layout.tp", layout.tp, width, name)
    if model.is_moe:
        yield from _divides("layout.ep", layout.ep, model.num_experts, "num_experts")
        yield from _divides(
            "layout.etp", layout.etp, model.moe_intermediate_size or 1, "moe_intermediate_size"
        )
    elif layout.ep > 1:
        yield Finding("layout.ep", layout.ep, "a dense model has no experts to divide", (1,))
    if layout.num_stages - empty_stages > model.num_hidden_layers:
        num_layers = model.num_hidden_layers
        rule = f"pp·vpp = {layout.num_stages} stages need a layer each, and the model has {num_layers}"
        longest = num_layers // layout.vpp
        yield Finding("layout.pp", layout.pp, rule, (longest,) if longest else ())


def cluster_findings(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Whether the ranks are the cluster's GPUs, and which groups leave the fast links."""
    world = cluster.num_gpus
    if layout.world_size != world:
        inner = layout.tp * layout.cp * layout.pp
        fits = (world // inner,) if world % inner == 0 else ()
        rule = f"tp·cp·dp·pp = {layout.world_size} must equal the {world} GPUs of the cluster"
        yield Finding("layout.dp", layout.dp, rule, fits)
        return
    if len(cluster.links) < 2:
        return
    inner_size = cluster.tier_size(0)
    for axis in ("tp", "etp"):  # both are the fastest axis of their view: groups are runs of ranks
        degree = layout.size(axis)
        if degree > 1 and inner_size % degree:
            rule = f"its groups leave the {cluster.links[0].name} tier of {inner_size} GPUs at every layer"
            near = tuple(nearest_divisors(inner_size, degree))
            yield Finding(f"layout.{axis}", degree, rule, near, "warning")


def workload_findings(workload: Workload, layout: Layout, policy: Policy) -> Iterator[Finding]:
    """Whether the batch and the sequences divide."""
    batch = workload.global_batch_size
    if batch % layout.dp:
        rule = f"must be a multiple of dp = {layout.dp}: every replica takes the same number of sequences"
        near = tuple(n for n in (batch // layout.dp * layout.dp, -(-batch // layout.dp) * layout.dp) if n)
        yield Finding("workload.global_batch_size", batch, rule, near)
    elif (batch // layout.dp) % policy.micro_batch_size:
        per_replica = batch // layout.dp
        rule = f"must divide the {per_replica} sequences of a replica"
        near = tuple(nearest_divisors(per_replica, policy.micro_batch_size))
        yield Finding("policy.micro_batch_size", policy.micro_batch_size, rule, near)
    divisor = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if policy.sequence_parallel else 1)
    for length in dict.fromkeys((workload.min_sequence_length, workload.max_sequence_length)):
        if length % divisor:
            rule = f"must be a multiple of {divisor}: context and sequence parallelism cut it evenly"
            near = (max(1, length // divisor) * divisor, -(-length // divisor) * divisor)
            yield Finding("workload.sequence_length", length, rule, tuple(dict.fromkeys(near)))


def precision_findings(cluster: Cluster, workload: Workload) -> Iterator[Finding]:
    """Whether the GPU computes in the number type of the workload."""
    known = cluster.gpu.peak
    if workload.precision not in known:
        rule = f"{cluster.gpu.name} has no peak for it"
        yield Finding("workload.precision", workload.precision, rule, tuple(known))


def stage_findings(model: Model, layout: Layout, policy: Policy) -> Iterator[Finding]:
    """Whether the stages hold the layers, and the schedule fits the chunks."""
    try:  # with two micro-batches per rank of the pipeline every schedule can be built, if its chunks fit
        require_buildable(policy.schedule, layout.pp, 2 * layout.pp, layout.vpp)
    except InputError as error:
        yield Finding(error.key, error.value, error.rule, error.nearest)
    stages = policy.layers_per_stage
    if len(stages) != layout.num_stages:
        rule = f"pp·vpp = {layout.num_stages} stages need one entry each"
        yield Finding("policy.layers_per_stage", len(stages), rule, (layout.num_stages,))
    elif sum(stages) != model.num_hidden_layers:
        rule = f"must add up to num_hidden_layers = {model.num_hidden_layers}"
        yield Finding("policy.layers_per_stage", sum(stages), rule, (model.num_hidden_layers,))
    elif stages.count(0) > num_empty_stages(policy) and len(stages) <= model.num_hidden_layers:
        rule = "a stage has a layer; only Megatron's first and last may hold none"
        even = split_layers(model.num_hidden_layers, len(stages))
        yield Finding("policy.layers_per_stage", stages, rule, (even,))


def engine_findings(model: Model, workload: Workload, layout: Layout, policy: Policy) -> Iterator[Finding]:
    """Whether the engine runs it, and whether the schedule can be built."""
    engine = engine_named(policy.engine)
    for key, value, known in (
        ("policy.schedule", policy.schedule, engine.schedules),
        ("policy.zero_stage", policy.zero_stage, engine.zero_stages),
        ("workload.precision", workload.precision, engine.precisions),
    ):
        if value not in known and not (key == "policy.schedule" and layout.pp == 1):
            yield Finding(key, value, f"the {policy.engine} engine does not run it", tuple(known))
    if model.is_moe and policy.dispatcher not in engine.dispatchers:
        rule = f"the {policy.engine} engine does not run it"
        yield Finding("policy.dispatcher", policy.dispatcher, rule, engine.dispatchers)
    if layout.cp > engine.max_cp:
        rule = f"the {policy.engine} engine runs cp up to {engine.max_cp}"
        yield Finding("layout.cp", layout.cp, rule, (engine.max_cp,))
    if model.is_mla and not engine.latent_attention:
        others = ("megatron", "torchtitan")
        yield Finding("policy.engine", policy.engine, "does not run multi-head latent attention", others)
    yield from _settings_findings(policy)
    yield from _combination_findings(model, layout, policy, engine)
    if policy.expert_overlap and model.is_moe and layout.ep > 1:
        yield from _overlap_findings(workload, layout, policy, engine)
    yield from _schedule_findings(workload, layout, policy)


def _settings_findings(policy: Policy) -> Iterator[Finding]:
    for name, why in unknown_settings(policy.engine, policy.settings).items():
        rule = f"the {policy.engine} engine cannot be set so: {why}"
        yield Finding(f"policy.settings.{name}", getattr(policy.settings, name), rule, ("leave it out",))


def _combination_findings(model: Model, layout: Layout, policy: Policy, engine: Engine) -> Iterator[Finding]:
    if model.is_moe and layout.tp > 1 and not policy.sequence_parallel:
        rule = (
            "experts under tensor parallelism need sequence parallelism: "
            "else each rank of tp routes every token"
        )
        yield Finding("policy.sequence_parallel", False, rule, (True,))
    splits_weight_gradient = policy.schedule in SPLIT_BACKWARD
    if policy.zero_stage == 3 and splits_weight_gradient and layout.pp > 1:
        rule = (
            f"with {policy.schedule} PyTorch reshards parameters before the deferred weight gradient "
            "needs them and gives wrong gradients without an error"
        )
        yield Finding("policy.zero_stage", 3, rule, (1, 2))
    if not divides_under_pipelines(policy.engine) and policy.zero_stage >= 2 and layout.pp > 1:
        rule = f"pipelines of {policy.engine} take ZeRO 0 or 1"
        yield Finding("policy.zero_stage", policy.zero_stage, rule, (0, 1))
    if layout.dp_replicas > 1 and not makes_replicas(policy.engine, policy.zero_stage):
        why = "ZeRO 0 divides nothing" if policy.zero_stage == 0 else f"{policy.engine} makes one group"
        rule = f"replicas are those of ZeRO's groups, and {why}"
        yield Finding("layout.dp_replicas", layout.dp_replicas, rule, (1,))
    elif policy.zero_stage == 0 and layout.dp * layout.cp > 1 and 0 in engine.zero_stages:
        rule = "each data-parallel rank keeps all optimizer states; 1 divides them for the same traffic"
        yield Finding("policy.zero_stage", 0, rule, (1,), "warning")


def makes_replicas(engine: EngineName, zero_stage: ZeroStage) -> bool:
    """Whether an engine divides by ZeRO within several equal groups: FSDP2 over a mesh of two dims, as
    torchtitan's data_parallel_replicate_degree, and Megatron's num_distributed_optimizer_instances
    (megatron-core 0.16.1)."""
    return zero_stage > 0 and engine != "deepspeed"


def divides_under_pipelines(engine: EngineName) -> bool:
    """Whether an engine runs ZeRO-2 and 3 under a pipeline: DeepSpeed refuses it, and Megatron-FSDP is taken
    to be for layouts without one (its second version says so: distributed/fsdp/mcore_fsdp_adapter.py)."""
    return engine in ("native", "torchtitan")


def fewest_under_1f1b(engine: EngineName, pp: int) -> int:
    """Micro-batches that 1F1B needs: as many as ranks where PyTorch runs it (torch 2.13,
    pipelining/schedules.py, Schedule1F1B), one elsewhere."""
    return pp if engine in ("native", "torchtitan") else 1


def _overlap_findings(
    workload: Workload, layout: Layout, policy: Policy, engine: Engine
) -> Iterator[Finding]:
    key, runs = "policy.expert_overlap", engine.expert_overlap.value
    if runs == "none":
        yield Finding(key, True, f"the {policy.engine} engine does not run it", (False,))
    if runs == "dual_pipe" and (policy.schedule != "DualPipeV" or layout.pp == 1):
        yield Finding(key, True, f"{policy.engine} runs it under a pipeline with DualPipeV only", (False,))
    if runs != "interleaved":
        return
    if layout.pp > 1 and layout.vpp == 1:
        yield Finding(key, True, f"under a pipeline {policy.engine} runs it with vpp 2 or more", (False,))
    if policy.recompute == "full":
        yield Finding(key, True, f"{policy.engine} does not run it with full recompute", (False,))
    if policy.dispatcher == "allgather":
        yield Finding(key, True, f"{policy.engine} does not run it with the allgather dispatcher", (False,))
    if workload.precision == "fp32":
        yield Finding(key, True, f"{policy.engine} does not run it in fp32", (False,))


def _schedule_findings(workload: Workload, layout: Layout, policy: Policy) -> Iterator[Finding]:
    per_replica = workload.global_batch_size // layout.dp
    if workload.global_batch_size % layout.dp or per_replica % policy.micro_batch_size:
        return
    count = per_replica // policy.micro_batch_size
    if policy.schedule == "1F1B" and count < fewest_under_1f1b(policy.engine, layout.pp):
        rule = (
            f"counted in micro-batches, 1F1B over {layout.pp} ranks needs at least {layout.pp} in PyTorch; "
            f"this batch makes {count} micro-batches on each of {layout.dp} replicas"
        )
        near = (layout.pp * policy.micro_batch_size * layout.dp,)
        yield Finding("workload.global_batch_size", workload.global_batch_size, rule, near)
    try:
        require_buildable(policy.schedule, layout.pp, count, layout.vpp)
    except InputError as error:
        if error.key == "workload.global_batch_size":  # anything else is a finding of the stages
            rule = f"{error.rule}; this batch makes {count} micro-batches on each of {layout.dp} replicas"
            nearest = [int(str(n)) * policy.micro_batch_size * layout.dp for n in error.nearest]
            yield Finding(error.key, workload.global_batch_size, rule, tuple(nearest))
    if policy.engine == "megatron" and layout.vpp > 1 and count % layout.pp:
        rule = (
            f"Megatron's interleaved schedule needs a multiple of pp = {layout.pp} micro-batches, not {count}"
        )
        near_count = max(1, count // layout.pp) * layout.pp * policy.micro_batch_size * layout.dp
        yield Finding("workload.global_batch_size", workload.global_batch_size, rule, (near_count,))


def _divides(key: str, degree: int, size: int, name: str) -> Iterator[Finding]:
    if size % degree:
        yield Finding(key, degree, f"must divide {name} = {size}", tuple(nearest_divisors(size, degree)))

"""What a rank communicates once per step, after its last micro-batch: gradients, parameters, scalars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.engines import Engine, engine_of
from meshwright.ir.elementwise import is_everywhere_nothing, is_one
from meshwright.ir.graph import CollectiveKind
from meshwright.ir.holding import Holding
from meshwright.ir.parameters import embedding_parameters
from meshwright.ir.sharding import AxisSizes, local_numel, replica_axis, zero_axes
from meshwright.ir.tasks import CommTask, Phase
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.policy import ZeroStage
from meshwright.workload import Workload


def reduces_each_micro_batch(plan: Plan) -> bool:
    """Whether every backward reduces its gradients, block by block, so that a rank keeps its share alone."""
    return reduces_in_backward(engine_of(plan.policy), plan.policy.zero_stage, plan.layout.pp)


def reduces_in_backward(engine: Engine, zero_stage: ZeroStage, pp: int) -> bool:
    """The same for an engine, a ZeRO stage and a pipeline.

    Never under a pipeline: torch.distributed.pipelining turns `set_requires_gradient_sync` off for every
    backward and reduces once (torch 2.13, pipelining/stage.py, backward_maybe_with_nosync and
    perform_reduce_grad).
    """
    return engine.reduces_gradients.value == "each_micro_batch" and zero_stage >= 2 and pp == 1


def gather_phases(plan: Plan) -> tuple[Phase, ...]:
    """The phases of a micro-batch before which each block's parameters are gathered."""
    return phases_that_gather(engine_of(plan.policy), plan.policy.zero_stage, plan.layout.pp)


def phases_that_gather(engine: Engine, zero_stage: ZeroStage, pp: int) -> tuple[Phase, ...]:
    """The same for an engine, a ZeRO stage and a pipeline: forward and backward under ZeRO-3. Under ZeRO-2,
    FSDP2 (parameters that are their own masters) divides them again after every backward that reduces;
    elsewhere they are gathered once per step."""
    if zero_stage == 3:
        return ("forward", "input_gradient")
    in_place = engine.master_in_parameter.value
    return ("forward",) if in_place and reduces_in_backward(engine, zero_stage, pp) else ()


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What a step's communication depends on beside the parameters that a rank holds."""

    model: Model
    engine: Engine
    workload: Workload
    zero_stage: ZeroStage
    sequence_parallel: bool
    pp: int
    sizes: AxisSizes

    def ranks(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.pp if axis == "pp" else self.sizes.size(axis)


def step_tasks(plan: Plan, held: Holding, has_embedding: bool, has_head: bool) -> Iterator[CommTask]:
    """What one rank communicates once per step, given what it holds of the parameters."""
    facts = StepFacts(
        plan.model,
        engine_of(plan.policy),
        plan.workload,
        plan.policy.zero_stage,
        plan.policy.sequence_parallel,
        plan.layout.pp,
        plan.layout,
    )
    yield from communication(facts, held, has_embedding, has_head)


def communication(facts: StepFacts, held: Holding, has_embedding: bool, has_head: bool) -> Iterator[CommTask]:
    """The same from what a rank holds. Elementwise, for layouts that agree on whether heads are replicated
    over tp; with arrays, axes of one rank are not left out, and cost nothing."""
    yield from _partial_gradients(facts, held)
    yield from _tied_embedding(facts, has_embedding, has_head)
    yield from _data_parallel(facts, held)
    yield from _expert_counts(facts, held)
    yield from _scalars(facts, held)


def reduces_by_block(engine: Engine, zero_stage: ZeroStage) -> bool:
    """Whether each block's gradients are reduced in a call of their own, once per step: FSDP2 does so where
    gradients add up over micro-batches first."""
    return zero_stage == 3 and engine.reduces_gradients.value == "once_per_step"


def _partial_gradients(facts: StepFacts, held: Holding) -> Iterator[CommTask]:
    """Gradients that are partial sums: over tp those of norms and router (each rank saw its share of the
    tokens) and of norms shared by heads; over the ranks of tp that hold the same key-value heads; over etp
    those of the experts' output biases. Where FSDP2 has divided the gradients before, a share of each."""
    width, tp = facts.engine.gradient_bytes.value, facts.ranks("tp")
    partial = held.partial if facts.sequence_parallel else held.partial_by_heads
    divided = reduces_by_block(facts.engine, facts.zero_stage)
    for name, axis, ranks, elements, data_axis in (
        ("partial", "tp", tp, partial, "dp_shard"),
        ("replicated_heads", "tp", tp // facts.model.kv_heads, held.replicated, "dp_shard"),
        ("expert_biases", "etp", facts.ranks("etp"), held.uncut, "edp_shard"),
    ):
        if not is_everywhere_nothing(elements) and not is_one(ranks):
            own = -(-elements // facts.ranks(data_axis)) if divided else elements
            size = own * width
            yield CommTask(f"gradients.{name}", "step", CollectiveKind.ALL_REDUCE, axis, ranks, size)


def _tied_embedding(facts: StepFacts, has_embedding: bool, has_head: bool) -> Iterator[CommTask]:
    """First and last stage hold copies of a tied embedding and add up their gradients."""
    if not facts.model.tie_word_embeddings or has_embedding == has_head:
        return
    table = next(iter(embedding_parameters(facts.model)))
    elements = local_numel(table, facts.sizes)
    if reduces_by_block(facts.engine, facts.zero_stage):
        elements = -(-elements // facts.ranks("dp_shard"))
    size = elements * facts.engine.gradient_bytes.value
    yield CommTask("gradients.tied_embedding", "step", CollectiveKind.ALL_REDUCE, "embedding", 2, size)


def _data_parallel(facts: StepFacts, held: Holding) -> Iterator[CommTask]:
    """Gradients over the data axes where no backward has reduced them: all-reduced without ZeRO, else
    reduce-scattered. Under ZeRO 1 and 2 the updated parameters are gathered again, where no forward does
    (Rajbhandari et al., arXiv:1910.02054 §7). Replicas of ZeRO's groups add up the shares of gradients."""
    zero, engine = facts.zero_stage, facts.engine
    dense, experts = zero_axes(facts.sizes) if zero else ("dp_cp", "edp")
    for axis, name, elements in ((dense, "dense", held.dense), (experts, "experts", held.experts)):
        ranks, replicas = facts.ranks(axis), facts.ranks("dp_replica") if zero else 1
        if (is_one(ranks) and replicas == 1) or is_everywhere_nothing(elements):
            continue
        kind = CollectiveKind.REDUCE_SCATTER if zero else CollectiveKind.ALL_REDUCE
        if not reduces_in_backward(engine, zero, facts.pp):
            size = elements * engine.gradient_bytes.value
            if not is_one(ranks):
                yield CommTask(f"gradients.{name}", "step", kind, axis, ranks, size)
            if replicas > 1:
                over, share = replica_axis(axis), -(-size // ranks)
                kind = CollectiveKind.ALL_REDUCE
                yield CommTask(f"gradients.{name}_replicas", "step", kind, over, replicas, share)
        if is_one(ranks):
            continue
        if zero in (1, 2) and not phases_that_gather(engine, zero, facts.pp):
            size = elements * facts.workload.compute_bytes
            yield CommTask(f"parameters.{name}", "step", CollectiveKind.ALL_GATHER, axis, ranks, size)


def _expert_counts(facts: StepFacts, held: Holding) -> Iterator[CommTask]:
    """Tokens per expert and layer over the whole batch, from which a correction bias is moved (DeepSeek-V3,
    arXiv:2412.19437 §2.1.2; Megatron-LM `finalize_model_grads.py`, over tp·cp·dp)."""
    if not facts.model.router.correction_bias or not held.routers:
        return
    size = 4 * held.routers * facts.model.num_experts
    for axis in ("tp", "dp_cp"):
        ranks = facts.ranks(axis)
        if not is_one(ranks):
            yield CommTask(f"experts.counts_{axis}", "step", CollectiveKind.ALL_REDUCE, axis, ranks, size)


def _scalars(facts: StepFacts, held: Holding) -> Iterator[CommTask]:
    """The global token count, and the gradient norm: squares add up over each axis that divides
    gradients."""
    sums: list[tuple[str, str, int]] = [("loss.tokens", "dp_cp", 8)]
    dense, experts = zero_axes(facts.sizes)
    axes = ["tp", *([dense] if facts.zero_stage else [])]
    if not is_everywhere_nothing(held.experts):
        axes += ["etp", "ep", *([experts] if facts.zero_stage else [])]
    sums += [(f"clip.{axis}", axis, 4) for axis in (*axes, "pp")]
    if facts.workload.precision == "fp16":
        sums.append(("scaler.overflow", "world", 4))
    for name, axis, size in sums:
        ranks = facts.ranks(axis)
        if not is_one(ranks):
            yield CommTask(name, "step", CollectiveKind.ALL_REDUCE, axis, ranks, size)

"""What a rank communicates once per step, after its last micro-batch: gradients, parameters, scalars."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.engines import Engine, engine_named
from meshwright.ir.graph import CollectiveKind
from meshwright.ir.parameters import Param, embedding_parameters
from meshwright.ir.sharding import local_numel
from meshwright.ir.tasks import CommTask, Phase
from meshwright.plan import Plan
from meshwright.policy import ZeroStage


def reduces_each_micro_batch(plan: Plan) -> bool:
    """Whether every backward reduces its gradients, block by block, so that a rank keeps its share alone."""
    return reduces_in_backward(engine_named(plan.policy.engine), plan.policy.zero_stage, plan.layout.pp)


def reduces_in_backward(engine: Engine, zero_stage: ZeroStage, pp: int) -> bool:
    """The same for an engine, a ZeRO stage and a pipeline.

    Never under a pipeline: torch.distributed.pipelining turns `set_requires_gradient_sync` off for every
    backward and reduces once (torch 2.13, pipelining/stage.py, backward_maybe_with_nosync and
    perform_reduce_grad).
    """
    return engine.reduces_gradients.value == "each_micro_batch" and zero_stage >= 2 and pp == 1


def gather_phases(plan: Plan) -> tuple[Phase, ...]:
    """The phases of a micro-batch before which each block's parameters are gathered."""
    return phases_that_gather(engine_named(plan.policy.engine), plan.policy.zero_stage, plan.layout.pp)


def phases_that_gather(engine: Engine, zero_stage: ZeroStage, pp: int) -> tuple[Phase, ...]:
    """The same for an engine, a ZeRO stage and a pipeline: forward and backward under ZeRO-3. Under ZeRO-2,
    FSDP2 (parameters that are their own masters) divides them again after every backward that reduces;
    elsewhere they are gathered once per step."""
    if zero_stage == 3:
        return ("forward", "input_gradient")
    in_place = engine.master_in_parameter.value
    return ("forward",) if in_place and reduces_in_backward(engine, zero_stage, pp) else ()


def step_tasks(plan: Plan, params: list[Param], has_embedding: bool, has_head: bool) -> Iterator[CommTask]:
    """What one rank communicates once per step, given the parameters that it holds."""
    yield from _partial_gradients(plan, params)
    yield from _tied_embedding(plan, has_embedding, has_head)
    yield from _data_parallel(plan, params)
    yield from _expert_counts(plan, params)
    yield from _scalars(plan, params)


def _partial_gradients(plan: Plan, params: list[Param]) -> Iterator[CommTask]:
    """Gradients that are partial sums: over tp those of norms and router (each rank saw its share of the
    tokens) and of norms shared by heads; over the ranks of tp that hold the same key-value heads; over etp
    those of the experts' output biases."""
    layout, sequence = plan.layout, plan.policy.sequence_parallel
    width = engine_named(plan.policy.engine).gradient_bytes.value
    partial = [p for p in params if p.partial_over_tp and (sequence or p.shared_by_heads)]
    replicated = [p for p in params if p.blocks is not None and layout.tp > p.blocks]
    uncut = [p for p in params if p.is_expert and "etp" not in p.shard]
    for name, axis, ranks, reduced in (
        ("partial", "tp", layout.tp, partial),
        ("replicated_heads", "tp", layout.tp // plan.model.kv_heads, replicated),
        ("expert_biases", "etp", layout.etp, uncut),
    ):
        size = sum(local_numel(p, layout) for p in reduced) * width
        if size and ranks > 1:
            yield CommTask(f"gradients.{name}", "step", CollectiveKind.ALL_REDUCE, axis, ranks, size)


def _tied_embedding(plan: Plan, has_embedding: bool, has_head: bool) -> Iterator[CommTask]:
    """First and last stage hold copies of a tied embedding and add up their gradients."""
    if not plan.model.tie_word_embeddings or has_embedding == has_head:
        return
    table = next(iter(embedding_parameters(plan.model)))
    size = local_numel(table, plan.layout) * engine_named(plan.policy.engine).gradient_bytes.value
    yield CommTask("gradients.tied_embedding", "step", CollectiveKind.ALL_REDUCE, "embedding", 2, size)


def _data_parallel(plan: Plan, params: list[Param]) -> Iterator[CommTask]:
    """Gradients over the data axes where no backward has reduced them: all-reduced without ZeRO, else
    reduce-scattered. Under ZeRO 1 and 2 the updated parameters are gathered again, where no forward does
    (Rajbhandari et al., arXiv:1910.02054 §7)."""
    engine = engine_named(plan.policy.engine)
    for axis, expert in (("dp_cp", False), ("edp", True)):
        ranks = plan.layout.size(axis)
        held = sum(local_numel(p, plan.layout) for p in params if p.is_expert is expert)
        if ranks == 1 or held == 0:
            continue
        zero = plan.policy.zero_stage
        kind = CollectiveKind.REDUCE_SCATTER if zero else CollectiveKind.ALL_REDUCE
        name = "experts" if expert else "dense"
        if not reduces_each_micro_batch(plan):
            size = held * engine.gradient_bytes.value
            yield CommTask(f"gradients.{name}", "step", kind, axis, ranks, size)
        if zero in (1, 2) and not gather_phases(plan):
            size = held * plan.workload.compute_bytes
            yield CommTask(f"parameters.{name}", "step", CollectiveKind.ALL_GATHER, axis, ranks, size)


def _expert_counts(plan: Plan, params: list[Param]) -> Iterator[CommTask]:
    """Tokens per expert and layer over the whole batch, from which a correction bias is moved (DeepSeek-V3,
    arXiv:2412.19437 §2.1.2; Megatron-LM `finalize_model_grads.py`, over tp·cp·dp)."""
    routers = sum(param.part == "router" and len(param.shape) == 2 for param in params)
    if not plan.model.router.correction_bias or not routers:
        return
    size = 4 * routers * plan.model.num_experts
    for axis in ("tp", "dp_cp"):
        if plan.layout.size(axis) > 1:
            ranks = plan.layout.size(axis)
            yield CommTask(f"experts.counts_{axis}", "step", CollectiveKind.ALL_REDUCE, axis, ranks, size)


def _scalars(plan: Plan, params: list[Param]) -> Iterator[CommTask]:
    """The global token count, and the gradient norm: squares add up over each axis that divides
    gradients."""
    layout = plan.layout
    if layout.size("dp_cp") > 1:
        yield CommTask("loss.tokens", "step", CollectiveKind.ALL_REDUCE, "dp_cp", layout.size("dp_cp"), 8)
    axes = ["tp", *(["dp_cp"] if plan.policy.zero_stage else [])]
    if any(param.is_expert for param in params):
        axes += ["etp", "ep", *(["edp"] if plan.policy.zero_stage else [])]
    for axis in (*axes, "pp"):
        if layout.size(axis) > 1:
            yield CommTask(f"clip.{axis}", "step", CollectiveKind.ALL_REDUCE, axis, layout.size(axis), 4)
    if plan.workload.precision == "fp16" and layout.world_size > 1:
        yield CommTask("scaler.overflow", "step", CollectiveKind.ALL_REDUCE, "world", layout.world_size, 4)

"""What blocks and parameters add to the memory of a rank. Elementwise: numbers, or arrays over layouts.

One plan (`cost/memory.py`) and a search over many layouts read the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from meshwright.cluster import LOCAL_GPU, Cluster
from meshwright.engines import Engine, engine_of
from meshwright.ir.elementwise import larger, rounded, smaller
from meshwright.ir.graph import OpKind
from meshwright.ir.holding import Holding
from meshwright.ir.lowering import MATMULS, LoweredBlock
from meshwright.ir.step import reduces_by_block, reduces_in_backward
from meshwright.ir.tasks import CommTask, ComputeTask
from meshwright.plan import Plan
from meshwright.policy import Recompute, ZeroStage
from meshwright.workload import Workload

LOGITS = ("head.logits", "head.probabilities")
STATES = ("weights", "gradients", "optimizer states")
CPU_CONTEXT_BYTES = 250_000_000
MASTER_BYTES = 4
ACTIVE_STAGES = 3
"""Stages of a rank that PyTorch keeps gathered at most (torch 2.13, pipelining/schedules.py:
`_add_unshard_reshard`)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the memory of a rank depends on beside its blocks and parameters."""

    engine: Engine
    workload: Workload
    zero_stage: ZeroStage
    pp: int
    is_local: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Setting:
        """That of a plan."""
        policy = plan.policy
        return cls(
            engine_of(policy),
            plan.workload,
            policy.zero_stage,
            plan.layout.pp,
            runs_on_cpu(plan.cluster),
        )

    @property
    def masters_in_place(self) -> bool:
        """Whether parameters are their own FP32 masters: always where FSDP2 divides them."""
        return self.engine.master_in_parameter.value or reduces_by_block(self.engine, self.zero_stage)

    def divides_gradients(self, num_micro_batches: int) -> bool:
        """Whether a rank keeps only its share of the gradients: under ZeRO-2 and 3, where the backward that
        makes them reduces them too. A pipeline adds them up whole, and reduces after its last backward."""
        if self.zero_stage < 2 or self.pp > 1:
            return False
        return reduces_in_backward(self.engine, self.zero_stage, self.pp) or num_micro_batches == 1

    def widths(self) -> dict[str, int]:
        """Bytes per parameter of each state: weight (compute type, or FP32 where the engine keeps masters in
        place), gradient, and for AdamW two moments plus in mixed precision an FP32 master."""
        in_place = self.masters_in_place
        master = MASTER_BYTES if self.workload.has_master_weights and not in_place else 0
        moments = 2 * self.engine.moment_bytes.value if self.workload.optimizer == "adamw" else 0
        weight = MASTER_BYTES if in_place else self.workload.compute_bytes
        widths = (weight, self.engine.gradient_bytes.value, master + moments)
        return dict(zip(STATES, widths, strict=True))


def runs_on_cpu(cluster: Cluster) -> bool:
    """Whether a "GPU" of the cluster is a process of the machine at hand."""
    return cluster.gpu.name == LOCAL_GPU


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of one model state on a rank: kept whole, and kept as this rank's share under ZeRO."""

    whole: int = 0
    divided: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.whole + self.divided

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(self.whole + other.whole, self.divided + other.divided)


def states(setting: Setting, held: Holding, num_micro_batches: int) -> dict[str, StateBytes]:
    """Weights, gradients and optimizer states of one rank, by what ZeRO divides and what stays whole.

    ZeRO 1 divides optimizer states, 2 also gradients, 3 also weights. Gradients that add up over
    micro-batches before one reduction are whole until then, whatever the stage (see `divides_gradients`). An
    engine that keeps masters in its parameters divides those always, and below ZeRO-3 keeps the gathered copy
    in the compute type between forward and backward.
    """
    zero, in_place = setting.zero_stage, setting.masters_in_place
    divided = {
        "weights": zero == 3 or in_place,
        "gradients": setting.divides_gradients(num_micro_batches),
        "optimizer states": zero >= 1,
    }
    parts = {
        name: StateBytes(
            whole=held.total * width * (1 - divided[name]), divided=held.share * width * divided[name]
        )
        for name, width in setting.widths().items()
    }
    if in_place and zero < 3:
        parts["weights"] += StateBytes(held.total * setting.workload.compute_bytes)
    return parts


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What one block adds for one micro-batch.

    `saved`: kept from forward to backward, of which `logits` by the loss; `deferred`: what a deferred weight
    gradient keeps of it; `remade`: what recompute makes again; `gradients`: the largest op's output and input
    gradients, in the head those of the loss; `exchanged`: the largest exchange between expert ranks;
    `weights`: elements of one of each shape of matmul weight.
    """

    saved: int
    logits: int
    deferred: int
    remade: int
    gradients: int
    exchanged: int
    weights: int


ROUTED = (".moe.dispatched", ".moe.experts.", ".moe.sort", ".moe.unsort")
"""Tensors and ops of tokens that have reached their experts: the fullest rank has more of them."""


def _is_routed(name: str) -> bool:
    return any(part in name for part in ROUTED)


def _loaded(tensors: Mapping[str, tuple[int, bool]], load: float) -> int:
    """Bytes of all tensors, those of routed tokens times the load."""
    routed = sum(size for name, (size, _) in tensors.items() if _is_routed(name))
    return sum(size for size, _ in tensors.values()) + rounded((load - 1) * routed)


def block_bytes(
    block: LoweredBlock, setting: Setting, recompute: Recompute = "none", load: float = 1.0
) -> BlockBytes:
    """The bytes of a lowered block on the rank whose experts take `load` times the mean of tokens."""
    saved, element_bytes = _loaded(block.saved, load), setting.workload.compute_bytes
    remade = larger(0, _loaded(block.saved_without_recompute, load) - saved)
    gradients = _shared_input_bytes(block, setting, load)
    exchanged = weights = 0
    for task in block.tasks:
        if isinstance(task, ComputeTask):
            if task.phase == "forward":
                more = load if _is_routed(task.name) else 1.0
                own = rounded(more * _op_gradient_bytes(task, element_bytes))
                gradients = larger(gradients, own + _weight_gradient_bytes(task, setting))
                weights += prod(task.sizes[-2:]) if task.kind in MATMULS else 0
        elif task.axis in ("ep", "etp"):
            exchanged = larger(exchanged, rounded(load * task.bytes) * (task.num_ranks > 1))
    if setting.engine.places_every_copy.value:
        exchanged = larger(exchanged, _every_copy_bytes(block, element_bytes) // 2)
    return BlockBytes(
        saved=saved,
        logits=sum(size for name, (size, _) in block.saved.items() if name in LOGITS),
        deferred=_deferred(block, setting, recompute, load, saved, remade),
        remade=remade,
        gradients=gradients,
        exchanged=exchanged,
        weights=weights,
    )


def _every_copy_bytes(block: LoweredBlock, unit: int) -> int:
    """Under the all-gather dispatcher, a row for every chosen expert of every gathered token, of which a rank
    fills those of its own experts, and their sums."""
    forward = [task for task in block.tasks if task.phase == "forward"]
    copies = [t.bytes // 4 for t in forward if isinstance(t, CommTask) and t.name.endswith(".gather_weights")]
    if not copies:
        return 0
    gathered = next(t.bytes for t in forward if isinstance(t, CommTask) and t.name.endswith("moe.dispatch"))
    width = next(
        t.sizes[1] for t in forward if isinstance(t, ComputeTask) and t.name.endswith(".combine_tokens")
    )
    return copies[0] * width * unit + gathered


def _deferred(
    block: LoweredBlock, setting: Setting, recompute: Recompute, load: float, saved: int, remade: int
) -> int:
    """What waits for a deferred weight gradient. An engine that retains the graph keeps all that forward
    kept, and of layers that are run again all that this made, beside the matmuls' output gradients."""
    if setting.engine.retains_graph.value:
        return saved + block.output_gradient_bytes + remade * (recompute == "full")
    kept = {name: tensor for name, tensor in block.saved.items() if tensor[1]}
    return block.deferred_bytes + _loaded(kept, load) - _loaded(kept, 1.0)


_OF_ONE_INPUT = (".q", ".k", ".v", ".gate", ".up")
"""Matmuls of a layer that read the same input."""


def _shared_input_bytes(block: LoweredBlock, setting: Setting, load: float) -> int:
    """The gradients of matmuls that share an input, where they are made apart: the sum so far, the next one
    and the new sum, beside the gradients of their outputs."""
    if not setting.engine.eager_gradients.value:
        return 0
    unit, most = setting.workload.compute_bytes, 0
    widths: dict[str, list[tuple[int, int, int]]] = {}
    for task in block.tasks:
        if isinstance(task, CommTask) or task.phase != "forward" or task.kind not in MATMULS:
            continue
        if task.name.endswith(_OF_ONE_INPUT):
            m, n, k = task.sizes[-3:]
            widths.setdefault(task.name.rsplit(".", 1)[0], []).append((m, n, k))
    for name, ops in widths.items():
        if len(ops) > 1:
            m, _, k = ops[0]
            own = m * (3 * k + sum(n for _, n, _ in ops)) * unit
            own = rounded((load if _is_routed(name + ".") else 1.0) * own)
            most = larger(most, own - _kept_after(block, name, load))
    return most


_INPUTS = {"attention": "attention_norm", "mlp": "mlp_norm", "shared": "mlp_norm", "experts": "dispatched"}
"""The tensor that the matmuls of a part of a layer share."""


def _kept_after(block: LoweredBlock, part: str, load: float) -> int:
    """Bytes of a layer that its backward has let go of when it comes to a part's first matmuls: all that
    forward kept after their input."""
    name = _INPUTS.get(part.rsplit(".", 1)[-1], "")
    after = list(block.saved)
    place = next(
        (n for n, key in enumerate(after) if name and f".{name}" in key and "statistics" not in key), None
    )
    if place is None:
        return 0
    return _loaded({key: block.saved[key] for key in after[place + 1 :]}, load)


def _weight_gradient_bytes(task: ComputeTask, setting: Setting) -> int:
    """A matmul's weight gradient where autograd makes it, and its FP32 copy where the compute type is
    another."""
    if task.kind not in MATMULS or not setting.engine.eager_gradients.value:
        return 0
    unit = setting.workload.compute_bytes
    groups = task.sizes[0] if task.kind is OpKind.GROUPED_MATMUL else 1
    return groups * task.sizes[-1] * task.sizes[-2] * (unit + MASTER_BYTES * (unit != MASTER_BYTES))


def head_bytes(block: LoweredBlock, setting: Setting, tp: int) -> BlockBytes:
    """The bytes of the head, whose largest moment is the loss or the projection's backward after it.

    On top of what is kept of the logits come first what the loss makes besides, then the input's gradient
    and, where the engine adds weight gradients in the matmul, an empty one of the whole projection.
    """
    plain = block_bytes(block, setting)
    loss, unit = setting.engine.loss.value, setting.workload.compute_bytes
    most = loss.peak + (loss.divided_peak - loss.peak) * (tp > 1)
    tokens, vocabulary, hidden = next(
        task.sizes for task in block.tasks if isinstance(task, ComputeTask) and task.kind is OpKind.MATMUL
    )
    empty = vocabulary * hidden * unit * setting.engine.placeholder_gradients.value
    after = tokens * hidden * unit + empty
    gradients = larger((most - loss.kept) * tokens * vocabulary, after)
    return replace(plain, gradients=gradients, weights=0)


def _op_gradient_bytes(task: ComputeTask, unit: int) -> int:
    sizes = task.sizes
    match task.kind:
        case OpKind.MATMUL | OpKind.GROUPED_MATMUL:
            m, n, k = sizes[-3:]
            return m * (n + k) * unit
        case OpKind.ATTENTION:
            batch, heads, queries, keys, qk_dim, v_dim = sizes
            return batch * heads * (queries * (qk_dim + v_dim) + keys * (qk_dim + v_dim)) * unit
        case _:
            return 2 * sizes[0] * sizes[1] * unit


def transient_bytes(setting: Setting, blocks: Iterable[BlockBytes]) -> tuple[int, int, int]:
    """What one backward pass needs on top of what is held: remade activations, activation gradients, and both
    sides of the largest exchange between expert ranks; each the most of any block. Where gradients are
    counted op by op, an exchange adds what it needs beyond the largest op: the two are not at once."""
    remade = gradients = exchanged = 0
    for block in blocks:
        remade = larger(remade, block.remade)
        gradients = larger(gradients, block.gradients)
        exchanged = larger(exchanged, block.exchanged)
    return remade, gradients, larger(0, 2 * exchanged - gradients * setting.engine.eager_gradients.value)


def placeholder_bytes(setting: Setting, blocks: Iterable[BlockBytes]) -> int:
    """Empty weight gradients that the engine keeps, one for each shape of weight of its layers."""
    largest = 0
    for block in blocks:
        largest = larger(largest, block.weights)
    return largest * setting.workload.compute_bytes * setting.engine.placeholder_gradients.value


def gradient_share_bytes(setting: Setting, held: Holding, dp_cp: int, edp: int) -> int:
    """This rank's share of the reduced gradients, where it has a buffer beside the whole ones."""
    if setting.zero_stage == 0 or not setting.engine.gradient_shares_apart.value:
        return 0
    shares = held.dense_share * (dp_cp > 1) + held.expert_share * (edp > 1)
    return shares * setting.engine.gradient_bytes.value


def pipeline_buffer_bytes(setting: Setting, sends_bytes: int, num_micro_batches: int) -> int:
    """Buffers for what neighbouring stages send. A stage receives as much as it sends: where the engine makes
    the buffers of all micro-batches ahead, the inputs among them are those that forward keeps, and outputs
    that backward starts from stand in their place."""
    return sends_bytes * (num_micro_batches if setting.engine.receives_ahead.value else 2)


def gathered_bytes(setting: Setting, largest_block: int, stages: Iterable[int]) -> int:
    """What ZeRO-3 keeps whole beside the shares, in the compute type.

    `largest_block` counts the parameters of a rank's largest block, `stages` those of each of its stages that
    have a whole copy (`whole_copies`). Alone, a rank gathers block by block. Under a pipeline PyTorch calls
    `set_reshard_after_backward(False)` (torch 2.13, pipelining/stage.py, backward_maybe_with_nosync): what a
    backward has gathered stays until the next forward of the stage divides it again.
    """
    width = setting.workload.compute_bytes
    if setting.zero_stage < 3:
        return 0
    if setting.pp == 1:
        return 2 * largest_block * width
    most = [0] * ACTIVE_STAGES
    for size in stages:
        for place, known in enumerate(most):
            most[place], size = larger(known, size), smaller(known, size)
    return sum(most) * width


def whole_copies(setting: Setting, held: Holding, dp_cp: int, edp: int) -> int:
    """Parameters with a whole copy beside the share: not where the share is all, in the compute type."""
    cast = setting.engine.master_in_parameter.value
    return held.dense * (cast or dp_cp > 1) + held.experts * (cast or edp > 1)


def bucket_bytes(setting: Setting, largest_block: int, dp_cp: int) -> int:
    """One block's gradients while they are divided."""
    if setting.zero_stage < 2:
        return 0
    return largest_block * setting.engine.gradient_bytes.value * (dp_cp > 1)


def slack_bytes(setting: Setting, held: int) -> int:
    """What the allocator takes beyond what tensors hold."""
    return rounded(held * setting.engine.slack.value)


def context_bytes(setting: Setting) -> int:
    """What the runtime holds before the model: a CUDA context on a GPU, a Python process on a CPU."""
    return CPU_CONTEXT_BYTES if setting.is_local else setting.engine.context.value

"""Seconds of one block for one micro-batch, by phase and by what takes them.

Works on numbers and on numpy arrays alike: one plan has numbers, the search has one element per layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.collectives import ONCE_PER_DOMAIN, UNIFORM, Fanout, collective_seconds
from meshwright.cost.compute import ComputeRates, compute_seconds
from meshwright.cost.placement import Group, group_on
from meshwright.ir.graph import CollectiveKind, OpKind
from meshwright.ir.tasks import CommTask, ComputeTask, Phase, Task
from meshwright.planner.prices import Prices
from meshwright.policy import Dispatcher

Array = Any
"""A number or a numpy array of numbers, one per layout."""

MICRO_BATCH_PHASES: tuple[Phase, ...] = ("forward", "recompute", "input_gradient", "weight_gradient")
AXES = ("tp", "cp", "ep", "etp", "dp")
"""Axes of communication inside a micro-batch; `dp` stands for ZeRO's gathers and reductions."""
KERNELS = ("matmul", "grouped", "attention", "memory", "casts", "measured")
KERNEL_OF = {OpKind.MATMUL: "matmul", OpKind.GROUPED_MATMUL: "grouped", OpKind.ATTENTION: "attention"}
"""What bounds the kernel of an op, by its kind; memory bandwidth bounds the others. Of KERNELS, `casts` are
those of fp8 operands, each once, and `measured` is what a calibration timed as a step runs it."""
DATA_AXES = ("dp_cp", "edp", "dp_shard", "edp_shard", "dp_replica", "edp_replica")
"""Axes of ZeRO's gathers and reductions, with and without replicas of its groups."""
PARTS = ("compute", *AXES, "host")
"""What the time of a phase is made of: compute, exposed communication by axis, waiting for launches."""

_OVERLAPPED_AS = {"tp": "tensor", "etp": "tensor", "cp": "context", "ep": "expert", "dp": "gather"}
_PRECISE = ("head", ".router", ".shared_gate")
"""Matmuls that fp8 recipes keep in bf16 (Megatron-LM and DeepSeek-V3, arXiv:2412.19437 §3.3.1)."""
_MATMULS = (OpKind.MATMUL, OpKind.GROUPED_MATMUL)
_EXCHANGES = (".moe.dispatch", ".moe.combine")
_BY_SENDER = (".sort", ".unsort")
"""Permutes between the order in which ranks send tokens and that of the experts."""
_CAST_BYTES = {"tensor": 9.0, "block": 4.4}
"""Casting one bf16 element by recipe, amplitudes and transposes included: what published fp8 matmuls with
their casts take beyond the matmul alone, at the bandwidth of memory-bound ops (docs/curves.md)."""

_PAIR_BYTES_FORWARD = 13
"""Scores written (2), softmax (2 + 2), dropout with its mask (2 + 2 + 1), read by the second product (2)."""
_PAIR_BYTES_BACKWARD = 19
"""Probabilities read (2), their gradient written (2), dropout (2 + 2 + 1), softmax (2 + 2 + 2), two reads of
the scores' gradient (4)."""

PhaseParts = dict[str, Array]
BlockTimes = dict[Phase, PhaseParts]
"""Seconds by phase and part (PARTS): what a block takes inside a step."""
KernelTimes = dict[Phase, PhaseParts]
"""Seconds by phase of kernels alone (KERNELS) and of communication by axis, inside a node and `outside`, none
of it hidden; how many ops the phase launches, those on routed tokens (`launches_experts`) apart from the
others (`launches`); and how many exchanges leave a node in kernels of their own (`proxied`), which EFA hands
to threads of the host."""


def outside(axis: str) -> str:
    """Name of an axis' communication that leaves a node."""
    return f"{axis}_outside"


@dataclass(frozen=True, slots=True)
class Running:
    """How a layout runs its blocks, beyond the tasks themselves.

    `load` is the fullest expert rank's load over the mean; `overlaps_experts` says that expert communication
    runs beside another micro-batch's compute; `fanout` is how a token's experts spread; `fixed`
    says that every expert takes a fixed number of tokens, so that no size comes back from the GPU; `senders`
    is how many ranks send tokens to an expert.
    """

    dispatcher: Dispatcher
    overlaps_experts: Array = False
    load: Array = 1.0
    fanout: Fanout = UNIFORM
    fixed: bool = False
    senders: Array = 2


def axis_groups(cluster: Cluster, degrees: Mapping[str, Array]) -> dict[str, Group]:
    """The group along each axis, for ranks in the order tp-cp-dp-pp and etp-ep-edp-pp; elementwise.

    `degrees` names tp, cp, dp, pp, ep and etp, and dp_replicas where there are several. `pp` is a pair of
    neighbouring stages, `pipeline` a whole pipeline, `embedding` its two ends, `world` all ranks.
    """
    tp, cp, dp, pp = (degrees[axis] for axis in ("tp", "cp", "dp", "pp"))
    ep, etp = degrees["ep"], degrees["etp"]
    stage = tp * cp * dp
    pair = np.minimum(pp, 2)
    replicas = degrees.get("dp_replicas", 1)
    shard, expert_shard = dp * cp // replicas, stage // (ep * etp) // replicas
    divided = {
        "dp_shard": group_on(cluster, shard, tp),
        "dp_replica": group_on(cluster, replicas, tp * shard),
        "edp_shard": group_on(cluster, expert_shard, etp * ep),
        "edp_replica": group_on(cluster, replicas, etp * ep * expert_shard),
    }
    return {
        **(divided if np.any(replicas != 1) else {}),
        "tp": group_on(cluster, tp, 1),
        "cp": group_on(cluster, cp, tp),
        "dp_cp": group_on(cluster, dp * cp, tp),
        "etp": group_on(cluster, etp, 1),
        "ep": group_on(cluster, ep, etp),
        "edp": group_on(cluster, stage // (ep * etp), etp * ep),
        "pp": group_on(cluster, pair, stage),
        "pipeline": group_on(cluster, pp, stage),
        "embedding": group_on(cluster, pair, stage * np.maximum(pp - 1, 1)),
        "world": group_on(cluster, stage * pp, 1),
    }


def kernel_times(
    tasks: Sequence[Task], prices: Prices, groups: Mapping[str, Group], running: Running
) -> KernelTimes:
    """What a block's tasks take alone, for one micro-batch, by phase: curves of kernels and links only."""
    times: KernelTimes = {}
    for phase in MICRO_BATCH_PHASES:
        of_phase = [task for task in tasks if task.phase == phase]
        parts: PhaseParts = dict.fromkeys((*KERNELS, *AXES, *map(outside, AXES)), 0.0)
        for task in of_phase:
            if isinstance(task, ComputeTask):
                for name, seconds in price_op(task, prices, running).items():
                    parts[name] = parts[name] + seconds
            else:
                axis = "dp" if task.axis in DATA_AXES else task.axis
                near, far = price_collective(task, prices, groups, running)
                parts[axis], parts[outside(axis)] = parts[axis] + near, parts[outside(axis)] + far
        # Among many layouts some have one rank along an axis, and launch nothing there.
        for name, routed in (("launches", False), ("launches_experts", True)):
            parts[name] = sum(_launches(task, prices) for task in of_phase if is_routed(task) is routed)
        parts["proxied"] = sum(proxied(task, groups, running) for task in of_phase)
        times[phase] = parts
    return times


def block_times(kernels: KernelTimes, prices: Prices, running: Running) -> BlockTimes:
    """Seconds of a block inside a step: the constants on top of the kernels.

    Kernels are slowed down, those that memory bounds by a factor of their own. Communication that the era
    overlaps is exposed by the share that cannot be hidden, or by what does not fit beside the phase's
    compute: max((1 − h)·t, t − compute). A phase that takes hardly longer than launching its ops waits for
    that too (`host_wait_s`), where work leaves out the exchange of tokens: its sizes come back to the host,
    which cannot run ahead of it.
    """
    times: BlockTimes = {}
    with_experts = has_experts(kernels)
    for phase, of_phase in kernels.items():
        compute = compute_in_step(of_phase, prices)
        parts: PhaseParts = {"compute": compute}
        for axis in AXES:
            parts[axis] = exposed(
                comm_in_step(of_phase, axis, prices), compute, hidden_share(axis, prices, running)
            )
        work = sum(parts.values()) - parts["ep"]
        launching = launch_wait_s(of_phase, with_experts, prices, running)
        parts["host"] = host_wait_s(work, launching, prices.is_serial)
        times[phase] = parts
    return times


def has_experts(kernels: KernelTimes) -> bool:
    """Whether a block launches anything on routed tokens."""
    return bool(np.any(kernels["forward"]["launches_experts"] > 0))


def host_wait_s(work_s: Array, launching_s: Array, is_serial: bool) -> Array:
    """Seconds of a phase in which the host is waited for: (work⁴ + launches⁴)^¼ − work where it runs ahead
    of a GPU, and all of them where processors launch an op and then run it."""
    if is_serial:
        return launching_s
    return np.sqrt(np.sqrt(work_s**4 + launching_s**4)) - work_s


def launch_wait_s(launches: PhaseParts, with_experts: bool, prices: Prices, running: Running) -> Array:
    """Seconds of launching the ops of a phase.

    Eagerly, every op of a block waits for the experts' sizes to come back to the host, unless they are fixed
    or stay on the GPU (HybridEP). A partial graph launches all but the experts' own ops, a full one
    everything.
    """
    host = prices.constants.host
    fixed = prices.static_experts or running.fixed
    waits = with_experts and not (fixed or running.dispatcher == "hybridep")
    eager = host["experts" if waits else "dense"].value
    routed, others = launches["launches_experts"], launches["launches"]
    if prices.graphs == "none":
        return (routed + others) * eager
    captured = host["graph"].value
    return others * captured + routed * (captured if prices.graphs == "full" else eager)


def compute_in_step(kernels: PhaseParts, prices: Prices) -> Array:
    """Seconds of a phase's kernels inside a step. What was measured ran as in one: no factor is due."""
    fitted = prices.constants
    work = kernels["matmul"] + prices.grouped * kernels["grouped"] + prices.attention * kernels["attention"]
    moved = kernels["memory"] + fitted.fp8_cast.value * kernels["casts"]
    return prices.slowdown * work + prices.memory * moved + kernels["measured"]


def comm_in_step(seconds: Mapping[str, Array], axis: str, prices: Prices) -> Array:
    """Seconds of communication along an axis inside a step: links between nodes are shared."""
    found = seconds[axis] + prices.network * seconds[outside(axis)]
    return found + prices.exchange_s * seconds.get("proxied", 0.0) if axis == "ep" else found


def exposed(comm_s: Array, compute_s: Array, hidden: Array) -> Array:
    """Communication that nothing hides: the share that cannot overlap, or what is longer than the compute."""
    return comm_s - np.minimum(hidden * comm_s, compute_s)


def hidden_share(axis: str, prices: Prices, running: Running) -> Array:
    """The share of an axis' communication that may run beside compute, from 0 to 1: a fitted constant, for
    experts only where the engine overlaps them."""
    if axis == "ep":
        return running.overlaps_experts * prices.constants.hidden["expert"].value
    return prices.hidden(_OVERLAPPED_AS[axis])


def rates_of(task: ComputeTask, prices: Prices) -> ComputeRates:
    """The rates that price an op: what an fp8 or fp4 recipe leaves in bf16 has those of bf16."""
    return prices.compute if _is_low(task, prices) or task.kind not in _MATMULS else prices.precise


def _is_low(task: ComputeTask, prices: Prices) -> bool:
    """Whether a recipe runs the op in fp8 or fp4."""
    return prices.casts and task.kind in _MATMULS and not task.name.endswith(_PRECISE)


def price_op(task: ComputeTask, prices: Prices, running: Running) -> PhaseParts:
    """Seconds of one op by KERNELS: its kernel alone by what bounds it, and casting its fp8 operands; or what
    was measured."""
    sizes, flops = task.sizes, task.flops
    if task.kind is OpKind.GROUPED_MATMUL:
        sizes = (sizes[0], sizes[1] * running.load, *sizes[2:])
        flops = flops * running.load
    if prices.measured is not None:
        seconds = prices.measured.op_seconds(task, sizes)
        if seconds is not None:
            # Where one rank sends, its tokens stand in the order of its experts already.
            moves = np.greater(running.senders, 1) if task.name.endswith(_BY_SENDER) else 1.0
            return {"measured": seconds * moves}
    if task.kind is OpKind.ATTENTION and not prices.flash_attention:
        return _scored_attention(task, prices)
    low = _is_low(task, prices)
    rates = rates_of(task, prices)
    kernel = compute_seconds(rates, task.kind, task.phase, sizes, flops, task.traffic_bytes)
    parts = {KERNEL_OF.get(task.kind, "memory"): kernel}
    return parts | {"casts": _cast_bytes(task, prices) / prices.memory_bytes_per_s} if low else parts


def _scored_attention(task: ComputeTask, prices: Prices) -> PhaseParts:
    """Attention as matmuls, softmax and dropout of their own: every pair of the square is computed, masked or
    not, and its score passes through memory once for each read and write."""
    batch, heads, queries, keys = task.sizes[:4]
    forward = task.phase in ("forward", "recompute")
    moved = (_PAIR_BYTES_FORWARD if forward else _PAIR_BYTES_BACKWARD) * batch * heads * queries * keys
    # Backward reads the kept probabilities instead of making the scores again: four products, not five.
    flops = 2 * task.flops * (1.0 if forward else 0.8)
    work = compute_seconds(prices.precise, task.kind, task.phase, task.sizes, flops, task.traffic_bytes)
    return {"attention": work, "memory": moved / prices.memory_bytes_per_s}


def is_routed(task: Task) -> bool:
    """Whether a task works on tokens that the router has sent: none that stands before or beside it."""
    name = task.name
    return ".moe." in name and not any(word in name for word in (".router", ".route", ".shared", ".balance"))


def _launches(task: Task, prices: Prices) -> Array:
    """Kernels that a task launches, as the constants count them: one, and none where nobody is spoken to.
    Attention without flash kernels has four more of them forward, and eight backward."""
    if isinstance(task, CommTask):
        return np.greater(task.num_ranks, 1)
    if task.kind is not OpKind.ATTENTION or prices.flash_attention:
        return 1
    return 5 if task.phase in ("forward", "recompute") else 9


def _cast_bytes(task: ComputeTask, prices: Prices) -> Array:
    """Memory traffic of casting a matmul's operands: its input forward, the output's gradient backward."""
    m, n, k = task.sizes[-3:]
    width = {"forward": k, "recompute": k, "input_gradient": n}.get(task.phase, 0)
    return _CAST_BYTES[prices.fp8_recipe] * m * width


def proxied(task: Task, groups: Mapping[str, Group], running: Running) -> Array:
    """1 for an exchange of tokens between nodes by a library that sends from its kernels (DeepEP, HybridEP),
    which takes their weights and counts along; else 0."""
    if not isinstance(task, CommTask) or not task.name.endswith(_EXCHANGES):
        return 0
    group = groups[task.axis]
    leaves = np.less(group.inner, group.ranks)
    return leaves * 1 if running.dispatcher in ONCE_PER_DOMAIN else 0


def price_collective(
    task: CommTask, prices: Prices, groups: Mapping[str, Group], running: Running
) -> tuple[Array, Array]:
    """Seconds of one collective, as one that stays in a node's links and as one that leaves them: one of the
    two is 0. Routed tokens of the fullest rank set the pace of an all-to-all. A calibration timed ranks of
    one machine, and prices groups that stay in a node and are no larger than those."""
    size: Array = task.bytes
    if task.kind is CollectiveKind.ALL_TO_ALL:
        size = size * running.load
    group = groups[task.axis]
    seconds = collective_seconds(prices.links, task.kind, size, group, running.dispatcher, running.fanout)
    leaves = np.asarray(group.inner) < np.asarray(group.ranks)
    known = prices.measured
    if known is not None and task.kind in known.links:
        timed = known.collective_seconds(task.kind, size, group.ranks)
        seconds = np.where(leaves | ~np.asarray(known.covers(task.kind, group.ranks)), seconds, timed)
    return seconds * ~leaves, seconds * leaves

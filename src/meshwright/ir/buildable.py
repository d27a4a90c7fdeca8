"""Which schedules have an order at all, found without building one.

P is the number of ranks, m the number of micro-batches.
"""

from __future__ import annotations

from meshwright.errors import InputError
from meshwright.ir import orders
from meshwright.policy import CHUNKED_SCHEDULES, SCHEDULES, V_SCHEDULES, ScheduleName

MAX_FORWARDS = 2**17
"""Largest order that is built, 64 stages of 2,048 micro-batches: a bound on time and memory."""


def default_chunks(name: ScheduleName) -> int:
    """Chunks per rank unless told otherwise: 2 for schedules that need several, else 1."""
    return 2 if name in CHUNKED_SCHEDULES else 1


def require_buildable(
    name: ScheduleName, num_ranks: int, num_micro_batches: int, chunks_per_rank: int | None = None
) -> None:
    """Refuse what has no order, without building anything.

    PyTorch refuses the same, and 1F1B with fewer micro-batches than ranks besides, which Megatron and
    DeepSpeed run (see `verify`).

    Raises InputError: `policy.schedule` for an unknown name; `layout.pp` below one rank; `layout.vpp` where
    GPipe and 1F1B are given more than one chunk a rank, V schedules other than two; and
    `workload.global_batch_size`, its value counted in micro-batches, where DualPipeV has m < 2P, or
    interleaving has an m that does not split into ⌊m/P⌋ equal rounds.
    """
    if name not in SCHEDULES:
        raise InputError("policy.schedule", name, "not a pipeline schedule", SCHEDULES)
    if num_ranks < 1:
        raise InputError("layout.pp", num_ranks, "a pipeline has at least one rank", (1,))
    chunks = default_chunks(name) if chunks_per_rank is None else chunks_per_rank
    if name not in CHUNKED_SCHEDULES and chunks != 1:
        raise InputError("layout.vpp", chunks, f"{name} runs one chunk per rank", (1,))
    if name in V_SCHEDULES and chunks != 2:
        raise InputError("layout.vpp", chunks, f"{name} runs exactly two chunks per rank", (2,))
    if chunks < 1:
        raise InputError("layout.vpp", chunks, f"{name} runs at least one chunk per rank", (1, 2))
    if num_ranks * chunks * num_micro_batches > MAX_FORWARDS:
        rule = f"counted in micro-batches, an order has at most {MAX_FORWARDS:,} forwards over all stages"
        most = MAX_FORWARDS // (num_ranks * chunks)
        raise InputError("workload.global_batch_size", num_micro_batches, rule, (most,))
    _require_micro_batches(name, num_ranks, num_micro_batches)


def _require_micro_batches(name: ScheduleName, num_ranks: int, num_micro_batches: int) -> None:
    key = "workload.global_batch_size"
    fewest = {"DualPipeV": 2 * num_ranks}.get(name, 1)
    if num_micro_batches < fewest:
        rule = f"counted in micro-batches, {name} over {num_ranks} ranks needs at least {fewest}"
        raise InputError(key, num_micro_batches, rule, (fewest,))
    if name not in CHUNKED_SCHEDULES - V_SCHEDULES or _has_equal_rounds(num_ranks, num_micro_batches):
        return
    nearest = []
    for step in (-1, 1):  # a multiple of P always works, so neither walk is longer than P
        candidate = num_micro_batches + step
        while not _has_equal_rounds(num_ranks, candidate):
            candidate += step
        nearest.append(candidate)
    rounds = orders.num_rounds(num_ranks, num_micro_batches)
    rule = f"counted in micro-batches, {name} over {num_ranks} ranks runs them in {rounds} equal rounds"
    raise InputError(key, num_micro_batches, rule, nearest)


def _has_equal_rounds(num_ranks: int, num_micro_batches: int) -> bool:
    return num_micro_batches % orders.num_rounds(num_ranks, num_micro_batches) == 0

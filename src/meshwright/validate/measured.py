"""What a row measured: step time, throughput for ranking, and memory in bytes with what it counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from meshwright.cost.memory import RankMemory
from meshwright.validate.rows import Row

GIB = 2**30
MemoryView = Literal["allocated", "reserved", "unstated"]


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """Peak bytes of the worst GPU, and whose count it is.

    `allocated` is what tensors held and `reserved` what PyTorch's allocator took from the driver: neither
    holds the CUDA context or NCCL's buffers. `unstated` sources do not say.
    """

    bytes: int
    view: MemoryView


@dataclass(frozen=True, slots=True)
class Throughput:
    """A figure that ranks rows of one source: more is faster. Its unit is its definition's."""

    value: float
    definition: str


def step_time_of(row: Row) -> float | None:
    """Seconds of a step: printed, else derived from what is printed, else from tokens per second."""
    if row.iteration_time_s:
        return row.iteration_time_s
    if row.iteration_time_derived_s:
        return row.iteration_time_derived_s
    rate, batch, length, count = (
        row.tokens_per_s_per_gpu,
        row.global_batch_size,
        row.sequence_length,
        row.num_gpus,
    )
    if rate and batch and length and count:
        return batch * length / (rate * count)
    return None


def throughput_of(row: Row) -> Throughput | None:
    """What ranks a row without a time: TFLOP/s, else MFU, else tokens per second, per GPU."""
    if row.tflops_per_gpu:
        return Throughput(row.tflops_per_gpu, f"TFLOP/s: {row.tflops_definition}")
    if row.mfu_percent:
        return Throughput(row.mfu_percent, f"MFU: {row.tflops_definition}")
    if row.tokens_per_s_per_gpu:
        return Throughput(row.tokens_per_s_per_gpu, "tokens/s/GPU")
    return None


def seen_bytes(rank: RankMemory, view: MemoryView) -> int:
    """What a measurement would have read of a rank's memory. A source that does not say whose count it is has
    it from a training log, which prints what is allocated."""
    return rank.reserved_bytes if view == "reserved" else rank.allocated_bytes


def memory_of(row: Row) -> MeasuredMemory | None:
    """Measured bytes in the unit that the definition states: GiB where it says so, else GB of 10⁹.

    A breakdown that adds up parts is an analysis, not a measurement: None.
    """
    text = row.memory_definition.lower()
    if row.memory is None or "breakdown" in text or "analytic" in text:
        return None
    size = round(row.memory * (GIB if "gib" in text else 10**9))
    first = re.split(r"[;]", text)[0]
    view: MemoryView = "unstated"
    if "alloc" in first:
        view = "allocated"
    elif "reserved" in first:
        view = "reserved"
    return MeasuredMemory(size, view)

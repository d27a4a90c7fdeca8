"""How an engine runs a layout: everything in a plan that is neither the model nor the degrees."""

from __future__ import annotations

from typing import Literal, get_args

from meshwright.files import Noun
from meshwright.units import Count

EngineName = Literal["native", "megatron", "torchtitan", "deepspeed"]
ScheduleName = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
Recompute = Literal["none", "selective", "full"]
Dispatcher = Literal["allgather", "alltoall", "deepep", "hybridep"]
ZeroStage = Literal[0, 1, 2, 3]

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
CHUNKED_SCHEDULES: frozenset[ScheduleName] = frozenset(SCHEDULES[2:])
"""Schedules in which a rank holds more than one chunk of the model."""
V_SCHEDULES: frozenset[ScheduleName] = frozenset(("ZBVZeroBubble", "DualPipeV"))
"""Schedules whose second chunk runs back through the ranks: rank r holds stages r and 2P−1−r."""


SPLIT_BACKWARD: frozenset[ScheduleName] = frozenset(("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"))
"""Schedules that run the input gradient and the weight gradient of a micro-batch apart."""


class PolicyRequest(Noun):
    """The `policy` of a deployment file: what is given is kept, what is missing is chosen."""

    engine: EngineName | None = None
    micro_batch_size: Count | None = None
    schedule: ScheduleName | None = None
    zero_stage: ZeroStage | None = None
    sequence_parallel: bool | None = None
    recompute: Recompute | None = None
    dispatcher: Dispatcher | None = None
    expert_overlap: bool | None = None
    layers_per_stage: tuple[Count, ...] | None = None


class Policy(Noun):
    """The `policy` of a plan: every choice made.

    `micro_batch_size` counts sequences per micro-batch on one data-parallel rank; `layers_per_stage`
    lists the transformer layers of each pipeline stage (chunk) in the order of the model.
    """

    engine: EngineName
    micro_batch_size: Count
    schedule: ScheduleName
    zero_stage: ZeroStage
    sequence_parallel: bool
    recompute: Recompute
    dispatcher: Dispatcher
    expert_overlap: bool
    layers_per_stage: tuple[Count, ...]

"""How an engine runs a layout: everything in a plan that is neither the model nor the degrees."""

from __future__ import annotations

from typing import Literal, get_args

from meshwright.files import Noun
from meshwright.units import Count, CountOrZero

EngineName = Literal["native", "megatron", "torchtitan", "deepspeed"]
ScheduleName = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
Recompute = Literal["none", "selective", "full"]
Dispatcher = Literal["allgather", "alltoall", "deepep", "hybridep"]
ZeroStage = Literal[0, 1, 2, 3]

RecomputeModule = Literal["core_attn", "layernorm", "mla_up_proj", "moe_act", "mlp", "moe", "shared_experts"]
"""Parts that selective recompute repeats, by Megatron Core's names (transformer_config.py)."""
FloatType = Literal["fp32", "bf16"]

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
CHUNKED_SCHEDULES: frozenset[ScheduleName] = frozenset(SCHEDULES[2:])
"""Schedules in which a rank holds more than one chunk of the model."""
V_SCHEDULES: frozenset[ScheduleName] = frozenset(("ZBVZeroBubble", "DualPipeV"))
"""Schedules whose second chunk runs back through the ranks: rank r holds stages r and 2P−1−r."""


SPLIT_BACKWARD: frozenset[ScheduleName] = frozenset(("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"))
"""Schedules that run the input gradient and the weight gradient of a micro-batch apart."""


class EngineSettings(Noun):
    """How an engine is set where that changes what it keeps or sends; what is missing is the engine's usual.

    `gradients`: the type that gradients add up and are reduced in; `moments`: that of the optimizer's two
    moments; `loss`: whether one kernel makes the loss, with no FP32 copy of the logits; `recompute_modules`:
    what `recompute: selective` repeats.
    """

    gradients: FloatType | None = None
    moments: FloatType | None = None
    loss: Literal["eager", "fused"] | None = None
    recompute_modules: tuple[RecomputeModule, ...] | None = None


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
    layers_per_stage: tuple[CountOrZero, ...] | None = None
    settings: EngineSettings | None = None


class Policy(Noun):
    """The `policy` of a plan: every choice made.

    `micro_batch_size` counts sequences per micro-batch on one data-parallel rank; `layers_per_stage`
    lists the transformer layers of each pipeline stage (chunk) in the order of the model; Megatron may leave
    the first and the last one to the embedding and the head alone.
    """

    engine: EngineName
    micro_batch_size: Count
    schedule: ScheduleName
    zero_stage: ZeroStage
    sequence_parallel: bool
    recompute: Recompute
    dispatcher: Dispatcher
    expert_overlap: bool
    layers_per_stage: tuple[CountOrZero, ...]
    settings: EngineSettings = EngineSettings()

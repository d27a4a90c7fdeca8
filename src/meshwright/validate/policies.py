"""How a row's framework ran it: engine, era, number type, ZeRO stage, recompute, dispatcher, routing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from meshwright.policy import Dispatcher, EngineName, Recompute, ScheduleName, ZeroStage
from meshwright.validate.refusal import RefusedError
from meshwright.validate.rows import Row
from meshwright.workload import Precision

RoutingKind = Literal["balanced", "natural", "unstated"]


@dataclass(frozen=True, slots=True)
class Stated:
    """What a row says of how it ran; None is unknown.

    `recompute_modules` are the parts that selective recompute names; `era` is the engine's line and time,
    which constants may depend on.
    """

    engine: EngineName
    era: str
    precision: Precision
    zero_stage: ZeroStage
    schedule: ScheduleName | None
    sequence_parallel: bool | None
    recompute: Recompute | None
    recompute_modules: frozenset[str]
    dispatchers: tuple[Dispatcher, ...]
    expert_overlap: bool | None
    communication_overlap: bool | None
    routing: RoutingKind
    static_experts: bool
    compiled: bool | None
    cuda_graphs: bool | None
    offload: frozenset[str]


def stated_policy(row: Row, assumed: dict[str, str]) -> Stated:
    """What a row says of its policy. Raises RefusedError for an engine or schedule not described."""
    engine = engine_of(row)
    text = f"{row.dispatcher_overlap}; {row.notes}".lower()
    level, modules = recompute_of(row.recompute)
    return Stated(
        engine=engine,
        era=era_of(row, engine),
        precision=precision_of(row.precision, row.gpu, row.year, assumed),
        zero_stage=zero_stage_of(row.zero, engine, assumed),
        schedule=schedule_of(row.dispatcher_overlap),
        sequence_parallel=_sequence_parallel(row, engine),
        recompute=level,
        recompute_modules=modules,
        dispatchers=dispatchers_of(row, engine),
        expert_overlap=expert_overlap_of(row.dispatcher_overlap),
        communication_overlap=_communication_overlap(row.dispatcher_overlap),
        routing=routing_of(row.routing),
        static_experts=has_fixed_capacity(row.routing),
        compiled=_compiled(text, row),
        cuda_graphs=True if re.search(r"cuda.?graph|\bcg\b", text) else None,
        offload=offload_of(f"{row.zero}; {row.dispatcher_overlap}; {row.notes}"),
    )


def engine_of(row: Row) -> EngineName:
    """The engine whose facts stand for a framework: the first rule that its name, or its ZeRO, meets."""
    name = row.framework.lower()
    sharded = "fsdp" in name or "fsdp" in row.zero.lower()
    if "deepspeed" in name:
        return "deepspeed"
    if sharded or re.search(r"torchtitan|foundry|composer|automodel|pytorch|fsdp", name):
        return "torchtitan"
    if re.search(r"megatron|mcore|nemo|megascale|primus|hai-llm|bridge|mlite|maxtext", name):
        return "megatron"
    if "deepspeed" in row.zero.lower():
        return "deepspeed"
    raise RefusedError("engine: framework not known", row.framework or "not stated")


def era_of(row: Row, engine: EngineName) -> str:
    """The engine's line and time, a name of the catalogue's eras."""
    name, year = row.framework.lower(), row.year or 2025
    if "deepspeed" in name:
        return "megatron-deepspeed" if "megatron" in name else "deepspeed"
    if engine == "torchtitan":
        return "fsdp-2023" if year <= 2023 else "fsdp2-2025"
    if "megascale" in name:
        return "megascale-2024"
    container = re.search(r"container (\d\d)\.(\d\d)", row.notes)
    if container:
        return "megatron-2026" if int(container[1] + container[2]) >= 2602 else "megatron-2025"
    if year >= 2026:
        return "megatron-2026"
    if year <= 2022:
        return "megatron-2021"
    return "megatron-2024" if year <= 2024 else "megatron-2025"


def precision_of(spelling: str, gpu: str, year: int | None, assumed: dict[str, str]) -> Precision:
    """The number type of matrix multiplications, whatever granularity of scales a spelling names."""
    text = spelling.lower()
    if re.search(r"fp4|nvfp4|mxfp4", text):
        return "fp4"
    if re.search(r"fp8|mxfp8|float8|e4m3", text):
        return "fp8"
    if re.search(r"bf16|bfloat16", text):
        return "bf16"
    if re.search(r"fp16|float16|half", text):
        return "fp16"
    if re.search(r"fp32|float32|tf32", text):
        return "fp32"
    if text:
        raise RefusedError("precision: not known", spelling)
    old = "a100" in gpu.lower() and (year or 2025) <= 2022
    assumed["precision"] = "fp16: not stated, and usual then" if old else "bf16: not stated"
    return "fp16" if old else "bf16"


def zero_stage_of(spelling: str, engine: EngineName, assumed: dict[str, str]) -> ZeroStage:
    """The ZeRO stage that a spelling means; without one, the engine's usual."""
    text = spelling.lower()
    number = re.search(r"zero[- _]?([0-3])", text)
    stages: dict[str, ZeroStage] = {"0": 0, "1": 1, "2": 2, "3": 3}
    if number:
        return stages[number[1]]
    if re.search(r"full_shard|fsdp2|optim_grads_params", text):
        return 3
    if re.search(r"shard_grad_op|no reshard|optim_grads", text):
        return 2
    if "fsdp" in text:
        return 3
    if re.search(r"dist.*optim|distributed", text):
        return 1
    if text in ("none", "no", "ddp"):
        return 0
    usual: dict[EngineName, ZeroStage] = {"megatron": 1, "torchtitan": 3, "deepspeed": 1, "native": 1}
    assumed["zero_stage"] = f"{usual[engine]}: the engine's usual"
    return usual[engine]


def schedule_of(text: str) -> ScheduleName | None:
    """The pipeline order that a text names; None where it names none."""
    lower = text.lower()
    for pattern, name in _SCHEDULES:
        if re.search(pattern, lower):
            return name
    if re.search(r"schedule|dualpipe|v-half|v-min", lower):
        raise RefusedError("engine: pipeline schedule not described", text)
    return None


_SCHEDULES: tuple[tuple[str, ScheduleName], ...] = (
    (r"dualpipev", "DualPipeV"),
    (r"\bzbv|zb-?v\b", "ZBVZeroBubble"),
    (r"zero.?bubble|\bzb-|\bzbb\b|\bzb\d", "InterleavedZeroBubble"),
    (r"schedule.*(interleaved|vpp)", "Interleaved1F1B"),
    (r"schedule 1f1b", "1F1B"),
    (r"gpipe", "GPipe"),
)


def recompute_of(text: str) -> tuple[Recompute | None, frozenset[str]]:
    """How much is computed again in backward, and the parts that a selective setting names."""
    lower = text.lower()
    if not lower:
        return None, frozenset()
    if re.match(r"none|no\b|off|false", lower):
        return "none", frozenset()
    if lower.startswith("full"):
        return "full", frozenset()
    found = {name for name, pattern in _MODULES.items() if re.search(pattern, lower)}
    return "selective", frozenset(found)


_MODULES = {
    "core_attn": r"core.?attn|core.?attention|selective \(core",
    "layernorm": r"layer.?norm|rmsnorm|\bnorm\b",
    "mla_up_proj": r"up.?proj",
    "moe_act": r"moe.?act|\bact\b|swiglu",
    "mlp": r"\bmlp\b",
    "moe": r"\bmoe\b(?!.act)",
    "per_op": r"per-op|sac\b|config default",
}


def dispatchers_of(row: Row, engine: EngineName) -> tuple[Dispatcher, ...]:
    """The dispatchers that a row may have run with: one where it names it, else those of its time.

    Megatron exchanges by NCCL all-to-all unless its flexible dispatcher is chosen: DeepEP on nodes of
    eight, HybridEP within a rack of NVLink, where Megatron-Bridge's recipes of 2026 all set it.
    """
    text = row.dispatcher_overlap.lower()
    for pattern, name in _DISPATCHERS:
        if re.search(pattern, text):
            return (name,)
    if not row.num_experts or (row.year or 2025) < 2025 or engine != "megatron":
        return ("alltoall",)
    if "nvl" not in row.interconnect.lower():
        return ("deepep", "alltoall")
    return ("hybridep",) if (row.year or 2025) >= 2026 else ("hybridep", "alltoall")


_DISPATCHERS: tuple[tuple[str, Dispatcher], ...] = (
    (r"deepep|deep-ep", "deepep"),
    (r"hybridep|hybrid-ep", "hybridep"),
    (r"all.?gather", "allgather"),
    (r"all.?to.?all|\ba2a\b", "alltoall"),
)


def expert_overlap_of(text: str) -> bool | None:
    """Whether expert communication hides behind the computation of another micro-batch."""
    lower = text.lower()
    if re.search(r"ep (1f1b )?overlap off|no comm overlap|no ep overlap", lower):
        return False
    if re.search(r"ep (1f1b )?overlap on|1f1b ep overlap|ep overlap|^overlap$|dualpipe", lower):
        return True
    return None


def _communication_overlap(text: str) -> bool | None:
    lower = text.lower()
    if "no comm overlap" in lower or "vanilla tp" in lower:
        return False
    return True if re.search(r"comm overlap on|asynctp|async tp|userbuffer", lower) else None


def routing_of(text: str) -> RoutingKind:
    """Whether every expert got as many tokens as any other: forced or padded to, or as routers choose."""
    lower = text.lower()
    if re.search(r"natural|real data", lower):
        return "natural"
    return "balanced" if re.search(r"balanc|capacity|drop|pad", lower) else "unstated"


def has_fixed_capacity(text: str) -> bool:
    """Whether every expert takes a fixed number of tokens: a capacity, by dropping or padding."""
    return bool(re.search(r"capacity|token.?drop|\bdrop\b", text.lower()))


def _sequence_parallel(row: Row, engine: EngineName) -> bool | None:
    """Stated, or False where the engine's line never had it (Megatron-DeepSpeed, Megatron-LM to 2021)."""
    if row.sequence_parallel is not None:
        return row.sequence_parallel
    return False if engine == "deepspeed" or (row.year or 2025) <= 2021 else None


def _compiled(text: str, row: Row) -> bool | None:
    if re.search(r"\bcompile\b", text):
        return True
    return False if re.search(r"\beager\b", text) else None


def offload_of(text: str) -> frozenset[str]:
    """What was moved to the host's memory: `optimizer`, `activations`."""
    lower = text.lower()
    found = set()
    if re.search(r"cpu offload|opt(imizer)? offload", lower):
        found.add("optimizer")
    if re.search(r"activation offload(?! off)|offload expert|offload.*activations", lower):
        found.add("activations")
    if "no activation offload" in lower:
        found.discard("activations")
    return frozenset(found)

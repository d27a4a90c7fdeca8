"""How a row's framework ran it: engine, era, number type, ZeRO stage, recompute, dispatcher, routing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from meshwright.cost.compute import Recipe
from meshwright.planner.prices import GraphScope
from meshwright.policy import (
    Dispatcher,
    EngineName,
    EngineSettings,
    FloatType,
    Recompute,
    RecomputeModule,
    ScheduleName,
    ZeroStage,
)
from meshwright.validate.refusal import RefusedError
from meshwright.validate.rows import Row
from meshwright.workload import Precision

RoutingKind = Literal["balanced", "natural", "unstated"]


@dataclass(frozen=True, slots=True)
class Stated:
    """What a row says of how it ran; None is unknown.

    `era` is the engine's line and time, which constants may depend on.
    """

    engine: EngineName
    era: str
    precision: Precision
    fp8_recipe: Recipe | None
    zero_stage: ZeroStage
    schedule: ScheduleName | None
    sequence_parallel: bool | None
    recompute: Recompute | None
    settings: EngineSettings
    dispatchers: tuple[Dispatcher, ...]
    expert_overlap: bool | None
    communication_overlap: bool | None
    routing: RoutingKind
    static_experts: bool
    compiled: bool | None
    graphs: GraphScope | None
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
        fp8_recipe=fp8_recipe_of(row.precision),
        zero_stage=zero_stage_of(row.zero, engine, assumed),
        schedule=schedule_of(row.dispatcher_overlap),
        sequence_parallel=_sequence_parallel(row, engine),
        recompute=level,
        settings=settings_of(row, engine, modules),
        dispatchers=dispatchers_of(row, engine),
        expert_overlap=expert_overlap_of(row.dispatcher_overlap),
        communication_overlap=_communication_overlap(row.dispatcher_overlap),
        routing=routing_of(row.routing),
        static_experts=has_fixed_capacity(row.routing),
        compiled=_compiled(text),
        graphs=graphs_of(text),
        offload=offload_of(f"{row.zero}; {row.dispatcher_overlap}; {row.notes}"),
    )


def engine_of(row: Row) -> EngineName:
    """The engine whose facts stand for a framework: the first rule that its name, or its ZeRO, meets."""
    name = row.framework.lower()
    sharded = "fsdp" in name or "fsdp" in row.zero.lower()
    if "deepspeed" in name:
        return "deepspeed"
    of_megatron = re.search(r"megatron|mcore|bridge", f"{name} {row.zero.lower()}")
    if (sharded and not of_megatron) or re.search(r"torchtitan|foundry|composer|automodel|pytorch", name):
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
    if year <= 2024 and name.startswith("megatron-lm"):
        return "megatron-2023"
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


def fp8_recipe_of(spelling: str) -> Recipe | None:
    """How a spelling says that fp8 is scaled; None where it does not say."""
    text = spelling.lower()
    if re.search(r"mx|block|sub.?channel", text):
        return "block"
    return "tensor" if re.search(r"\bcs\b|-cs|\bds\b|tensor|rowwise|delayed|current", text) else None


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


def settings_of(row: Row, engine: EngineName, modules: tuple[RecomputeModule, ...]) -> EngineSettings:
    """How the engine is set, as the framework's published recipes set it.

    NeMo's performance recipes keep and reduce gradients in bf16 (NVIDIA/NeMo@8cfedd72,
    collections/llm/recipes: pretrain_performance_optimizations). So do Megatron-Bridge's, which let one
    TransformerEngine kernel make the loss (perf_recipes/_common.py), and those of mixtures of experts keep
    moments in bf16 (perf_recipes/deepseek/common.py, perf_recipes/qwen, recipes/moonlight;
    Megatron-Bridge@067f987d).
    torchtitan compiles its loss with the model since 2025.
    """
    if engine == "megatron" and "bridge" in row.framework.lower():
        moments: FloatType = "bf16" if row.num_experts else "fp32"
        return EngineSettings(
            gradients="bf16", moments=moments, loss="fused", recompute_modules=modules or None
        )
    if engine == "megatron" and "nemo" in row.framework.lower():
        return EngineSettings(gradients="bf16", recompute_modules=modules or None)
    compiled = engine == "torchtitan" and _compiled(row.dispatcher_overlap.lower())
    fused = compiled and dated(row) >= FIRST_COMPILED_LOSS
    return EngineSettings(loss="fused" if fused else None, recompute_modules=modules or None)


FIRST_COMPILED_LOSS = 2025.0


def dated(row: Row) -> float:
    """When a run was made, in years: the month in its source's name, else its year."""
    month = re.search(r"(20\d\d)[-_]?(0[1-9]|1[0-2])(?!\d)", row.source_path)
    if month:
        return int(month[1]) + (int(month[2]) - 1) / 12
    return float(row.year or 2025)


def recompute_of(text: str) -> tuple[Recompute | None, tuple[RecomputeModule, ...]]:
    """How much is computed again in backward, and the parts that a selective setting names.

    `core_attn` alone is what Megatron repeats unless told otherwise, and torchtitan's selection has no parts:
    both are the engine's usual.
    """
    lower = text.lower()
    if not lower:
        return None, ()
    if re.match(r"none|no\b|off|false", lower):
        return "none", ()
    if lower.startswith("full"):
        return "full", ()
    found = tuple(name for name, pattern in _MODULES.items() if re.search(pattern, lower))
    return "selective", () if found == ("core_attn",) else found


_MODULES: dict[RecomputeModule, str] = {
    "core_attn": r"core.?attn|core.?attention|selective \(core",
    "layernorm": r"layer.?norm|rmsnorm|\bnorm\b",
    "mla_up_proj": r"up.?proj",
    "moe_act": r"moe.?act|\bact\b|swiglu",
    "mlp": r"\bmlp\b",
    "moe": r"\bmoe\b(?!.act)",
    "shared_experts": r"shared.?expert",
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
    if not re.search(r"nvl\d", row.interconnect.lower()):
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


def graphs_of(text: str) -> GraphScope | None:
    """What captured CUDA graphs hold: the whole step, all but the experts, nothing; None where not said.

    Paging the buffers of experts ("paged stash") is what lets a graph hold them without fixed sizes.
    """
    if re.search(r"full.?(iteration.)?(cuda.?graph|\bcg\b)|paged stash", text):
        return "full"
    if re.search(r"no cuda.?graph", text):
        return "none"
    return "partial" if re.search(r"cuda.?graph|\bcg\b", text) else None


def has_fixed_capacity(text: str) -> bool:
    """Whether every expert takes a fixed number of tokens: a capacity, by dropping or padding."""
    return bool(re.search(r"capacity|token.?drop|\bdrop\b", text.lower()))


def _sequence_parallel(row: Row, engine: EngineName) -> bool | None:
    """Stated, or False where the engine's line never had it (Megatron-DeepSpeed, Megatron-LM to 2021)."""
    if row.sequence_parallel is not None:
        return row.sequence_parallel
    return False if engine == "deepspeed" or (row.year or 2025) <= 2021 else None


def _compiled(text: str) -> bool | None:
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

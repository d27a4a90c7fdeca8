"""Engines, number types and settings as frameworks spell them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.validate.run_rows import EXPERTS, carried, row_of

from meshwright.engines import engine_named
from meshwright.eras import eras
from meshwright.validate.policies import (
    dated,
    dispatchers_of,
    engine_of,
    era_of,
    expert_overlap_of,
    offload_of,
    precision_of,
    recompute_of,
    routing_of,
    schedule_of,
    settings_of,
    stated_policy,
    zero_stage_of,
)
from meshwright.validate.refusal import RefusedError

FRAMEWORKS = {
    "Megatron-LM": "megatron",
    "Megatron-LM 23e00ed": "megatron",
    "Megatron-Core 0.8": "megatron",
    "Megatron-Core (Pai patch)": "megatron",
    "MCore 0.9": "megatron",
    "Megatron-Bridge": "megatron",
    "mbridge": "megatron",
    "NeMo 24.07": "megatron",
    "MegaScale": "megatron",
    "MegaScale-MoE": "megatron",
    "Primus/Megatron": "megatron",
    "HAI-LLM": "megatron",
    "Megatron-Core: MCore folding": "megatron",
    "Megatron-Core: FSDP+EP": "megatron",
    "Megatron-DeepSpeed": "deepspeed",
    "DeepSpeed/Arctic": "deepspeed",
    "torchtitan": "torchtitan",
    "torchtitan fork": "torchtitan",
    "llm-foundry/Composer FSDP": "torchtitan",
    "NeMo Automodel (PyTorch FSDP2+EP)": "torchtitan",
}


@pytest.mark.parametrize(("framework", "engine"), FRAMEWORKS.items())
@pytest.mark.parametrize("year", [2021, 2023, 2024, 2025, 2026, None])
def test_a_framework_is_an_engine_of_its_time(framework: str, engine: str, year: int | None) -> None:
    row = row_of(framework=framework, zero="", year=year)
    assert engine_of(row) == engine
    era = eras()[era_of(row, engine_of(row))]
    assert era.engine == engine


def test_fsdp_is_megatron_s_own_where_it_says_so() -> None:
    assert engine_of(row_of(framework="Megatron-Bridge", zero="Megatron-FSDP shard 64")) == "megatron"
    assert engine_of(row_of(framework="Meta internal", zero="FSDP (no reshard of params)")) == "torchtitan"


@pytest.mark.parametrize("framework", ["", "Colossal-AI", "42"])
def test_a_framework_that_is_not_known_is_refused(framework: str) -> None:
    with pytest.raises(RefusedError, match="engine: framework not known"):
        engine_of(row_of(framework=framework, zero=""))


@pytest.mark.parametrize(
    ("spelling", "precision"),
    [
        ("bf16", "bf16"),
        ("BF16", "bf16"),
        ("amp_bf16", "bf16"),
        ("fp16", "fp16"),
        ("FP8", "fp8"),
        ("FP8-CS", "fp8"),
        ("FP8-MX", "fp8"),
        ("fp8_mx", "fp8"),
        ("MXFP8", "fp8"),
        ("amp_fp8", "fp8"),
        ("FP8 tensorwise", "fp8"),
        ("FP8 (implied by page footnotes; no Precision column in 25.09)", "fp8"),
        ("NVFP4", "fp4"),
        ("tf32", "fp32"),
    ],
)
def test_number_types(spelling: str, precision: str) -> None:
    assert precision_of(spelling, "H100", 2025, {}) == precision


def test_a_number_type_left_open_is_that_of_its_time() -> None:
    assumed: dict[str, str] = {}
    assert precision_of("", "A100", 2021, assumed) == "fp16"
    assert precision_of("", "H100", 2025, assumed) == "bf16"
    assert "not stated" in assumed["precision"]
    with pytest.raises(RefusedError, match="precision: not known"):
        precision_of("int4", "H100", 2025, {})


@pytest.mark.parametrize(
    ("spelling", "stage"),
    [
        ("dist-optimizer", 1),
        ("none", 0),
        ("ZeRO-1", 1),
        ("FSDP FULL_SHARD (ZeRO-3)", 3),
        ("FSDP SHARD_GRAD_OP (ZeRO-2)", 2),
        ("FSDP2", 3),
        ("FSDP2 (ZeRO-3)", 3),
        ("Megatron-FSDP shard 64", 3),
        ("Megatron-FSDP optim_grads_params", 3),
        ("DeepSpeed ZeRO-2", 2),
        ("DeepSpeed ZeRO-3 + CPU offload", 3),
        ("FSDP (optimizer+grads sharded, no reshard of params)", 2),
    ],
)
def test_zero_stages(spelling: str, stage: int) -> None:
    assert zero_stage_of(spelling, "megatron", {}) == stage


@pytest.mark.parametrize("engine", ["megatron", "torchtitan", "deepspeed"])
def test_a_zero_stage_left_open_is_one_that_the_engine_runs(engine: Any) -> None:
    assumed: dict[str, str] = {}
    assert zero_stage_of("", engine, assumed) in engine_named(engine).zero_stages
    assert "zero_stage" in assumed


@pytest.mark.parametrize(
    ("text", "level", "modules"),
    [
        ("", None, ()),
        ("none", "none", ()),
        ("none (8K)", "none", ()),
        ("full", "full", ()),
        ("selective: core_attn", "selective", ()),
        ("selective (core_attn) + SP", "selective", ()),
        ("selective (torchtitan per-op SAC)", "selective", ()),
        ("selective (config default)", "selective", ()),
        ("selective: layernorm+moe_act", "selective", ("layernorm", "moe_act")),
        ("selective: moe_act,layernorm", "selective", ("layernorm", "moe_act")),
        ("selective: moe_act", "selective", ("moe_act",)),
        ("selective: moe", "selective", ("moe",)),
        ("selective: moe+layernorm", "selective", ("layernorm", "moe")),
        ("selective: mla_up_proj+mlp", "selective", ("mla_up_proj", "mlp")),
        ("selective: mlp+core_attn", "selective", ("core_attn", "mlp")),
        ("selective: norm,act", "selective", ("layernorm", "moe_act")),
        ("selective (RMSNorm, MLA up-proj, SwiGLU)", "selective", ("layernorm", "mla_up_proj", "moe_act")),
    ],
)
def test_recompute(text: str, level: str | None, modules: tuple[str, ...]) -> None:
    assert recompute_of(text) == (level, modules)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DeepEP", ("deepep",)),
        ("DeepEP API on UCCL; EP 1F1B overlap off", ("deepep",)),
        ("NCCL alltoall; EP 1F1B overlap on", ("alltoall",)),
        ("alltoall (A2A)", ("alltoall",)),
        ("all-to-all expert dispatch", ("alltoall",)),
        ("HybridEP flex; TE CUDA graph (recipe @067f987)", ("hybridep",)),
        ("allgather", ("allgather",)),
        ("", ("deepep", "alltoall")),
    ],
)
def test_dispatchers(text: str, expected: tuple[str, ...]) -> None:
    row = row_of(**EXPERTS, dispatcher_overlap=text)
    assert dispatchers_of(row, "megatron") == expected


def test_the_words_nvlink_and_nvl72_are_two() -> None:
    node = row_of(**EXPERTS, interconnect="NVLink 450GB/s uni + 400Gb/s IB", year=2025)
    rack = row_of(**EXPERTS, interconnect="NVL72 NVLink domain", year=2025)
    assert dispatchers_of(node, "megatron") == ("deepep", "alltoall")
    assert dispatchers_of(rack, "megatron") == ("hybridep", "alltoall")
    assert dispatchers_of(row_of(**EXPERTS, year=2024), "megatron") == ("alltoall",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NCCL alltoall; EP 1F1B overlap on", True),
        ("DeepEP on NVSHMEM; EP 1F1B overlap off", False),
        ("HybridEP; 1F1B EP overlap ON; CUDA graphs", True),
        ("HybridEP; EP overlap OFF; CUDA graphs", False),
        ("overlap", True),
        ("NO comm overlap (TP/PP overlap disabled); fused CE", False),
        ("DeepEP", None),
        ("", None),
    ],
)
def test_expert_overlap(text: str, expected: bool | None) -> None:
    assert expert_overlap_of(text) is expected


def test_pipeline_orders() -> None:
    assert schedule_of("schedule 1F1B") == "1F1B"
    assert schedule_of("schedule VPP2 interleaved") == "Interleaved1F1B"
    assert schedule_of("schedule ZBV") == "ZBVZeroBubble"
    assert schedule_of("schedule ZB-bubble (zbb)") == "InterleavedZeroBubble"
    assert schedule_of("EP 1F1B overlap on") is None
    assert schedule_of("vanilla TP; compile") is None
    for text in ("schedule V-half", "DualPipe + custom EP all-to-all"):
        with pytest.raises(RefusedError, match="schedule not described"):
            schedule_of(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("force-balanced, dropless", "balanced"),
        ("fake balanced gate", "balanced"),
        ("token-drop capacity factor 1", "balanced"),
        ("capacity factor 1, pad to capacity (exactly balanced)", "balanced"),
        ("natural routing (real data)", "natural"),
        ("natural, aux-loss-free", "natural"),
        ("", "unstated"),
    ],
)
def test_routing(text: str, kind: str) -> None:
    assert routing_of(text) == kind


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("DeepSpeed ZeRO-3 + CPU offload", {"optimizer"}),
        ("opt offload", {"optimizer"}),
        ("activation offload ON", {"activations"}),
        ("HybridEP; offload expert_fc1 activations", {"activations"}),
        ("no activation offload", set()),
        ("", set()),
    ],
)
def test_what_lies_in_the_host_s_memory(text: str, moved: set[str]) -> None:
    assert offload_of(text) == moved


def test_recipes_of_a_framework_set_the_engine() -> None:
    bridge = settings_of(row_of(framework="Megatron-Bridge"), "megatron", ())
    assert (bridge.gradients, bridge.moments, bridge.loss) == ("bf16", "fp32", "fused")
    experts = settings_of(row_of(**EXPERTS, framework="Megatron-Bridge"), "megatron", ("moe_act",))
    assert (experts.moments, experts.recompute_modules) == ("bf16", ("moe_act",))
    nemo = settings_of(row_of(framework="NeMo 24.07"), "megatron", ())
    assert (nemo.gradients, nemo.moments, nemo.loss) == ("bf16", None, None)
    plain = settings_of(row_of(framework="Megatron-LM"), "megatron", ())
    assert plain.gradients is plain.moments is plain.loss is plain.recompute_modules is None


@pytest.mark.parametrize(
    ("path", "words", "loss"),
    [
        ("benchmarks/llama3_h100_202412_torchtitan.md T1", "compile bf16", None),
        ("benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md", "compile", "fused"),
        ("benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md", "AsyncTP; compile", "fused"),
        ("benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md", "eager bf16", None),
    ],
)
def test_torchtitan_compiles_its_loss_since_2025(path: str, words: str, loss: str | None) -> None:
    row = row_of(framework="torchtitan", source_path=path, dispatcher_overlap=words)
    assert settings_of(row, "torchtitan", ()).loss == loss


def test_a_run_is_dated_by_its_source_or_its_year() -> None:
    assert dated(row_of(source_path="x_202412_y", year=2026)) == pytest.approx(2024 + 11 / 12)
    assert dated(row_of(source_path="docs 26.04", year=2026)) == 2026
    assert dated(row_of(source_path="arXiv 2504.14960", year=2025)) == 2025


def test_sequence_parallelism_is_not_older_than_itself() -> None:
    assert stated_policy(row_of(framework="Megatron-LM 2021", year=2021), {}).sequence_parallel is False
    assert stated_policy(row_of(framework="Megatron-DeepSpeed"), {}).sequence_parallel is False
    assert stated_policy(row_of(), {}).sequence_parallel is None
    assert stated_policy(row_of(sequence_parallel=False), {}).sequence_parallel is False


@given(text=st.text(max_size=80))
def test_any_spelling_is_read_or_refused(text: str) -> None:
    row = row_of(framework=text, zero=text, recompute=text, dispatcher_overlap=text, routing=text, notes=text)
    reason = "engine: read"
    try:
        stated_policy(row, {})
    except RefusedError as refused:
        reason = refused.reason
    assert reason.split(":")[0] in ("engine", "precision")


def test_the_carried_rows_name_eras_of_the_catalogue() -> None:
    for row in carried().values():
        try:
            assert stated_policy(row, {}).era in eras()
        except RefusedError:
            continue

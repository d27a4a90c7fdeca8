"""Every rule that a plan can break, broken alone; and that the nearest values named would heal it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshwright.deployment import deployment_from
from meshwright.errors import InputError
from meshwright.gpus import gpu_named
from meshwright.layout import Layout
from meshwright.plan import Plan, resolve
from meshwright.verify import Finding, cluster_findings, require_valid, verify

BASE = {
    "cluster": {
        "nodes": 2,
        "gpus_per_node": 8,
        "gpu": "h100-sxm",
        "links": [
            {"name": "node", "gpus": 8, "kind": "nvlink", "bandwidth": "450 GB/s", "latency": "3 us"},
            {"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"},
        ],
    },
    "model": {
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 256,
        "intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
    },
    "workload": {"global_batch_size": 16, "sequence_length": 64},
    "layout": {"tp": 2, "dp": 4, "pp": 2, "ep": 4, "etp": 1},
}


@pytest.fixture(scope="module")
def base() -> Plan:
    return resolve(deployment_from(BASE, Path()))


def changed(plan: Plan, changes: dict[str, Any]) -> Plan:
    """The plan with fields replaced and nothing checked again: rules must stand on their own."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        part, field = key.split(".")
        parts.setdefault(part, {})[field] = value
    update = {}
    for part, fields in parts.items():
        noun = getattr(plan, part)
        kept = {name: getattr(noun, name) for name in type(noun).model_fields}
        update[part] = type(noun).model_construct(**{**kept, **fields})
    return plan.model_copy(update=update)


MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
CHUNKED = {"layout.vpp": 2, "policy.layers_per_stage": (2, 2, 2, 2)}
TP_16 = {"layout.tp": 16, "layout.dp": 1, "layout.pp": 1, "policy.layers_per_stage": (8,)}
ETP_16 = {
    "layout.tp": 1,
    "layout.dp": 16,
    "layout.pp": 1,
    "layout.ep": 1,
    "layout.etp": 16,
    "policy.layers_per_stage": (8,),
    "policy.sequence_parallel": False,
}

NO_PIPELINE: dict[str, Any] = {"layout.pp": 1, "layout.dp": 8, "policy.layers_per_stage": (8,)}

ERRORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "heads": (
        {"model.num_attention_heads": 9, "model.num_key_value_heads": 1},
        "layout.tp",
        "num_attention_heads = 9",
    ),
    "key-value heads": (
        {"model.num_attention_heads": 12, "model.num_key_value_heads": 3},
        "layout.tp",
        "num_key_value_heads = 3",
    ),
    "dense width": (
        {"model.mlp_only_layers": (0,), "model.intermediate_size": 63},
        "layout.tp",
        "intermediate_size = 63",
    ),
    "shared width": (
        {"model.shared_expert_intermediate_size": 63},
        "layout.tp",
        "shared expert width = 63",
    ),
    "experts": ({"model.num_experts": 6}, "layout.ep", "num_experts = 6"),
    "expert width": (
        {"layout.etp": 2, "layout.ep": 2, "model.moe_intermediate_size": 63},
        "layout.etp",
        "moe_intermediate_size = 63",
    ),
    "experts of a dense model": ({"model.num_experts": 0}, "layout.ep", "no experts"),
    "layers": (
        {"model.num_hidden_layers": 1, "policy.layers_per_stage": (1, 0)},
        "layout.pp",
        "stages need a layer each",
    ),
    "an empty stage": (
        {"model.num_hidden_layers": 4, "policy.layers_per_stage": (4, 0)},
        "policy.layers_per_stage",
        "a stage has a layer",
    ),
    "world": ({"layout.dp": 8}, "layout.dp", "must equal the 16 GPUs"),
    "batch": ({"workload.global_batch_size": 18}, "workload.global_batch_size", "multiple of dp = 4"),
    "micro-batch": ({"policy.micro_batch_size": 3}, "policy.micro_batch_size", "the 4 sequences"),
    "sequence parallelism": ({"workload.sequence_length": 63}, "workload.sequence_length", "multiple of 2"),
    "context parallelism": (
        {"policy.engine": "megatron", "layout.cp": 2, "layout.dp": 2, "workload.sequence_length": 68},
        "workload.sequence_length",
        "multiple of 8",
    ),
    "number of stages": ({"policy.layers_per_stage": (4, 2, 2)}, "policy.layers_per_stage", "one entry each"),
    "layers of stages": ({"policy.layers_per_stage": (4, 3)}, "policy.layers_per_stage", "must add up"),
    "chunks": (
        {"layout.vpp": 2, "policy.layers_per_stage": (2, 2, 2, 2)},
        "layout.vpp",
        "one chunk per rank",
    ),
    "chunks of a V": ({"policy.schedule": "DualPipeV"}, "layout.vpp", "exactly two chunks"),
    "schedule of the engine": (
        {"policy.engine": "deepspeed", "policy.schedule": "GPipe"},
        "policy.schedule",
        "deepspeed engine does not run it",
    ),
    "ZeRO of the engine": (
        {"policy.engine": "torchtitan", "policy.zero_stage": 1},
        "policy.zero_stage",
        "torchtitan engine does not run it",
    ),
    "precision of the GPU": (
        {"policy.engine": "megatron", "workload.precision": "fp8", "cluster.gpu": gpu_named("a100-80gb")},
        "workload.precision",
        "a100-80gb has no peak",
    ),
    "precision of the engine": (
        {"workload.precision": "fp8"},
        "workload.precision",
        "native engine does not run it",
    ),
    "dispatcher of the engine": ({"policy.dispatcher": "deepep"}, "policy.dispatcher", "does not run it"),
    "context parallelism of the engine": ({"layout.cp": 2, "layout.dp": 2}, "layout.cp", "cp up to 1"),
    "overlap of the engine": ({"policy.expert_overlap": True}, "policy.expert_overlap", "native engine"),
    "overlap without interleaving": (
        {"policy.engine": "megatron", "policy.expert_overlap": True},
        "policy.expert_overlap",
        "vpp 2 or more",
    ),
    "overlap with full recompute": (
        {
            **NO_PIPELINE,
            "policy.engine": "megatron",
            "policy.expert_overlap": True,
            "policy.recompute": "full",
        },
        "policy.expert_overlap",
        "full recompute",
    ),
    "overlap with allgather": (
        {
            **NO_PIPELINE,
            "policy.engine": "megatron",
            "policy.expert_overlap": True,
            "policy.dispatcher": "allgather",
        },
        "policy.expert_overlap",
        "allgather dispatcher",
    ),
    "overlap in fp32": (
        {
            **NO_PIPELINE,
            "policy.engine": "megatron",
            "policy.expert_overlap": True,
            "workload.precision": "fp32",
        },
        "policy.expert_overlap",
        "fp32",
    ),
    "overlap without DualPipeV": (
        {"policy.engine": "torchtitan", "policy.zero_stage": 2, "policy.expert_overlap": True},
        "policy.expert_overlap",
        "DualPipeV only",
    ),
    "latent attention": (
        {f"model.{key}": value for key, value in MLA.items()},
        "policy.engine",
        "multi-head latent attention",
    ),
    "experts without sequence parallelism": (
        {"policy.sequence_parallel": False},
        "policy.sequence_parallel",
        "need sequence parallelism",
    ),
    "ZeRO 3 under zero bubble": (
        {**CHUNKED, "policy.schedule": "InterleavedZeroBubble", "policy.zero_stage": 3},
        "policy.zero_stage",
        "wrong gradients",
    ),
    "replicas of nothing": (
        {"policy.zero_stage": 0, "layout.dp_replicas": 2},
        "layout.dp_replicas",
        "ZeRO 0 divides nothing",
    ),
    "replicas in DeepSpeed": (
        {"policy.engine": "deepspeed", "layout.dp_replicas": 2},
        "layout.dp_replicas",
        "deepspeed makes one group",
    ),
    "ZeRO 2 in a DeepSpeed pipeline": (
        {"policy.engine": "deepspeed", "policy.zero_stage": 2},
        "policy.zero_stage",
        "pipelines of deepspeed",
    ),
    "ZeRO 3 in a Megatron pipeline": (
        {"policy.engine": "megatron", "policy.zero_stage": 3},
        "policy.zero_stage",
        "pipelines of megatron",
    ),
    "too few micro-batches": ({"workload.global_batch_size": 4}, "workload.global_batch_size", "at least 2"),
    "unequal rounds": (
        {**CHUNKED, "policy.schedule": "Interleaved1F1B", "workload.global_batch_size": 20},
        "workload.global_batch_size",
        "equal rounds",
    ),
    "rounds of Megatron": (
        {
            **CHUNKED,
            "policy.schedule": "Interleaved1F1B",
            "policy.engine": "megatron",
            "workload.global_batch_size": 12,
        },
        "workload.global_batch_size",
        "Megatron's interleaved schedule",
    ),
}

WARNINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "tp leaves the node": (TP_16, "layout.tp", "leave the node tier of 8 GPUs"),
    "etp leaves the node": (ETP_16, "layout.etp", "leave the node tier of 8 GPUs"),
    "no ZeRO": ({"policy.zero_stage": 0}, "policy.zero_stage", "keeps all optimizer states"),
}

HEALED_BY_ANOTHER_KEY = {"number of stages", "layers of stages", "experts without sequence parallelism"}


def test_the_base_breaks_no_rule(base: Plan) -> None:
    assert verify(base) == []
    assert require_valid(base) == []


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_found_alone(base: Plan, name: str) -> None:
    changes, key, text = ERRORS[name]
    plan = changed(base, changes)
    (finding,) = verify(plan)
    assert (finding.key, finding.level) == (key, "error")
    assert text in finding.rule
    with pytest.raises(InputError, match=r"^" + key.replace(".", r"\.")):
        require_valid(plan)


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_found_alone(base: Plan, name: str) -> None:
    changes, key, text = WARNINGS[name]
    plan = changed(base, changes)
    (finding,) = verify(plan)
    assert (finding.key, finding.level) == (key, "warning")
    assert text in finding.rule
    assert require_valid(plan) == [finding]


@pytest.mark.parametrize("name", [*ERRORS, *WARNINGS])
def test_the_nearest_values_keep_the_rule(base: Plan, name: str) -> None:
    """What is named as valid must be: the same rule no longer speaks when the value is put in place."""
    changes, key, text = {**ERRORS, **WARNINGS}[name]
    plan = changed(base, changes)
    (finding,) = verify(plan)
    assert finding.nearest, "every one of these rules has a valid value"
    if name in HEALED_BY_ANOTHER_KEY:
        return
    for value in finding.nearest:
        again = verify(changed(plan, {key: value}))
        assert not [f for f in again if f.key == key and text in f.rule], (value, again)


def test_engines_that_are_not_pytorch_s_run_few_micro_batches(base: Plan) -> None:
    few = {"workload.global_batch_size": 4}  # one micro-batch for two ranks
    assert [f.key for f in verify(changed(base, few))] == ["workload.global_batch_size"]
    for engine in ("megatron", "deepspeed"):
        assert verify(changed(base, {**few, "policy.engine": engine})) == []


def test_errors_stand_before_warnings(base: Plan) -> None:
    plan = changed(base, {**TP_16, "workload.global_batch_size": 15, "policy.zero_stage": 0, "layout.dp": 2})
    levels = [finding.level for finding in verify(plan)]
    assert levels == sorted(levels)
    assert set(levels) == {"error", "warning"}


def test_all_rules_that_are_broken_are_found(base: Plan) -> None:
    changes = {"workload.global_batch_size": 18, "workload.sequence_length": 63, "model.num_experts": 6}
    assert {finding.key for finding in verify(changed(base, changes))} == {
        "workload.global_batch_size",
        "workload.sequence_length",
        "layout.ep",
    }


def test_chunks_are_checked_whatever_the_batch(base: Plan) -> None:
    plan = changed(base, {**CHUNKED, "workload.global_batch_size": 18})
    assert {finding.key for finding in verify(plan)} == {"workload.global_batch_size", "layout.vpp"}


def test_the_shortest_and_the_longest_sequence_are_checked(base: Plan) -> None:
    document = {**BASE, "workload": {"global_batch_size": 16, "sequence_length": {"min": 31, "max": 63}}}
    plan = resolve(deployment_from(document, Path()))
    assert [finding.value for finding in verify(plan)] == [31, 63]


def test_latent_attention_has_no_key_value_heads_to_divide(base: Plan) -> None:
    changes = {f"model.{key}": value for key, value in MLA.items()}
    changes |= {"model.num_attention_heads": 12, "model.num_key_value_heads": 3, "policy.engine": "megatron"}
    assert verify(changed(base, changes)) == []


def test_one_node_has_no_tier_to_leave() -> None:
    document = {**BASE, "cluster": {"local": 16}, "layout": {"tp": 16, "ep": 4, "etp": 1}}
    plan = resolve(deployment_from(document, Path()))
    assert [finding for finding in verify(plan) if finding.level == "warning"] == []


def test_a_tp_that_straddles_nodes_is_warned_of(base: Plan) -> None:
    """Six ranks do not divide eight, so some groups lie on two nodes although each would fit on one."""
    cluster = base.cluster.model_copy(update={"nodes": 3})
    findings = list(cluster_findings(cluster, Layout(tp=6, dp=4)))
    assert [(f.key, f.level, f.nearest) for f in findings] == [("layout.tp", "warning", (2, 4, 8))]


def test_a_finding_becomes_the_error_of_a_command() -> None:
    error = Finding("layout.ep", 3, "must divide num_experts = 8", (2, 4)).raised()
    assert str(error) == "layout.ep: 3: must divide num_experts = 8 (nearest: 2, 4)"

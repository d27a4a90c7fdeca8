"""What selective recompute keeps and repeats, by class, by Megatron's modules, and op by op."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from meshwright.deployment import deployment_from
from meshwright.engines import engine_named, engine_of
from meshwright.ir.program import LoweredBlock, lower
from meshwright.ir.tasks import ComputeTask
from meshwright.plan import Plan, resolve
from meshwright.policy import RecomputeModule

LINKS = [{"name": "node", "kind": "nvlink", "bandwidth": "450 GB/s", "latency": "3 us"}]
TOKENS, HIDDEN, WIDTH, HEADS, KEYS, HEAD = 256, 256, 1024, 8, 2, 32
LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "vocab_size": 2048,
    "intermediate_size": WIDTH,
}
EXPERTS = {
    **LLAMA,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "n_shared_experts": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
MODULES: tuple[RecomputeModule, ...] = get_args(RecomputeModule)


def plan_of(model: dict[str, Any], engine: str = "megatron", precision: str = "bf16", **policy: Any) -> Plan:
    document = {
        "cluster": {"nodes": 1, "gpus_per_node": 1, "gpu": "h100-sxm", "links": LINKS},
        "model": model,
        "workload": {"global_batch_size": 2, "sequence_length": TOKENS, "precision": precision},
        "layout": {},
        "policy": {"engine": engine, **policy},
    }
    return resolve(deployment_from(document, Path()))


def layer(model: dict[str, Any], *modules: str, **policy: Any) -> LoweredBlock:
    settings = {"recompute_modules": list(modules)} if modules else {}
    plan = plan_of(model, recompute="selective", settings=settings, **policy)
    return lower(plan).stages[0].blocks[1]


def without(model: dict[str, Any], **policy: Any) -> LoweredBlock:
    return lower(plan_of(model, **policy)).stages[0].blocks[1]


def freed(model: dict[str, Any], *modules: str) -> int:
    """Bytes that a selection no longer keeps."""
    return without(model).saved_bytes - layer(model, *modules).saved_bytes


def repeated(block: LoweredBlock) -> set[str]:
    tasks = [t for t in block.tasks if isinstance(t, ComputeTask) and t.phase == "recompute"]
    return {task.name.removeprefix("layers.0.") for task in tasks}


def test_a_dense_feed_forward_is_kept_by_its_input_alone() -> None:
    """Gate, up and their product, 2 bytes each; the four ops between run again."""
    assert freed(LLAMA, "mlp") == 3 * 2 * TOKENS * WIDTH
    assert repeated(layer(LLAMA, "mlp")) == {"mlp.gate", "mlp.up", "mlp.activation", "mlp.down"}


def test_norms_are_kept_by_their_inputs() -> None:
    """Two outputs of 2 bytes and two FP32 statistics a token."""
    assert freed(LLAMA, "layernorm") == 2 * TOKENS * (2 * HIDDEN + 4)
    assert repeated(layer(LLAMA, "layernorm")) == {"attention_norm", "mlp_norm"}


def test_the_attention_core_had_only_its_statistics_to_drop() -> None:
    assert freed(LLAMA, "core_attn") == 4 * TOKENS * HEADS
    assert repeated(layer(LLAMA, "core_attn")) == {"attention.core"}


def test_the_activation_of_experts_alone() -> None:
    """The product of every token's two experts."""
    assert freed(EXPERTS, "moe_act") == 2 * 2 * TOKENS * 512
    assert repeated(layer(EXPERTS, "moe_act")) == {"moe.experts.activation"}


def test_shared_experts() -> None:
    assert freed(EXPERTS, "shared_experts") == 3 * 2 * TOKENS * 512
    assert all(name.startswith("moe.shared.") for name in repeated(layer(EXPERTS, "shared_experts")))


def test_the_up_projections_of_latent_attention() -> None:
    """Queries and keys of 48, values of 32, for every head; only latent attention has them."""
    assert freed(EXPERTS, "mla_up_proj") == 2 * TOKENS * HEADS * (48 + 48 + 32)
    assert {"attention.q_b", "attention.kv_b"} <= repeated(layer(EXPERTS, "mla_up_proj"))
    assert freed(LLAMA, "mla_up_proj") == 0
    assert repeated(layer(LLAMA, "mla_up_proj")) == set()


def test_whole_experts_keep_their_input_and_the_choice() -> None:
    kept = layer(EXPERTS, "moe").saved
    of_experts = {name for name in kept if ".moe." in name}
    assert of_experts == {name for name in of_experts if name.endswith((".choices", ".index"))}
    assert "layers.0.mlp_norm" in kept
    assert {"moe.router", "moe.experts.down"} <= repeated(layer(EXPERTS, "moe"))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("model", [LLAMA, EXPERTS], ids=["dense", "experts"])
def test_a_module_frees_what_it_makes_again_or_does_nothing(model: dict[str, Any], module: str) -> None:
    block = layer(model, module)
    assert (freed(model, module) > 0) == bool(repeated(block))
    assert block.saved.keys() <= without(model).saved.keys()
    both = freed(model, module, "layernorm")
    assert both >= max(freed(model, module), freed(model, "layernorm"))


def test_torchtitan_keeps_attention_and_every_second_matmul() -> None:
    """q, v, gate, down of q, k, v, o, gate, up, down; the core's output and statistics; the layer's input."""
    block = layer(LLAMA, engine="torchtitan", zero_stage=3)
    outputs = HIDDEN + KEYS * HEAD + WIDTH + HIDDEN
    assert block.saved_bytes == TOKENS * (2 * (outputs + HIDDEN + HIDDEN) + 4 * HEADS)
    again = repeated(block)
    assert {"attention.k", "attention.o", "mlp.up", "attention_norm", "mlp.activation"} <= again
    assert not {"attention.q", "attention.v", "mlp.gate", "mlp.down", "attention.core"} & again


def test_quantized_inputs_take_one_byte_and_attention_keeps_its_own() -> None:
    """fp8 on Megatron: inputs of q·k·v, o, gate·up and down in one byte; all else in two."""
    wide, narrow = without(LLAMA), without(LLAMA, precision="fp8")
    inputs = HIDDEN + HIDDEN + WIDTH  # of q·k·v, of gate·up, of down; that of o stands beside attention's own
    assert wide.saved_bytes - narrow.saved_bytes == TOKENS * (inputs - HEADS * HEAD)
    plain = without(LLAMA, engine="torchtitan", zero_stage=3, precision="fp8")
    assert plain.saved_bytes == without(LLAMA, engine="torchtitan", zero_stage=3).saved_bytes


def test_settings_replace_the_engine_s_usual_and_say_so() -> None:
    usual = engine_named("megatron")
    assert engine_of(plan_of(LLAMA).policy) == usual
    settings = {"gradients": "bf16", "moments": "bf16", "loss": "fused", "recompute_modules": ["mlp"]}
    set_ = engine_of(plan_of(LLAMA, settings=settings).policy)
    assert (set_.gradient_bytes.value, set_.moment_bytes.value) == (2, 2)
    assert set_.loss == usual.fused_loss
    assert set_.selective.value == ("mlp",)
    assert not {"gradient_bytes", "moment_bytes", "selective"} & set_.assumptions().keys()
    assert engine_of(plan_of(LLAMA, settings={"loss": "eager"}).policy).loss == usual.loss

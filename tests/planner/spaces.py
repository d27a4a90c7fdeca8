"""Small deployments whose spaces can be searched whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshwright.deployment import Deployment, deployment_from

TINY: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "intermediate_size": 2816,
}
TINY_MOE = {
    **TINY,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
TINY_LATENT = {
    **TINY_MOE,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
TIED = {**TINY, "tie_word_embeddings": True, "num_hidden_layers": 6}
MODELS = {"dense": TINY, "moe": TINY_MOE, "latent": TINY_LATENT, "tied": TIED}


def deployment(
    model: dict[str, Any] | str = "moe",
    nodes: int = 2,
    batch: int = 32,
    length: Any = 2048,
    layout: dict[str, int] | None = None,
    gpus_per_node: int = 8,
    precision: str = "bf16",
    routing: Any = "balanced",
    gpu: Any = "h100-sxm",
    efficiency: Any = None,
    **policy: Any,
) -> Deployment:
    """A deployment of a small model by name, or of any other model, on two H100 nodes unless told."""
    document = {
        "name": "small",
        "cluster": {"nodes": nodes, "gpus_per_node": gpus_per_node, "gpu": gpu, "efficiency": efficiency},
        "model": MODELS.get(model, model) if isinstance(model, str) else model,
        "workload": {
            "global_batch_size": batch,
            "sequence_length": length,
            "precision": precision,
            "routing": routing,
        },
        "layout": layout or {},
        "policy": policy,
    }
    return deployment_from(document, Path())

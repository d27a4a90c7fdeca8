"""Plans of the examples and small ones of every schedule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.deployment import Deployment
from meshwright.files import decode
from meshwright.plan import Plan, open_placement, resolve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUNNABLE = (
    "brief-repaired",
    "brief-30b",
    "deepseek-v3-2048",
    "mixtral-8x22b-128",
    "qwen3-30b-a3b-16",
    "qwen3-30b-a3b-512",
)
"""Examples whose layout exists."""

MODEL = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1024,
    "vocab_size": 32000,
}


def example(name: str) -> Plan:
    """The plan of an example as it stands."""
    return resolve(open_placement(EXAMPLES / f"{name}.yaml", Deployment))


def plan(
    layout: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
    workload: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    nodes: int = 2,
) -> Plan:
    """A mixture of experts on two nodes of eight H100."""
    document = {
        "cluster": {"nodes": nodes, "gpu": "h100-sxm"},
        "model": {**MODEL, **(model or {})},
        "workload": {"global_batch_size": 64, "sequence_length": 4096, **(workload or {})},
        "layout": layout or {},
        "policy": {"engine": "megatron", **(policy or {})},
    }
    return resolve(decode(Deployment, document))

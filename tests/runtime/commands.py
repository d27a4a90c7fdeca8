"""A deployment so small that the command trains it within a test, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.files import to_yaml

DENSE = {"intermediate_size": 32}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "router": {"aux_loss": 0.01},
}
"""What a model's layers hold beside attention."""


def small_deployment(
    feed_forward: Mapping[str, Any],
    *,
    ranks: int = 1,
    layers: int = 1,
    ep: int = 1,
    batch: tuple[int, int] = (2, 16),
    **parts: Mapping[str, Any],
) -> dict[str, Any]:
    """A deployment of `ranks` data-parallel processes under ZeRO 1, in fp32, with nothing left to be chosen.

    `batch`: sequences of a step, and tokens of each. `parts`: more keys of a part of the file, as
    `workload={"optimizer": "sgd"}`.
    """
    document: dict[str, Any] = {
        "name": "small",
        "cluster": {"local": ranks},
        "model": {
            "num_hidden_layers": layers,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 256,
            **feed_forward,
        },
        "workload": {"global_batch_size": batch[0], "sequence_length": batch[1], "precision": "fp32"},
        "layout": {"tp": 1, "cp": 1, "pp": 1, "vpp": 1, "dp": ranks, "ep": ep, "etp": 1},
        "policy": {
            "engine": "native",
            "micro_batch_size": 1,
            "schedule": "1F1B",
            "zero_stage": 1,
            "sequence_parallel": False,
            "recompute": "none",
            "dispatcher": "alltoall",
            "expert_overlap": False,
        },
    }
    return document | {part: {**document.get(part, {}), **keys} for part, keys in parts.items()}


def written(document: Mapping[str, Any], folder: Path) -> Path:
    """The file of a deployment, in a folder."""
    path = folder / "small.yaml"
    path.write_text(to_yaml(document), "utf-8")
    return path

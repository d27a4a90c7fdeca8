"""Rows for the tests of this folder."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from meshwright.validate.rows import Row, read_rows

CARRIED = Path(__file__).with_name("runs.csv")
"""Two dozen published runs, of every kind."""


@cache
def carried() -> dict[str, Row]:
    """The rows of the small file by id."""
    return {row.id: row for row in read_rows(CARRIED)}


def row_of(**given: Any) -> Row:
    """A dense run on one node of H100, with fields replaced; what is not given of other kinds is blank."""
    blank: dict[str, Any] = {f.name: "" if f.type == "str" else None for f in fields(Row)}
    usual = {
        "id": "T-1",
        "source": "test",
        "year": 2026,
        "task": "pretrain",
        "model": "tiny",
        "num_layers": 8,
        "hidden_size": 1024,
        "feed_forward_size": 4096,
        "num_heads": 16,
        "num_kv_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "sequence_length": 2048,
        "gated": True,
        "attention": "GQA",
        "gpu": "H100",
        "num_gpus": 8,
        "gpus_per_node": 8,
        "precision": "bf16",
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "ep": 1,
        "global_batch_size": 64,
        "micro_batch_size": 1,
        "recompute": "none",
        "zero": "dist-optimizer",
        "framework": "Megatron-LM",
        "iteration_time_s": 1.0,
        "quality": "A",
    }
    return Row(**{**blank, **usual, **given})


EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "experts_per_token": 2,
    "expert_feed_forward_size": 512,
    "feed_forward_size": None,
    "ep": 8,
}
"""What makes the usual row a mixture of experts."""

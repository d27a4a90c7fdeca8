"""Tests of this folder use the layouts on which training is tested, its ranks, and a small plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from meshwright.dryrun import Answer, Asked, answered

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "runtime"):
    sys.path.insert(0, str(folder))

PLAN = """
name: small
cluster: {local: 16}
model:
  num_hidden_layers: 2
  hidden_size: 64
  num_attention_heads: 4
  num_experts: 8
  num_experts_per_tok: 2
  moe_intermediate_size: 32
  vocab_size: 256
workload: {global_batch_size: 16, sequence_length: 128, precision: bf16}
layout: {tp: 2, pp: 2, dp: 4, cp: 1, vpp: 1, ep: 4, etp: 1}
policy:
  engine: native
  micro_batch_size: 2
  schedule: 1F1B
  zero_stage: 1
  sequence_parallel: true
  recompute: none
  dispatcher: alltoall
  expert_overlap: false
"""


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(PLAN)
    return str(path)


@pytest.fixture(scope="session")
def answer(file: str) -> Answer:
    """The dry run of 16 ranks."""
    return answered(Asked(file), lambda what, done, of: None)

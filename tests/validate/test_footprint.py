"""Predicted memory against what training runs measured, and what makes the difference."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from meshwright.cost.memory import memory, worst
from meshwright.deployment import deployment_from
from meshwright.ir.program import lower
from meshwright.plan import Plan, resolve
from meshwright.validate.described import Run, describe
from meshwright.validate.footprint import memory_bytes
from meshwright.validate.rows import Row, read_rows

RUNS = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "training_runs.csv"
LINKS = [{"name": "node", "kind": "nvlink", "bandwidth": "900 GB/s", "latency": "3 us"}]
GIB = 2**30


def measured(prefix: str) -> list[Run]:
    rows = [row for row in read_rows(RUNS) if row.id.startswith(prefix) and row.memory is not None]
    distinct: dict[object, Row] = {(row.memory, row.recompute, row.precision): row for row in rows}
    runs = [describe(row) for row in distinct.values()]
    return [run for run in runs if isinstance(run, Run) and run.memory is not None]


def errors(prefix: str) -> list[float]:
    found = []
    for run in measured(prefix):
        predicted = memory_bytes(run)
        assert run.memory is not None
        assert predicted is not None
        found.append(abs(predicted - run.memory.bytes) / run.memory.bytes)
    return found


@pytest.mark.parametrize(
    ("prefix", "number", "average", "most"),
    [
        ("SMX", 15, 0.01, 0.03),  # Megatron-LM on eight B200: tp, cp, pp, ep, 4,096 to 131,072 tokens
        ("TT", 11, 0.05, 0.08),  # torchtitan: eager and compiled, cp, tp, reserved bytes
        ("MBS", 10, 0.08, 0.18),  # Megatron-Bridge: bf16 gradients and moments, selective recompute, fp8
    ],
)
def test_measured_runs(prefix: str, number: int, average: float, most: float) -> None:
    found = errors(prefix)
    assert len(found) == number
    assert mean(found) <= average
    assert max(found) <= most


def plan_of(**policy: Any) -> Plan:
    document = {
        "cluster": {"nodes": 1, "gpus_per_node": 8, "gpu": "b200", "links": LINKS},
        "model": "llama-3-8b",
        "workload": {"global_batch_size": 32, "sequence_length": 4096, "precision": "bf16"},
        "layout": {"tp": 2},
        "policy": {"engine": "megatron", **policy},
    }
    return resolve(deployment_from(document, Path()))


def line(name: str, **policy: Any) -> int:
    return worst(memory(lower(plan_of(**policy)))).line(name)


def test_an_empty_weight_gradient_is_kept_for_each_shape() -> None:
    """TransformerEngine get_dummy_wgrad: q·k·v, o, gate·up and down of one layer; the head's meanwhile."""
    shapes = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    assert line("gradient placeholders") == 2 * shapes // 2
    head = 2 * 128256 * 4096 // 2
    assert line("activation gradients") >= head
    assert line("gradient placeholders", engine="torchtitan", zero_stage=3) == 0


def test_a_fused_loss_keeps_the_logits_in_two_bytes() -> None:
    logits = 4096 * 128256 // 2
    assert line("logits") == 4 * logits
    assert line("logits", settings={"loss": "fused"}) == 2 * logits


def test_bf16_gradients_and_moments_halve_theirs() -> None:
    halved = {"gradients": "bf16", "moments": "bf16"}
    assert line("gradients") == 2 * line("gradients", settings=halved)
    assert 2 * line("optimizer states") == 3 * line("optimizer states", settings=halved)


def test_the_allocator_takes_a_share_of_all_that_tensors_hold() -> None:
    """torch.cuda.max_memory_reserved over max_memory_allocated of SimuMax's runs, from their own text."""
    shares = []
    for run in measured("SMX"):
        reserved = float(run.row.memory_definition.rpartition("reserved ")[2].removesuffix(" GiB"))
        assert run.row.memory is not None
        shares.append(reserved / run.row.memory - 1)
    rank = worst(memory(lower(plan_of())))
    assert rank.reserved_bytes / rank.allocated_bytes - 1 == pytest.approx(mean(shares), abs=0.01)
    assert rank.total_bytes - rank.reserved_bytes == rank.line("runtime context")

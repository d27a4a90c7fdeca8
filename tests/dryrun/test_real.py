"""A dry run is a real run without values: the same events in the same order, FLOPs, parameters and bytes.

Both seams are in it: the real ranks route evenly too, and multiply groups of every type for real.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from layouts import Case, _case
from real_runs import real

from meshwright.ir.observed import Conduct
from meshwright.runtime.dryrun.rehearse import observe
from meshwright.runtime.dryrun.seams import FAKE_OPS, grouped_mm

CASES = (
    _case("gated", "pp2 dp2 ep2", "z1", "mb2", "1F1B"),
    _case("gated", "dp2 ep2", "z1", "selective", "bf16"),
    _case("plain", "tp2 dp2 ep2 etp2", "z1", "mb4", "allgather", "fp16"),
    _case("tied", "pp2 dp2 ep2 vpp2", "z2", "ZBVZeroBubble"),
    _case("gated", "dp4 ep2", "z3", "mb2"),
    _case("balanced", "tp2 dp2 ep4", "z1", "mb4", "full"),
)
CLOSE = 0.02
"""By which fraction a peak may be off, beside buffers that are let go late."""
LATE = 2
"""Buffers of calls that a real rank may still hold: until the thread that sends is done with them."""


def late_bytes(conduct: Conduct) -> int:
    return LATE * max(call.bytes for call in conduct.calls)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_does_for_real_what_its_dry_run_does(case: Case, corpus: Path) -> None:
    plan = case.plan("adamw")
    for rank, (conduct, peak) in enumerate(real(case, corpus)):
        seen = observe(plan, rank)
        assert seen.conduct.events == conduct.events
        assert seen.conduct.work == conduct.work
        assert seen.conduct.parameters == conduct.parameters
        assert seen.conduct.stages == conduct.stages
        assert seen.peak is not None
        # FSDP2 and split backwards let go of tensors a moment earlier or later
        assert (1 - CLOSE) * seen.peak.bytes <= peak.bytes
        assert peak.bytes <= (1 + CLOSE) * seen.peak.bytes + late_bytes(conduct)


def test_a_real_peak_is_no_lower_and_little_higher(corpus: Path) -> None:
    """Usually they are equal. A real send or collective may keep its buffer until its own thread is done."""
    plan = CASES[0].plan("adamw")
    for rank, (conduct, peak) in enumerate(real(CASES[0], corpus)):
        dry = observe(plan, rank).peak
        assert dry is not None
        assert dry.bytes <= peak.bytes <= dry.bytes + late_bytes(conduct)


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[0]], ids=str)
def test_a_peak_s_moment_is_one_of_the_step(case: Case) -> None:
    """With a pipeline and without."""
    peak = observe(case.plan("adamw"), 0).peak
    assert peak is not None
    assert re.fullmatch(r"(for|back)ward of micro-batch \d on stage 0|update", peak.moment), peak.moment


def test_one_op_has_a_result_of_our_own() -> None:
    assert list(FAKE_OPS) == [torch.ops.aten._grouped_mm.default]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fake_grouped_matmul_has_the_real_one_s_shape(kind: torch.dtype) -> None:
    x, ends = torch.ones(16, 16, dtype=kind), torch.tensor([4, 8, 16], dtype=torch.int32)
    pairs = (
        (x, torch.ones(3, 16, 8, dtype=kind), ends),
        (x.t(), torch.ones(16, 8, dtype=kind), ends),
    )
    for left, right, offs in pairs:
        true = torch._grouped_mm(left, right, offs=offs)
        fake = grouped_mm(left, right, offs)
        assert (fake.shape, fake.dtype) == (true.shape, true.dtype)
        assert fake.untyped_storage().nbytes() == true.untyped_storage().nbytes()

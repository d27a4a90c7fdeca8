"""Each kind of figure against arithmetic done by hand, and the bounds and roundings that verdicts use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.audit import AuditReport, Checked, audit
from meshwright.deployment import deployment_from
from meshwright.units import BYTES

# A dense-free model whose sizes are easy: 8 layers, hidden 64, 4 heads of 16, 8 experts of width 32, top 2.
BASE: dict[str, Any] = {
    "cluster": {
        "nodes": 2,
        "gpus_per_node": 8,
        "gpu": {"memory": "80 GB", "memory_bandwidth": "2 TB/s", "peak": {"bf16": "500 TFLOP/s"}},
        "links": [{"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"}],
        "efficiency": {"compute": "40%"},
    },
    "model": {
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "vocab_size": 100,
    },
    "workload": {"global_batch_size": 64, "sequence_length": 256},
    "layout": {"tp": 2, "pp": 2, "dp": 4, "ep": 4},
}
LAYER = 4 * 64 * 64 + 2 * 64 + 8 * 64 + 8 * 3 * 64 * 32  # attention, two norms, router, gated experts
TOTAL = 8 * LAYER + 2 * 100 * 64 + 64


def audited(*figures: dict[str, Any], **changes: dict[str, Any]) -> AuditReport:
    document = {key: {**value, **changes.get(key, {})} for key, value in BASE.items()}
    document |= {key: value for key, value in changes.items() if key not in BASE}
    document["claims"] = {**document.get("claims", {}), "figures": list(figures)}
    return audit(deployment_from(document, Path()))


def one(figure: str, value: Any, **changes: Any) -> Checked:
    at = changes.pop("at", {})
    return audited({"id": figure, "value": value, "at": at}, **changes).claims[0]


BY_HAND = {
    "parameters": (TOTAL, TOTAL),
    "world_size": (16, 2 * 2 * 4),
    "layers_per_stage": (4, 8 / 2),
    "experts_per_gpu": (2, 8 / 4),
    "hidden_per_tp_rank": (32, 64 / 2),
    "heads_per_tp_rank": (2, 4 / 2),
    "sequences_per_replica": (16, 64 / 4),
    "micro_batch_size": (1, 1),
    "num_micro_batches": (16, 16),
    "bubble_fraction": ("5.882%", 1 / 17),
    "effective_flops": ("200 TFLOP/s", 0.4 * 500e12),
    "stage_ranks": (["0-7", "8-15"], ("0-7", "8-15")),
    # a rank of stage 0: per layer half of attention, the norms and router whole, a quarter of the experts
    "parameter_memory": (
        "175.5 kB",
        2 * (4 * (4 * 64 * 64 // 2 + 2 * 64 + 8 * 64 + 8 * 3 * 64 * 32 // 4) + 100 * 64 // 2 + 64),
    ),
    "optimizer_ratio": (6, 12 / 2),
}


@pytest.mark.parametrize("figure", BY_HAND)
def test_figures_by_hand(figure: str) -> None:
    stated, expected = BY_HAND[figure]
    checked = one(figure, stated)
    assert checked.computed == (
        expected if isinstance(expected, tuple) else pytest.approx(expected, rel=1e-12)
    )
    assert checked.verdict == "holds", checked.why


def test_gradients_are_twice_the_weights_and_states_are_divided() -> None:
    weights = one("parameter_memory", "1 B").computed
    assert one("gradient_memory", "1 B").computed == 2 * weights  # FP32 beside BF16
    dense = 4 * (4 * 64 * 64 // 2 + 2 * 64 + 8 * 64) + 100 * 64 // 2
    experts = 4 * 8 * 3 * 64 * 32 // 4
    first = 12 * (dense // 4 + experts // 2)  # dp 4, edp 2
    assert one("optimizer_memory", "1 B").computed == pytest.approx(first, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "layout", "idle"),
    [
        ("GPipe", {"pp": 4}, 3 / 19),
        ("1F1B", {"pp": 4}, 3 / 19),
        ("Interleaved1F1B", {"pp": 4, "vpp": 2}, 3 / 35),
        # (pp-1)(F+I-W) = 3 of 3·2·16 + 3 slots, Zero Bubble (arXiv:2401.10241) with F = I = W
        ("InterleavedZeroBubble", {"pp": 4, "vpp": 1}, 3 / 51),
        # (PP/2-1)(F&B+B-3W) = 6 of 6·16 + 6 slots, DualPipe with PP = 8 (arXiv:2412.19437 table 2)
        ("DualPipeV", {"pp": 4, "vpp": 2}, 6 / 102),
    ],
)
def test_the_bubble_is_that_of_the_schedule(schedule: str, layout: dict[str, int], idle: float) -> None:
    changes = {"layout": {"tp": 1, "ep": 1, "dp": 4, **layout}, "policy": {"schedule": schedule}}
    checked = one("bubble_fraction", "1%", **changes)
    assert checked.computed == pytest.approx(idle, rel=1e-9)
    assert schedule in checked.why


def test_uneven_stages_are_named_by_their_fullest() -> None:
    uneven = {"policy": {"layers_per_stage": [5, 3]}}
    assert one("layers_per_stage", 5, **uneven).verdict == "holds"
    assert one("layers_per_stage", 4, **uneven).verdict == "fails"
    three = {
        "layout": {"pp": 8, "tp": 2, "dp": 1, "ep": 1},
        "model": {**BASE["model"], "num_hidden_layers": 12},
    }
    assert one("layers_per_stage", 2, **three).verdict == "holds"
    assert one("layers_per_stage", 1.5, **three).verdict == "fails"


@pytest.mark.parametrize(
    ("figure", "stated", "verdict"),
    [
        ("bubble_fraction", "6%", "holds"),  # 5.88 % printed to the per cent
        ("bubble_fraction", "5.9%", "holds"),
        ("bubble_fraction", "5.8%", "fails"),
        ("bubble_fraction", "5%", "fails"),
        ("parameters", 542e3, "holds"),  # 542,272
        ("parameters", 5.4e5, "holds"),
        ("parameters", 5.3e5, "fails"),
        ("effective_flops", "0.2 PFLOP/s", "holds"),
        ("effective_flops", "210 TFLOP/s", "fails"),
    ],
)
def test_figures_are_read_to_their_last_printed_digit(figure: str, stated: Any, verdict: str) -> None:
    assert TOTAL == 542_272
    assert one(figure, stated).verdict == verdict


@settings(max_examples=60, deadline=None)
@given(
    number=st.one_of(st.integers(1, 10**6), st.floats(1, 1e5).map(lambda n: round(n, 3))),
    unit=st.sampled_from(["B", "MB", "GiB", "kB"]),
    space=st.sampled_from(["", " ", "\t"]),
)
def test_every_quantity_that_is_read_can_be_judged(number: float, unit: str, space: str) -> None:
    text = f"{number}{space}{unit}"
    checked = one("total_memory", text)
    assert checked.stated == BYTES.parse(text)
    assert checked.verdict in ("holds", "fails")


def test_bounds_rule_figures_out() -> None:
    """What compute alone forbids fails, and says so beside what the step-time model gives."""
    forward = 2 * 256 * (8 * (4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 32) + 100 * 64) + 8 * 2 * 64 * 256 * 257
    bound_s = 3 * 64 * forward / (16 * 500e12)
    words = "Compute alone allows at most"
    assert words in one("sequences_per_s", 1.01 * 64 / bound_s).why
    assert words not in one("sequences_per_s", 0.99 * 64 / bound_s).why
    words = "is impossible at every length"
    assert words in one("step_time", f"{0.99e9 * bound_s} ns").why
    assert words not in one("step_time", f"{1.01e9 * bound_s} ns").why
    assert one("step_time", f"{0.99e9 * bound_s} ns").verdict == "fails"
    assert one("mfu", "101%").verdict == "fails"
    assert one("bandwidth_utilization", "101%").verdict == "fails"
    too_fast = audited({"id": "step_time", "value": "1 ns"}, {"id": "sequences_per_s", "value": 64e9})
    assert [checked.verdict for checked in too_fast.claims] == ["fails", "fails"]


def test_a_stated_step_time_decides_nothing_but_itself() -> None:
    """Rate and MFU are judged on the model's step time, whatever the document says of its own."""
    alone = {"mfu": one("mfu", "1%").computed, "sequences_per_s": one("sequences_per_s", 1).computed}
    for stated in ("1 ms", "2 s"):
        step = {"id": "step_time", "value": stated}
        report = audited(step, {"id": "mfu", "value": "1%"}, {"id": "sequences_per_s", "value": 1})
        assert {c.figure.id: c.computed for c in report.claims[1:]} == alone


def test_every_broken_rule_is_said_the_world_first() -> None:
    report = audited(layout={"tp": 3, "pp": 5, "ep": 7, "dp": 2})
    rules = " ".join(finding.rule for finding in report.broken_rules)
    assert report.broken_rules[0].rule.startswith("tp·cp·dp·pp = 30 must equal the 16 GPUs")
    for part in ("num_attention_heads = 4", "num_experts = 8", "etp·ep = 7 must divide tp·cp·dp = 6"):
        assert part in rules


def test_repairs_count_what_was_stated_and_nothing_else() -> None:
    stated_etp = audited(layout={"tp": 2, "pp": 2, "dp": 4, "ep": 4, "etp": 4})
    assert not stated_etp.possible
    assert all(repair.changes for repair in stated_etp.nearest_layouts)
    assert dict(stated_etp.nearest_layouts[0].changes).keys() <= {"ep", "etp"}
    no_dp = audited(
        workload={"global_batch_size": 50, "sequence_length": 256}, layout={"tp": 2, "pp": 2, "dp": None}
    )
    assert not no_dp.possible
    assert all("dp" not in repair.changes for repair in no_dp.nearest_layouts)


def test_a_claimed_degree_stands_before_the_files_and_says_so() -> None:
    report = audited(layout={"dp": 4}, claims={"layout": {"tp": 2, "pp": 2, "dp": 8, "ep": 4}})
    assert any("layout.dp" in note for note in report.notes)
    assert report.stated_layout["dp"] == 8


def test_what_does_not_fit_is_an_error() -> None:
    small = {**BASE["cluster"]["gpu"], "memory": "1 GB"}
    report = audited(cluster={**BASE["cluster"], "gpu": small})
    assert not report.holds
    assert any(finding.key == "cluster.gpu.memory" for finding in report.findings)


def test_the_default_engine_is_one_that_runs_the_model() -> None:
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    report = audited(model={**BASE["model"], **latent})
    assert not [finding for finding in report.findings if finding.level == "error"]
    assert report.defaults["policy.engine"].startswith("megatron")

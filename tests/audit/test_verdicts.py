"""Verdicts follow from computing: stated what is computed, all hold; perturb one, exactly that one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.audit import AuditReport, audit
from meshwright.audit.figures import FIGURES
from meshwright.deployment import deployment_from
from meshwright.layout import divisors

UNDETERMINED = {"bandwidth_utilization"}
DETERMINED = sorted(set(FIGURES) - UNDETERMINED)
SPEED = {"step_time", "sequences_per_s", "mfu", "strong_scaling_efficiency"}
"""They hold within an interval, and what lies a factor of ten away is outside."""


@st.composite
def deployments(draw: st.DrawFn) -> dict[str, Any]:
    """A random deployment whose layout can exist."""
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    dp = draw(st.sampled_from([1, 2, 4, 8]))
    experts = draw(st.sampled_from([8, 16, 64]))
    ep = draw(st.sampled_from([d for d in divisors(tp * dp) if experts % d == 0]))
    micro_batches = draw(st.sampled_from([pp, 2 * pp, 8 * pp]))
    micro_batch = draw(st.sampled_from([1, 2, 3]))
    world = tp * pp * dp
    per_node = draw(st.sampled_from([d for d in divisors(world) if d <= 8]))
    return {
        "name": "drawn",
        "cluster": {
            "nodes": world // per_node,
            "gpus_per_node": per_node,
            "gpu": {"memory": "80 GB", "memory_bandwidth": "2 TB/s", "peak": {"bf16": "500 TFLOP/s"}},
            "links": [
                {"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"},
            ],
            "efficiency": {"compute": f"{draw(st.integers(1, 100))}%"},
        },
        "model": {
            "num_hidden_layers": pp * draw(st.integers(1, 3)),
            "hidden_size": 64 * draw(st.integers(1, 8)),
            "num_attention_heads": 8,
            "num_key_value_heads": draw(st.sampled_from([2, 4, 8])),
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, 4)),
            "moe_intermediate_size": 32 * draw(st.integers(1, 8)),
            "gated": draw(st.booleans()),
            "vocab_size": draw(st.integers(100, 5000)),
        },
        "workload": {
            "global_batch_size": dp * micro_batches * micro_batch,
            "sequence_length": 64 * draw(st.integers(1, 8)),
            "precision": "bf16",
        },
        "policy": {
            "zero_stage": draw(st.sampled_from([0, 1, 2])),
            "recompute": draw(st.sampled_from(["none", "full"])),
        },
        "claims": {"layout": {"tp": tp, "pp": pp, "dp": dp, "ep": ep, "num_micro_batches": micro_batches}},
    }


def stated(figure: str, value: Any) -> Any:
    """A computed value as a document would print it."""
    dimension = FIGURES[figure].dimension
    if isinstance(value, list):
        return value
    return dimension.format_exact(value) if dimension is not None else value


def with_figures(document: dict[str, Any], figures: dict[str, Any]) -> AuditReport:
    listed = [{"id": name, "value": value} for name, value in figures.items()]
    claims = {**document["claims"], "figures": listed}
    return audit(deployment_from({**document, "claims": claims}, Path()))


def computed(document: dict[str, Any]) -> dict[str, Any]:
    """What the audit computes for every determined figure of a deployment."""
    placeholders = {
        "rank ranges": ["0-0"], "bytes": "1 B", "fraction": "1%", "FLOP/s": "1 FLOP/s", "s": "1 s",
    }  # fmt: skip
    figures = {name: placeholders.get(FIGURES[name].unit, 1) for name in DETERMINED}
    return {c["id"]: c["computed"] for c in with_figures(document, figures).document()["claims"]}


def perturbed(figure: str, value: Any) -> Any:
    if isinstance(value, list):
        return [*value[:-1], f"{value[-1]}0"]
    kind = FIGURES[figure]
    if kind.exact:
        return value + 1
    return value * (0.1 if figure in SPEED else 0.9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=deployments(), choice=st.randoms(use_true_random=False))
def test_computed_values_hold_and_a_perturbed_one_alone_fails(document: dict[str, Any], choice: Any) -> None:
    values = computed(document)
    if values["strong_scaling_efficiency"] is None:  # neither dp nor pp can be halved
        del values["strong_scaling_efficiency"]
    assert None not in values.values()
    figures = {name: stated(name, value) for name, value in values.items()}
    report = with_figures(document, figures)
    assert {c.figure.id for c in report.claims if c.verdict == "fails"} == set()
    assert {c.figure.id for c in report.claims if c.verdict == "undetermined"} == set()

    changeable = [name for name, value in values.items() if value not in (0, [])]
    name = choice.choice(changeable)
    figures[name] = stated(name, perturbed(name, values[name]))
    report = with_figures(document, figures)
    assert {c.figure.id for c in report.claims if c.verdict == "fails"} == {name}


def test_impossible_layouts_are_findings_never_errors() -> None:
    """Degrees that divide nothing still give a verdict for each figure, and layouts that can exist."""
    document = {
        "cluster": {
            "nodes": 4, "gpus_per_node": 8,
            "gpu": {"memory": "80 GB", "memory_bandwidth": "2 TB/s", "peak": {"bf16": "500 TFLOP/s"}},
            "links": [{"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"}],
        },
        "model": {
            "num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 6, "num_experts": 10,
            "num_experts_per_tok": 2, "moe_intermediate_size": 100, "vocab_size": 1000,
        },
        "workload": {"global_batch_size": 64, "sequence_length": 128},
        "claims": {
            "layout": {"tp": 5, "pp": 7, "ep": 3, "dp": 11},
            "figures": [
                {"id": "layers_per_stage", "value": 1}, {"id": "experts_per_gpu", "value": 3},
                {"id": "total_memory", "value": "1 GB"}, {"id": "stage_ranks", "value": ["0-3"]},
            ],
        },
    }  # fmt: skip
    report = audit(deployment_from(document, Path()))
    assert not report.possible
    assert [c.verdict for c in report.claims] == ["fails"] * 4
    assert report.nearest_layouts
    assert all(repair.layout.world_size == 32 for repair in report.nearest_layouts)


def test_no_layout_at_all_is_said() -> None:
    """On 7 GPUs only the all-data layout is left, and a batch of 8 bars it."""
    document = {
        "cluster": {
            "nodes": 1, "gpus_per_node": 7,
            "gpu": {"memory": "80 GB", "memory_bandwidth": "2 TB/s", "peak": {"bf16": "500 TFLOP/s"}},
            "links": [{"name": "node", "kind": "nvlink", "bandwidth": "300 GB/s", "latency": "3 us"}],
        },
        "model": {
            "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
            "vocab_size": 1000,
        },
        "workload": {"global_batch_size": 8, "sequence_length": 128},
        "claims": {"layout": {"tp": 2}, "figures": [{"id": "total_memory", "value": "1 GB"}]},
    }  # fmt: skip
    report = audit(deployment_from(document, Path()))
    assert report.nearest_layouts == ()
    assert report.claims[0].verdict == "undetermined"
    assert "no layout" in report.claims[0].why

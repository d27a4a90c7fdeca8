"""The brief, whole: which of its figures are true and which are not, and that this comes from computing."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from meshwright.audit import AuditReport, audit
from meshwright.deployment import deployment_from, read_deployment
from meshwright.files import read_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"

# (figure, which of its statements, by position) as the document's critics found them by hand.
FALSE = [
    ("world_size", 0), ("world_size", 1), ("parameters", 0), ("parameter_memory", 0), ("gradient_memory", 0),
    ("optimizer_memory", 0), ("optimizer_ratio", 0), ("micro_batch_size", 0), ("sequences_per_s", 0),
    ("bubble_fraction", 0), ("memory_efficiency", 0), ("data_parallel", 0), ("step_time", 0),
    ("sequences_per_s", 1), ("sequences_per_s", 2), ("mfu", 0), ("strong_scaling_efficiency", 0),
]  # fmt: skip
TRUE = [
    ("layers_per_stage", 0), ("experts_per_gpu", 0), ("hidden_per_tp_rank", 0), ("heads_per_tp_rank", 0),
    ("effective_flops", 0), ("stage_ranks", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def brief() -> AuditReport:
    return audit(read_deployment(EXAMPLES / "brief.yaml"))


def verdicts(report: AuditReport) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for checked in report.claims:
        found[checked.figure.id].append(checked.verdict)
    return found


@pytest.mark.parametrize(("figure", "position"), FALSE)
def test_false_figures_fail(brief: AuditReport, figure: str, position: int) -> None:
    assert verdicts(brief)[figure][position] == "fails"


@pytest.mark.parametrize(("figure", "position"), TRUE)
def test_true_figures_hold(brief: AuditReport, figure: str, position: int) -> None:
    assert verdicts(brief)[figure][position] == "holds"


def test_what_the_document_itself_is_priced_with_is_undetermined(brief: AuditReport) -> None:
    assert set(verdicts(brief)["bandwidth_utilization"]) == {"undetermined"}
    assert brief.counts()["undetermined"] == 3


def test_speed_is_that_of_the_nearest_layout_at_both_ends(brief: AuditReport) -> None:
    """By hand: 4 micro-batches through 4 stages are 7 slots; on a quarter of the GPUs, 16 are 19."""
    first = {c.figure.id: c for c in reversed(brief.claims)}
    for name in ("step_time", "sequences_per_s", "mfu", "strong_scaling_efficiency"):
        assert [at.sequence_length for at in first[name].by_length] == [128, 10240]
    step, rate, share, scaling = (
        [at.value for at in first[name].by_length]
        for name in ("step_time", "sequences_per_s", "mfu", "strong_scaling_efficiency")
    )
    assert step[0] < step[1]
    assert rate == pytest.approx([128 / seconds for seconds in step])
    for length, seconds, reached in zip((128, 10240), step, share, strict=True):
        assert reached == pytest.approx(step_flops_by_hand(length) / (512 * 400e12 * seconds))
    assert scaling == pytest.approx([19 / (4 * 7)] * 2, rel=0.05)
    assert "TP8 PP4 DP16 EP16, micro-batch 2, kernels at the stated 60 % of peak" in first["step_time"].why


def test_the_product_is_2048_and_the_sentence_says_so(brief: AuditReport) -> None:
    worlds = [c for c in brief.claims if c.figure.id == "world_size"]
    assert [c.computed for c in worlds] == [2048.0, 2048.0]
    assert all("2,048, not 512" in c.why for c in worlds)


def test_step_time_names_the_lengths_at_which_it_is_impossible(brief: AuditReport) -> None:
    step = next(c for c in brief.claims if c.figure.id == "step_time")
    at_peak, at_stated = longest_length_by_hand(1.0), longest_length_by_hand(0.6)
    assert (
        f"impossible above {at_peak:,} tokens, and above {at_stated:,} tokens at the stated 60 %" in step.why
    )


def longest_length_by_hand(efficiency: float) -> int:
    """Longest sequence for which 3 x forward FLOPs of 128 sequences fit 16 ms on 512 GPUs of 400 TFLOP/s."""
    budget = 0.016 * 512 * 400e12 * efficiency
    return max(length for length in range(1, 10240) if step_flops_by_hand(length) <= budget)


def step_flops_by_hand(length: int) -> int:
    """3 x forward FLOPs of 128 sequences."""
    hidden, layers, vocabulary = 1024, 16, 50257
    matrices = layers * (4 * hidden**2 + 64 * hidden + 2 * 2 * hidden * 2048) + hidden * vocabulary
    scores_and_values = layers * 2 * hidden * length * (length + 1)
    return 3 * 128 * (2 * matrices * length + scores_and_values)


def test_the_nearest_layout_changes_one_figure_and_fits(brief: AuditReport) -> None:
    assert not brief.possible
    first = brief.nearest_layouts[0]
    assert dict(first.changes) == {"dp": (4, 16)}
    assert first.fits
    changed = [len(repair.changes) for repair in brief.nearest_layouts]
    assert changed == sorted(changed)
    assert all(repair.layout.world_size == 512 for repair in brief.nearest_layouts)


def test_every_section_of_the_document_is_stated(brief: AuditReport) -> None:
    places = {c.figure.where for c in brief.claims}
    assert len(places) >= 15
    assert len(brief.claims) >= 45


def test_other_numbers_give_other_verdicts() -> None:
    """The same file with the true product, a true parameter count and a long enough pipeline holds there."""
    document = read_yaml(EXAMPLES / "brief.yaml")
    document["claims"]["layout"] |= {"dp": 16, "num_micro_batches": 8}
    document["model"]["moe_intermediate_size"] = 14208
    figures = document["claims"]["figures"]
    for figure in figures:
        match figure["id"]:
            case "world_size":
                figure["formula"] = "8 * 4 * 16"
            case "bubble_fraction":
                figure["value"] = "27.27%"  # 3 / 11
            case "data_parallel":
                figure["value"] = 16
    report = audit(deployment_from(document, EXAMPLES))
    found = verdicts(report)
    assert report.possible
    for figure in ("world_size", "parameters", "bubble_fraction", "data_parallel"):
        assert set(found[figure]) == {"holds"}, figure
    assert set(found["sequences_per_replica"]) == {"fails"}  # 128 / 16 is 8, not 32


def test_a_step_time_below_the_bound_fails_at_every_length() -> None:
    document = read_yaml(EXAMPLES / "brief.yaml")
    document["claims"]["figures"] = [{"id": "step_time", "value": "100 us"}]
    checked = audit(deployment_from(document, EXAMPLES)).claims[0]
    assert checked.verdict == "fails"
    assert "impossible at every length" in checked.why


def test_json_document_has_the_contract_keys(brief: AuditReport) -> None:
    document = brief.document()
    assert {"claims", "nearest_layouts", "parameters"} <= document.keys()
    assert {"total", "active", "by_part"} <= document["parameters"].keys()
    for claim in document["claims"]:
        assert {"id", "stated", "computed", "unit", "verdict", "why"} <= claim.keys()
        assert claim["verdict"] in ("holds", "fails", "undetermined")
        assert claim["why"].endswith(".")
    assert {"layout", "changes"} <= document["nearest_layouts"][0].keys()
    assert sum(document["parameters"]["by_part"].values()) == document["parameters"]["total"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_audits(path: Path) -> None:
    report = audit(read_deployment(path))
    if path.stem == "brief-plan":  # its layout is left open, and what stands for it by default is impossible
        assert report.nearest_layouts
    elif path.stem != "brief":
        assert report.holds, [c.why for c in report.claims if c.verdict == "fails"]
        assert max(rank.total_bytes for rank in report.memory) <= report.cluster.gpu.memory

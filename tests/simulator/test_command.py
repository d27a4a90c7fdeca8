"""`meshwright simulate`: what it says, the files that it writes, and what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.__main__ import main
from meshwright.planner.estimate import estimate
from meshwright.planner.planned import planned

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "brief-repaired.yaml")


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of a run that went well."""
    assert main(["simulate", EXAMPLE, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_has_the_keys_that_others_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys)
    keys = {"step_time_s", "bubble_fraction", "exposed_comm_s", "critical_path", "events", "wall_s"}
    assert keys <= found.keys()
    assert found["sequence_length"] == 10_240
    assert [one["sequence_length"] for one in found["lengths"]] == [128, 10_240]
    assert sum(part["fraction"] for part in found["critical_path"]) == pytest.approx(1)
    assert found["exposed_comm_s"] == pytest.approx(sum(found["exposed_comm_by_axis_s"].values()))


def test_it_agrees_with_the_estimate_of_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--lengths", "4096")
    assert found["step_time_s"] == pytest.approx(estimate(planned(EXAMPLE), None, 4096).total_s, rel=0.02)


def test_every_schedule_has_a_row_with_figures_or_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["schedule"]: row for row in document(capsys, "--schedules")["schedules"]}
    assert len(rows) == 6
    assert "at least 8" in rows["DualPipeV"]["refused"]
    assert rows["GPipe"]["peak_memory_bytes"] > rows["1F1B"]["peak_memory_bytes"]
    assert rows["ZBVZeroBubble"]["bubble_fraction"] < rows["1F1B"]["bubble_fraction"]


def test_draws_repeat_with_a_seed_and_stragglers_only_slow_down(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--lengths", "10240", "--samples", "8", "--stragglers", "0.2")
    one, two = (document(capsys, *asked)["samples"] for _ in range(2))
    other = document(capsys, *asked, "--seed", "1")["samples"]
    assert one["mean_s"] == two["mean_s"] != other["mean_s"]
    assert one["low_10_s"] > document(capsys, "--lengths", "10240")["step_time_s"]


def test_pictures_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, svg = tmp_path / "step.json.gz", tmp_path / "step.svg"
    assert main(["simulate", EXAMPLE, "--trace", str(trace), "--svg", str(svg)]) == 0
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["args"]["name"] for event in events if event.get("name") == "process_name"]
    assert len(names) == 4
    assert svg.read_text("utf-8").startswith("<svg")
    assert "The critical path at 10,240 tokens:" in capsys.readouterr().out


def test_failures_at_a_stated_time_and_at_a_published_rate(capsys: pytest.CaptureFixture[str]) -> None:
    stated = document(capsys, "--failures", "8 h", "--checkpoint", "1 min")["failures"]
    assert stated["mtbf_s"] == 8 * 3600
    assert stated["young_interval_s"] == pytest.approx((2 * 60 * 8 * 3600) ** 0.5)
    assert 0.8 < stated["effective_fraction"] < 1
    published = document(capsys, "--failures", "llama-3-405b")["failures"]
    assert published["mtbf_s"] == pytest.approx(54 * 86_400 / 419 * 16_384 / 512, rel=1e-3)


def test_experts_are_placed_by_their_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{layer},{expert},{1000 if expert < 4 else 10}" for layer in range(16) for expert in range(64)]
    (tmp_path / "loads.csv").write_text("layer,expert,tokens\n" + "\n".join(rows))
    text = (
        Path(EXAMPLE)
        .read_text("utf-8")
        .replace("  optimizer: adamw", "  optimizer: adamw\n  routing: {histogram: loads.csv}")
    )
    path = tmp_path / "uneven.yaml"
    path.write_text(text, "utf-8")
    assert main(["simulate", str(path), "--json", "--lengths", "10240", "--place-experts"]) == 0
    found = json.loads(capsys.readouterr().out)["experts"]
    load, step = found["load_max_over_mean"], found["step_time_s"]
    assert load["in_order"] > 10
    assert load["bound"] <= load["placed"] < load["in_order"]
    assert step["placed"] < step["in_order"]


REFUSED = {
    "nothing to place by": (("--place-experts",), "--place-experts: 'balanced'"),
    "draws": (("--samples", "0"), "--samples: 0: between 1 and 10,000 draws"),
    "stragglers without draws": (("--stragglers", "0.1"), "--samples: 'missing'"),
    "checkpoints without failures": (("--checkpoint", "1 min"), "--failures: 'missing'"),
    "a rate": (("--failures", "llama"), "preset: 'llama'"),
    "a time": (("--failures", "8 parsecs"), "--failures: '8 parsecs'"),
    "a length": (("--lengths", "64"), "--lengths: 64"),
    "over its own plan": (("--trace", EXAMPLE), "--trace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[name]
    assert main(["simulate", EXAMPLE, *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""

"""Profiles of real steps on one and two ranks: labels equal the program, figures add up, folders are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import plan_of
from commands import DENSE, MOE, small_deployment
from tables import table_for

from meshwright.__main__ import main
from meshwright.deployment import deployment_from
from meshwright.efficiency_table import write_table
from meshwright.files import to_yaml
from meshwright.ir.program import lower
from meshwright.plan import resolve
from meshwright.profiling.predicted import module_of, predicted
from meshwright.profiling.trace import labelled_calls, rank_trace
from meshwright.runtime.profile import Session, profile_plan
from meshwright.runtime.profile.living import Living

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero 1 and experts over two": {"ranks": 2, "ep": 2, "batch": (4, 16)},
    "zero 3": {"ranks": 2, "batch": (4, 16), "policy": {"zero_stage": 3}},
    "tensor": {
        "ranks": 2,
        "layout": {"tp": 2, "dp": 1, "ep": 2},
        "policy": {"sequence_parallel": True},
    },
    "pipeline": {"ranks": 2, "layers": 2, "batch": (4, 16), "layout": {"pp": 2, "dp": 1}},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_are_the_collectives_of_the_program(name: str, text: Path, tmp_path: Path) -> None:
    plan = plan_of(small_deployment(MOE, **LAYOUTS[name]), text)
    found = profile_plan(plan, Session(tmp_path, tmp_path, 1, routes_evenly=True), "cpu")
    assert [one.rank for one in found] == [0, 1]
    program = lower(plan)
    for one in found:
        trace = rank_trace(one.rank, json.loads(one.trace.read_text("utf-8"))["traceEvents"])
        expected: Counter[tuple[str, str, int]] = Counter()
        for task, count in program.collectives(one.rank if plan.layout.pp > 1 else 0):
            expected[task.axis, task.kind.value, task.bytes] += count
        assert Counter(labelled_calls(trace)) == expected


def run(document: dict[str, Any], folder: Path, *flags: str) -> int:
    """The command on a deployment's file."""
    file = folder / "small.yaml"
    file.write_text(to_yaml(document), "utf-8")
    return main(["profile", str(file), "--steps", "2", *flags])


def test_a_profile_of_one_rank_adds_up(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {**small_deployment(MOE, layers=2), "training": {"data": str(text)}}
    plan = resolve(deployment_from(document, Path()))
    write_table(table_for(plan), tmp_path / "here.yaml")
    output = tmp_path / "runs" / "first"
    flags = ("--json", "-o", str(output), "--calibration", str(tmp_path / "here.yaml"))
    assert run(document, tmp_path, *flags) == 0
    found = json.loads(capsys.readouterr().out)
    (rank,) = found["ranks"]
    assert rank["compute_s"] + rank["comm_s"] - rank["hidden_s"] + rank["idle_s"] == pytest.approx(
        rank["step_s"]
    )
    assert rank["axes"] == []
    assert len(found["steps_s"]) == 2
    rows = {(row["what"], row["part"]): row for row in found["disagreements"]}
    for what in ("layers.*.moe.experts", "layers.*.attention.q", "embedding"):
        for part in ("forward", "backward"):
            assert rows[what, part]["measured_s"] > 0
            assert rows[what, part]["predicted_s"] > 0
    apart = [abs((r["predicted_s"] or 0) - (r["measured_s"] or 0)) for r in found["disagreements"]]
    assert apart == sorted(apart, reverse=True)
    assert found["memory_bytes"]["measured"][0] == pytest.approx(
        found["memory_bytes"]["predicted_by_pipeline_rank"][0], rel=0.5
    )
    assert {path.name for path in output.iterdir()} == {"plan.yaml", "profile.json", "run.yaml", "traces"}
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    (kept,) = json.loads(capsys.readouterr().out)["runs"]
    assert kept["digest"] == found["digest"] == plan.digest
    assert kept["measured"]["step_time_s"] == found["step_time_s"]
    assert kept["predicted"]["step_time_s"] == pytest.approx(found["predicted_step_time_s"])
    assert kept["calibration"] == found["calibration"] is not None


def test_a_profile_of_two_ranks_is_printed(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = small_deployment(MOE, ranks=2, ep=2, batch=(4, 16))
    assert run({**document, "training": {"data": str(text)}}, tmp_path, "--balanced") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "computes longest" in said
    assert "overlap" in said
    assert "assumed rates: calibrate first" in said


def test_predicted_modules_add_up_to_the_compute_of_the_step(text: Path) -> None:
    plan = plan_of(small_deployment(DENSE, layers=2), text)
    table = table_for(plan)
    cluster = plan.cluster.model_copy(update={"calibration": table})
    found = predicted(
        plan.model_copy(update={"cluster": cluster}), ["embedding", "layers.0", "layers.1.attention"]
    )
    assert sum(found.ops.values()) == pytest.approx(found.step.step_time_s, rel=1e-6)
    names = frozenset({"layers.3.moe", "layers.3.moe.experts", "layers.3"})
    assert module_of("layers.3.moe.experts.up", names) == "layers.*.moe.experts"
    assert module_of("layers.3.moe.route", names) == "layers.*.moe"
    assert module_of("layers.3.mlp_residual", names) == "layers.*"
    assert module_of("loss", names) == "rest of the stage"


def test_the_first_of_torchruns_ranks_answers_for_all(text: Path, tmp_path: Path) -> None:
    document = {**small_deployment(MOE, ranks=2, ep=2, batch=(4, 16)), "training": {"data": str(text)}}
    file, output = tmp_path / "small.yaml", tmp_path / "run"
    file.write_text(to_yaml(document), "utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["profile", str(file), "--steps", "2", "--json", "-o", str(output)]
    command = [*launcher, "-m", "meshwright", *asked]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert len(found["memory_bytes"]["measured"]) == 2
    traces = {path.name for path in (output / "traces").iterdir()}
    assert traces == {"rank0.trace.json.gz", "rank1.trace.json.gz"}


def test_a_run_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("mine", "utf-8")
    assert run(small_deployment(DENSE), tmp_path, "-o", str(tmp_path)) == 2
    assert "the folder of another run, which is kept" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text("utf-8") == "mine"


BAD = {
    "no steps": (("--steps", "0"), "--steps: 0: between 1 and 1000 steps"),
    "other ranks": (("--nproc", "3"), "--nproc: 3: the plan's layout has 1 ranks"),
    "no table": (("--calibration", "nowhere.yaml"), "nowhere.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, words = BAD[name]
    assert run(small_deployment(DENSE), tmp_path, *flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_the_peak_is_that_of_living_storages() -> None:
    with Living() as living:
        kept = torch.zeros(1000)
        views = kept.view(10, 100)[2:4] + 1.0  # 200 elements of their own
        del views
        living.storages.restart("step")
        double = kept * 2
        assert living.storages.total == 8000
        del double
        kept.add_(1.0)
        again = torch.ones(500)
    assert living.storages.most == 8000
    assert living.storages.total == 4 * (kept.numel() + again.numel())

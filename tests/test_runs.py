"""Kept runs: several folders listed, and what they say of predictions on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.__main__ import main
from meshwright.cluster import LOCAL_GPU, LocalRequest
from meshwright.deployment import deployment_from
from meshwright.gpus import gpu_named
from meshwright.machine import this_machine
from meshwright.plan import resolve
from meshwright.runs import (
    Figures,
    RunRecord,
    history_of,
    journal_lines,
    keep_training,
    runs_in,
    write_record,
)

SMALL = {
    "cluster": {"local": 1},
    "model": {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "intermediate_size": 32,
    },
    "workload": {"global_batch_size": 2, "sequence_length": 16, "precision": "fp32"},
}


def record(predicted_s: float, measured_s: float, **parts: Any) -> RunRecord:
    """A run of a local plan on this machine."""
    fields: dict[str, Any] = {
        "kind": "train",
        "date": "2026-11-25T10:00:00+00:00",
        "plan": "small",
        "digest": "0123456789abcdef",
        "layout": {"tp": 1, "dp": 2},
        "ranks": 2,
        "gpu": LOCAL_GPU,
        "machine": this_machine(),
        "steps": 20,
        "predicted": Figures(step_time_s=predicted_s, peak_memory_bytes=90),
        "measured": Figures(step_time_s=measured_s, peak_memory_bytes=100),
    }
    return RunRecord(**{**fields, **parts})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs on this machine, one of them deeper, and one on another."""
    other = this_machine().model_copy(update={"processor": "abacus"})
    kept = {
        "a": record(1.1, 1.0, date="2026-11-25T12:00:00+00:00"),
        "b/c": record(1.5, 1.0),
        "d": record(9.0, 1.0, machine=other),
        "e": record(0.9, 1.0, calibration="fedcba9876543210"),
    }
    for name, one in kept.items():
        (tmp_path / name).mkdir(parents=True)
        write_record(one, tmp_path / name)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_runs_are_listed_by_date_with_their_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [one["folder"] for one in runs][-1] == "a"
    assert {one["folder"] for one in runs} == {"a", "b/c", "d", "e"}
    by_name = {one["folder"]: one for one in runs}
    assert by_name["b/c"]["time_error"] == pytest.approx(0.5)
    assert by_name["a"]["memory_error"] == pytest.approx(-0.1)
    assert main(["runs", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "abacus" in said
    assert "+50%" in said
    assert "dp2" in said


def test_history_is_that_of_the_same_machine_and_the_same_kind_of_price(folder: Path) -> None:
    cluster, _ = LocalRequest(local=2).resolve()
    found = history_of(runs_in(folder), cluster)
    assert (found.runs, found.calibrated) == (2, False)
    assert found.mean_error == pytest.approx(0.3)
    assert found.bias == pytest.approx(0.3)
    assert "2 runs on this machine" in found.words
    assert "30% in the mean" in found.words
    elsewhere = cluster.model_copy(update={"gpu": gpu_named("h100-sxm")})
    assert history_of(runs_in(folder), elsewhere).runs == 0
    assert "no run" in history_of([], cluster).words


def test_history_of_a_cluster_is_that_of_machines_with_its_gpu(tmp_path: Path) -> None:
    """A plan for GPUs that processors ran says nothing of GPUs."""
    gpu = this_machine("NVIDIA H100 80GB HBM3")
    for name, one in {
        "gpu": record(1.2, 1.0, gpu="h100-sxm", machine=gpu),
        "processors": record(9.0, 1.0, gpu="h100-sxm"),
    }.items():
        (tmp_path / name).mkdir()
        write_record(one, tmp_path / name)
    cluster, _ = LocalRequest(local=2).resolve()
    there = cluster.model_copy(update={"gpu": gpu_named("h100-sxm")})
    found = history_of(runs_in(tmp_path), there)
    assert (found.runs, found.mean_error) == (1, pytest.approx(0.2))
    other = cluster.model_copy(update={"gpu": gpu_named("h200")})
    assert history_of(runs_in(tmp_path), other).runs == 0


def test_a_resumed_run_counts_its_own_steps_and_no_torn_line(tmp_path: Path) -> None:
    plan = resolve(deployment_from(SMALL, Path()))
    lines = [json.dumps({"step_time_s": t, "peak_memory_bytes": 10**6}) for t in (9.0, 9.0, 9.0, 2.0, 2.0)]
    (tmp_path / "steps.jsonl").write_text("\n".join([*lines, '{"step_ti']), "utf-8")
    keep_training(plan, tmp_path, None, before=3)
    (found,) = runs_in(tmp_path)
    assert (found.record.measured.step_time_s, found.record.steps) == (2.0, 2)
    assert journal_lines(tmp_path) == 6
    assert journal_lines(tmp_path / "nowhere") == 0


def test_plan_and_simulate_say_how_runs_of_before_were_off(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL), "utf-8")
    for command in ("plan", "simulate"):
        assert main([command, str(file), "--history", str(folder), "--json"]) == 0
        history = json.loads(capsys.readouterr().out)["history"]
        assert history["runs"] == 2
        assert history["mean_error"] == pytest.approx(0.3)
    assert main(["simulate", str(file), "--history", str(folder)]) == 0
    assert "History: 2 runs on this machine" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["runs", "{}/nowhere"], "FOLDER"), (["runs", "{}/bad"], "measured.step_time_s")],
    ids=["no folder", "a broken record"],
)
def test_bad_folders_are_one_message(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "bad"
    bad.mkdir()
    text = (folder / "a" / "run.yaml").read_text("utf-8")
    (bad / "run.yaml").write_text(text.replace("step_time_s: 1.0", "step_time_s: long"), "utf-8")
    assert main([word.format(folder) for word in arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1

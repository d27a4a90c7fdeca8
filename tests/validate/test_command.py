"""`meshwright validate`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.validate import synthetic
from tests.validate.run_rows import CARRIED, row_of

from meshwright.__main__ import main
from meshwright.cost.constants import Constants
from meshwright.files import parse_yaml
from meshwright.planner.interval import Residual
from meshwright.terminal.progress import progress_bar
from meshwright.validate.rows import columns

GROUPS = ["dense", "moe_full", "moe_partial", "moe_efa"]
TIME = [
    *("rows", "mape", "median_ape", "max_ape", "bias", "pair_ranking", "pairs"),
    *("pair_ranking_equal_micro_batch", "pairs_equal_micro_batch", "coverage_80", "interval_half_width"),
]
MEMORY = ["rows", "mape", "median_ape", "max_ape", "bias"]
PREDICTION = [
    *("id", "group", "step_time_s", "low_s", "high_s", "measured_s"),
    *("memory_bytes", "measured_memory_bytes", "confidence"),
]


def validate(*arguments: str) -> int:
    return main(["validate", *arguments])


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str]) -> Any:
    assert validate(str(CARRIED), "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    return json.loads(out)


def test_json_has_the_keys_of_the_contract(document: Any) -> None:
    assert list(document) == ["rows", "scored", "refused", "groups", "predictions"]
    assert list(document["groups"]) == GROUPS
    for group in document["groups"].values():
        assert list(group) == ["time", "memory"]
        assert list(group["time"]) == TIME
        assert list(group["memory"]) == MEMORY
    assert document["rows"] == document["scored"] + sum(document["refused"].values()) == 25
    assert document["scored"] == len(document["predictions"]) == 19


def test_every_prediction_is_whole(document: Any) -> None:
    for prediction in document["predictions"]:
        assert list(prediction) == PREDICTION
        assert 0 < prediction["low_s"] < prediction["step_time_s"] < prediction["high_s"]
        assert prediction["group"] in GROUPS
    by_id = {prediction["id"]: prediction for prediction in document["predictions"]}
    assert by_id["VTM-001"]["measured_s"] == pytest.approx(3.5665, abs=1e-4)
    assert by_id["MPF-020"]["measured_s"] is None, "TFLOP/s rank a row; they are no time"
    weighed = [p for p in document["predictions"] if p["measured_memory_bytes"]]
    assert weighed
    assert all(p["memory_bytes"] > 0 for p in weighed)


def test_the_text_says_what_rows_were_taken_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(str(CARRIED)) == 0
    out = capsys.readouterr().out
    assert out.startswith("19 of 25 rows predicted with the constants of the catalogue.")
    for words in (
        "Step time",
        "Peak memory",
        "Frameworks were taken for",
        "Not predicted",
        "Predicted worst",
    ):
        assert words in out
    assert "Megatron-DeepSpeed   deepspeed" in " ".join(out.split("\n")) or "megatron-deepspeed" in out
    assert "repeat: an older measurement" in out
    assert "Every row" not in out
    assert max(map(len, out.split("\n"))) <= 110


def test_full_adds_every_row_and_every_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(str(CARRIED), "--full") == 0
    out = capsys.readouterr().out
    assert "Every row" in out
    for name in ("SMX-041", "TT-031", "MPF-020", "DS-001: engine", "MB-069: task"):
        assert name in out


def test_the_output_goes_to_a_file_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "scores.json"
    assert validate(str(CARRIED), "--json", "-o", str(target)) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(target.read_text("utf-8"))["rows"] == 25


def test_a_fit_writes_its_files_and_scores_held_back_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = synthetic.write(
        tmp_path / "runs.csv",
        [
            _timed(row, prepared.run.measured_s)
            for row, prepared in zip(synthetic.rows(), synthetic.measured(), strict=True)
        ],
    )
    fitted, widths = tmp_path / "constants.yaml", tmp_path / "residuals.yaml"
    assert validate(table, "--fit", str(fitted), "--residuals", str(widths), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["groups"]["dense"]["time"]["mape"] < 0.1
    values = Constants.model_validate(parse_yaml(fitted.read_text("utf-8"), "constants.yaml"))
    assert values.slowdown["hopper"].value == pytest.approx(synthetic.TRUTH["slowdown.hopper"], rel=0.05)
    assert values.slowdown["hopper"].source.startswith("fitted to 30 rows of ")
    found = parse_yaml(widths.read_text("utf-8"), "residuals.yaml")
    assert Residual.model_validate(found["dense"]).rows == 24
    assert validate(table, "--cross-validate") == 0
    assert "constants fitted without the row's recipe" in capsys.readouterr().out


def _timed(row: Any, seconds: float | None) -> Any:
    from dataclasses import replace

    return replace(row, iteration_time_s=seconds)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    assert validate(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.csv"
    assert "cannot be read" in refused(capsys, str(tmp_path / "absent.csv"))
    bad.write_text("id,model\na,b\n", "utf-8")
    assert "columns missing" in refused(capsys, str(bad))
    bad.write_bytes(b"\xff\xfe\x00")
    assert str(bad) in refused(capsys, str(bad))
    synthetic.write(bad, [row_of(id="twice"), row_of(id="twice")])
    assert "an id names one row" in refused(capsys, str(bad))
    names = list(columns())
    bad.write_text(
        ",".join(names) + "\n" + ",".join("x" if n == "TP" else "1" for n in names) + "\n", "utf-8"
    )
    assert "line 2, column" in refused(capsys, str(bad))
    assert "standard input" in refused(capsys, "-")


def test_a_table_without_rows_has_nothing_to_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = synthetic.write(tmp_path / "empty.csv", [])
    assert validate(empty, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["rows"], document["scored"], document["predictions"]) == (0, 0, [])
    assert validate(empty) == 0
    assert capsys.readouterr().out.startswith("0 of 0 rows predicted")


def test_a_fit_on_few_rows_is_refused_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "constants.yaml"
    message = refused(capsys, str(CARRIED), "--fit", str(target))
    assert "13 rows of 9 recipes" in message
    assert "at least 20 rows" in message
    assert not target.exists()


@pytest.mark.parametrize("flag", ["--output", "--fit", "--residuals"])
def test_the_table_is_never_overwritten(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "runs.csv"
    table.write_bytes(CARRIED.read_bytes())
    assert f"{flag}: " in refused(capsys, str(table), flag, str(table))
    assert table.read_bytes() == CARRIED.read_bytes()


def test_names_from_the_table_do_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_of(id="S\x1b[2J", model="m\x1b]0;x\x07", framework="Megatron-LM \x1b[31m", source="s")
    table = synthetic.write(tmp_path / "runs.csv", [row, row_of(id="L", task="lora\x1b[0m")])
    assert validate(table, "--full") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar() as progress:
            progress("rows priced", 1, 2)
            progress("rows priced", 2, 2)
        assert ("rows priced" in stream.getvalue()) is shown


def test_simulated_steps_are_scored_beside(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row's step is simulated too, and scored as the estimate is; that stays as it was."""
    assert validate(str(CARRIED), "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert validate(str(CARRIED), "--json", "--simulate") == 0
    document = json.loads(capsys.readouterr().out)
    for group in GROUPS:
        assert document["groups"][group]["time"] == plain["groups"][group]["time"]
        assert list(document["groups"][group]["simulated"]) == TIME
    for one, other in zip(document["predictions"], plain["predictions"], strict=True):
        simulated = one.pop("simulated_step_time_s")
        assert one == other
        assert simulated == pytest.approx(one["step_time_s"], rel=0.1)
    assert validate(str(CARRIED), "--simulate") == 0
    assert "Step time, simulated" in capsys.readouterr().out

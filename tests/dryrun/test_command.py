"""The command `dryrun`: what it prints, its JSON, its exit codes, and what it refuses in words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from meshwright.__main__ import main
from meshwright.cli import app
from meshwright.dryrun import Answer, Check
from meshwright.dryrun.checks import checks_of_all, checks_of_steps
from meshwright.dryrun.expected import Expected
from meshwright.ir.observed import Conduct, Observed
from meshwright.terminal import rendered
from meshwright.terminal.dryrun import show_dry_run


def document(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["dryrun", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_holds_every_rank_and_every_check(answer: Answer) -> None:
    found = json.loads(json.dumps(answer.document()))
    assert [rank["rank"] for rank in found["ranks"]] == list(range(16))
    assert {rank["same_as"] for rank in found["ranks"]} == {None, 0, 8}
    first = found["ranks"][0]
    keys = {"rank", "coordinates", "same_as", "parameters", "parameter_bytes", "peak_bytes", "collectives"}
    assert keys | {"flops"} <= first.keys()
    assert first["parameter_bytes"] == 2 * first["parameters"]
    assert sum(first["peak_by_class"].values()) == first["peak_bytes"]
    assert {"axis", "kind", "count", "bytes"} == first["collectives"][0].keys()
    assert {"name", "holds", "worst"} <= found["checks"][0].keys()
    assert [check["name"] for check in found["checks"] if not check["holds"]] in ([], ["memory"])


def test_all_ranks_are_run_one_by_one_and_do_as_those_of_their_class(file: str, answer: Answer) -> None:
    every, classes = document(file, "--ranks", "all"), answer.document()
    assert all(rank["same_as"] is None for rank in every["ranks"])
    for one, other in zip(every["ranks"], classes["ranks"], strict=True):
        for key in ("rank", "coordinates", "parameters", "parameter_bytes", "collectives", "flops"):
            assert one[key] == other[key]
        assert one["peak_bytes"] == pytest.approx(other["peak_bytes"], rel=1e-3)


def test_ranks_that_were_named_are_run_alone(file: str) -> None:
    found = document(file, "--ranks", "3,9")
    assert [(rank["rank"], rank["same_as"]) for rank in found["ranks"]] == [(3, None), (9, None)]
    checks = {check["name"]: check for check in found["checks"]}
    for name in ("matching of steps", "progress"):
        assert checks[name]["holds"] is None
        assert checks[name]["why"] == "the steps of some ranks alone were run"


def test_a_check_that_was_not_run_neither_holds_nor_fails(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshwright.dryrun.checks.MOST_EVENTS", 10)
    steps = [row.step for row in answer.run]
    conducts = [row.step.conduct for row in answer.rows]
    checks = {check.name: check for check in checks_of_steps(Expected(answer.plan), steps, conducts)}
    assert checks["progress"].holds is None
    assert "more than 10 events" in checks["progress"].why
    left = replace(answer, checks=[checks["progress"], checks["flops"]])
    assert left.holds
    shown = rendered(lambda console: show_dry_run(left, console))
    assert "not run" in shown
    assert "every check run holds; not run: progress" in shown


def test_nothing_is_said_of_ranks_of_which_nothing_was_seen(answer: Answer) -> None:
    failed = Observed(answer.rows[0].facts, Conduct(failed="no"))
    expected = Expected(answer.plan)
    checks = [*checks_of_all(expected, [failed]), *checks_of_steps(expected, [failed], [failed.conduct])]
    found = {check.name: check.holds for check in checks}
    looked_at = {name for name, holds in found.items() if holds is not None}
    assert looked_at == {"build", "groups", "step", "progress"}
    assert not any(found[name] for name in ("build", "step", "progress"))


def test_people_read_why_memory_is_needed(answer: Answer) -> None:
    shown = rendered(lambda console: show_dry_run(answer, console))
    parts = ("activations", "in the", "collectives of a step", "matching")
    for words in ("rank 0", "fits: rank 0 needs", *parts):
        assert words in shown


def test_strict_ends_with_1_where_a_check_does_not_hold(
    file: str, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = replace(answer, checks=[Check("groups", False, 1, "ranks", "rank 5")])
    monkeypatch.setattr("meshwright.dryrun.answered", lambda asked, progress: failed)
    assert CliRunner().invoke(app, ["dryrun", file, "--strict"]).exit_code == 1
    assert CliRunner().invoke(app, ["dryrun", file]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "16"], "--ranks: 16: a rank of this layout lies between 0 and 15"),
        (["--ranks", "first"], "`classes`, `all`, or ranks with commas between them"),
        (["--ranks", "-1"], "`classes`, `all`, or ranks with commas between them"),
        (["--set", "policy.engine=megatron"], "policy.engine"),
        (["--set", "layout.tp=3"], "layout.dp: 4"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(
    file: str,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["meshwright", "dryrun", file, *arguments])
    assert main() == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1
    assert "Traceback" not in said


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from meshwright.cli import app;"
        "CliRunner().invoke(app, ['dryrun', '--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_experts_are_chosen_as_a_histogram_says(file: str, tmp_path: Path) -> None:
    counts = ["layer,expert,tokens"]
    counts += [f"{layer},{e},{16 if e == 0 else 8}" for layer in range(2) for e in range(8)]
    (tmp_path / "counts.csv").write_text("\n".join(counts) + "\n")
    path = tmp_path / "plan.yaml"
    routed = "precision: bf16, routing: {histogram: counts.csv}}"
    path.write_text(Path(file).read_text("utf-8").replace("precision: bf16}", routed))
    found = document(str(path))
    checks = {check["name"]: check for check in found["checks"]}
    assert "histogram" in found["notes"]["routing"]
    assert checks["matching"]["holds"]
    assert checks["progress"]["holds"]
    work = {rank["coordinates"]["ep"]: rank["flops_by_kind"]["grouped_matmul"] for rank in found["ranks"]}
    assert work[0] > max(work[1], work[2], work[3])

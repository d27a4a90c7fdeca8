"""What a run may do to a folder that is there already, and how it goes on from what another run left."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import DENSE, small_deployment, written

from meshwright.__main__ import main
from meshwright.deployment import LossScale
from meshwright.runtime.checkpoint import survey
from meshwright.runtime.optim import Scaler

DEPLOYMENT = small_deployment(DENSE, workload={"optimizer": "sgd"}, training={"steps": 2})


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    return written(DEPLOYMENT, tmp_path)


@pytest.fixture
def kept(deployment: Path, tmp_path: Path) -> Path:
    """The folder of a run of two steps."""
    assert main(["train", str(deployment), "-o", str(tmp_path / "run"), "--json"]) == 0
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], deployment: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["train", str(deployment), *arguments]) == 2
    return capsys.readouterr().err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_run_into_the_folder_of_another_is_refused_before_its_first_step(
    kept: Path, deployment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(kept)
    message = refused(capsys, deployment, "-o", str(kept), "--steps", "3")
    assert "holds step-00000002 of another run: go on with it by --resume" in message
    assert contents(kept) == before


def test_a_resumption_that_is_refused_changes_nothing(
    kept: Path, deployment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(kept)
    other = ("--resume", "--set", "model.hidden_size=64")
    assert "model.hidden_size: 64" in refused(capsys, deployment, "-o", str(kept), *other)
    assert contents(kept) == before


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_where_a_folder_has_to_be_is_said_before_the_first_step(
    name: str, deployment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    message = refused(capsys, deployment, "-o", str(tmp_path / "run"), "--json")
    assert "cannot be written: File exists" in message
    assert message.startswith(f"error: --output: '{str(tmp_path)[:40]}")


def test_an_output_without_a_name_is_refused(deployment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--output: '': a folder" in refused(capsys, deployment, "-o", "")


def test_momentum_that_a_checkpoint_has_not_is_named_by_its_key(
    kept: Path, deployment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("-o", str(kept), "--resume", "--steps", "3")
    message = refused(capsys, deployment, *more, "--set", "training.momentum=0.9")
    assert "training.momentum: 0.9: the checkpoint's run kept none" in message
    assert [found.step for found in survey(kept / "checkpoints")] == [2]


def test_fp16_takes_up_a_run_that_had_no_loss_scale_with_its_own() -> None:
    with_scale, without = Scaler(LossScale(), True), Scaler(LossScale(), False)
    with_scale.restore(without.state())
    assert with_scale.scale == LossScale().initial
    assert with_scale.overflows_left == LossScale().hysteresis


def test_a_loss_scale_ends_where_a_run_goes_on_in_another_type() -> None:
    with_scale, without = Scaler(LossScale(), True), Scaler(LossScale(), False)
    without.restore(with_scale.state())
    assert without.scale == 1.0

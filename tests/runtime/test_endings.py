"""How a run of local ranks ends: by whom, with which words, and leaving nobody behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import DENSE, small_deployment, written

from meshwright.__main__ import main
from meshwright.planner.planned import planned
from meshwright.runtime.launch import run_local

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")

DEPLOYMENT = small_deployment(DENSE, ranks=2, layers=2, training={"steps": 1_000_000})
LIMIT_S = 60.0


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    return written(DEPLOYMENT, tmp_path)


def _heed_interrupts() -> None:
    """A shell starts what runs in its background with interrupts ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def running(deployment: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two ranks that has done its first step and goes on for long."""
    command = [sys.executable, "-m", "meshwright", "train", str(deployment), "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["step"] == 1
        yield process
        process.kill()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


def assert_gone(ranks: list[int]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline, "ranks go on without the process that started them"
        time.sleep(0.05)


def is_running(rank: int) -> bool:
    try:
        return Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("ending", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_ranks_end_with_the_process_that_started_them(
    running: subprocess.Popen[str], ending: signal.Signals, code: int
) -> None:
    ranks = ranks_of(running)
    assert len(ranks) == 2
    running.send_signal(ending)
    running.communicate(timeout=LIMIT_S)
    assert running.returncode == code
    assert_gone(ranks)


def test_a_reader_that_has_seen_enough_ends_the_run_without_a_word(running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.wait(LIMIT_S) == 141
    assert running.stderr.read() == ""


def test_the_rank_that_failed_is_named_and_not_one_that_lost_it(deployment: Path) -> None:
    def work(mesh: Any) -> None:
        ones = torch.ones(1000)
        if mesh.rank == 1:
            raise ValueError("the cause")
        while True:
            dist.all_reduce(ones)

    with pytest.raises(RuntimeError, match="rank 1: ValueError: the cause"):
        run_local(planned(str(deployment)), 2, "cpu", work)


def test_a_rank_that_was_killed_is_named_with_what_kills(deployment: Path) -> None:
    def work(mesh: Any) -> None:
        if mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    with pytest.raises(Exception, match=r"rank 1 was ended by signal 9, as the kernel does where memory"):
        run_local(planned(str(deployment)), 2, "cpu", work)


@pytest.mark.parametrize("threads", ["", "2,1", "none"])
def test_ranks_take_whatever_says_how_many_threads_there_are(
    threads: str, deployment: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert main(["train", str(deployment), "--json", "--steps", "1"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: 'x': torchrun states a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: 'two': torchrun states"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: 2: below WORLD_SIZE = 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: 'missing'"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_said(
    environment: dict[str, str],
    message: str,
    deployment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(deployment)]) == 2
    assert message in capsys.readouterr().err


def test_a_closed_standard_output_is_said_before_anything_starts(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["train", str(deployment), "--json"]) == 2
    assert "standard output: 'closed'" in capsys.readouterr().err

"""Ranks for tests: processes forked from this one, so that torch is imported once."""

from __future__ import annotations

import datetime
import gc
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT_S = 60
DIED = 9
"""Exit code of a process that a test lets die."""


class Crew:
    """Runs a function on several ranks; each is told its rank, and what they return comes back in order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0

    def __call__(self, num_ranks: int, act: Callable[[int], Any]) -> list[Any]:
        """Results by rank; None for a rank that died on purpose. Fails when a rank raises."""
        self._runs += 1
        place = self._folder / f"run-{self._runs}"
        place.mkdir()
        children = [self._fork(rank, num_ranks, place, act) for rank in range(num_ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        results = []
        for rank, code in enumerate(codes):
            if code == DIED:
                results.append(None)
                continue
            assert code == 0, f"rank {rank} ended with {code}"
            error, result = pickle.loads((place / str(rank)).read_bytes())
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
        return results

    def _fork(self, rank: int, num_ranks: int, place: Path, act: Callable[[int], Any]) -> int:
        child = os.fork()
        if child:
            return child
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT_S)
            torch.set_num_threads(1)
            gc.freeze()  # a collection would touch, and so copy, every page that is shared with the parent
            answer = (None, self._act(rank, num_ranks, place, act))
        except BaseException:
            answer = (traceback.format_exc(), None)
        (place / str(rank)).write_bytes(pickle.dumps(answer))
        os._exit(0)

    @staticmethod
    def _act(rank: int, num_ranks: int, place: Path, act: Callable[[int], Any]) -> Any:
        if num_ranks > 1:
            if "lo" in [name for _, name in socket.if_nameindex()]:
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            dist.init_process_group(
                "gloo",
                init_method=f"file://{place}/meeting-point",
                rank=rank,
                world_size=num_ranks,
                timeout=datetime.timedelta(seconds=LIMIT_S / 2),
            )
        return act(rank)


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    """`crew(4, act)`: act(rank) on four ranks over gloo; with one rank, without torch.distributed."""
    folder = tmp_path / "crew"
    folder.mkdir()
    return Crew(folder)

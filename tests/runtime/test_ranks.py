"""The ranks of these tests: results in order, the first error, nothing left behind."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def _sum(rank: int, base: int) -> tuple[int, float]:
    value = torch.tensor([float(base + rank)])
    dist.all_reduce(value)
    return rank, value.item()


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(3, _sum, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_large_results_come_whole() -> None:
    results = run_ranks(2, lambda rank: torch.full((1 << 20,), float(rank)))
    assert [result.sum().item() for result in results] == [0.0, float(1 << 20)]


def _fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()  # waits for rank 1, which never comes


def test_the_first_error_is_raised_and_the_others_end() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 3\n(.|\n)*ValueError: the cause"):
        run_ranks(3, _fails)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def _dies(rank: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match=r"rank (0|1) of 2\n(died without a word|(.|\n)*Error)"):
        run_ranks(2, _dies)


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(RankError, match=r"\[0, 1\] have not come to an end"):
        run_ranks(2, lambda rank: os.read(os.pipe()[0], 1), limit_s=1.0)

"""Several ranks on one machine: forked processes that speak over gloo.

The parent has imported torch, so that a rank starts in milliseconds; what is passed to it is there already
and needs no pickling, and what a test has patched is patched in it. Results come back through pipes. The
parent opens the port of the ranks' store itself: no two runs can meet on one.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor

HOST = "127.0.0.1"
LIMIT_S = 120.0
"""No group of ranks takes longer, unless it hangs."""


class RankError(AssertionError):
    """A rank has failed: its traceback, the first of all ranks'."""


def run_ranks(world: int, run: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list[Any]:
    """run(rank, *args) on each rank of a gloo world; what they return, by rank, which pickle has to know.

    Raises RankError with the traceback of the rank that failed first, after ending the others.
    """
    with socket.create_server((HOST, 0), backlog=4 * world) as listener:
        ranks: dict[int, int] = {}
        pipes: list[Connection] = []
        try:
            for rank in range(world):
                ours, theirs = Pipe(duplex=False)
                pipes.append(ours)
                ranks[_forked(rank, world, listener, theirs, run, args)] = rank
                theirs.close()
            return _results(pipes, time.monotonic() + limit_s)
        finally:
            _end(ranks)
            for pipe in pipes:
                pipe.close()


def _forked(
    rank: int, world: int, listener: socket.socket, pipe: Connection, run: Callable[..., Any], args: Any
) -> int:
    """The process that a new rank runs in."""
    with warnings.catch_warnings():  # a test runner has threads; ranks take up none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        _run_rank(rank, world, listener, pipe, run, args)
    return process


def _run_rank(
    rank: int, world: int, listener: socket.socket, pipe: Connection, run: Callable[..., Any], args: Any
) -> NoReturn:
    code = 1
    try:
        torch.set_num_threads(1)
        _join(rank, world, listener)
        result = pickle.dumps((time.monotonic(), None, run(rank, *args)))
        code = 0
    except BaseException:
        result = pickle.dumps((time.monotonic(), traceback.format_exc(), None))
    with suppress(BaseException):  # a parent that is gone reads nothing
        pipe.send_bytes(result)
        pipe.close()
    os._exit(code)


def _join(rank: int, world: int, listener: socket.socket) -> None:
    """Rank 0 serves the store on the port that the parent has opened."""
    limit = timedelta(seconds=LIMIT_S)
    port = listener.getsockname()[1]
    served = {"master_listen_fd": os.dup(listener.fileno())} if rank == 0 else {}
    store = dist.TCPStore(HOST, port, world, rank == 0, limit, wait_for_workers=False, **served)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


def _results(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], deadline - time.monotonic())
        if not ready:
            late = [rank for rank, pipe in enumerate(pipes) if pipe not in results]
            raise RankError(f"ranks {late} have not come to an end")
        failed: list[tuple[float, int, str]] = []
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            at, error, results[pipe] = _received(pipe)  # type: ignore[arg-type,index]
            if error is not None:
                failed.append((at, rank, error))
        if failed:
            _, rank, error = min(failed)
            raise RankError(f"rank {rank} of {len(pipes)}\n{error}")
    return [results[pipe] for pipe in pipes]


def _received(pipe: Connection) -> tuple[float, str | None, Any]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return time.monotonic(), "died without a word", None


def _end(ranks: dict[int, int]) -> None:
    """End what still runs, and collect every process."""
    for process in ranks:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for process in ranks:
        os.waitpid(process, 0)

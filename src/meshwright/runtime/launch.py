"""Starting the ranks of a plan: as processes of this machine, or those that torchrun has started.

Local ranks are forked after torch was loaded, so that eight are ready in a moment. The first one that fails
ends the others, and its message is the run's.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from meshwright.errors import InputError, MeshwrightError
from meshwright.plan import Plan
from meshwright.runtime.mesh import Mesh, build_mesh, single_process
from meshwright.torchrun import is_under_torchrun

DeviceKind = Literal["auto", "cpu", "cuda"]
Work = Callable[[Mesh], None]

GRACE_S = 10.0
"""How long a rank may take to end once it was asked to."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another before it gives up: a checkpoint of a large model fits in."""


def require_world(plan: Plan, num_ranks: int) -> None:
    """Raise InputError unless there are as many ranks as the plan has."""
    world = plan.layout.world_size
    if num_ranks != world:
        where = "WORLD_SIZE" if is_under_torchrun() else "--nproc"
        rule = f"the plan's layout has {world} ranks"
        raise InputError(where, num_ranks, rule, [world, "--scale-down"])


def device_kind(asked: DeviceKind, num_local: int) -> Literal["cpu", "cuda"]:
    """Where the ranks compute. Raises InputError for GPUs that are not there."""
    present = torch.cuda.device_count()
    if asked == "auto":
        return "cuda" if present >= num_local else "cpu"
    if asked == "cuda" and present < num_local:
        raise InputError(
            "--device", "cuda", f"{num_local} ranks need a GPU each, {present} are here", ["cpu"]
        )
    return asked


def gpu_name(asked: DeviceKind, num_local: int) -> str | None:
    """The name of the GPU that ranks compute on; None where processors do."""
    return torch.cuda.get_device_name(0) if device_kind(asked, num_local) == "cuda" else None


def run_joined(plan: Plan, device: DeviceKind, work: Work) -> None:
    """This process is one rank of torchrun's: do its part."""
    world, local_world = _stated("WORLD_SIZE", None), _stated("LOCAL_WORLD_SIZE", "1")
    require_world(plan, world)
    rank, local = _stated("RANK", None), _stated("LOCAL_RANK", "0")
    if rank >= world:
        raise InputError("RANK", rank, f"below WORLD_SIZE = {world}", [world - 1])
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(name, "missing", "RANK and WORLD_SIZE are set, so ranks meet there")
    _join(plan, rank, local, device_kind(device, local_world), "env://", work)


def _stated(name: str, usual: str | None) -> int:
    """A number that torchrun puts into the environment."""
    text = os.environ.get(name, usual)
    if text is None or not text.isdecimal():
        raise InputError(name, text, "torchrun states a whole number; unset it where torchrun is not at work")
    return int(text)


def run_local(plan: Plan, num_ranks: int, device: DeviceKind, work: Work) -> None:
    """Start the ranks of a plan on this machine and wait for them.

    Raises MeshwrightError with the first failed rank's message. A plan of one rank runs in this process.
    """
    require_world(plan, num_ranks)
    kind = device_kind(device, num_ranks)
    if num_ranks == 1:
        _set_threads(kind)
        work(single_process(_device(kind, 0)))
        return
    if sys.platform != "linux":
        rule = "ranks are forked, which is safe on Linux alone: start them with torchrun"
        raise InputError("--nproc", num_ranks, rule, [1])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        _Ranks(plan, num_ranks, kind, meeting, work).run()


def run_alone(device: DeviceKind, work: Callable[[torch.device], None]) -> None:
    """Do one rank's work in this process, as that of a plan of one rank is done."""
    kind = device_kind(device, 1)
    _set_threads(kind)
    work(_device(kind, 0))


def _device(kind: str, local: int) -> torch.device:
    return torch.device(kind, local) if kind == "cuda" else torch.device(kind)


def _set_threads(kind: str) -> None:
    """As many threads for a rank alone as for one among others: layouts are compared by what they do."""
    if kind == "cpu":
        torch.set_num_threads(_num_threads())


def _num_threads() -> int:
    """Threads of a rank on processors: OMP_NUM_THREADS, of a list its outermost level; one where it says
    nothing."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(max(int(first), 1), os.cpu_count() or 1) if first.isdecimal() else 1


def _join(plan: Plan, rank: int, local: int, kind: str, meeting: str, work: Work) -> None:
    device = _device(kind, local)
    if kind == "cuda":
        torch.cuda.set_device(device)
    _set_threads(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    world = plan.layout.world_size
    dist.init_process_group(backend, meeting, TIMEOUT, world_size=world, rank=rank)
    work(build_mesh(plan.layout, rank, device, plan.model.kv_heads))
    # Not after an error: other ranks would lose this one, and say so, before it has said what is wrong.
    dist.destroy_process_group()


class _Ranks:
    """The processes of a local run, each with a pipe on which it says what went wrong."""

    def __init__(self, plan: Plan, num_ranks: int, kind: str, meeting: str, work: Work) -> None:
        context: Any = multiprocessing.get_context("fork")
        self.pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        self.processes = [
            context.Process(target=_run_rank, args=(plan, rank, kind, meeting, work, self.pipes[rank][1]))
            for rank in range(num_ranks)
        ]

    def run(self) -> None:
        """Start all, and wait until all are done or one has failed. Whoever ends this process ends them."""
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            for process in self.processes:
                process.start()
            for _, sender in self.pipes:
                sender.close()
            self._wait()
        finally:
            self._end()
            signal.signal(signal.SIGTERM, before)

    def _end(self) -> None:
        """End what still runs, and collect every process that was started."""
        started = [process for process in self.processes if process.pid is not None]
        for process in started:
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _wait(self) -> None:
        waiting = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        while waiting:
            for sentinel in connection.wait(list(waiting)):
                rank = waiting.pop(sentinel)
                process = self.processes[rank]
                process.join()
                if process.exitcode:
                    raise self._failure(rank, process.exitcode)

    def _failure(self, rank: int, code: int) -> Exception:
        """Why the run failed: what the first rank that failed said. The others fail because it is gone, and
        may be noticed before it. A rank that was killed could say nothing."""
        for number, process in enumerate(self.processes):
            if process.exitcode is not None and process.exitcode < 0:
                return MeshwrightError(f"rank {number} was ended by {_signal(-process.exitcode)}")
        said = [words for words in map(self._said, range(len(self.processes))) if words is not None]
        if not said:
            return MeshwrightError(f"rank {rank} ended with exit code {code}")
        return min(said, key=lambda words: words[0])[1]

    def _said(self, rank: int) -> tuple[float, Exception] | None:
        """When a rank failed, and why."""
        receiver = self.pipes[rank][0]
        try:
            return receiver.recv() if receiver.poll() else None
        except EOFError:
            return None


def _signal(number: int) -> str:
    why = ", as the kernel does where memory runs out" if number == signal.SIGKILL else ""
    return f"signal {number}{why}"


def _leave(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    """Have the kernel end this rank when the process that started it is gone, however that came about."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run_rank(plan: Plan, rank: int, kind: str, meeting: str, work: Work, sender: Any) -> None:
    """One rank's process. Its errors go to the parent; it prints none."""
    _end_with_parent()
    try:
        _join(plan, rank, rank, kind, meeting, work)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        sender.send((time.monotonic(), _told(rank, error)))
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _told(rank: int, error: BaseException) -> Exception:
    """An error as its rank sends it: a message stays one, of a defect its name and words are told."""
    if isinstance(error, MeshwrightError):
        return MeshwrightError(str(error))
    if isinstance(error, OSError) and error.strerror:
        return OSError(error.errno, error.strerror, error.filename)
    if os.environ.get("MESHWRIGHT_TRACEBACK"):
        traceback.print_exc()
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")

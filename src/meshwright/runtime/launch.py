"""Starting the ranks of a plan: as processes of this machine, or those that torchrun has started.

Local ranks are forked after torch was loaded, so that eight are ready in a moment. The first one that fails
ends the others, and its message is the run's.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from meshwright.errors import InputError, MeshwrightError
from meshwright.plan import Plan
from meshwright.runtime.mesh import Mesh, build_mesh, single_process

DeviceKind = Literal["auto", "cpu", "cuda"]
Work = Callable[[Mesh], None]

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another before it gives up: a checkpoint of a large model fits in."""


def is_under_torchrun() -> bool:
    """Whether somebody else has started the ranks and says so in the environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


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


def run_joined(plan: Plan, device: DeviceKind, work: Work) -> None:
    """This process is one rank of torchrun's: do its part."""
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    require_world(plan, int(os.environ["WORLD_SIZE"]))
    kind = device_kind(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    _join(plan, rank, local, kind, "env://", work)


def run_local(plan: Plan, num_ranks: int, device: DeviceKind, work: Work) -> None:
    """Start the ranks of a plan on this machine and wait for them.

    Raises MeshwrightError with the first failed rank's message. A plan of one rank runs in this process.
    """
    require_world(plan, num_ranks)
    kind = device_kind(device, num_ranks)
    if num_ranks == 1:
        work(single_process(_device(kind, 0)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        _Ranks(plan, num_ranks, kind, meeting, work).run()


def _device(kind: str, local: int) -> torch.device:
    return torch.device(kind, local) if kind == "cuda" else torch.device(kind)


def _join(plan: Plan, rank: int, local: int, kind: str, meeting: str, work: Work) -> None:
    device = _device(kind, local)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    backend = "nccl" if kind == "cuda" else "gloo"
    world = plan.layout.world_size
    dist.init_process_group(backend, meeting, TIMEOUT, world_size=world, rank=rank)
    try:
        work(build_mesh(plan.layout, rank, device, plan.model.kv_heads))
    finally:
        dist.destroy_process_group()


class _Ranks:
    """The processes of a local run, each with a pipe on which it says what went wrong."""

    def __init__(self, plan: Plan, num_ranks: int, kind: str, meeting: str, work: Work) -> None:
        method = "fork" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(method)
        self.pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        self.processes = [
            context.Process(target=_run_rank, args=(plan, rank, kind, meeting, work, self.pipes[rank][1]))
            for rank in range(num_ranks)
        ]

    def run(self) -> None:
        """Start all, and wait until all are done or one has failed."""
        try:
            for process in self.processes:
                process.start()
            for _, sender in self.pipes:
                sender.close()
            self._wait()
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.terminate()
            for process in self.processes:
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
        """What the ranks said, the clearest first: one that lost its peer says less than the peer."""
        said = [self._said(number) for number in range(len(self.processes))]
        for kind in ("input", "message"):
            for words in said:
                if words is not None and words[0] == kind:
                    return MeshwrightError(words[1])
        words = said[rank]
        if words is not None:
            return RuntimeError(f"rank {rank}: {words[1]}")
        return MeshwrightError(
            f"rank {rank} was ended by signal {-code}" if code < 0 else f"rank {rank} ended"
        )

    def _said(self, rank: int) -> tuple[str, str] | None:
        receiver = self.pipes[rank][0]
        try:
            return receiver.recv() if receiver.poll() else None
        except EOFError:
            return None


def _run_rank(plan: Plan, rank: int, kind: str, meeting: str, work: Work, sender: Any) -> None:
    """One rank's process. Its errors go to the parent; it prints none."""
    try:
        _join(plan, rank, rank, kind, meeting, work)
    except KeyboardInterrupt:
        os._exit(130)
    except InputError as error:
        sender.send(("input", str(error)))
        os._exit(2)
    except MeshwrightError as error:
        sender.send(("message", str(error)))
        os._exit(2)
    except BaseException as error:
        if os.environ.get("MESHWRIGHT_TRACEBACK"):
            traceback.print_exc()
        sender.send(("defect", f"{type(error).__name__}: {error}"))
        os._exit(3)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

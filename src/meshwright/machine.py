"""The machine at hand: what identifies it, so that measurements of one are not taken for another's."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from meshwright.files import Noun
from meshwright.units import BYTES, Count


class Machine(Noun):
    """Processors, main memory and GPU of one host, and the torch that ran on it.

    `gpu` is the name that the driver gives, None where processors compute. `processors` are those that a
    process may use.
    """

    processor: str
    processors: Count
    memory_bytes: Count
    device: Literal["cpu", "cuda"] = "cpu"
    gpu: str | None = None
    torch: str = "none"

    @property
    def is_here(self) -> bool:
        """Whether its processors are those of the machine at hand; for its GPU nobody is asked."""
        here = this_machine()
        return (self.processor, self.processors) == (here.processor, here.processors)

    @property
    def words(self) -> str:
        """The machine in a few words."""
        host = f"{self.processor}, {self.processors} processors, {BYTES.format(self.memory_bytes)}"
        what = f"{self.gpu} beside {host}" if self.gpu else host
        return f"{what}, torch {self.torch}"


def this_machine(gpu: str | None = None) -> Machine:
    """The machine at hand; `gpu` where a GPU computes. Does not load torch."""
    return Machine(
        processor=_processor(),
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        device="cpu" if gpu is None else "cuda",
        gpu=gpu,
        torch=_torch(),
    )


@cache
def _processor() -> str:
    """The model's name, of Linux from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "processor"


@cache
def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"

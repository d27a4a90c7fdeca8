"""A calibration from what was asked to the table, and what it covers of the plans."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, Protocol

from meshwright.calibrating.references import (
    Reference,
    constants_from,
    programs_of,
    references,
)
from meshwright.calibrating.shapes import ShapeKey, grid, of_programs
from meshwright.cluster import LocalRequest, require_same_gpu
from meshwright.efficiency_table import EfficiencyTable, Kernels, LinkPoint, OpPoint, write_table
from meshwright.errors import InputError
from meshwright.ir.program import lower
from meshwright.layout import Layout
from meshwright.machine import this_machine
from meshwright.plan import Plan
from meshwright.planner.confidence import Confidence, confidence_of
from meshwright.planner.estimate import running_of
from meshwright.planner.planned import planned
from meshwright.planner.prices import Conditions, prices
from meshwright.runnable import TORCH, require_installed
from meshwright.units import SECONDS
from meshwright.workload import Precision

Progress = Callable[[str, int, int], None]
MOST_RANKS = 64
USUAL_BUDGET = "60 s"
_DIGITS = 4


@dataclass(frozen=True)
class Asked:
    """The command line of `calibrate`."""

    plans: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    output: str | None = None
    budget: str = USUAL_BUDGET
    nproc: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Covered:
    """What a table says of one plan's prices."""

    plan: Plan
    confidence: Confidence


@dataclass(frozen=True)
class Calibrated:
    """A table, and what it covers of the plans that it was made for."""

    table: EfficiencyTable
    covers: tuple[Covered, ...]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.table.model_dump(mode="json"),
            "digest": self.table.digest,
            "plans": [
                {"plan": one.plan.name, "digest": one.plan.digest, **one.confidence.document()}
                for one in self.covers
            ],
        }


def calibrate(asked: Asked, progress: Progress) -> Calibrated:
    """Measure this machine, and write the table where asked. Raises InputError and MeshwrightError."""
    budget_s = _budget(asked.budget)
    if asked.overrides and not asked.plans:
        raise InputError(
            "--set", asked.overrides[0], "changes a plan: name one by --plan", ["--plan plan.yaml"]
        )
    plans = [planned(path, asked.overrides, "native", progress) for path in asked.plans]
    nproc = _nproc(asked.nproc, plans)
    _require_alike(plans)
    require_installed("measuring", TORCH)
    kind = _device_kind(asked.device, nproc)
    precision = _precision(plans, kind)
    _require_priced_here(plans, kind)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    table = _measured(plans, precision, nproc, budget_s, asked.device, progress)
    if asked.output is not None:
        write_table(table, asked.output)
    return Calibrated(table, tuple(Covered(plan, coverage(plan, table)) for plan in plans))


def coverage(plan: Plan, table: EfficiencyTable) -> Confidence:
    """How much of a plan's seconds the table measured, and what it does not cover."""
    cluster = plan.cluster.model_copy(update={"calibration": table})
    calibrated = plan.model_copy(update={"cluster": cluster})
    priced = prices(cluster, plan.workload.precision, plan.policy.engine)
    return confidence_of(lower(calibrated), priced, running_of(calibrated, priced, Conditions()))


def _budget(text: str) -> float:
    seconds = float(SECONDS.parse(text, "--budget"))
    if not 1 <= seconds <= 3600:
        raise InputError("--budget", text, "between 1 s and 1 h", [USUAL_BUDGET])
    return seconds


def _nproc(asked: int | None, plans: Sequence[Plan]) -> int:
    """Ranks at work together: as many as the largest of the plans that this machine runs, else two."""
    if asked is None:
        cores = os.cpu_count() or 1
        of_plans = [plan.layout.world_size for plan in plans if plan.layout.world_size <= cores]
        return max(of_plans, default=min(cores, 2))
    if not 1 <= asked <= MOST_RANKS:
        raise InputError("--nproc", asked, f"between 1 and {MOST_RANKS} ranks", [2])
    return asked


_SURROUNDINGS = (
    "norm",
    "hidden_act",
    "router",
    "num_experts",
    "num_experts_per_tok",
    "qk_head_dim",
    "partial_rotary_factor",
    "vocab_size",
)
"""What ops take from a model beside their sizes (`runtime/calibrate/subjects.py`)."""


def _require_alike(plans: Sequence[Plan]) -> None:
    """One table holds ops by their sizes: the plans' ops differ in nothing else. Raises InputError."""
    for plan in plans[1:]:
        of_first, own = _surroundings(plans[0]), _surroundings(plan)
        for name, value in own.items():
            if value != of_first[name]:
                rule = f"plans of one table have one {name}, and the first, {plans[0].name}, has "
                shown = f"{plan.name} with {name} {value}"
                raise InputError("--plan", shown, f"{rule}{of_first[name]}: calibrate by itself")


def _surroundings(plan: Plan) -> dict[str, object]:
    found: dict[str, object] = {name: getattr(plan.model, name) for name in _SURROUNDINGS}
    heads = plan.model.num_attention_heads // plan.model.kv_heads
    return {**found, "query heads per key-value head": heads, "optimizer": plan.workload.optimizer}


def _precision(plans: Sequence[Plan], device: Literal["cpu", "cuda"]) -> Precision:
    """The number type of all plans; without any the one in which the device is fast."""
    usual: Precision = "bf16" if device == "cuda" else "fp32"
    kinds = list(dict.fromkeys(plan.workload.precision for plan in plans)) or [usual]
    if len(kinds) > 1:
        rule = f"the plans of one calibration compute in one number type, and the first one in {kinds[0]}"
        raise InputError("--plan", kinds[1], rule, [kinds[0]])
    if kinds[0] not in ("fp32", "bf16", "fp16"):
        raise InputError(
            "workload.precision", kinds[0], "the native engine does not run it", ["bf16", "fp16", "fp32"]
        )
    return kinds[0]


def _measured(
    plans: Sequence[Plan],
    precision: Precision,
    nproc: int,
    budget_s: float,
    device: Literal["auto", "cpu", "cuda"],
    progress: Progress,
) -> EfficiencyTable:
    """The table. Several ranks come first: they are forked, which is safe while this process computes
    nothing."""
    asked = references(plans[0] if plans else None, precision)
    conditions = sorted({nproc, 1}, reverse=True)
    found = []
    for place, ranks in enumerate(conditions):
        progress(f"measuring with {ranks} ranks at work", place, len(conditions))
        share = budget_s / len(conditions)
        found.append(_of_condition(plans, asked, precision, ranks, share, device))
    gpu = found[0][2]
    return EfficiencyTable(
        machine=this_machine(gpu),
        date=date.today().isoformat(),
        subject=", ".join(plan.name for plan in plans) or "a grid of shapes",
        wall_s=_rounded(sum(wall for *_, wall in found)),
        kernels=tuple(kernels for kernels, *_ in found),
        links=found[0][1],
    )


def _of_condition(
    plans: Sequence[Plan],
    asked: Sequence[Reference],
    precision: Precision,
    ranks: int,
    budget_s: float,
    device: Literal["auto", "cpu", "cuda"],
) -> tuple[Kernels, tuple[LinkPoint, ...], str | None, float]:
    """Kernels and links with so many ranks at work, the GPU's name, and how long it took."""
    from meshwright.runtime.calibrate import Job, Shape, measure_locally

    kind = _device_kind(device, ranks)
    shapes = _shapes(plans, asked, ranks, kind)
    launching = _launching(asked[0].plan, ranks)
    model = plans[0].model if plans else asked[-1].plan.model
    job = Job(
        launching,
        model,
        tuple(Shape(*shape) for shape in shapes),
        tuple(one.plan for one in asked),
        budget_s,
    )
    measured = measure_locally(job, kind)
    bare = Kernels(
        ranks=ranks,
        threads=measured.threads,
        precision=precision,
        host_s={"dense": 0.0, "experts": 0.0},
        step_s=0.0,
        points=tuple(_op_points(measured.shapes)),
    )
    kernels = _with_constants(bare, asked, [one.time_s for one in measured.references], kind == "cpu")
    return kernels, tuple(_link_points(measured.links, ranks)), measured.gpu, measured.wall_s


class Timed(Protocol):
    """Seconds of one thing as the runtime gives them: median, spread, and how many samples."""

    @property
    def time_s(self) -> float: ...
    @property
    def spread(self) -> float: ...
    @property
    def samples(self) -> int: ...


def _figures(one: Timed) -> dict[str, Any]:
    return {"time_s": _rounded(one.time_s), "spread": _rounded(one.spread), "samples": one.samples}


def _op_points(found: Mapping[Any, Timed]) -> Iterator[OpPoint]:
    for (op, phase, sizes), one in found.items():
        yield OpPoint(op=op, phase=phase, sizes=sizes, **_figures(one))


def _link_points(found: Mapping[tuple[str, int], Timed], ranks: int) -> Iterator[LinkPoint]:
    for (kind, size), one in found.items():
        yield LinkPoint.model_validate({"collective": kind, "ranks": ranks, "bytes": size, **_figures(one)})


def _with_constants(
    bare: Kernels, asked: Sequence[Reference], seconds: Sequence[float], is_serial: bool
) -> Kernels:
    """The kernels with what launching and a step cost besides, from the steps of the references."""
    alone = EfficiencyTable(machine=this_machine(), date="-", subject="-", wall_s=1.0, kernels=(bare,))
    values = constants_from(asked, seconds, alone, is_serial)
    host_s = {name: _rounded(value) for name, value in values.host_s.items()}
    return bare.model_copy(update={"host_s": host_s, "step_s": _rounded(values.step_s)})


def _device_kind(asked: Literal["auto", "cpu", "cuda"], ranks: int) -> Literal["cpu", "cuda"]:
    from meshwright.runtime.launch import device_kind

    return device_kind(asked, ranks)


def _require_priced_here(plans: Sequence[Plan], kind: Literal["cpu", "cuda"]) -> None:
    """Raise InputError for a plan of other hardware than is measured: it would refuse the table."""
    from meshwright.runtime.launch import gpu_name

    gpu = gpu_name(kind, 1)
    words = this_machine(gpu).words
    for plan in plans:
        require_same_gpu("--plan", gpu, f"{plan.name}, on {words}", plan.cluster.gpu.name)


def _shapes(
    plans: Sequence[Plan], asked: Sequence[Reference], ranks: int, device: Literal["cpu", "cuda"]
) -> list[ShapeKey]:
    """The shapes of the plans that run on so many ranks, else of all of them, and of the references."""
    mine = [plan for plan in plans if plan.layout.world_size == ranks] or list(plans)
    own = of_programs([*map(lower, mine), *programs_of(asked)], device)
    return own if plans else list(dict.fromkeys([*own, *grid(device)]))


def _launching(plan: Plan, ranks: int) -> Plan:
    """A plan of so many data-parallel ranks: what ranks need to know to meet."""
    cluster, _ = LocalRequest(local=ranks).resolve()
    return plan.model_copy(update={"cluster": cluster, "layout": Layout(dp=ranks)})


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

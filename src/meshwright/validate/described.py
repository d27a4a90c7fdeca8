"""A row becomes a run: plans that it may mean, what it measured, and how it is grouped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meshwright.validate.candidates import Candidate, Described, candidates_of
from meshwright.validate.clusters import cluster_of, generation_of
from meshwright.validate.measured import (
    MeasuredMemory,
    Throughput,
    memory_of,
    step_time_of,
    throughput_of,
)
from meshwright.validate.models import model_of
from meshwright.validate.policies import Stated, stated_policy
from meshwright.validate.refusal import Refusal, RefusedError
from meshwright.validate.rows import Row, read_rows

Group = Literal["dense", "moe_full", "moe_partial", "moe_efa"]
GROUPS: tuple[Group, ...] = ("dense", "moe_full", "moe_partial", "moe_efa")


@dataclass(frozen=True, slots=True)
class Run:
    """A row that is scored. `recipe` names rows that a fit and its hold-out never share."""

    id: str
    group: Group
    source: str
    recipe: str
    era: str
    generation: str
    stated: Stated
    candidates: tuple[Candidate, ...]
    measured_s: float | None
    throughput: Throughput | None
    memory: MeasuredMemory | None
    row: Row

    @property
    def quality(self) -> str:
        """The grade of the source: A, B or C."""
        return self.row.quality

    @property
    def notes(self) -> str:
        """What the source adds."""
        return self.row.notes


@dataclass(frozen=True, slots=True)
class Runs:
    """Every row of a file: those that are scored, and why the others are not."""

    runs: tuple[Run, ...]
    refusals: tuple[Refusal, ...]


def read_runs(path: str | Path) -> Runs:
    """Read a table of measured runs. Raises InputError when it is none."""
    return described(read_rows(path))


def described(rows: Iterable[Row]) -> Runs:
    """Every row as a run or a refusal, in order."""
    results = [describe(row) for row in rows]
    return Runs(
        tuple(r for r in results if isinstance(r, Run)),
        tuple(r for r in results if isinstance(r, Refusal)),
    )


def describe(row: Row) -> Run | Refusal:
    """A row as a run, or why it is not scored."""
    try:
        return _described(row)
    except RefusedError as refused:
        return Refusal(row.id, refused.reason, refused.detail)


def _described(row: Row) -> Run:
    assumed: dict[str, str] = {}
    model = model_of(row, assumed)
    _require_scored(row)
    cluster = cluster_of(row, assumed)
    stated = stated_policy(row, assumed)
    if not row.sequence_length:
        raise RefusedError("workload: sequence length not stated", row.id)
    parts = Described(row, model, cluster, stated, assumed)
    return Run(
        id=row.id,
        group=group_of(row),
        source=row.source,
        recipe=recipe_of(row),
        era=stated.era,
        generation=generation_of(cluster.gpu.name),
        stated=stated,
        candidates=candidates_of(parts),
        measured_s=step_time_of(row),
        throughput=throughput_of(row),
        memory=None if stated.offload else memory_of(row),  # a plan keeps nothing on the host
        row=row,
    )


def _require_scored(row: Row) -> None:
    if "lora" in row.task.lower():
        raise RefusedError("task: adapters are trained, not the model", row.task)
    if row.latest_in_group.lower() == "n":
        raise RefusedError("repeat: an older measurement of a recipe that is measured again", row.source_path)
    if row.quality.upper() == "C":
        raise RefusedError("quality: graded C by its source's reader", row.notes[:80])
    if step_time_of(row) is None and throughput_of(row) is None and memory_of(row) is None:
        raise RefusedError("measurement: nothing measured", row.id)


def group_of(row: Row) -> Group:
    """Dense, or experts: over EFA, with everything stated, or with something left open."""
    if not row.num_experts:
        return "dense"
    if "efa" in row.interconnect.lower():
        return "moe_efa"
    chunks_known = row.vpp is not None or row.pp == 1
    full = row.micro_batch_size is not None and bool(row.recompute) and chunks_known
    return "moe_full" if full else "moe_partial"


def recipe_of(row: Row) -> str:
    """Model, GPU and family of source: all precisions and sizes of one recipe share it."""
    source = row.source.lower()
    family = next((name for name, words in _FAMILIES.items() if any(w in source for w in words)), source)
    model = re.sub(r"[^a-z0-9.]", "", re.sub(r"\(.*?\)", "", row.model.lower()))
    return f"{family}/{model}/{row.gpu.lower()}"


_FAMILIES = {
    "vtrain": ("vtrain",),
    "aws": ("aws",),
    "simumax": ("simumax",),
    "nvidia": ("megatron", "nemo", "bridge", "moe parallel folding"),
}

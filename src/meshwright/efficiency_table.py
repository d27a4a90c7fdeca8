"""What kernels and links reach on one machine, as it was measured there: the file that `calibrate` writes.

Points are seconds of one op or collective at one size: of an op the median of samples taken in turns with all
others, of a collective their mean without the slowest. A point's size is written `512x128x256`: the dims of
its kind in the graph's order (`ir/graph.py`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, model_validator

from meshwright.errors import InputError
from meshwright.files import Noun, decode, read_yaml, to_yaml, write_text
from meshwright.machine import Machine
from meshwright.units import Count, Number
from meshwright.workload import Precision

MeasuredPhase = Literal["forward", "input_gradient", "weight_gradient", "step"]
MeasuredCollective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


def _read_sizes(value: object) -> object:
    if not isinstance(value, str):
        return value
    words = value.split("x")
    if not all(word.isascii() and word.isdecimal() and 0 < len(word) <= 15 for word in words):
        raise InputError("sizes", value, "dims are whole numbers joined by x", ["512x128x256"])
    return tuple(int(word) for word in words)


Sizes = Annotated[
    tuple[Count, ...],
    BeforeValidator(_read_sizes, json_schema_input_type=str),
    PlainSerializer(lambda sizes: "x".join(map(str, sizes)), return_type=str),
]


class OpPoint(Noun):
    """Seconds of one op at one size. `spread` is half the range between the quartiles over the median."""

    op: str
    phase: MeasuredPhase
    sizes: Sizes
    time_s: Number
    spread: Number = 0.0
    samples: Count = 1

    @model_validator(mode="after")
    def _takes_time(self) -> OpPoint:
        _require_time(self.time_s)
        return self


class LinkPoint(Noun):
    """Seconds of one collective in a group of so many local ranks; bytes as CollectiveKind counts them."""

    collective: MeasuredCollective
    ranks: Count
    bytes: Count
    time_s: Number
    spread: Number = 0.0
    samples: Count = 1

    @model_validator(mode="after")
    def _is_possible(self) -> LinkPoint:
        _require_time(self.time_s)
        if self.ranks < 2:
            raise InputError("ranks", self.ranks, "a collective joins at least two ranks", [2])
        return self


def _require_time(time_s: float) -> None:
    if time_s <= 0:
        raise InputError("time_s", time_s, "seconds above 0: what was measured took some", [1e-6])


class Kernels(Noun):
    """What one rank reaches while `ranks` of them compute on the machine at once, each with `threads`.

    `host_s`: seconds that launching one op of a block takes on top of its kernel, for blocks without experts
    (`dense`) and with them (`experts`); `step_s`: seconds of a step that no op and no collective explains.
    """

    ranks: Count
    threads: Count
    precision: Precision
    host_s: dict[Literal["dense", "experts"], Number]
    step_s: Number
    points: tuple[OpPoint, ...]

    @model_validator(mode="after")
    def _is_complete(self) -> Kernels:
        missing = next((kind for kind in ("dense", "experts") if kind not in self.host_s), None)
        if missing is not None:
            raise InputError("host_s", missing, "launch costs of blocks of both kinds are needed", ["dense"])
        if not self.points:
            raise InputError("points", [], "at least one op that was measured")
        return self


class EfficiencyTable(Noun):
    """All that was measured on a machine. `subject` names the plan whose shapes were measured, or the grid;
    `wall_s` is how long that took."""

    machine: Machine
    date: str
    subject: str
    wall_s: Number
    kernels: tuple[Kernels, ...]
    links: tuple[LinkPoint, ...] = ()

    @model_validator(mode="after")
    def _has_kernels(self) -> EfficiencyTable:
        if not self.kernels:
            raise InputError("kernels", [], "at least the kernels of one rank")
        return self

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over the whole table."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def kernels_of(self, precision: Precision, num_ranks: int) -> Kernels:
        """Those of a number type, with as many ranks at work as a cluster has, or as near as was measured.

        Raises InputError for a number type that was not measured.
        """
        of_type = [kernels for kernels in self.kernels if kernels.precision == precision]
        if not of_type:
            known = sorted({kernels.precision for kernels in self.kernels})
            rule = f"the calibration of {self.date} measured other number types; calibrate with this plan"
            raise InputError("workload.precision", precision, rule, known)
        return min(of_type, key=lambda kernels: abs(kernels.ranks - num_ranks))


def read_table(path: str | Path) -> EfficiencyTable:
    """Read a table. Raises InputError with the key's path."""
    return decode(EfficiencyTable, read_yaml(path), str(path))


def write_table(table: EfficiencyTable, path: str | Path) -> None:
    """Write a table's file, whole or not at all, a line for each point."""
    write_text(path, table_text(table))


def table_text(table: EfficiencyTable) -> str:
    """The table as YAML."""
    document: dict[str, Any] = table.model_dump(mode="json", exclude_none=True)
    heading = "# Measured by `meshwright calibrate`. Times in seconds, spread as a fraction of the time.\n"
    return heading + to_yaml(document, rows_in_lines=True)

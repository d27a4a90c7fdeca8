"""Runs whose step times are the model's own under chosen constants: what a fit must find again."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tests.validate.run_rows import EXPERTS, row_of

from meshwright.cost.constants import Constants, constants
from meshwright.validate.described import Run, describe
from meshwright.validate.predict import Prepared, prepare, step_times
from meshwright.validate.rows import Row, columns

TRUTH = {
    "slowdown.hopper": 1.5,
    "slowdown.ampere": 1.0,
    "host.dense": 40e-6,
    "host.experts": 250e-6,
}
"""Constants that these runs move, away from where a fit starts."""


def truth() -> Constants:
    """The catalogue's constants with those of TRUTH."""
    return constants().changed(TRUTH)


@cache
def rows() -> tuple[Row, ...]:
    """Dense runs and mixtures of experts on two GPUs, of a dozen recipes, that leave nothing open."""
    return tuple(_rows())


def _rows() -> Iterator[Row]:
    number = 0
    for gpu in ("H100", "A100-80GB"):
        for hidden, layers in ((1024, 8), (2048, 12), (4096, 8)):
            for tp, pp, gpus, size in ((1, 1, 8, 1), (2, 1, 8, 2), (4, 2, 16, 4), (8, 1, 32, 8)):
                number += 1
                given: dict[str, Any] = {
                    "id": f"S-{number}",
                    "model": f"dense {hidden}",
                    "gpu": gpu,
                    "hidden_size": hidden,
                    "feed_forward_size": 4 * hidden,
                    "num_layers": layers,
                    "num_heads": hidden // 64,
                    "num_kv_heads": hidden // 64,
                    "tp": tp,
                    "pp": pp,
                    "vpp": 1,
                    "num_gpus": gpus,
                    "micro_batch_size": size,
                    "global_batch_size": 128,
                    "year": 2025,
                    "interconnect": "NVLink; InfiniBand 400Gb/s per GPU",
                }
                yield row_of(**given)
        for shared in (0, 1, 2):
            number += 1
            more = {
                "model": f"experts {shared}",
                "num_shared_experts": shared,
                "dispatcher_overlap": "alltoall",
            }
            yield row_of(id=f"S-{number}", gpu=gpu, etp=1, year=2025, **EXPERTS, **more)


def run_of(row: Row) -> Run:
    """A row as a run."""
    run = describe(row)
    assert isinstance(run, Run), run
    return run


@cache
def measured() -> tuple[Prepared, ...]:
    """The runs priced by curves, their measurement being what the model gives under the true constants."""
    return tuple(_measured(row) for row in rows())


def _measured(row: Row) -> Prepared:
    prepared = prepare(run_of(row))
    seconds = float(np.median(step_times(prepared, truth())))
    return replace(prepared, run=replace(prepared.run, measured_s=seconds))


def write(path: Path, table: Sequence[Row]) -> str:
    """A table of rows as the file that `validate` reads."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns())
        writer.writerows([_cell(value) for value in astuple(row)] for row in table)
    return str(path)


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return "y" if value else "n"
    return "" if value is None else value

"""Rows that stand for many bases: the distinct values of the columns that something depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meshwright.planner.space import Bases, joined

Array = Any


class Keys:
    """The distinct values of some columns of the bases of some pipeline degrees, and which each base has."""

    def __init__(self, bases: Mapping[int, Bases], names: tuple[str, ...]) -> None:
        every = joined(list(bases.values()))
        columns = np.stack([getattr(every, name).astype(np.int64) for name in names], axis=1)
        _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        self.rows = every.where(first)
        ends = np.cumsum([len(one) for one in bases.values()])
        self.of = dict(zip(bases, np.split(inverse.reshape(-1), ends[:-1]), strict=True))


def positions(rows: Bases, among: Bases, names: Sequence[str]) -> Array:
    """Where each row stands among others that are ordered by these columns and differ in them."""
    code, wanted = np.zeros(len(among), np.int64), np.zeros(len(rows), np.int64)
    for name in names:
        values = np.unique(getattr(among, name))
        code = code * len(values) + np.searchsorted(values, getattr(among, name))
        wanted = wanted * len(values) + np.searchsorted(values, getattr(rows, name))
    return np.searchsorted(code, wanted)


LONGEST_COUNTED = 2**22
"""Tokens of a sequence up to which FLOPs of attention are counted in whole numbers of 64 bits."""


def counted(rows: Bases, sequence_length: int) -> Bases:
    """Rows as they are, in whole numbers, whose division is fast; as floats where products would overflow."""
    if sequence_length <= LONGEST_COUNTED:
        return rows
    return rows.with_columns({name: column * 1.0 for name, column in rows.columns().items()})


def op_degrees(rows: Bases) -> Any:
    """Ranks along each axis that divides an op's dims, as `degrees_of` of one layout."""
    sp = np.where(rows.sequence_parallel, rows.tp, 1)
    return {"tp": rows.tp, "cp": rows.cp, "ep": rows.ep, "etp": rows.etp, "sp": sp}

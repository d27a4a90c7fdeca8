"""What a document states about a deployment, to be held against what its description gives."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from meshwright.errors import InputError
from meshwright.files import Noun
from meshwright.layout import LayoutRequest
from meshwright.units import Count, Share, parse_number

MAX_FIGURES = 1000


class ClaimedLayout(LayoutRequest):
    """The degrees as the document states them; they need not be possible.

    `num_micro_batches` is how many micro-batches the document says one step is cut into.
    """

    num_micro_batches: Count | None = None


class Conditions(Noun):
    """For which workload a figure is stated, where it is not the whole document's."""

    sequence_length: Count | None = None
    micro_batch_size: Count | None = None
    sequences_per_replica: Count | None = None


def _read_value(value: object) -> object:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise InputError("value", value, "a list of figures holds text such as 0-127")
        return tuple(value)
    return parse_number(value)


class Figure(Noun):
    """One stated figure. The same id may be stated more than once, each with its own formula.

    `formula` is the document's own arithmetic in numbers and units, such as `128 / 0.016 s`; `tolerance`
    widens the rounding of the printed digits for a figure that the document calls approximate.
    """

    id: str
    value: Annotated[float | str | tuple[str, ...], BeforeValidator(_read_value)]
    formula: str | None = None
    where: str = ""
    at: Conditions = Conditions()
    tolerance: Share | None = None


class Claims(Noun):
    """Everything that a document states. `assumptions` names keys of the description that the document
    leaves open, each with the reason for the value that stands there."""

    document: str = ""
    layout: ClaimedLayout = ClaimedLayout()
    figures: tuple[Figure, ...] = ()
    assumptions: dict[str, str] = {}

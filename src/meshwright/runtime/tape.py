"""Routing decisions kept for full recompute: made again, a near tie could fall the other way.

The first run of a layer records each decision; a second run of it replays them in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Tape:
    """The decisions of one run of a layer. `place` is the next one to replay; None while recording."""

    def __init__(self) -> None:
        self.decisions: list[Any] = []
        self.place: int | None = None

    @property
    def replays(self) -> bool:
        """Whether decisions are being used again."""
        return self.place is not None

    def next_decision(self) -> Any:
        """The next decision to use again; None while recording."""
        if self.place is None:
            return None
        self.place += 1
        return self.decisions[self.place - 1]


_current: ContextVar[Tape | None] = ContextVar("routing_tape", default=None)


def current_tape() -> Tape | None:
    """The tape of the layer at work, if its decisions are kept."""
    return _current.get()


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """While active, routing adds its decisions to the tape."""
    yield from _using(tape, None)


@contextmanager
def replaying(tape: Tape) -> Iterator[None]:
    """While active, routing takes its decisions from the tape."""
    yield from _using(tape, 0)


def _using(tape: Tape, place: int | None) -> Iterator[None]:
    tape.place = place
    token = _current.set(tape)
    try:
        yield
    finally:
        _current.reset(token)

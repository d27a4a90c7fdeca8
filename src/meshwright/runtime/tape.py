"""Routing decisions kept for full recompute: made again, a near tie could fall the other way.

The first run of a checkpointed layer records each decision; every later run of it replays them in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

_current: ContextVar[Tape | None] = ContextVar("routing_tape", default=None)


class Tape:
    """The decisions of one run of a layer."""

    def __init__(self) -> None:
        self.decisions: list[Any] = []
        self.place: int | None = None

    def next_decision(self) -> Any | None:
        """The decision to use again; None while recording."""
        if self.place is None:
            return None
        decision = self.decisions[self.place]
        self.place += 1
        return decision


def current_tape() -> Tape | None:
    """The tape of the layer that is being run, if it is one that is run again."""
    return _current.get()


def recording_and_replaying() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What torch.utils.checkpoint wants as `context_fn`: one context for the first run, one for later ones."""
    tape = Tape()
    return _using(tape, replays=False), _Replay(tape)


@contextmanager
def _using(tape: Tape, replays: bool) -> Iterator[None]:
    tape.place = 0 if replays else None
    token = _current.set(tape)
    try:
        yield
    finally:
        _current.reset(token)


class _Replay:
    """A context that can be entered as often as backward needs the layer: split backward needs it twice."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = _using(self.tape, replays=True)
        self.entered.append(context)
        context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)

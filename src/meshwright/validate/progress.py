"""How what takes a while says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def unheard(what: str, done: int, of: int) -> None:
    """Progress that nobody watches."""

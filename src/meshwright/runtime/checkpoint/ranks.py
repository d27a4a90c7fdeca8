"""Ranks that act together: an error on one of them becomes the same error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from meshwright.errors import MeshwrightError

T = TypeVar("T")
R = TypeVar("R")


class Ranks:
    """The ranks of a process group; one rank alone where torch.distributed is not initialised.

    Messages are Python objects: a group over gloo spares a GPU the copies.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.group = process_group
        self.rank = dist.get_rank(process_group) if self.distributed else 0
        self.size = dist.get_world_size(process_group) if self.distributed else 1
        if self.rank < 0:
            raise MeshwrightError("this rank is not one of the process group that was given")

    @property
    def is_first(self) -> bool:
        """Whether this rank decides for all."""
        return self.rank == 0

    def concluded(self, doing: str, work: Callable[[], T], conclude: Callable[[list[T]], R]) -> R:
        """Do work on every rank and draw a conclusion on the first; every rank returns it.

        Where work or the conclusion fails, every rank raises one MeshwrightError with the message of the
        lowest rank that failed.
        """
        outcome = _outcome(doing, work)
        outcomes = contact(doing, lambda: self._gather(outcome[:2]))
        verdict: tuple[Any, str | None] = (None, None)
        if outcomes is not None:
            failures = [message for _, message in outcomes if message is not None]
            if failures:
                verdict = (None, failures[0])
            else:
                values = [cast(T, value) for value, _ in outcomes]
                verdict = _outcome(doing, lambda: conclude(values))[:2]
        result, message = contact(doing, lambda: self._broadcast(verdict))
        if message is not None:
            raise MeshwrightError(message) from outcome[2]
        return cast(R, result)

    def together(self, doing: str, work: Callable[[], T]) -> T:
        """Do work on every rank and return this rank's result, once all have succeeded."""
        kept: list[T] = []
        self.concluded(doing, lambda: kept.append(work()), lambda _: None)
        return kept[0]

    def first_does(self, doing: str, work: Callable[[], R]) -> R:
        """Do work on the first rank; every rank returns its result."""
        return self.concluded(doing, lambda: None, lambda _: work())

    def _gather(self, value: T) -> list[T] | None:
        if not self.distributed:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, group=self.group, group_dst=0)
        return values

    def _broadcast(self, value: T) -> T:
        if not self.distributed:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return cast(T, values[0])


def contact(doing: str, exchange: Callable[[], T]) -> T:
    """Run an exchange among ranks; when a rank is gone, say so."""
    try:
        return exchange()
    except RuntimeError as error:  # what torch.distributed raises when a peer closes the connection
        raise MeshwrightError(f"{doing}: another rank does not answer") from error


def message_of(doing: str, error: BaseException) -> str:
    """An error as one message for people."""
    if isinstance(error, MeshwrightError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{doing}: {where}{error.strerror}"
    return f"{doing}: {type(error).__name__}: {error}"


def _outcome(doing: str, work: Callable[[], T]) -> tuple[T | None, str | None, Exception | None]:
    """A result, or a message and the error behind it."""
    try:
        return work(), None, None
    except Exception as error:  # an error that stays on one rank would leave the others waiting
        return None, message_of(doing, error), error

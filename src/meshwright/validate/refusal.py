"""Why a row is not scored."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from meshwright.errors import MeshwrightError


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is not scored: a reason that is counted, and what it was in this row."""

    id: str
    reason: str
    detail: str = ""


class RefusedError(MeshwrightError):
    """Raised where a row turns out to state what cannot be priced."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


def words_of(error: ValueError) -> str:
    """The first thing that is wrong, in one line."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error).splitlines()[0]

"""What people see on a terminal. Every show_… function writes to a rich console that `rendered` makes."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 110
"""Columns of an output that is not a terminal: a file, a pipe."""
_NARROWEST = 60


def rendered(show: Callable[[Console], None], is_terminal: bool = False, width: int | None = None) -> str:
    """The text of an output: with colours at the width of the terminal, or plain and 110 columns wide."""
    from rich.console import Console  # here, because `printable` alone needs none of it

    if width is None:
        size = shutil.get_terminal_size((PLAIN_WIDTH, 50)).columns if is_terminal else PLAIN_WIDTH
        width = max(size, _NARROWEST)
    text = io.StringIO()
    console = Console(
        file=text,
        force_terminal=is_terminal,
        color_system="auto" if is_terminal else None,
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    show(console)
    return "\n".join(line.rstrip() for line in text.getvalue().split("\n"))


def printable(text: str) -> str:
    """Text on one line without control characters: names come from files and must not steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text).split())

"""What can go wrong, as one small tree.

MeshwrightError          anything meshwright says to its user; the message is the whole story
└── InputError           a file, flag or figure that cannot be used; exit code 2
"""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN_VALUE_LENGTH = 80


class MeshwrightError(Exception):
    """Base of every error that is a message to the user rather than a defect."""


class InputError(MeshwrightError, ValueError):
    """A value that breaks a rule: names the key, the value, the rule and the nearest valid values.

    It is a ValueError too, so that a pydantic validator may raise it and the file's path be added above.
    """

    def __init__(self, key: str, value: object, rule: str, nearest: Sequence[object] = ()) -> None:
        self.key = key
        self.value = value
        self.rule = rule
        self.nearest = tuple(nearest)
        super().__init__(self._message())

    def _message(self) -> str:
        text = f"{self.key}: {shown(self.value)}: {self.rule}"
        if self.nearest:
            text += f" (nearest: {', '.join(str(value) for value in self.nearest)})"
        return text


def shown(value: object) -> str:
    """One line of a value for a message, cut so that hostile input cannot fill the screen."""
    try:
        text = repr(value)
    except ValueError:  # integers beyond the interpreter's digit limit refuse to print
        text = f"<{type(value).__name__} too large to print>"
    return text if len(text) <= _SHOWN_VALUE_LENGTH else text[: _SHOWN_VALUE_LENGTH - 1] + "…"

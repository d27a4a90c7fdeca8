"""How exactly a document states a figure: to half of the last digit that it prints."""

from __future__ import annotations

import re
from decimal import Decimal

from meshwright.claims import Figure

PRINTED = re.compile(r"\s*[+-]?\d*(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?")


def half_last_digit(figure: Figure, stated: float) -> float:
    """Half of the last digit that the document printed, in SI units.

    `58.6 MB` is printed to 0.1 MB, `16 ms` to 1 ms. A plain number has lost its trailing zeros on reading,
    so at least two of its digits count: 47e9 is printed to 1e9, and so is 30e9.
    """
    if stated == 0:
        return 0.0
    if isinstance(figure.value, str):
        match = PRINTED.match(figure.value)
        if match is None:
            return 0.0
        decimals, exponent = match.groups()
        number = float(match.group(0))
        step = 10.0 ** (int(exponent or 0) - len(decimals or ""))
        return 0.5 * step * abs(stated / number) if number else 0.0
    _, digits, power = Decimal(repr(stated)).normalize().as_tuple()
    step = 10.0 ** (int(power) - (len(digits) < 2))
    return 0.5 * step


def slack(figure: Figure, stated: float) -> float:
    """How far from an interval a stated value may lie and still be inside it as it was printed."""
    return max(half_last_digit(figure, stated), (figure.tolerance or 0.0) * abs(stated)) * (1 + 1e-9)

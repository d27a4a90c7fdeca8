"""Arithmetic that works on one number and, elementwise, on a NumPy array of numbers, without NumPy.

Sizes are typed `int` throughout: where one call answers for many layouts, an array stands in an int's place.
"""

from __future__ import annotations

from math import ceil


def larger(a: int, b: int) -> int:
    """The larger of two."""
    return a + (b - a) * (b > a)


def smaller(a: int, b: int) -> int:
    """The smaller of two."""
    return a + (b - a) * (b < a)


def rounded_up(amount: float) -> int:
    """The next whole number."""
    if isinstance(amount, int | float):
        return ceil(amount)
    below: int = amount.astype("int64")
    return below + (amount > below)


def rounded(amount: float) -> int:
    """The nearest whole number, of two the even one."""
    return round(amount) if isinstance(amount, int | float) else amount.round()


def is_one(amount: int) -> bool:
    """Whether this is the number one; an array never is, whatever it holds."""
    return isinstance(amount, int) and amount == 1


def is_nothing(amount: int) -> bool:
    """Whether this is the number zero; an array never is, whatever it holds."""
    return isinstance(amount, int) and amount == 0


def is_everywhere_nothing(amount: int) -> bool:
    """Whether this is zero, or an array of zeros."""
    return amount == 0 if isinstance(amount, int | float) else not amount.any()

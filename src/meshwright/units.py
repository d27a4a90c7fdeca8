"""Quantities with units: parsed from text, kept as SI numbers, printed for people.

Files carry strings such as `64 GB`, `1.8 TB/s`, `400 TFLOP/s`, `16 ms` and `60%`. GB is 10⁹ bytes,
GiB 2³⁰ bytes, Gb 10⁹ bits. Inside the code every quantity is an SI number whose unit is the suffix of
its name (`_bytes`, `_s`, `_flops_per_s`, `_bytes_per_s`, `_fraction`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from meshwright.errors import InputError, shown

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_SHOWN_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?)\s*([A-Za-zµμ%/]*)\s*\Z", re.ASCII)
_LONGEST_QUANTITY = 40
_DIGITS = Context(prec=20)

MAX_COUNT = 2**53
"""Largest count that is taken: beyond it a float no longer tells neighbouring integers apart."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One kind of quantity: the units it is written in, and the range a value may have."""

    name: str
    units: dict[str, Fraction]
    shown_unit: str
    smallest: float
    largest: float
    example: str

    def parse(self, text: object, key: str = "value") -> float:
        """The quantity in SI units. Raises InputError for a bare number, a wrong unit or a wild value."""
        if isinstance(text, bool) or not isinstance(text, int | float | str):
            raise InputError(key, text, f"a {self.name} is written as text with its unit", [self.example])
        if not isinstance(text, str):
            raise InputError(key, text, f"a {self.name} needs a unit", self._guesses(shown(text)))
        match = _QUANTITY.match(text) if len(text) <= _LONGEST_QUANTITY else None
        if match is None:
            raise InputError(key, text, f"not a {self.name}: a number and a unit", [self.example])
        number, unit = match.groups()
        if unit not in self.units:
            raise InputError(key, text, self._wrong_unit(unit), self._guesses(number))
        value = float(Fraction(number) * self.units[unit])
        if not self.smallest <= value <= self.largest:
            rule = f"a {self.name} lies between {self.format(self.smallest)} and {self.format(self.largest)}"
            raise InputError(key, text, rule, [self.example])
        return value

    def _wrong_unit(self, unit: str) -> str:
        return f"a {self.name} needs a unit" if not unit else f"{unit!r} is no unit of a {self.name}"

    def _guesses(self, number: str) -> list[str]:
        plain = re.fullmatch(r"\d{1,12}(\.\d{1,12})?", number, re.ASCII) is not None
        if not plain or not 0 < float(number) <= 10**9:  # negative, infinite, endless: no guess
            return [self.example]
        if self.shown_unit == "%":
            value = float(number) * (100 if float(number) <= 1 else 1)
            return [f"{value:.6g}%" if value <= 100 else self.example]
        common = [self.shown_unit] if self.shown_unit == "s" else []
        common += [unit for unit in self.units if unit.startswith(("G", "T", "m")) and "i" not in unit]
        return [f"{number} {unit}" for unit in common[:3]]

    def format(self, value: float) -> str:
        """Text that reads well: four significant digits, with a decimal prefix."""
        if self.shown_unit == "s":
            return _format_seconds(value)
        if self.shown_unit == "%":
            return f"{100 * value:.4g}%"
        number = float(f"{value:.4g}")  # rounded before the prefix is chosen: 999,999 B are 1 MB
        prefix = next((p for p in reversed(_SHOWN_PREFIXES) if abs(number) >= _DECIMAL[p]), "")
        return f"{number / _DECIMAL[prefix]:.4g} {prefix}{self.shown_unit}"

    def format_exact(self, value: float) -> str:
        """Text that `parse` reads back to the very same number, with as few digits as may be, for files."""
        shortest = Fraction(repr(float(value)) if isinstance(value, float) else value)
        numbers = [(_decimal(shortest / self.units[unit]), unit) for unit in self._file_units()]
        number, unit = min((pair for pair in numbers if pair[0]), key=lambda pair: len(pair[0]))
        return f"{number} {unit}"

    def _file_units(self) -> list[str]:
        """Units to write in: every unit of times and shares, and every prefix of the shown unit."""
        if self.shown_unit in ("s", "%"):
            return list(self.units)
        prefixes = _SHOWN_PREFIXES if self.shown_unit != "B" else (*_SHOWN_PREFIXES, *_BINARY)
        return [prefix + self.shown_unit for prefix in prefixes]


def _decimal(number: Fraction) -> str:
    """The number in decimal digits, or nothing where they do not end within twenty."""
    digits = _DIGITS.divide(Decimal(number.numerator), Decimal(number.denominator))
    return f"{digits.normalize(_DIGITS):f}" if Fraction(digits) == number else ""


def _format_seconds(value: float) -> str:
    number = float(f"{value:.4g}")
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(number) >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number / 1e-9:.4g} ns"


def _prefixed(*bases: tuple[str, Fraction]) -> dict[str, Fraction]:
    table: dict[str, Fraction] = {}
    for base, scale in bases:
        for prefix, factor in (_DECIMAL | _BINARY).items():
            table[prefix + base] = factor * scale
    return table


_BIT = Fraction(1, 8)
BYTES = Dimension("size", _prefixed(("B", Fraction(1)), ("b", _BIT)), "B", 1, 1e18, "64 GB")
BYTES_PER_S = Dimension(
    "bandwidth",
    _prefixed(
        ("B/s", Fraction(1)),
        ("Bps", Fraction(1)),
        ("b/s", _BIT),
        ("bps", _BIT),
        ("bit/s", _BIT),
    ),
    "B/s",
    1,
    1e16,
    "450 GB/s",
)
FLOPS_PER_S = Dimension(
    "compute rate",
    {
        u: f
        for u, f in _prefixed(
            ("FLOP/s", Fraction(1)), ("FLOPS", Fraction(1)), ("FLOPs", Fraction(1)), ("FLOPs/s", Fraction(1))
        ).items()
        if "i" not in u
    },
    "FLOP/s",
    1,
    1e18,
    "400 TFLOP/s",
)
SECONDS = Dimension(
    "time",
    {
        "s": Fraction(1),
        "ms": Fraction(1, 10**3),
        "us": Fraction(1, 10**6),
        "µs": Fraction(1, 10**6),
        "μs": Fraction(1, 10**6),
        "ns": Fraction(1, 10**9),
        "min": Fraction(60),
        "h": Fraction(3600),
    },
    "s",
    1e-12,
    1e9,
    "16 ms",
)
FRACTION = Dimension("share", {"%": Fraction(1, 100)}, "%", 1e-9, 1.0, "60%")


def parse_count(value: object, key: str = "value") -> int:
    """A whole positive number, written `512` or `30e9`. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(key, value, "a count is a plain whole number", _count_guess(value))
    if isinstance(value, float) and (not math.isfinite(value) or value != math.floor(value)):
        near = [math.floor(value), math.ceil(value)] if math.isfinite(value) and value > 0 else []
        raise InputError(key, value, "a count is a whole number", [n for n in near if n > 0])
    if not 0 < value <= MAX_COUNT:
        raise InputError(key, value, "a count lies between 1 and 2^53", [1] if value <= 0 else [MAX_COUNT])
    return int(value)


def _count_guess(value: object) -> list[object]:
    """The plain number that somebody meant by `30B`, `1,024` or `"30.5e9"`."""
    text = re.sub(r"[,_\s]", "", value[:_LONGEST_QUANTITY]) if isinstance(value, str) else ""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(?:[eE](\d{1,2}))?\s*([kKMBGT]?)", text, re.ASCII)
    if match is None:
        return []
    power = int(match[2] or 0) + {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12}[match[3].upper()]
    number = Fraction(match[1]) * 10**power
    return [int(number)] if number.denominator == 1 and 0 < number <= MAX_COUNT else []


def parse_count_or_zero(value: object, key: str = "value") -> int:
    """Like `parse_count`, with 0 allowed."""
    if not isinstance(value, bool) and isinstance(value, int | float) and value == 0:
        return 0
    return parse_count(value, key)


def parse_number(value: object, key: str = "value") -> float:
    """A finite real number, bounded by ±10³⁰. Raises InputError for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(key, value, "a number is needed")
    if isinstance(value, int) and abs(value) > 10**30:
        raise InputError(key, value, "a number lies between -1e30 and 1e30")
    if not math.isfinite(value) or abs(value) > 1e30:
        raise InputError(key, value, "a number is finite and lies between -1e30 and 1e30")
    return float(value)


def format_count(value: float) -> str:
    """`30.53 B`, `58.6 M`, `1,024`: counts as people say them."""
    number = float(f"{value:.4g}")
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= scale and abs(value) >= 1e6:
            return f"{number / scale:.4g} {letter}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _schema(dimension: Dimension) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "string",
            "examples": [dimension.example],
            "description": f"a {dimension.name} with its unit",
        }
    )


_COUNT_SCHEMA = {"type": "number", "maximum": MAX_COUNT, "multipleOf": 1}

# Types of file fields. On reading they take text with a unit; in the code they are SI numbers.
Bytes = Annotated[
    int,
    BeforeValidator(lambda text: round(BYTES.parse(text))),
    PlainSerializer(BYTES.format_exact, return_type=str),
    _schema(BYTES),
]
BytesPerSecond = Annotated[
    float,
    BeforeValidator(lambda text: BYTES_PER_S.parse(text)),
    PlainSerializer(BYTES_PER_S.format_exact, return_type=str),
    _schema(BYTES_PER_S),
]
FlopsPerSecond = Annotated[
    float,
    BeforeValidator(lambda text: FLOPS_PER_S.parse(text)),
    PlainSerializer(FLOPS_PER_S.format_exact, return_type=str),
    _schema(FLOPS_PER_S),
]
Seconds = Annotated[
    float,
    BeforeValidator(lambda text: SECONDS.parse(text)),
    PlainSerializer(SECONDS.format_exact, return_type=str),
    _schema(SECONDS),
]
Share = Annotated[
    float,
    BeforeValidator(lambda text: FRACTION.parse(text)),
    PlainSerializer(FRACTION.format_exact, return_type=str),
    _schema(FRACTION),
]
Count = Annotated[
    int,
    BeforeValidator(lambda value: parse_count(value)),
    WithJsonSchema({**_COUNT_SCHEMA, "minimum": 1}),
]
CountOrZero = Annotated[
    int,
    BeforeValidator(lambda value: parse_count_or_zero(value)),
    WithJsonSchema({**_COUNT_SCHEMA, "minimum": 0}),
]
Number = Annotated[
    float,
    BeforeValidator(lambda value: parse_number(value)),
    WithJsonSchema({"type": "number"}),
]

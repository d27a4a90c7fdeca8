"""A document's own arithmetic: numbers, units, + − * / and parentheses, evaluated without running code."""

from __future__ import annotations

import ast
import math
import re

from meshwright.errors import InputError
from meshwright.units import BYTES, BYTES_PER_S, FLOPS_PER_S, FRACTION, SECONDS

MAX_LENGTH = 200
MAX_DEPTH = 40
_TERM = re.compile(r"(\d+\.?\d*(?:[eE][+-]?\d{1,2})?|\.\d+)\s*([A-Za-zµμ%]+(?:/s)?)?")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TIMES = re.compile(r"(?<=[\d)])\s+x\s+(?=[\d(])")


def evaluate(formula: str, key: str) -> float:
    """The value of a formula such as `128 / 0.016 s`, in SI units; units are not tracked through it.

    Raises InputError for anything but numbers with units, + − * / and parentheses.
    """
    if len(formula) > MAX_LENGTH:
        raise InputError(key, formula, f"a formula has at most {MAX_LENGTH} characters")
    plain = _TIMES.sub(" * ", _THOUSANDS.sub("", formula.translate(_SIGNS)))
    text = _TERM.sub(lambda match: _number(match, key), plain)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        value = _value(tree.body, key, formula, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise _refusal(key, formula) from None
    except ZeroDivisionError:
        raise InputError(key, formula, "the formula divides by zero") from None
    if not math.isfinite(value):
        raise InputError(key, formula, "the formula's value is not finite")
    return value


def _number(match: re.Match[str], key: str) -> str:
    number, unit = match.groups()
    if unit is None:
        return repr(float(number))
    if unit == "B":
        rule = "B may mean bytes or billions here"
        raise InputError(key, f"{number} {unit}", rule, [f"{number}e9", f"{number} bytes"])
    if unit in ("bytes", "byte"):
        return repr(float(number))
    for dimension in (BYTES, SECONDS, FLOPS_PER_S, FRACTION, BYTES_PER_S):
        if unit in dimension.units:
            return repr(float(number) * float(dimension.units[unit]))
    raise InputError(
        key, f"{number} {unit}", "not a unit that a formula may use", ["GB", "s", "TFLOP/s", "%"]
    )


def _value(node: ast.expr, key: str, formula: str, depth: int) -> float:
    if depth > MAX_DEPTH:
        raise _refusal(key, formula)
    match node:
        case ast.Constant(value=float() | int() as number) if not isinstance(number, bool):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, key, formula, depth + 1)
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = _value(left, key, formula, depth + 1), _value(right, key, formula, depth + 1)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
    raise _refusal(key, formula)


def _refusal(key: str, formula: str) -> InputError:
    rule = "a formula holds numbers with units, + - * / and parentheses only"
    return InputError(key, formula, rule, ["8 * 4 * 16 * 4", "128 / 0.016 s"])

"""The document's own arithmetic is evaluated exactly and nothing but arithmetic is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.audit.arithmetic import evaluate
from meshwright.errors import InputError


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("8 * 4 * 16 * 4", 2048),
        ("8 × 4 × 16 × 4", 2048),
        ("8 x 4 x 16 x 4", 2048),
        ("1,024 / 8", 128),
        ("4 * 2 bytes", 8),
        ("128 ÷ 4", 32),
        ("128 / 0.016 s", 8000),
        ("400 TFLOP/s * 60%", 240e12),
        ("490.4 MB / 64 GB", 0.0076625),
        ("58.6 MB + 256 MB + 58.6 MB + 117.2 MB", 490.4e6),
        ("(1 + 2) * -3", -9),
        ("2 * 64 GiB", 2 * 64 * 2**30),
        ("30e9 / 512", 58593750),
    ],
)
def test_formulas(formula: str, value: float) -> None:
    assert evaluate(formula, "formula") == pytest.approx(value, rel=1e-12)


NOT_ARITHMETIC = (
    """
__import__('os').system('true')|2 ** 99999999|a + 1|1 if 1 else 2|[1]*9||1 +|(1|1; 2|lambda: 1|9 ** 9 ** 9
|1 / 0|3 parsecs|1e99 * 1e99 * 1e99 * 1e99|True + 1|1_000|0x10|30B / 512|1,00|1 @ 2
""".strip()
    .replace("\n", "")
    .split("|")
)


@pytest.mark.parametrize("formula", [*NOT_ARITHMETIC, "-" * 90 + "1", "1 +" * 60 + "1", "1" * 300])
def test_anything_else_is_refused(formula: str) -> None:
    with pytest.raises(InputError):
        evaluate(formula, "formula")


@given(st.text(max_size=60))
def test_any_text_gives_a_number_or_one_clear_error(text: str) -> None:
    try:
        value: object = evaluate(text, "formula")
    except InputError as error:
        value = str(error)
    assert isinstance(value, float) or (isinstance(value, str) and "\n" not in value)

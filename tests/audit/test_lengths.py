"""Verdicts over a range of sequence lengths, on curves whose break-even lengths are known."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from meshwright.audit.answer import AtLength
from meshwright.audit.lengths import SAMPLES, judged, sampled


def curve_of(value: Callable[[int], float], factor: float = 1.25) -> Callable[[int], AtLength]:
    """A curve with an interval of a factor either way; it counts nothing and remembers nothing."""
    return lambda length: AtLength(length, value(length), value(length) / factor, value(length) * factor)


def linear(length: int) -> float:
    """A step of 1 ms a token: 128 ms to 10.24 s, whose interval is 0.8 to 1.25 of that."""
    return 1e-3 * length


def verdict(stated: float, value: Callable[[int], float] = linear, slack: float = 0.0) -> tuple[str, str]:
    return judged(curve_of(value), stated, slack, sampled(128, 10240, 128), 128)


def test_samples_are_equal_ratios_between_the_ends() -> None:
    assert sampled(128, 10240, 128) == [128, 384, 1152, 3456, 10240]  # ratio 80^(1/4) = 2.99
    assert sampled(100, 101, 1) == [100, 101]
    assert sampled(4096, 4096, 4096) == [4096]
    assert len(sampled(1, 10**6, 1)) == SAMPLES


def test_inside_at_every_length_holds() -> None:
    assert verdict(1.0, lambda length: 1.0 + 1e-5 * length) == (
        "holds",
        "lies inside the interval at every length",
    )


@pytest.mark.parametrize(("stated", "side"), [(0.1, "below"), (12.9, "above")])
def test_outside_at_every_length_fails(stated: float, side: str) -> None:
    # The interval begins at 0.8 · 0.128 = 0.1024 and ends at 1.25 · 10.24 = 12.8.
    assert verdict(stated) == ("fails", f"lies {side} the interval at every length")


@pytest.mark.parametrize(
    ("stated", "words", "exact"),
    [
        # 0.12 s is inside while 0.8 · length < 0.12 s: below 150 tokens.
        (0.12, "below", (150,)),
        # 1 s is inside from 1 s / 1.25 = 800 tokens to 1 s / 0.8 = 1,250.
        (1.0, "between", (800, 1250)),
        # 11 s is inside from 11 s / 1.25 = 8,800 tokens on.
        (11.0, "above", (8800,)),
    ],
)
def test_the_lengths_at_which_it_can_hold_are_found(
    stated: float, words: str, exact: tuple[int, ...]
) -> None:
    found, text = verdict(stated)
    assert found == "undetermined"
    assert words in text
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]
    assert len(numbers) == len(exact)
    for number, length in zip(numbers, exact, strict=True):
        assert abs(number - length) <= 128 + 0.05 * length  # whole steps of 128 tokens, two digits


def test_a_value_between_the_ends_is_never_a_failure() -> None:
    """Outside at both ends and at every sample, but crossed between two of them."""
    found, text = judged(curve_of(linear, 1.0001), 2.0, 0.0, sampled(128, 10240, 128), 128)
    assert found == "undetermined"
    assert text == "can hold at about 2,000 tokens only"


def test_a_curve_that_comes_back_has_two_ranges() -> None:
    def valley(length: int) -> float:
        return 1.0 if 512 < length < 2048 else 4.0

    found, text = verdict(4.0, valley)
    assert found == "undetermined"
    assert re.fullmatch(r"can hold below about \d+ tokens and above about [\d,]+ tokens only", text)


def test_one_length_is_named_once() -> None:
    one = judged(curve_of(linear), 4.0, 0.0, sampled(4096, 4096, 1), 1)
    assert one == ("holds", "lies inside the interval")
    assert judged(curve_of(linear), 40.0, 0.0, [4096], 1) == ("fails", "lies above the interval")


def test_what_was_rounded_away_counts_as_inside() -> None:
    """12.9 s printed to 0.1 s may be 12.85 s: still outside; printed to 1 s it is inside at the end."""
    assert verdict(12.9, slack=0.05)[0] == "fails"
    assert verdict(13.0, slack=0.5)[0] == "undetermined"

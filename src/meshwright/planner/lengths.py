"""The sequence lengths that a plan is ranked on, as a few lengths with shares that add up to 1.

A range without a mean is uniform. With a mean it is the truncated exponential of that mean, which assumes
nothing else (of all distributions between two bounds with a mean it has the largest entropy). A histogram is
what it counts. More than MOST lengths become MOST parts of equal probability, each at its own mean, rounded
to a multiple of gcd(min, max), which every legal layout cuts evenly. A plan must fit at the longest length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import expm1, gcd, log1p

from meshwright.workload import LengthCounts, LengthRange, Workload

MOST = 5


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens with their shares, in ascending order, and where they come from."""

    shares: tuple[tuple[int, float], ...]
    words: str

    @property
    def mean_tokens(self) -> float:
        """Mean length of those that are ranked on."""
        return sum(length * share for length, share in self.shares)


def lengths_of(workload: Workload) -> Lengths:
    """The lengths that plans for a workload are ranked on."""
    shortest, longest = workload.min_sequence_length, workload.max_sequence_length
    if shortest == longest:
        return Lengths(((longest, 1.0),), f"{longest:,} tokens")
    step = gcd(shortest, longest)
    match workload.sequence_length:
        case LengthRange() as given:
            rate = 0.0 if given.mean is None else _rate(given.min, given.max, given.mean)
            means = _means(given.min, given.max, rate)
            kind = "uniform" if given.mean is None else f"truncated exponential of mean {given.mean:,}"
            words = f"{given.min:,}–{given.max:,} tokens, assumed {kind}"
            return Lengths(_rounded([(mean, 1 / MOST) for mean in means], step, shortest, longest), words)
        case LengthCounts() as counts:
            words = f"{shortest:,}–{longest:,} tokens, as counted"
            return Lengths(_rounded(_of_counts(counts.counts), step, shortest, longest), words)
    raise AssertionError("one length is no range")


def _rounded(
    parts: Sequence[tuple[float, float]], step: int, shortest: int, longest: int
) -> tuple[tuple[int, float], ...]:
    shares: dict[int, float] = {}
    for mean, share in parts:
        length = min(max(round(mean / step) * step, shortest), longest)
        shares[length] = shares.get(length, 0.0) + share
    return tuple(sorted(shares.items()))


def _of_counts(counts: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """Each length with its share, or MOST parts of equal probability where there are more lengths."""
    ordered = sorted(counts)
    total = sum(count for _, count in ordered)
    if len({length for length, _ in ordered}) <= MOST:
        return [(float(length), count / total) for length, count in ordered]
    tokens, left = [0.0] * MOST, [total / MOST] * MOST
    part = 0
    for length, count in ordered:
        rest = float(count)
        while rest > 0 and part < MOST:
            taken = min(rest, left[part])
            tokens[part] += taken * length
            left[part] -= taken
            rest -= taken
            if left[part] <= 1e-9 * total:
                part += 1
    return [(of_part / (total / MOST), 1 / MOST) for of_part in tokens]


def _rate(low: float, high: float, mean: float) -> float:
    """λ of the density e^(−λx) between two bounds that has this mean, per token; found by halving."""
    width, target = high - low, (mean - low) / (high - low)
    least, most = -700.0, 700.0
    for _ in range(200):
        middle = (least + most) / 2
        if _mean_share(middle) > target:
            least = middle
        else:
            most = middle
    return (least + most) / 2 / width


def _mean_share(rate: float) -> float:
    """Mean of e^(−rate·x) on 0 to 1: 1/rate − 1/(e^rate − 1)."""
    if abs(rate) < 1e-6:
        return 0.5 - rate / 12
    return 1 / rate - 1 / expm1(rate)


def _means(low: float, high: float, rate: float) -> list[float]:
    """Means of MOST parts of equal probability of the density e^(−rate·x) between two bounds."""
    width = high - low
    scaled = rate * width
    edges = [_quantile(scaled, part / MOST) for part in range(MOST + 1)]
    means = []
    for start, end in pairwise(edges):
        means.append(low + width * (start + (end - start) * _mean_share(scaled * (end - start))))
    return means


def _quantile(rate: float, share: float) -> float:
    """Where a share of the density e^(−rate·x) on 0 to 1 lies below."""
    if share in (0.0, 1.0) or abs(rate) < 1e-6:
        return share
    if rate < 0:
        return 1 - _quantile(-rate, 1 - share)
    return -log1p(share * expm1(-rate)) / rate

"""What is computed per step: batch, sequence lengths, number type, optimizer, routing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from meshwright.errors import InputError
from meshwright.files import Noun, choice
from meshwright.units import Count, CountOrZero, Number, parse_count

Precision = Literal["fp32", "bf16", "fp16", "fp8", "fp4"]
Optimizer = Literal["adamw", "sgd"]

COMPUTE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "fp4": 2}
"""Bytes of a weight or activation between ops. fp8 and fp4 recipes keep bf16 there and cast around each
matmul."""


MAX_BATCH_SIZE = 2**24
MAX_SEQUENCE_LENGTH = 2**24


class LengthRange(Noun):
    """Sequence lengths between two bounds; `mean` when the distribution's mean is known."""

    min: Count
    max: Count
    mean: Count | None = None

    @model_validator(mode="after")
    def _in_order(self) -> LengthRange:
        if self.min > self.max:
            raise InputError("min", self.min, f"min is at most max = {self.max}", [self.max])
        if self.mean is not None and not self.min <= self.mean <= self.max:
            raise InputError("mean", self.mean, "mean lies between min and max", [self.min, self.max])
        return self


class LengthHistogram(Noun):
    """Sequence lengths counted in a file of `length,count` lines."""

    histogram: str


class LengthCounts(Noun):
    """Sequence lengths with how often each occurs: what a histogram file becomes inside a plan."""

    counts: tuple[tuple[Count, Count], ...]

    @model_validator(mode="after")
    def _not_empty(self) -> LengthCounts:
        if not self.counts:
            raise InputError("counts", [], "at least one length with its count", ["[[4096, 1]]"])
        return self


class Zipf(Noun):
    """Expert loads that fall as rank^−zipf."""

    zipf: Number

    @model_validator(mode="after")
    def _not_negative(self) -> Zipf:
        if not 0 <= self.zipf <= 10:
            raise InputError("zipf", self.zipf, "an exponent between 0 (even) and 10", [0.4])
        return self


class Lognormal(Noun):
    """Expert loads drawn from a log-normal distribution with this sigma."""

    lognormal: Number

    @model_validator(mode="after")
    def _not_negative(self) -> Lognormal:
        if not 0 <= self.lognormal <= 10:
            raise InputError("lognormal", self.lognormal, "a sigma between 0 (even) and 10", [0.5])
        return self


class RoutingHistogram(Noun):
    """Expert loads counted in a file of `layer,expert,tokens` lines."""

    histogram: str


class RoutingCounts(Noun):
    """Tokens by layer and expert: what a routing histogram becomes inside a plan."""

    tokens: tuple[tuple[CountOrZero, CountOrZero, CountOrZero], ...]


def _read_length(value: object) -> object:
    if isinstance(value, LengthRange | LengthHistogram | LengthCounts):
        return value
    forms: dict[str, type[Noun]] = {
        "min": LengthRange,
        "max": LengthRange,
        "histogram": LengthHistogram,
        "counts": LengthCounts,
    }
    return choice(value, forms, "a number of tokens") if isinstance(value, dict) else parse_count(value)


def _read_routing(value: object) -> object:
    forms: dict[str, type[Noun]] = {
        "zipf": Zipf,
        "lognormal": Lognormal,
        "histogram": RoutingHistogram,
        "tokens": RoutingCounts,
    }
    if isinstance(value, dict):
        return choice(value, forms, "balanced")
    if value == "balanced" or isinstance(value, Zipf | Lognormal | RoutingHistogram | RoutingCounts):
        return value
    near = ["balanced", "{zipf: 0.4}", "{lognormal: 0.5}", "{histogram: file}"]
    raise InputError("value", value, "not a kind of routing", near)


SequenceLength = Annotated[int | LengthRange | LengthHistogram | LengthCounts, BeforeValidator(_read_length)]
Routing = Annotated[
    Literal["balanced"] | Zipf | Lognormal | RoutingHistogram | RoutingCounts, BeforeValidator(_read_routing)
]


class Workload(Noun):
    """One training step. `global_batch_size` counts sequences over all data-parallel ranks."""

    global_batch_size: Count
    sequence_length: SequenceLength
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    routing: Routing = "balanced"

    @model_validator(mode="after")
    def _bounded(self) -> Workload:
        if self.global_batch_size > MAX_BATCH_SIZE:
            rule = f"at most {MAX_BATCH_SIZE:,} sequences"
            raise InputError("global_batch_size", self.global_batch_size, rule, [MAX_BATCH_SIZE])
        known = not isinstance(self.sequence_length, LengthHistogram)
        if known and self.max_sequence_length > MAX_SEQUENCE_LENGTH:
            rule = f"at most {MAX_SEQUENCE_LENGTH:,} tokens"
            raise InputError("sequence_length", self.max_sequence_length, rule, [MAX_SEQUENCE_LENGTH])
        return self

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence, in tokens: what a plan must fit."""
        return self._length_bounds()[1]

    @property
    def min_sequence_length(self) -> int:
        """Shortest sequence, in tokens."""
        return self._length_bounds()[0]

    def _length_bounds(self) -> tuple[int, int]:
        match self.sequence_length:
            case LengthRange() as lengths:
                return lengths.min, lengths.max
            case LengthCounts() as histogram:
                lengths_ = [length for length, _ in histogram.counts]
                return min(lengths_), max(lengths_)
            case LengthHistogram() as unread:
                raise InputError(
                    "workload.sequence_length.histogram", unread.histogram, "the file was not read"
                )
            case length:
                return length, length

    @property
    def compute_bytes(self) -> int:
        """Bytes of one weight or activation element between ops."""
        return COMPUTE_BYTES[self.precision]

    @property
    def has_master_weights(self) -> bool:
        """Whether the optimizer keeps an FP32 copy of each weight."""
        return self.precision != "fp32"

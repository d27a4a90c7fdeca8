"""Quantities and counts: what is read, what is refused, and that writing loses nothing."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from meshwright.errors import InputError
from meshwright.units import (
    BYTES,
    BYTES_PER_S,
    FLOPS_PER_S,
    FRACTION,
    MAX_COUNT,
    SECONDS,
    Bytes,
    BytesPerSecond,
    Count,
    Dimension,
    FlopsPerSecond,
    Seconds,
    Share,
    format_count,
    parse_count,
    parse_count_or_zero,
    parse_number,
)

DIMENSIONS = (BYTES, BYTES_PER_S, FLOPS_PER_S, SECONDS, FRACTION)
by_dimension = pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda d: d.name)


def values_of(dimension: Dimension) -> st.SearchStrategy[float]:
    """Every value a dimension may have, small ones as likely as large ones."""
    low, high = math.log10(dimension.smallest), math.log10(dimension.largest)
    spread = st.floats(low, high).map(lambda e: min(max(10.0**e, dimension.smallest), dimension.largest))
    return spread | st.floats(dimension.smallest, dimension.largest)


# The value of each text, worked out by hand: 8 bits to the byte, 2^30 to the Gi, 10^9 to the G.
READ = [
    (BYTES, "64 GB", 64e9),
    (BYTES, "64GB", 64e9),
    (BYTES, "  64 GB\n", 64e9),
    (BYTES, "64 GiB", 68_719_476_736),
    (BYTES, "64 Gb", 8e9),
    (BYTES, "64 Gib", 8_589_934_592),
    (BYTES, "81559 MiB", 85_520_809_984),
    (BYTES, "1 kB", 1000),
    (BYTES, "1 KB", 1000),
    (BYTES, "1 KiB", 1024),
    (BYTES, "+1.5e3 MB", 1.5e9),
    (BYTES, ".5 TB", 5e11),
    (BYTES_PER_S, "1.8 TB/s", 1.8e12),
    (BYTES_PER_S, "400 Gb/s", 50e9),
    (BYTES_PER_S, "400 Gbps", 50e9),
    (BYTES_PER_S, "400 Gbit/s", 50e9),
    (BYTES_PER_S, "450 GBps", 450e9),
    (BYTES_PER_S, "1 GiB/s", 1_073_741_824),
    (FLOPS_PER_S, "400 TFLOP/s", 4e14),
    (FLOPS_PER_S, "400 TFLOPS", 4e14),
    (FLOPS_PER_S, "0.4 PFLOPs", 4e14),
    (SECONDS, "16 ms", 0.016),
    (SECONDS, "3 us", 3e-6),
    (SECONDS, "3 µs", 3e-6),  # the micro sign
    (SECONDS, "3 μs", 3e-6),  # the Greek letter
    (SECONDS, "2 min", 120.0),
    (SECONDS, "1 h", 3600.0),
    (FRACTION, "60%", 0.6),
    (FRACTION, "60 %", 0.6),
    (FRACTION, "100%", 1.0),
]


@pytest.mark.parametrize(("dimension", "text", "value"), READ)
def test_reads_the_units_of_the_field(dimension: Dimension, text: str, value: float) -> None:
    assert dimension.parse(text) == value


def test_a_decimal_is_read_exactly_and_rounded_once() -> None:
    # 0.1 · 10^12 in floats is exact only if the decimal is not rounded before it is scaled.
    assert BYTES_PER_S.parse("0.3 TB/s") == 3e11
    assert SECONDS.parse("0.1 us") == float(Fraction(1, 10_000_000))


WRONG = [
    ("64", "needs a unit"),
    (64, "needs a unit"),
    (64.5, "needs a unit"),
    (True, "written as text"),
    (None, "written as text"),
    ([], "written as text"),
    ({"GB": 64}, "written as text"),
    ("64 gb", "'gb' is no unit"),
    ("64 GFLOP/s", "is no unit of a size"),
    ("64 GB/s", "is no unit of a size"),
    ("-64 GB", "lies between"),
    ("0 GB", "lies between"),
    ("0.4 B", "lies between"),
    ("0e5 GB", "lies between"),
    ("2e18 B", "lies between"),
    ("nan GB", "not a size"),
    ("inf GB", "not a size"),
    ("1e400 GB", "not a size"),
    ("1e99 GB", "lies between"),
    ("1e-99 GB", "lies between"),
    ("GB", "not a size"),
    ("", "not a size"),
    ("64 GB 2", "not a size"),
    ("64 GB\x00", "not a size"),
    ("0x40 GB", "not a size"),
    ("1_000 GB", "not a size"),
    ("1,000 GB", "not a size"),
    ("６４ GB", "not a size"),  # full-width digits
    ("64\u00a0GB", "not a size"),  # a no-break space
    ("1e GB", "not a size"),
    (".", "not a size"),
    (math.nan, "needs a unit"),
    (math.inf, "needs a unit"),
    (-5, "needs a unit"),
    (10**5000, "needs a unit"),
]


@pytest.mark.parametrize(("text", "rule"), WRONG, ids=[repr(t)[:20] for t, _ in WRONG[:-1]] + ["10**5000"])
def test_refuses_what_is_no_size(text: object, rule: str) -> None:
    with pytest.raises(InputError, match=rule) as caught:
        BYTES.parse(text, "cluster.gpu.memory")
    assert caught.value.key == "cluster.gpu.memory"
    assert caught.value.nearest
    for guess in caught.value.nearest:
        BYTES.parse(guess)  # what is offered instead is itself valid
    assert len(str(caught.value)) < 300


def test_a_bare_number_is_met_with_itself_and_a_unit() -> None:
    with pytest.raises(InputError) as caught:
        BYTES.parse(64)
    assert caught.value.nearest == ("64 GB", "64 TB", "64 Gb")
    with pytest.raises(InputError) as caught:
        SECONDS.parse("16")
    assert "16 ms" in caught.value.nearest
    for bare, share in ((0.6, "60%"), ("0.6", "60%"), (1, "100%"), (60, "60%"), (160, "60%"), (0, "60%")):
        with pytest.raises(InputError) as caught:
            FRACTION.parse(bare)
        assert caught.value.nearest == (share,)


@pytest.mark.parametrize("text", ["0%", "101%", "0.6", 0.6, "-5%", "60"])
def test_a_share_lies_above_nothing_and_at_most_everything(text: object) -> None:
    with pytest.raises(InputError):
        FRACTION.parse(text)


@pytest.mark.parametrize("text", ["9" * 10**6 + " GB", " " * 10**6, "64 " + "G" * 10**6, "1" + "0" * 10**6])
def test_endless_text_is_refused_at_once(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        BYTES.parse(text)
    assert time.perf_counter() - start < 0.5
    assert len(str(caught.value)) < 300


@by_dimension
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_written_to_a_file_reads_back_to_the_same_number(
    dimension: Dimension, data: st.DataObject
) -> None:
    value = data.draw(values_of(dimension))
    assert dimension.parse(dimension.format_exact(value)) == value


@by_dimension
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_printed_is_short_and_right_to_four_digits(dimension: Dimension, data: st.DataObject) -> None:
    value = data.draw(values_of(dimension))
    text = dimension.format(value)
    assert len(text) <= 20
    number, unit = text.removesuffix("%").split()[0], text.split()[-1] if " " in text else "%"
    assert float(Fraction(number) * dimension.units[unit]) == pytest.approx(value, rel=1e-3)


@by_dimension
@given(text=st.text(max_size=30) | st.from_regex(r"[0-9.eE+-]{1,10} ?[A-Za-z/%]{0,7}", fullmatch=True))
@settings(max_examples=300, deadline=None)
def test_any_text_is_either_a_sound_value_or_an_input_error(dimension: Dimension, text: str) -> None:
    try:
        value = dimension.parse(text)
    except InputError:
        return
    assert dimension.smallest <= value <= dimension.largest


@pytest.mark.parametrize(
    ("dimension", "value", "text"),
    [
        (BYTES, 64e9, "64 GB"),
        (BYTES, 85_520_809_984, "85.52 GB"),
        (BYTES, 999_999, "1 MB"),  # not "1000 kB"
        (BYTES, 512, "512 B"),
        (BYTES_PER_S, 3.35e12, "3.35 TB/s"),
        (FLOPS_PER_S, 989.4e12, "989.4 TFLOP/s"),
        (SECONDS, 3e-6, "3 us"),
        (SECONDS, 0.0999999, "100 ms"),
        (SECONDS, 0.999999, "1 s"),
        (SECONDS, 5e-9, "5 ns"),
        (FRACTION, 0.6, "60%"),
        (FRACTION, 0.07, "7%"),
    ],
)
def test_prints_as_people_write(dimension: Dimension, value: float, text: str) -> None:
    assert dimension.format(value) == text


@pytest.mark.parametrize(
    ("dimension", "value", "text"),
    [
        (BYTES, 64 * 10**9, "64 GB"),
        (BYTES, 81559 * 2**20, "81559 MiB"),
        (BYTES_PER_S, 450e9, "450 GB/s"),
        (SECONDS, 0.016, "16 ms"),
        (FRACTION, 0.07, "7 %"),
    ],
)
def test_files_keep_the_round_figures(dimension: Dimension, value: float, text: str) -> None:
    assert dimension.format_exact(value) == text


class Everything(BaseModel):
    size: Bytes
    rate: BytesPerSecond
    peak: FlopsPerSecond
    delay: Seconds
    share: Share
    count: Count


def test_the_types_of_file_fields_go_out_and_in_unchanged() -> None:
    text = {"size": "81559 MiB", "rate": "3.35 TB/s", "peak": "989.4 TFLOP/s", "delay": "3 us", "share": "7%"}
    first = Everything.model_validate({**text, "count": 30e9})
    assert (first.size, first.count) == (85_520_809_984, 30_000_000_000)
    assert isinstance(first.size, int)
    assert isinstance(first.count, int)
    assert Everything.model_validate(first.model_dump()) == first
    assert Everything.model_validate_json(first.model_dump_json()) == first


@pytest.mark.parametrize(("value", "count"), [(512, 512), (30e9, 30_000_000_000), (1, 1), (MAX_COUNT, 2**53)])
def test_reads_counts(value: float, count: int) -> None:
    read = parse_count(value)
    assert read == count
    assert isinstance(read, int)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (1.5, (1, 2)),
        (0.5, (1,)),
        (0, (1,)),
        (-3, (1,)),
        (-2.5, ()),
        (2**53 + 1, (2**53,)),
        (1e300, (2**53,)),
        (True, ()),
        (False, ()),
        (None, ()),
        ("512", (512,)),
        ("1,024", (1024,)),
        ("many", ()),
        ("9" * 10**6, ()),
        (math.nan, ()),
        (math.inf, ()),
        (-math.inf, ()),
        ([512], ()),
        (512 + 0j, ()),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_refuses_what_is_no_count(value: object, nearest: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="count") as caught:
        parse_count(value, "layout.tp")
    assert (caught.value.key, caught.value.nearest) == ("layout.tp", nearest)


def test_an_endless_integer_is_refused_at_once() -> None:
    endless = 1 << 20_000_000
    start = time.perf_counter()
    for parse in (parse_count, parse_number, BYTES.parse):
        with pytest.raises(InputError) as caught:
            parse(endless)
        assert "too large to print" in str(caught.value)
    assert time.perf_counter() - start < 1.0


def test_zero_is_a_count_only_where_it_is_allowed() -> None:
    assert parse_count_or_zero(0) == 0
    assert parse_count_or_zero(0.0) == 0
    assert parse_count_or_zero(7) == 7
    for wrong in (False, -1, 0.5, "0", None):
        with pytest.raises(InputError):
            parse_count_or_zero(wrong)


def test_numbers_are_finite_and_bounded() -> None:
    assert parse_number(-2) == -2.0
    assert parse_number(3e-4) == 3e-4
    for wrong in (True, "1", None, math.nan, math.inf, -math.inf, 1e31, -(10**31)):
        with pytest.raises(InputError, match="number"):
            parse_number(wrong, "training.learning_rate")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1024, "1,024"), (999_999, "999,999"), (58.6e6, "58.6 M"), (30.53e9, "30.53 B"),
     (999_999_999, "1 B"), (1.5e12, "1.5 T"), (2.5, "2.5")],
)  # fmt: skip
def test_counts_are_printed_as_people_say_them(value: float, text: str) -> None:
    assert format_count(value) == text

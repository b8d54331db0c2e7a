"""Sizes and durations: what a user may write, and what is printed."""

from __future__ import annotations

import re

import pytest

from edgeprune.errors import UsageError
from edgeprune.units import compact_bytes, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 B", 0),
        ("4096B", 4096),
        ("1KB", 1000),
        ("1 KiB", 1024),
        ("12 MB", 12_000_000),
        ("12MiB", 12 * 2**20),
        ("9.5GiB", 19 * 2**29),
        ("  9.5 gib ", 19 * 2**29),
        ("2 tB", 2 * 10**12),
        ("0.5 TiB", 2**39),
        ("1.5 B", 1),
        # In binary floating point each of these is a byte short.
        ("2.01 GB", 2_010_000_000),
        ("4.35 GB", 4_350_000_000),
        ("8.2 GB", 8_200_000_000),
    ],
)
def test_size_is_read_to_the_byte(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_no_decimal_size_loses_a_byte() -> None:
    hundredths = range(1, 5000, 7)
    assert [parse_bytes(f"{n // 100}.{n % 100:02d}GB") for n in hundredths] == [n * 10**7 for n in hundredths]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "12",
        "-1 GB",
        "1,5 GB",
        "1.5.2 GB",
        "1e9 B",
        "9.5 G",
        "1 ib",
        "1 kbit",
        "nan GB",
        "\N{KELVIN SIGN}B",
    ],
)
def test_wrong_size_is_a_usage_error_that_shows_the_form(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"'{text}' is not a size")) as raised:
        parse_bytes(text)
    assert raised.value.exit_code == 2
    assert "9.5GiB" in raised.value.hint


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (820 * 1024, "820 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (int(12.34 * 2**20), "12.3 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (5000 * 2**30, "5000 GiB"),
        (-3 * 2**29, "-1.50 GiB"),
    ],
)
def test_bytes_are_printed_with_a_binary_unit(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize("count", [1, 999, 4096, 123_456, 987_654_321, 7 * 2**30, 3 * 2**40])
def test_printed_size_reads_back_to_within_its_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.0 s"),
        (0.0455, "46 ms"),
        (0.84, "0.8 s"),
        (42.2, "42 s"),
        (89.0, "89 s"),
        (200.0, "3 min 20 s"),
        (5399.9, "89 min 59 s"),
        (7500.0, "2 h 5 min"),
    ],
)
def test_duration_is_printed_in_two_units_at_most(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


@pytest.mark.parametrize(
    ("count", "text"),
    [(4 * 10**6, "4MB"), (19 * 2**29, "9.5GiB"), (12_500_000, "12.5MB"), (3 * 2**20, "3MiB"), (50_000, "50kB")],
)
def test_compact_sizes_are_short_and_exact(count: int, text: str) -> None:
    assert compact_bytes(count) == text
    assert parse_bytes(text) == count


def test_a_compact_size_of_odd_bytes_is_rounded() -> None:
    assert compact_bytes(5_242_881) == "5.0MiB"

import pytest

from intentd.core import units
from intentd.core.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1Gbit", 1e9), ("2.5 mbit", 2.5e6), (1000, 1000.0), ("1e3kbit", 1e6), ("0", 0.0)],
)
def test_rates_read_as_tc_reads_them(text: object, expected: float) -> None:
    assert units.parse_rate_bps(text) == expected


def test_decimal_and_binary_sizes_differ() -> None:
    assert units.parse_size_bytes("64KiB") == 65536
    assert units.parse_size_bytes("64KB") == 64000


@pytest.mark.parametrize("text", ["1Gbyte", "-1", "", "fast", True, None, [1], "1 2", "1e999"])
def test_a_bad_quantity_names_field_value_and_example(text: object) -> None:
    with pytest.raises(InputError) as caught:
        units.parse_rate_bps(text, "domains[0].rate")
    assert caught.value.field == "domains[0].rate"
    assert caught.value.value == text
    assert caught.value.expected in ("a number >= 0 or text such as '1Gbit'", "a finite number")


@pytest.mark.parametrize(("seconds", "text"), [(0.00025, "250us"), (0.25, "250ms"), (12.0, "12s")])
def test_durations_print_in_the_unit_people_use(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text
    assert units.parse_duration_s(text) == pytest.approx(seconds)


def test_sizes_and_rates_print_short() -> None:
    assert units.format_size(float("inf")) == "inf"
    assert units.format_size(65_540) == "65.54KB"
    assert units.format_rate(1e9) == "1Gbit"

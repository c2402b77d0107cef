import math

import pytest

from fedspeed.units import bytes_text, count_text, loss_text, parameters_text, seconds_text, shortened_list


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (0.44, "0.4s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (125, "2m 05s"),
        (3599.6, "1h 00m"),
        (7800, "2h 10m"),
        (86399.9, "1d 0h"),
        (273600, "3d 4h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (1.5, "1.50"),
        (950, "950"),
        (999.6, "1.00k"),
        (1234, "1.23k"),
        (12345, "12.3k"),
        (99960, "100k"),
        (4.56e6, "4.56M"),
        (-1500, "-1.50k"),
        (math.nan, "nan"),
    ],
)
def test_count(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (950, "950 B"),
        (1024, "1.00 KiB"),
        (1023, "1.00 KiB"),
        (3 << 30, "3.00 GiB"),
        (1.2e18, "1066 PiB"),
    ],
)
def test_bytes(count, text):
    assert bytes_text(count) == text


def test_loss():
    assert (loss_text(None), loss_text(1.23456), loss_text(math.nan)) == ("-", "1.2346", "nan")


@pytest.mark.parametrize(
    ("count", "text"),
    [(950, "950"), (117_248, "117.25 k"), (3_400_000, "3.40 M"), (14_770_033_664, "14.77 B")],
)
def test_parameters(count, text):
    assert parameters_text(count) == text


def test_some_of_many_names():
    assert shortened_list([], 2) == "" and shortened_list([4, 5], 2) == "4, 5"
    assert shortened_list(["a", "b", "c", "d"], 2) == "a, b and 2 more"

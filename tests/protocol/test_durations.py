import pytest

from zeolith.protocol.durations import parse_seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("0.5", 0.5),
        ("0", 0),
        ("30s", 30),
        ("2m", 120),
        ("1h 30m", 5400),
    ],
)
def test_a_time_is_seconds_or_has_a_unit(text, expected):
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", " ", "soon", "-1", "3 parsecs", "1e400", "s"])
def test_what_is_no_time_is_refused_with_a_sentence(text):
    with pytest.raises(ValueError, match="is not a time to wait"):
        parse_seconds(text)

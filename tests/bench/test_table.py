"""The table: what is beside what, and how many times better it is."""

import pytest

from . import table
from .rows import Row

LATENCY = Row("load", "load", "us")
RATE = Row("loads", "loads/s", "/s", more_is_better=True)


def test_less_is_better_for_a_latency_and_worse_for_a_rate():
    assert table.ratios(LATENCY, [50.0], [200.0]) == [4.0]
    assert table.ratios(RATE, [50.0], [200.0]) == [0.25]


def test_a_ratio_compares_within_a_round_and_shows_its_extremes():
    figures = {"load": {"zeo": [100.0, 200.0, 300.0], "zeolith": [50.0, 50.0, 50.0]}}

    (_header, _colons, line) = table.markdown(
        [LATENCY], ["zeo", "zeolith"], figures
    ).splitlines()

    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["load", "us", "200", "50.0", "4.0 (2.0 to 6.0)"]


def test_who_has_no_figure_has_a_dash_and_no_ratio():
    figures = {"load": {"zeo": [100.0]}}

    line = table.markdown([LATENCY], ["zeo", "relstorage"], figures).splitlines()[-1]

    assert [cell.strip() for cell in line.strip("|").split("|")][3:] == ["-", "-"]


def test_a_bound_has_no_ratio():
    figures = {"load": {"zeo": [100.0], "filestorage": [10.0]}}

    header = table.markdown([LATENCY], ["zeo", "filestorage"], figures).splitlines()[0]

    assert "times better" not in header


@pytest.mark.parametrize("words", [1, 2])
def test_words_stand_left_and_numbers_right(words):
    header, colons, line = table.aligned(
        [["name", "other", "n"], ["a", "b", "1000"]], words
    ).splitlines()

    assert len(header) == len(colons) == len(line)
    assert colons.count("---:") == 3 - words
    assert line.startswith("| a    |")


def test_a_program_reads_every_figure_of_every_round():
    figures = {"loads": {"zeo": [1.0, 2.0]}}

    (row,) = table.report([RATE], figures)["rows"]

    assert row["key"] == "loads"
    assert row["more_is_better"]
    assert row["figures"] == {"zeo": [1.0, 2.0]}

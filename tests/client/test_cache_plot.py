"""Tables and pictures of hit rates."""

from array import array
from xml.etree import ElementTree

import pytest

from zeolith.client.cache_plot import (
    BAR_COLUMNS,
    bytes_text,
    duration_text,
    svg,
    table,
)
from zeolith.client.cache_simulation import Outcome, Steps, Workload

MB = 1024**2
WORKLOAD = Workload(
    caches=[Steps(taken_bytes=array("q", [0, 3 * MB]))],
    loads=1000,
    hits=500,
    processes=2,
    cache_bytes=2 * MB,
    ended_us=90_000_000,
)
OUTCOMES = [Outcome(1 * MB, 1000, 250, 12), Outcome(2 * MB, 1000, 500, 0)]
BEST = Outcome(12 * MB, 1000, 900, 0)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (100, "100B"),
        (1024, "1KB"),
        (1536, "1.5KB"),
        (20 * MB, "20MB"),
        (5 * 1024 * MB, "5GB"),
    ],
)
def test_a_size_has_a_unit(size, text):
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (3.21, "3.2 s"), (250, "4 min 10 s"), (7980, "2 h 13 min")],
)
def test_a_duration_is_told_as_people_do(seconds, text):
    assert duration_text(seconds) == text


def test_a_table_has_a_line_for_each_size():
    lines = table(WORKLOAD, OUTCOMES, BEST).splitlines()
    assert lines[0] == "1000 loads in 1 min 30 s by 2 processes with 1 cache of 2MB"
    assert lines[1] == "50.0% were found when it was recorded"
    assert lines[3].split() == ["size", "hit", "rate", "misses", "evictions"]
    assert lines[4].split()[:4] == ["1MB", "25.0%", "750", "12"]
    assert lines[5].split()[:4] == ["2MB", "50.0%", "500", "0"]
    assert lines[7] == "3MB hold all that was asked for; more than 90.0% cannot be had"


def test_a_bar_is_as_long_as_the_hit_rate():
    lines = table(WORKLOAD, OUTCOMES, BEST).splitlines()
    assert lines[4].count("#") == BAR_COLUMNS // 4
    assert lines[5].count("#") == BAR_COLUMNS // 2
    assert lines[4].index("|") == lines[5].index("|")


def test_the_recorded_size_is_marked():
    marked = [
        line
        for line in table(WORKLOAD, OUTCOMES, BEST).splitlines()
        if line.endswith("  as recorded")
    ]
    assert len(marked) == 1
    assert marked[0].split()[0] == "2MB"


def test_a_picture_is_xml_with_a_point_for_each_size():
    root = ElementTree.fromstring(svg("a<b>&c", OUTCOMES))
    name = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{name}circle")
    assert len(circles) == 2
    heights = [float(circle.get("cy") or 0) for circle in circles]
    assert heights[1] < heights[0]
    texts = [each.text for each in root.findall(f"{name}text")]
    assert {"1MB", "2MB", "25.0%", "50.0%"} <= set(texts)
    assert any("a<b>&c" in (text or "") for text in texts)


def test_one_size_is_a_picture_too():
    ElementTree.fromstring(svg("one", OUTCOMES[:1]))

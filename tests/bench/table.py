"""The figures as a markdown table and as JSON.

A ratio is always "times better": it compares two peers within one round, and the
table shows the median of the rounds with their extremes.
"""

import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from statistics import median
from typing import Any

from .rows import Row
from .servers import title

# Row key -> peer -> the figure of each round.
Figures = dict[str, dict[str, list[float]]]
REFERENCE = "zeo"
# Bounds, not rivals: nobody needs to know how many times better they are.
BOUNDS = ("filestorage", "socket")


def markdown(rows: Iterable[Row], peers: list[str], figures: Figures) -> str:
    """One line a row; peers beside each other, each with its ratio to ZEO."""
    header = ["", "unit"]
    for peer in peers:
        header.append(title(peer))
        if _has_ratio(peer, peers):
            header.append("times better")
    lines = [header]
    for row in rows:
        line = [row.title, row.unit]
        for peer in peers:
            measured = figures[row.key].get(peer, [])
            line.append(_number(median(measured)) if measured else "-")
            if _has_ratio(peer, peers):
                line.append(_ratio(row, measured, figures[row.key].get(REFERENCE, [])))
        lines.append(line)
    return aligned(lines, words=2)


def aligned(lines: Sequence[Sequence[str]], words: int) -> str:
    """A markdown table: a header and lines, the first ``words`` cells of each words."""
    header, *others = lines
    numbers = len(header) - words
    every = [header, ["---"] * words + ["---:"] * numbers, *others]
    widths = [max(len(line[at]) for line in every) for at in range(len(header))]
    return "\n".join(_line(line, widths, words) for line in every)


def ratios(row: Row, measured: list[float], reference: list[float]) -> list[float]:
    """How many times better ``measured`` is than ``reference``, round by round."""
    pairs = zip(measured, reference, strict=False)
    if row.more_is_better:
        return [ours / theirs for ours, theirs in pairs]
    return [theirs / ours for ours, theirs in pairs]


def machine() -> str:
    """One line that says when, with what and on what."""
    now = datetime.now().strftime("%Y-%m-%d %H:%M")
    packages = ", ".join(_versions("ZODB", "ZEO", "uvloop", "msgpack", "RelStorage"))
    return (
        f"{now}, {platform.system()} {platform.machine()}, {cpu_count()} cores,"
        f" Python {platform.python_version()}, {packages}"
    )


def report(rows: Iterable[Row], figures: Figures) -> dict[str, Any]:
    """Everything that was measured, for a program to read."""
    return {
        "machine": machine(),
        "command": " ".join(sys.argv),
        "rows": [
            {
                "key": row.key,
                "title": row.title,
                "unit": row.unit,
                "more_is_better": row.more_is_better,
                "figures": figures[row.key],
            }
            for row in rows
        ],
    }


def _has_ratio(peer: str, peers: list[str]) -> bool:
    return peer != REFERENCE and peer not in BOUNDS and REFERENCE in peers


def _ratio(row: Row, measured: list[float], reference: list[float]) -> str:
    found = ratios(row, measured, reference)
    if not found:
        return "-"
    return f"{median(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(cells: Sequence[str], widths: list[int], words: int) -> str:
    # Words to the left, numbers to the right, as the header's colons have it.
    padded = [
        cell.ljust(width) if at < words else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _versions(*packages: str) -> Iterable[str]:
    for package in packages:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue

"""The outcome of simulations to look at: a table with bars, and a picture in SVG.

Used by ``zeolith cache simulate``. Pure: numbers in, text out.
"""

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from zeolith.client.cache_simulation import Outcome, Workload

BAR_COLUMNS = 40
_UNITS = (("GB", 1024**3), ("MB", 1024**2), ("KB", 1024))

# Of the picture.
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 40, 50
_PERCENTS = range(0, 101, 20)


def bytes_text(size: int) -> str:
    """``size`` as an option takes it: 20MB; rounded to a tenth of the unit."""
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return f"{size}B"


def duration_text(seconds: float) -> str:
    """``seconds`` for people: 2 h 13 min, 4 min 10 s, 3.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def table(workload: Workload, outcomes: Sequence[Outcome], best: Outcome) -> str:
    """What was recorded, and a line for each size, with a bar for its hit rate.

    ``best`` is the outcome of a cache without bounds.
    """
    lines = [*_recorded(workload), "", *_lines(workload, outcomes), ""]
    needed = bytes_text(workload.needed_bytes)
    rest = f"more than {best.hit_rate:.1%} cannot be had"
    return "\n".join([*lines, f"{needed} hold all that was asked for; {rest}"])


def _recorded(workload: Workload) -> Iterator[str]:
    length_s = (workload.ended_us - workload.started_us) / 1e6
    yield (
        f"{workload.loads} loads in {duration_text(length_s)}"
        f" by {several(workload.processes, 'process', 'processes')}"
        f" with {several(len(workload.caches), 'cache', 'caches')}"
        f" of {bytes_text(workload.cache_bytes)}"
    )
    rate = workload.hits / workload.loads if workload.loads else 0.0
    yield f"{rate:.1%} were found when it was recorded"


def _lines(workload: Workload, outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"{'size':>10}  {'hit rate':>8}  {'misses':>11}  {'evictions':>11}"
    for outcome in outcomes:
        bar = "#" * round(outcome.hit_rate * BAR_COLUMNS)
        mark = "  as recorded" if outcome.cache_bytes == workload.cache_bytes else ""
        line = (
            f"{bytes_text(outcome.cache_bytes):>10}  {outcome.hit_rate:8.1%}"
            f"  {outcome.loads - outcome.hits:11}  {outcome.evictions:11}"
            f"  |{bar:{BAR_COLUMNS}}|{mark}"
        )
        yield line


def several(count: int, one: str, many: str) -> str:
    """``count`` and what there are so many of."""
    return f"{count} {one if count == 1 else many}"


def svg(title: str, outcomes: Sequence[Outcome]) -> str:
    """A picture: the hit rate over the sizes, each as far from the next."""
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(outcomes) - 1)
    places = [
        (_LEFT + number * step, _y(outcome.hit_rate), outcome)
        for number, outcome in enumerate(outcomes)
    ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _outcome in places)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _label(_WIDTH / 2, 22, f"Hit rate by cache size: {escape(title)}"),
        *_grid(),
        f'<polyline points="{points}" fill="none" stroke="#2060a0" stroke-width="2"/>',
    ]
    for x, y, outcome in places:
        lines += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2060a0"/>',
            _label(x, y - 9, f"{outcome.hit_rate:.1%}"),
            _label(x, _HEIGHT - _BOTTOM + 20, bytes_text(outcome.cache_bytes)),
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _grid() -> Iterator[str]:
    for percent in _PERCENTS:
        y = _y(percent / 100)
        yield (
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"'
            ' stroke="#ddd"/>'
        )
        yield _label(_LEFT - 24, y + 4, f"{percent} %")


def _y(hit_rate: float) -> float:
    return _HEIGHT - _BOTTOM - hit_rate * (_HEIGHT - _TOP - _BOTTOM)


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'

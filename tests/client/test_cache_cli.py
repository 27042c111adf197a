"""``zeolith cache``, as a program and as functions."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ZODB.utils import p64

from zeolith.client.cache import MemoryCache
from zeolith.client.cache_cli import cache
from zeolith.client.cache_trace import end_trace, traced

from ..support.commanding import complaint, zeolith

T1, T2 = p64(1), p64(2)
MB = 1024**2


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cache, arguments, catch_exceptions=False)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Of a cache of 1 MB and records of 100 KB, five of which are loaded twice."""
    path = str(tmp_path / "cache.trace")
    cache = traced(MemoryCache(MB), path)
    cache.forget_all(T1)
    for _ in range(2):
        for number in range(5):
            if cache.load(p64(number), T2) is None:
                cache.store(p64(number), T1, None, b"x" * 100_000, T1)
    end_trace(cache)
    return path


def rates(output: str) -> dict[str, str]:
    rows = [line.split() for line in output.splitlines() if "|" in line]
    return {row[0]: row[1] for row in rows}


def test_simulate_prints_the_hit_rate_for_several_sizes(trace):
    done = run("simulate", trace)
    assert done.exit_code == 0
    assert rates(done.output) == {
        "128KB": "0.0%",
        "256KB": "0.0%",
        "512KB": "50.0%",
        "1MB": "50.0%",
    }


def test_simulate_takes_sizes(trace):
    done = run("simulate", trace, "--size", "2MB", "--size", "1000000", "--size", "2MB")
    assert list(rates(done.output)) == ["976.6KB", "2MB"]


@pytest.mark.parametrize("size", ["many", "0", "-1", "20 apples"])
def test_simulate_refuses_what_is_no_size(trace, size):
    done = run("simulate", trace, "--size", size)
    assert done.exit_code == 2
    assert "is not a size" in done.output


def test_simulate_draws(trace, tmp_path):
    picture = tmp_path / "rates.SVG"
    done = run("simulate", trace, "--plot", str(picture))
    assert done.exit_code == 0
    assert picture.read_text().startswith("<svg")


def test_simulate_draws_only_svg(trace, tmp_path):
    done = run("simulate", trace, "--plot", str(tmp_path / "rates.png"))
    assert done.exit_code == 2
    assert "must end in .svg" in done.output


def test_simulate_together_is_one_cache(trace):
    again = traced(MemoryCache(MB), trace)
    for number in range(5):
        again.load(p64(number), T2)
        again.store(p64(number), T1, None, b"x" * 100_000, T1)
    end_trace(again)
    assert rates(run("simulate", trace, "--size", "1MB").output) == {"1MB": "33.3%"}
    together = run("simulate", trace, "--size", "1MB", "--together")
    assert rates(together.output) == {"1MB": "66.7%"}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("nowhere", None, "No such file"),
        ("other", "text", "no trace of a cache"),
        ("empty", "", "nothing is in it yet"),
    ],
)
def test_simulate_says_what_is_wrong_in_a_line(tmp_path, name, text, complaint):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    done = run("simulate", str(path))
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert complaint in line


def test_simulate_says_that_there_was_nothing_to_do(tmp_path):
    path = str(tmp_path / "cache.trace")
    cache = traced(MemoryCache(), path)
    cache.forget_all(T1)
    end_trace(cache)
    done = run("simulate", path)
    assert done.exit_code == 1
    assert "there are no loads" in done.output


def test_simulate_says_where_it_cannot_draw(trace, tmp_path):
    done = run("simulate", trace, "--plot", str(tmp_path / "nowhere" / "rates.svg"))
    assert done.exit_code == 1
    assert "No such file" in done.output


def test_it_is_a_command_of_the_program(trace, tmp_path):
    assert "as recorded" in zeolith("cache", "simulate", trace).stdout
    done = zeolith("cache", "simulate", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert complaint(done) == f"{tmp_path / 'nowhere'}: No such file or directory"

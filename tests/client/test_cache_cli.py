"""``zeolith cache``, as a program and as functions."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ZODB.utils import p64

from zeolith.client import cache_cli, cache_report
from zeolith.client.cache import MemoryCache
from zeolith.client.cache_cli import cache
from zeolith.client.cache_place import CachePlace, Identity
from zeolith.client.cache_trace import traced
from zeolith.client.disk_cache import DiskCache

from ..support.cache_files import IDENTITY, damaging, opened, revision, written
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
    cache.close()
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


def test_simulate_takes_a_size_as_it_prints_it(trace):
    done = run("simulate", trace, "--size", "1.5MB", "--size", "976.6kb")
    assert list(rates(done.output)) == ["976.6KB", "1.5MB"]


@pytest.mark.parametrize("size", ["many", "0", "-1", "1e3", "0.1B", "20 apples"])
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
    again.close()
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
    cache.close()
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


# The cache directory

OTHER = Identity(b"\x0e" * 16, 2)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of two databases, the first with a record of each of three classes."""
    directory = tmp_path / "cache"
    revisions = [
        revision(number, 10, None, b"\x80\x03cshop\nC%d\n." % number + b"." * 50, 20)
        for number in range(3)
    ]
    written(directory, through=20, revisions=revisions)
    written(directory, through=20, revisions=[], identity=OTHER)
    return directory


@pytest.fixture(autouse=True)
def _no_process(monkeypatch) -> None:
    """What is examined is so in this process, to save time."""
    looks = {"summary": cache_report.summary, "findings": cache_report.findings}
    monkeypatch.setattr(cache_cli, "examine", lambda what, path: looks[what](path))


def test_the_program_tells_the_same(directory):
    for arguments in (("info", "--json"), ("verify",)):
        done = zeolith("cache", *arguments, str(directory))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run(*arguments, str(directory)).output


def test_info_tells_of_each_database(directory):
    done = run("info", str(directory))
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert f"database {IDENTITY.database_id.hex()}, epoch 1" in lines
    assert f"database {OTHER.database_id.hex()}, epoch 2" in lines
    assert any("3 revisions" in line and "0 of them of older" in line for line in lines)
    assert [line.split()[-1] for line in lines if "shop" in line] == [
        "shop.C0",
        "shop.C1",
        "shop.C2",
    ]
    assert all(len(line) <= 88 for line in lines)


def test_info_tells_the_hit_rate_of_all_processes(directory):
    assert "hit rate" not in run("info", str(directory)).output
    disk = DiskCache(CachePlace(directory), "1", 10**6)
    disk.identify(*IDENTITY)
    for number in range(5):
        disk.load(p64(number), p64(21))
    disk.close()
    assert "  hit rate     60.0% of 5 loads" in run("info", str(directory)).output


def test_info_shows_so_many_classes(directory):
    output = run("info", "--classes", "1", str(directory)).output
    assert "shop.C0" in output
    assert "shop.C1" not in output
    assert "and 2 classes more" in output
    assert "shop" not in run("info", "--classes", "0", str(directory)).output


def test_info_is_there_for_programs(directory):
    one, other = json.loads(run("info", "--json", str(directory)).output)
    assert (one["revisions"], other["revisions"]) == (3, 0)
    assert len(one["classes"]) == 3


def test_info_of_a_damaged_file_is_a_line(directory):
    for path in directory.glob("*.lmdb"):
        path.write_bytes(b"")
    done = run("info", str(directory))
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.endswith("it is empty")


def test_verify_finds_nothing_in_what_is_right(directory):
    done = run("verify", str(directory))
    assert done.exit_code == 0
    assert [line.split(": ")[1] for line in done.output.splitlines()] == [
        "all is well",
        "all is well",
    ]


def test_verify_has_a_line_for_each_finding(directory):
    (path,) = directory.glob("0d*.lmdb")
    with damaging(path) as (txn, dbs):
        txn.drop(dbs["order"], delete=False)
    done = run("verify", str(directory))
    assert done.exit_code == 1
    assert done.output.count(f"{path.name}: revision ") == 3
    assert done.output.count("all is well") == 1


def test_verify_tells_what_cannot_be_read(directory):
    (path,) = directory.glob("0d*.lmdb")
    path.write_bytes(b"")
    done = run("verify", str(directory))
    assert done.exit_code == 1
    assert f"{path.name}: it is empty" in done.output.splitlines()


def test_clear_removes_everything(directory):
    done = run("clear", str(directory))
    assert (done.exit_code, done.output) == (0, "2 databases removed\n")
    assert run("info", str(directory)).exit_code == 1


def test_clear_takes_nothing_from_those_who_use_it(directory):
    with opened(directory) as file:
        done = run("clear", str(directory))
        assert done.exit_code == 1
        (line,) = done.output.splitlines()
        assert f"processes use {file.path.name}; nothing is removed" in line
        assert len(list(directory.glob("*.lmdb"))) == 2
        assert run("clear", "--force", str(directory)).exit_code == 0
    assert not list(directory.glob("*.lmdb"))


@pytest.mark.parametrize("command", ["info", "verify", "clear"])
def test_a_wrong_directory_is_told_and_not_made(tmp_path, command):
    done = run(command, str(tmp_path / "nowhere"))
    assert done.exit_code == 1
    assert (
        done.output == f"zeolith: {tmp_path / 'nowhere'}: there is no such directory\n"
    )
    (tmp_path / "file.lmdb").write_text("")
    done = run(command, str(tmp_path))
    assert done.exit_code == 1
    assert done.output == f"zeolith: {tmp_path}: there is no cache in it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file.lmdb"]

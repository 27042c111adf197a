"""A configuration with a mistake: one line that says where and what, exit status 2.

What differs only in the mistake is told by the command in this process.
"""

from pathlib import Path

import pytest
from click.testing import CliRunner

from zeolith.server.cli import main

from ..support.commanding import complaint, written, zeolith

GOOD = """\
<zeolith>
  address 127.0.0.1:0
  address sockets/zeolith.sock
  read-only true
  transaction-timeout 2m
  shutdown-timeout 5s
  log-level warning
</zeolith>

<filestorage main>
  path Data.fs
</filestorage>

<mappingstorage/>
"""

# What is changed in GOOD, what it becomes, the line of the mistake (0: the file's),
# and words that must be in the complaint.
MISTAKES = {
    "a key that is none": ("read-only true", "red-only true", 4, ["red-only"]),
    "a flag that is none": ("read-only true", "read-only maybe", 4, ["maybe"]),
    "a time that is none": ("timeout 2m", "timeout soon", 5, ["soon"]),
    "no time at all": ("timeout 2m", "timeout 0", 5, ["0"]),
    "a negative time": ("timeout 2m", "timeout -3s", 5, ["-3s"]),
    "a level that is none": ("level warning", "level loud", 7, ["loud"]),
    "a port that is none": ("127.0.0.1:0", "127.0.0.1:http", 2, ["127.0.0.1:http"]),
    "too high a port": ("127.0.0.1:0", "127.0.0.1:65536", 2, ["65536"]),
    "a section that is none": ("<mappingstorage/>", "<mapstorage/>", 14, ["mapstor"]),
    "an end too many": ("<mappingstorage/>", "</mappingstorage>", 14, ["end"]),
    "an end too few": ("</filestorage>", "", 0, []),
    "no path": ("  path Data.fs\n", "", 0, ["path"]),
    "a name that is taken": ("<mappingstorage/>", "<demostorage main/>", 0, ["main"]),
    "a module that is none": ("<mappingstorage/>", "%import no.such", 0, ["no.such"]),
}


def test_a_good_file_is_fine_and_nothing_is_opened(tmp_path: Path):
    conf = written(tmp_path / "server.conf", GOOD)
    done = zeolith("check-config", "-C", str(conf), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("127.0.0.1:0", "sockets/zeolith.sock", "main", "1"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == [conf]


def test_a_file_with_nothing_but_a_storage_is_fine(tmp_path: Path):
    conf = written(tmp_path / "server.conf", "<mappingstorage/>\n")
    done = zeolith("check-config", "-C", str(conf))
    assert (done.returncode, done.stderr) == (0, "")
    assert "127.0.0.1:8100" in done.stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_where_and_what(
    tmp_path: Path, mistake: str, monkeypatch
):
    good, bad, line, words = MISTAKES[mistake]
    assert good in GOOD
    conf = written(tmp_path / "server.conf", GOOD.replace(good, bad))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["check-config", "-C", str(conf)])
    (said,) = done.output.splitlines()
    said = said.removeprefix("zeolith: ")
    assert done.exit_code == 2
    assert said.startswith(f"{conf}:{line}: " if line else f"{conf}:")
    for word in words:
        assert word in said.removeprefix(str(conf))
    assert list(tmp_path.iterdir()) == [conf]


def test_whoever_does_not_check_is_told_the_same(tmp_path: Path):
    conf = written(tmp_path / "server.conf", GOOD.replace("read-only", "red-only"))
    checking, serving = (
        zeolith(command, "-C", str(conf), cwd=tmp_path)
        for command in ("check-config", "serve")
    )
    assert complaint(serving) == complaint(checking)
    assert serving.returncode == checking.returncode == 2
    assert list(tmp_path.iterdir()) == [conf]


def test_a_file_without_a_storage_is_a_mistake(tmp_path: Path):
    conf = written(tmp_path / "server.conf", "<zeolith>\n</zeolith>\n")
    done = zeolith("check-config", "-C", str(conf))
    assert done.returncode == 2
    assert "storage" in complaint(done)


def test_a_file_that_is_not_there_is_a_mistake(tmp_path: Path):
    path = str(tmp_path / "no.conf")
    for command in ("check-config", "serve"):
        done = zeolith(command, "-C", path)
        assert done.returncode == 2
        assert path in complaint(done)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["check-config"],
        ["serve"],
        ["serve", "-C", "server.conf", "--path", "Data.fs"],
        ["serve", "-C", "server.conf", "--address", "127.0.0.1:0"],
        ["serve", "--address", "127.0.0.1:0"],
        ["serve", "--path", "Data.fs", "--address", "127.0.0.1:http"],
        ["serve", "Data.fs"],
        ["ping"],
        ["ping", "127.0.0.1:http"],
        ["status"],
        ["status", "127.0.0.1:0", "--yaml"],
        ["sing"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_a_mistake(
    tmp_path: Path, arguments: list[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 2
    assert "Usage" in done.output
    assert not list(tmp_path.iterdir())

"""`zeolith pack`, against a server in this process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from zeolith.server import cli, pack_command
from zeolith.storage.pack_progress import Packed, Packing

from ..support.gates import Gate
from ..support.inprocess import InProcessServer, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "Data.fs") as server:
        yield server


class Pack:
    """A pack that does what the test wants, in the place of the storage's."""

    def __init__(self, server: InProcessServer, monkeypatch: Any):
        self.gate = Gate()
        self.calls: list[tuple[float, bool | None]] = []
        self.result: Any = Packed(True, 2000, 1000)
        self.packing: Packing | None = None
        monkeypatch.setattr(server.database, "pack", self)

    def __call__(self, time_s: float, gc: bool | None, packing: Packing) -> Packed:
        self.calls.append((time_s, gc))
        self.packing = packing
        packing.phase, packing.fraction = "copying", 0.57
        self.gate.pass_through()
        packing.refuse_if_cancelled()
        if isinstance(self.result, Exception):
            raise self.result
        result: Packed = self.result
        return result


@pytest.fixture
def pack(server, monkeypatch) -> Iterator[Pack]:
    pack = Pack(server, monkeypatch)
    yield pack
    pack.gate.open()


def run(server: InProcessServer, *options: str) -> Result:
    address = "{}:{}".format(*server.address)
    result = CliRunner().invoke(cli.main, ["pack", address, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def last_line(result: Result) -> str:
    """What was said at the end; a pack that took a moment has shown its progress."""
    return str(result.stdout.splitlines()[-1])


def complaint(result: Result) -> str:
    (line,) = result.stderr.splitlines()
    return str(line).removeprefix("zeolith: ")


def test_a_pack_is_asked_for_and_its_end_is_told(server, pack):
    result = run(server)
    assert result.exit_code == 0
    assert last_line(result).startswith("packed: 2000 bytes, now 1000, in ")
    ((moment_s, gc),) = pack.calls
    assert abs(time.time() - 86400 - moment_s) < 60
    assert gc is None


def test_nothing_to_pack_is_no_failure(server, pack):
    pack.result = Packed(False, 1000, 1000)
    result = run(server)
    assert result.exit_code == 0
    assert last_line(result) == "there is nothing to pack"


@pytest.mark.parametrize(
    ("options", "gc"), [([], None), (["--gc"], True), (["--no-gc"], False)]
)
def test_garbage_is_a_question_of_options(server, pack, options, gc):
    run(server, *options)
    assert pack.calls[0][1] is gc


def test_the_moment_is_a_number_of_days_ago_or_a_time(server, pack):
    run(server, "--days", "0.5")
    run(server, "--at", "2026-01-31T04:30+00:00")
    (by_days, _gc), (at, _gc) = pack.calls
    assert abs(time.time() - 43200 - by_days) < 60
    assert at == 1769833800


@pytest.mark.parametrize(
    "options",
    [
        ["--days", "-1"],
        ["--days", "nan"],
        ["--days", "1e9"],
        ["--days", "1", "--at", "2026-01-31"],
        ["--at", "yesterday"],
        ["--at", "2999-01-01"],
        ["--at", "1960-01-01"],
        ["--cancel", "--gc"],
    ],
)
def test_options_that_make_no_sense_end_with_2(server, pack, options):
    result = run(server, *options)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert not pack.calls


def test_a_failure_ends_with_1_and_a_line(server, pack):
    pack.result = OSError(28, "while packing: No space left on device")
    result = run(server, "--quiet")
    assert result.exit_code == 1
    assert "No space left on device" in complaint(result)
    assert not result.stdout


def test_a_wrong_name_is_told(server, pack):
    result = run(server, "--storage", "two")
    assert result.exit_code == 1
    assert complaint(result) == "there is no storage 'two' here, only '1'"


def test_a_read_only_server_is_told(tmp_path):
    with serving(tmp_path / "Data.fs", is_read_only=True) as server:
        result = run(server)
    assert result.exit_code == 1
    assert complaint(result) == "storage '1' is read-only there"


def test_no_answer_is_told(tmp_path):
    result = CliRunner().invoke(cli.main, ["pack", str(tmp_path / "nobody")])
    assert result.exit_code == 1
    assert "No such file or directory" in complaint(result)


def test_a_server_that_goes_away_is_told(server, pack):
    pack.gate.shut()

    def leave() -> None:
        pack.gate.wait_until_reached()
        server.cut_off()
        pack.gate.open()

    leaving = threading.Thread(target=leave)
    leaving.start()
    result = run(server)
    leaving.join()
    assert result.exit_code == 1
    assert "127.0.0.1:" in complaint(result)


def test_progress_is_shown_in_few_lines(server, pack, monkeypatch):
    monkeypatch.setattr(pack_command, "_LOOK_INTERVAL_S", 0.01)
    pack.gate.shut()
    echo = click.echo

    def echo_and_go_on(text: str, **options: Any) -> None:
        echo(text, **options)
        if "copying" in text:
            pack.gate.open()

    monkeypatch.setattr(click, "echo", echo_and_go_on)
    result = run(server)
    *before, last = result.stdout.splitlines()
    assert before in (["copying, 50 %"], ["starting, 0 %", "copying, 50 %"])
    assert last.startswith("packed: ")


def test_ctrl_c_gives_the_pack_up(server, pack, monkeypatch):
    monkeypatch.setattr(pack_command, "_LOOK_INTERVAL_S", 0.01)
    pack.gate.shut()
    cancel = Packing.cancel

    def cancel_and_go_on(self: Packing, reason: str) -> bool:
        is_cancelled = cancel(self, reason)
        pack.gate.open()
        return is_cancelled

    monkeypatch.setattr(Packing, "cancel", cancel_and_go_on)

    def interrupt() -> None:
        pack.gate.wait_until_reached()
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    result = run(server)
    interrupting.join()
    assert result.exit_code == 3
    assert "the pack was cancelled by" in complaint(result)


def test_somebody_elses_pack_can_be_given_up(server, pack):
    pack.gate.shut()

    def begin() -> Any:
        packing = _packing_of(server)
        return server.served.workers.aside(server.database.pack, 5.0, None, packing)

    packing = server.on_loop(begin)
    packing.add_done_callback(lambda ended: ended.exception())
    pack.gate.wait_until_reached()
    result = run(server, "--cancel")
    assert result.exit_code == 0
    assert result.stdout == "the pack is given up\n"
    pack.gate.open()


def _packing_of(server: InProcessServer) -> Packing:
    packing = server.served.packing = Packing("somebody")
    return packing


def test_a_pack_that_cannot_be_given_up_is_told(server, pack):
    result = run(server, "--cancel")
    assert result.exit_code == 1
    assert complaint(result) == "no pack is under way"
    server.on_loop(_packing_of, server)
    server.served.packing.is_cancellable = False
    result = run(server, "--cancel")
    assert complaint(result) == "the pack under way cannot be given up (any more)"
    server.served.packing = None

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from zeolith.server import cli, daemon, probe
from zeolith.server.listener import ListenError
from zeolith.storage.opening import OpeningError

from ..support.inprocess import InProcessServer, client_of, serving

CONF = """\
<zeolith>
  address 127.0.0.1:8101
  address /run/zeolith.sock
</zeolith>
<filestorage main>
  path {folder}/Data.fs
</filestorage>
"""


@pytest.fixture
def conf(tmp_path: Path) -> str:
    path = tmp_path / "server.conf"
    path.write_text(CONF.replace("{folder}", str(tmp_path)))
    return str(path)


@pytest.fixture
def served(monkeypatch) -> list[Any]:
    """The options with which a server was started, instead of one."""
    served: list[Any] = []
    monkeypatch.setattr(daemon, "run", lambda options, *_rest: served.append(options))
    return served


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "Data.fs") as server:
        yield server


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.main, arguments)
    # SystemExit is how a command says its exit code; anything else is a traceback.
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def address_of(server: InProcessServer) -> str:
    return "{}:{}".format(*server.address)


# serve


def test_a_file_is_served(conf, served):
    assert run("serve", "-C", conf).exit_code == 0
    assert served[0].addresses == [("127.0.0.1", 8101), "/run/zeolith.sock"]
    assert list(served[0].storages) == ["main"]


def test_the_quick_form_needs_no_file(served):
    result = run("serve", "--address", "[::1]:8101", "--path", "Data.fs")
    assert result.exit_code == 0
    assert served[0].addresses == [("::1", 8101)]
    assert list(served[0].storages) == ["1"]


def test_addresses_may_repeat(served):
    run("serve", "--address", "8101", "--address", "/run/x", "--path", "Data.fs")
    assert served[0].addresses == [("127.0.0.1", 8101), "/run/x"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-C", "server.conf", "--path", "Data.fs"],
        ["-C", "server.conf", "--address", "8101"],
        ["-C", "server.conf", "--blob-dir", "blobs"],
        ["--path", "Data.fs", "--address", "nonsense:port"],
        ["--path", "Data.fs", "--frobnicate"],
    ],
)
def test_a_wrong_command_line_ends_with_2(served, arguments):
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert not served


def test_a_wrong_file_ends_with_2_and_one_line(tmp_path, served):
    path = tmp_path / "server.conf"
    path.write_text("<zeolith>\nport 8100\n</zeolith>\n")
    for command in ("serve", "check-config"):
        result = run(command, "-C", str(path))
        assert result.exit_code == 2
        assert result.stderr.startswith(f"zeolith: {path}:")
        assert result.stderr.count("\n") == 1
        assert not result.stdout
    assert not served


@pytest.mark.parametrize("error", [OpeningError("1: locked"), ListenError("in use")])
def test_what_cannot_be_done_ends_with_1_and_one_line(conf, monkeypatch, error):
    def fail(*_arguments: Any) -> None:
        raise error

    monkeypatch.setattr(daemon, "run", fail)
    result = run("serve", "-C", conf)
    assert result.exit_code == 1
    assert result.stderr == f"zeolith: {error}\n"


def test_a_hangup_reads_the_file_again(conf, monkeypatch, caplog):
    rereads: list[Any] = []
    monkeypatch.setattr(daemon, "run", lambda _o, _a, reread: rereads.append(reread))
    run("serve", "-C", conf)
    run("serve", "--path", "Data.fs")
    from_file, from_nothing = rereads
    with caplog.at_level(logging.ERROR):
        assert list(from_file().storages) == ["main"]
        Path(conf).write_text("nonsense")
        assert from_file() is None
        assert from_nothing() is None
    assert "the configuration is not used" in caplog.text


# check-config


def test_a_file_can_be_checked(conf, tmp_path):
    result = run("check-config", "-C", conf)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "address 127.0.0.1:8101",
        "address /run/zeolith.sock",
        "storage main",
    ]
    assert not (tmp_path / "Data.fs").exists()


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_an_exposed_address_is_refused_with_a_way_out(tmp_path, served, command):
    path = tmp_path / "server.conf"
    text = CONF.replace("127.0.0.1:8101", "0.0.0.0:8101")
    text = text.replace("{folder}", str(tmp_path))
    path.write_text(text)
    result = run(command, "-C", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith("zeolith: 0.0.0.0:8101: ")
    assert "insecure true" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not served
    path.write_text(text.replace("<zeolith>\n", "<zeolith>\n  insecure true\n"))
    assert run(command, "-C", str(path)).exit_code == 0


def test_an_exposed_address_without_a_file_needs_an_option(served):
    command = ["serve", "--path", "Data.fs", "--address", "0.0.0.0:8101"]
    assert run(*command).exit_code == 2
    assert not served
    assert run(*command, "--insecure").exit_code == 0
    assert served[0].may_be_exposed
    assert run("serve", "-C", "server.conf", "--insecure").exit_code == 2


def test_a_check_needs_a_file():
    assert run("check-config").exit_code == 2


# ping and status


@pytest.mark.parametrize("command", ["ping", "status"])
def test_an_answer_ends_with_0(server, command):
    assert run(command, address_of(server)).exit_code == 0


@pytest.mark.parametrize("command", ["ping", "status"])
def test_no_answer_ends_with_1_and_one_line(tmp_path, command):
    result = run(command, str(tmp_path / "nobody"))
    assert result.exit_code == 1
    assert result.stderr.startswith("zeolith: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["host:port"], ["1", "2"]])
@pytest.mark.parametrize("command", ["ping", "status"])
def test_a_wrong_question_ends_with_2(command, arguments):
    assert run(command, *arguments).exit_code == 2


def test_the_status_for_programs_is_json(server):
    with client_of(server, client_label="zope-3"):
        result = run("status", address_of(server), "--json")
    status = json.loads(result.stdout)
    assert status["storages"]["1"]["clients"][0]["label"] == "zope-3"


def test_the_status_for_people_names_clients_and_numbers(server):
    with client_of(server, client_label="zope-3"):
        shown = run("status", address_of(server)).stdout
    assert "storage 1: 0 objects, 4 bytes" in shown
    assert "client 127.0.0.1:" in shown
    assert "zope-3" in shown
    assert "0 commits" in shown


def test_the_status_for_people_tells_who_waits_and_what_is_broken(monkeypatch):
    status = {
        "version": "1.2.3",
        "pid": 7,
        "uptime_s": 12.3,
        "connections": 4,
        "storages": {
            "main": {
                "objects": 3,
                "size_bytes": 99,
                "last_tid": "0" * 16,
                "read_only": True,
                "counters": {"loads": 5},
                "broken": "the disk is gone",
                "transactions": [{"client": "a", "phase": "voted", "operations": 2}],
                "waiting": [{"client": "b"}, {"client": "c"}],
                "clients": [
                    {
                        "address": "d",
                        "label": None,
                        "identity": "user ann",
                        "read_only": True,
                        "channels": 1,
                    }
                ],
            }
        },
    }
    monkeypatch.setattr(probe, "ask", lambda *_question: status)
    shown = run("status", "8100").stdout.splitlines()
    assert shown == [
        "zeolith 1.2.3, process 7, up 12 s, 4 connections",
        "",
        "storage main: 3 objects, 99 bytes, last transaction 0000000000000000,"
        " read-only",
        "  5 loads",
        "  BROKEN, nothing is written: the disk is gone",
        "  in transaction: a (voted, 2 operations)",
        "  waiting for objects of others: b",
        "  waiting for objects of others: c",
        "  client d as user ann read-only, 1 channels",
    ]


def test_help_and_version():
    assert "serve" in run("--help").stdout
    assert run("--version").exit_code == 0

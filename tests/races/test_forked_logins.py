"""A process that is logged in forks: each child logs in for itself."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zeolith.server.greeting import Greeting
from zeolith.server.tls import Certificate, TlsOptions

from ..support.certificates import Authority
from ..support.identities import PASSWORD, TOKEN, access
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.records import seen

CHILDREN = 3
# Each line: who, the session before it worked and after, the ports of its sockets.
PREFORKING = """
import json, os, sys, threading, time
from tests.support.records import commit, seen
from zeolith.client.storage import ClientStorage

options, children = json.loads(sys.argv[1]), int(sys.argv[2])
storage = ClientStorage(**options)

def work(name):
    for n in range(10):
        commit(storage, **{name: b"%d" % n})
        # From the server, each time.
        storage.ping()
        assert seen(storage, name) == b"%d" % n

def session():
    return storage.current_session

def report(name, before):
    sockets = [session()._stream, *(each._socket for each in session()._pool.channels)]
    report = {
        "name": name,
        "before": before and before.welcome["session"].hex(),
        "after": session().welcome["session"].hex(),
        "ports": [each.getsockname()[1] for each in sockets],
    }
    os.write(1, json.dumps(report).encode() + b"\\n")

def begin(number):
    pid = os.fork()
    if pid:
        return pid
    try:
        name = f"child{number}"
        before = session()
        work(name)
        report(name, before)
        # Nobody goes before everybody was seen.
        sys.stdin.read()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

work("parent")
before = session()
# Channels in use, and not only idle ones, while it forks.
working = [threading.Thread(target=work, args=(f"thread{n}",)) for n in range(3)]
for each in working:
    each.start()
pids = [begin(number) for number in range(children)]
work("parent")
for each in working:
    each.join()
report("parent", before)
sys.stdin.read()
for pid in pids:
    assert os.waitpid(pid, 0)[1] == 0
work("parent")
storage.close()
"""
WAYS = {
    "user": {"username": "ann", "password": PASSWORD},
    "token": {"token_file": "token"},
    "tls": {"username": "ann", "password": PASSWORD, "tls_ca": "ca.pem"},
}


@contextmanager
def forking(folder: Path, options: dict[str, Any]) -> Iterator[Any]:
    """A process that has forked, and all its children."""
    # From Python 3.12 on it is warned of, in general.
    forks = "ignore:This process:DeprecationWarning"
    command = [sys.executable, "-W", "error", "-W", forks, "-c", PREFORKING]
    with (
        (folder / "stderr").open("wb") as stderr,
        subprocess.Popen(
            [*command, json.dumps(options), str(CHILDREN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def logins(monkeypatch) -> list[Any]:
    """What everybody has said of himself in the hello of a stream."""
    logins: list[Any] = []
    hello = Greeting.hello

    def noted(self: Greeting, peer: Any, fields: dict[str, Any]) -> None:
        if fields["kind"] == "stream":
            logins.append(fields["login"])
        hello(self, peer, fields)

    monkeypatch.setattr(Greeting, "hello", noted)
    return logins


def sockets_of(server: InProcessServer) -> dict[str, set[int]]:
    """The clients' ports of each session, by its token."""

    def look() -> dict[str, set[int]]:
        return {
            token.hex(): {
                int(peer.address.rpartition(":")[2])
                for peer in (session.stream, *session.channels)
            }
            for token, session in server.service.sessions.items()
        }

    found: dict[str, set[int]] = server.on_loop(look)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_each_child_logs_in_and_has_a_session_for_itself(tmp_path, logins, way):
    (tmp_path / "token").write_text(TOKEN)
    shown = Certificate(TlsOptions(Authority(tmp_path).sign().both))
    tls = shown.context if way == "tls" else None
    options = {
        key: str(tmp_path / value) if key in ("token_file", "tls_ca") else value
        for key, value in WAYS[way].items()
    }
    known = access(ann="write", token="write")
    with serving(tmp_path / "Data.fs", access=known, tls=tls) as server:
        if tls is not None:
            server.service.greeting.certificate = shown.pem
        with forking(tmp_path, {**options, "addr": list(server.address)}) as process:
            reports = {}
            for _ in range(CHILDREN + 1):
                report = json.loads(process.stdout.readline() or "{}")
                assert report, (tmp_path / "stderr").read_text()
                reports[report.pop("name")] = report
            sockets = sockets_of(server)
            process.stdin.close()
            assert process.wait(30) == 0, (tmp_path / "stderr").read_text()
        # The parent has noticed nothing, and the children had to begin.
        assert reports["parent"]["before"] == reports["parent"]["after"]
        for number in range(CHILDREN):
            assert reports[f"child{number}"]["before"] is None
        # No session has sockets of two processes.
        assert sockets == {
            report["after"]: set(report["ports"]) for report in reports.values()
        }
        assert len(sockets) == CHILDREN + 1
        # And none has said what another one has, but for a token, which is no secret
        # between them.
        assert len(logins) == CHILDREN + 1
        assert len(set(map(tuple, logins))) == (1 if way == "token" else CHILDREN + 1)
        with client_of(server, **options) as storage:
            for name in (*reports, "thread0", "thread1", "thread2"):
                assert seen(storage, name) == b"9"

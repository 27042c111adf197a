"""A session from the command line: kept alive, and every end told in a line."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from zeolith.server.probe import NoAnswer
from zeolith.server.visit import Refused, Visit
from zeolith.storage.pack_progress import Packing

from ..support.inprocess import InProcessServer, serving
from ..support.script import IMPATIENT, Act, scripted

TIMEOUT_S = 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "Data.fs") as server:
        yield server


def test_a_visit_asks_and_leaves_nothing_behind(server):
    with Visit(server.address, "1", "somebody", TIMEOUT_S) as visit:
        assert visit.call("pack_progress", TIMEOUT_S) is None
        assert server.status()["sessions"] == 1
        number = visit.ask("ping")
        assert visit.wait(TIMEOUT_S) == {number: None}
        assert visit.wait(0) == {}


def test_what_the_server_refuses_is_an_answer(server):
    with Visit(server.address, "1", "somebody", TIMEOUT_S) as visit:
        server.on_loop(setattr, server.served, "packing", Packing("somebody else"))
        number = visit.ask("pack", 5.0, None)
        refused = visit.wait(TIMEOUT_S)[number]
        server.on_loop(setattr, server.served, "packing", None)
    assert isinstance(refused, Refused)
    assert "is being packed already, for somebody else" in str(refused)


def test_it_is_kept_alive_while_it_waits(tmp_path):
    with scripted(limits=IMPATIENT) as server:
        server.answers["pack"] = Act.SILENCE
        with Visit(server.address, "1", "somebody", TIMEOUT_S, IMPATIENT) as visit:
            visit.ask("pack", 5.0, None)
            assert visit.wait(2 * IMPATIENT.heartbeat_timeout_s) == {}
            assert visit.call("ping", TIMEOUT_S) is None


def test_a_server_that_hangs_up_is_no_answer():
    with scripted() as server:
        server.answers["ping"] = Act.HANG_UP
        with (
            Visit(server.address, "1", "somebody", TIMEOUT_S) as visit,
            pytest.raises(NoAnswer, match="closed the connection"),
        ):
            visit.call("ping", TIMEOUT_S)


def test_an_answer_that_is_late_is_no_answer():
    with scripted() as server:
        server.answers["ping"] = Act.SILENCE
        with (
            Visit(server.address, "1", "somebody", TIMEOUT_S) as visit,
            pytest.raises(NoAnswer, match="does not answer within"),
        ):
            visit.call("ping", 0.05)


@pytest.mark.parametrize("kind", ["hello", "channel_hello"])
def test_silence_at_the_hello_is_told(kind):
    with scripted() as server:
        setattr(server, kind, Act.SILENCE)
        with pytest.raises(NoAnswer, match="does not answer within"):
            Visit(server.address, "1", "somebody", 0.05)


def test_nobody_there_is_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(NoAnswer, match="refused"):
        Visit(address, "1", "somebody", TIMEOUT_S)

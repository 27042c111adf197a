import socket
import sys

import pytest

from zeolith.server.readiness import notify


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """The socket on which systemd listens."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield sock


def test_systemd_is_told_the_state(systemd):
    notify("READY=1")
    notify("STOPPING=1")
    assert systemd.recv(100) == b"READY=1"
    assert systemd.recv(100) == b"STOPPING=1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has them")
def test_an_abstract_address_is_understood(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        # The kernel chooses a free one.
        sock.bind("")
        sock.setblocking(False)
        address = sock.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address[1:].decode())
        notify("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_without_systemd_nothing_happens(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_a_listener_that_is_not_there_is_no_reason_to_fail(
    monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nowhere"))
    notify("READY=1")
    assert "NOTIFY_SOCKET" in caplog.text

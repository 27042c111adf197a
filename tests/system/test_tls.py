"""TLS between processes: a server, its certificate, and those who come to it."""

import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.blob import Blob
from ZODB.DB import DB

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.protocol.limits import Limits

from ..support.certificates import Authority, Signed
from ..support.commanding import complaint, written, zeolith
from ..support.proxy import Proxy
from ..support.records import commit, seen, wait_for_position
from ..support.serving import FILESTORAGE, ServerProcess
from ..support.waiting import wait_until

SECRET = "known to nobody else " * 10
MEBIBYTE = 1024 * 1024
BLOBS = FILESTORAGE.replace("Data.fs\n", "Data.fs\n  blob-dir blobs\n")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def signed(authority: Authority) -> Signed:
    return authority.sign()


def section(signed: Signed, *more: str) -> str:
    lines = (f"certificate {signed.certificate}", f"key {signed.key}", *more)
    return "<tls>\n" + "\n".join(lines) + "\n</tls>"


@pytest.fixture
def server(tmp_path: Path, signed: Signed) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, options=section(signed), storages=BLOBS) as server:
        yield server


def refusal(address: Any, **options: Any) -> str:
    """Why no client can be had; told at once."""
    with pytest.raises(ClientDisconnected, match="refused") as caught:
        ClientStorage(address, wait_timeout=1000, **options)
    return str(caught.value)


class Tap(Proxy):
    """A proxy that keeps what passes."""

    def __init__(self, target: tuple[str, int]):
        super().__init__(target)
        self.passed: list[bytes] = []

    def admit(self, way: Any, chunk: bytes) -> tuple[bytes, bool]:
        self.passed.append(chunk)
        return super().admit(way, chunk)


def test_everything_goes_through_and_nothing_can_be_read(server, authority, tmp_path):
    tap = Tap(server.address)
    tap.start()
    try:
        _write_and_read(tap, authority, tmp_path)
    finally:
        tap.close()
    passed = b"".join(tap.passed)
    assert len(passed) > 7 * MEBIBYTE
    for readable in (SECRET, "label-of-mine", "persistent.mapping", "Welcome", "load"):
        assert readable.encode() not in passed


def _write_and_read(tap: Tap, authority: Authority, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tls_ca": authority.ca, "client_label": "label-of-mine"}
    for number in range(2):
        directory = str(tmp_path / f"blobs{number}")
        storage = ClientStorage(tap.address, blob_dir=directory, **options)
        db = DB(storage)
        with db.transaction() as connection:
            root = connection.root()
            if number == 0:
                root["secret"] = SECRET
                root["large"] = os.urandom(3 * MEBIBYTE)
                root["blob"] = Blob(SECRET.encode() * 10_000)
            assert root["secret"] == SECRET
            assert len(root["large"]) == 3 * MEBIBYTE
            with root["blob"].open() as blob:
                assert blob.read() == SECRET.encode() * 10_000
        db.close()


def test_channels_resume_what_their_stream_has_agreed(server, authority):
    storage = ClientStorage(server.address, tls_ca=authority.ca)
    session = storage.current_session
    assert session is not None
    channels = [session.borrow() for _ in range(3)]
    for channel in channels:
        assert isinstance(channel._socket, ssl.SSLSocket)
        assert channel._socket.session_reused
    for channel in channels:
        assert channel.call("ping") is None
        session.give_back(channel)
    storage.close()


# Who is refused


def test_a_plain_client_is_told_that_tls_is_spoken(server):
    assert "this server speaks TLS" in refusal(server.address)


def test_a_client_with_tls_is_told_that_it_is_not_spoken(tmp_path, authority):
    with ServerProcess(tmp_path) as server:
        said = refusal(server.address, tls_ca=authority.ca)
    assert "the server speaks no TLS" in said


def test_a_server_that_is_not_trusted_is_refused(server, authority, tmp_path):
    stranger = Authority(tmp_path, "stranger")
    assert "is not trusted" in refusal(server.address, tls_ca=stranger.ca)
    # The system knows nobody of ours.
    assert "is not trusted" in refusal(server.address, tls=True)


def test_a_server_of_another_name_is_refused(server, authority):
    said = refusal(server.address, tls_ca=authority.ca, tls_server_name="db.example")
    assert "is for another name" in said


def test_a_server_may_be_called_otherwise_than_its_address(tmp_path, authority):
    signed = authority.sign("db.example")
    with ServerProcess(tmp_path, options=section(signed)) as server:
        assert "another name" in refusal(server.address, tls_ca=authority.ca)
        ClientStorage(
            server.address, tls_ca=authority.ca, tls_server_name="db.example"
        ).close()
        context = ssl.create_default_context(cafile=authority.ca)
        ClientStorage(
            server.address, ssl=context, ssl_server_hostname="db.example"
        ).close()
        ClientStorage(server.address, tls_verify=False).close()


def test_a_server_whose_certificate_has_expired_is_refused(tmp_path, authority):
    options = section(authority.expired())
    with ServerProcess(tmp_path, options=options) as server:
        assert "has expired" in refusal(server.address, tls_ca=authority.ca)
    assert "the certificate has expired on" in server.stderr_text()


def test_a_client_without_the_certificate_that_is_wanted_is_refused(
    tmp_path, authority, signed
):
    wanted = section(
        signed, f"client-ca {authority.ca}", "require-client-certificate on"
    )
    other = Authority(tmp_path, "other").sign(file="other")
    mine = authority.sign("web", file="mine")
    with ServerProcess(tmp_path, options=wanted) as server:
        said = refusal(server.address, tls_ca=authority.ca)
        assert "wants a certificate of its clients" in said
        said = refusal(server.address, tls_ca=authority.ca, tls_certificate=other.both)
        assert "does not accept this client's certificate" in said
        storage = ClientStorage(
            server.address,
            tls_ca=authority.ca,
            tls_certificate=mine.certificate,
            tls_key=mine.key,
        )
        # On a channel, which resumes.
        storage.ping()
        storage.close()
    text = server.stderr_text()
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in text
    assert "Traceback" not in text


def test_who_does_not_shake_hands_is_given_up(authority):
    """Somebody accepts, and says nothing."""
    limits = Limits(hello_timeout_s=0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ClientDisconnected, match=r"did not answer .* 0\.2 s"),
    ):
        ClientStorage(
            silent.getsockname(), tls_ca=authority.ca, wait_timeout=1, limits=limits
        )


def test_a_relay_is_a_client_with_the_same_options(server, authority, tmp_path):
    host, port = server.address
    upstream = (
        "%import zeolith.client.upstream\n"
        f"<upstream 1>\nserver {host}:{port}\ntls-ca {authority.ca}\n</upstream>"
    )
    folder = tmp_path / "relay"
    folder.mkdir()
    with ServerProcess(folder, storages=upstream) as relay:
        here, there = (
            ClientStorage(relay.address),
            ClientStorage(server.address, tls_ca=authority.ca),
        )
        assert here.identity()[0] == there.identity()[0]
        wait_for_position(here, commit(there, x=b"there"))
        assert seen(here, "x") == b"there"
        wait_for_position(there, commit(here, x=b"here"))
        assert seen(there, "x") == b"here"
        here.close()
        there.close()


# Another certificate


def presented(server: ServerProcess) -> bytes:
    """The certificate that a new client is shown."""
    pem = ssl.get_server_certificate(server.address)
    return ssl.PEM_cert_to_DER_cert(pem)


def test_a_hangup_shows_new_clients_a_new_certificate(server, authority, signed):
    storage = ClientStorage(server.address, tls_ca=authority.ca)
    session = storage.current_session
    before = presented(server)
    authority.sign()
    assert presented(server) == before
    server.send(signal.SIGHUP)
    wait_until(lambda: presented(server) != before, "the new certificate")
    storage.ping()
    assert storage.current_session is session
    # A new channel of an old session.
    assert session is not None
    channels = [session.borrow() for _ in range(3)]
    for channel in channels:
        channel.call("ping")
        session.give_back(channel)
    storage.close()


def test_a_broken_certificate_is_logged_and_the_old_one_stays(
    server, authority, signed
):
    before = presented(server)
    good = Path(signed.key).read_text()
    authority.sign(file="other")
    Path(signed.key).write_text(Path(signed.key.replace("server", "other")).read_text())
    server.send(signal.SIGHUP)
    wait_until(lambda: "does not belong" in server.stderr_text(), "the complaint")
    assert "Traceback" not in server.stderr_text()
    assert presented(server) == before
    Path(signed.key).write_text(good)
    ClientStorage(server.address, tls_ca=authority.ca).close()


def test_tls_is_not_switched_off_by_a_hangup(server, authority, signed):
    server.rewrite(section(signed), "")
    server.send(signal.SIGHUP)
    wait_until(lambda: "by a restart only" in server.stderr_text(), "the remark")
    ClientStorage(server.address, tls_ca=authority.ca).close()


# What is wrong with a configuration


def _configuration(tmp_path: Path, tls: str) -> Path:
    return written(
        tmp_path / "server.conf",
        f"<zeolith>\naddress 127.0.0.1:0\n{tls}\n</zeolith>\n{FILESTORAGE}",
    )


@pytest.mark.parametrize("command", ["check-config", "serve"])
def test_a_mistake_of_tls_is_one_line(tmp_path, authority, signed, command):
    tls = f"<tls>\ncertificate {signed.certificate}\n</tls>"
    conf = _configuration(tmp_path, tls)
    done = zeolith(command, "-C", str(conf))
    assert done.returncode == 2
    assert complaint(done) == (
        f"{conf}: <tls>: {signed.certificate}: there is no private key in it"
        " (in PEM format)"
    )


def test_a_good_certificate_is_fine_and_an_old_one_is_warned_of(tmp_path, authority):
    for signed, warning in (
        (authority.sign(), ""),
        (authority.expired(), "the certificate has expired on"),
    ):
        conf = _configuration(tmp_path, section(signed))
        done = zeolith("check-config", "-C", str(conf))
        assert done.returncode == 0
        assert warning in done.stderr
        assert bool(warning) == bool(done.stderr)

"""Users and tokens as an operator lets them in, watches them and lets them go."""

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from ZODB.POSException import ReadOnlyError

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.server.access import parse_grants
from zeolith.server.key_files import add_user, create_token

from ..support.certificates import Authority, Signed
from ..support.commanding import complaint, zeolith
from ..support.records import commit
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

PASSWORD = "correct horse battery"
ACCESS = "<access>\nusers users\ntokens tokens\n</access>"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a user's password, and the files of a server."""
    monkeypatch.delenv("ZEOLITH_TOKEN", raising=False)
    monkeypatch.delenv("ZEOLITH_PASSWORD", raising=False)
    (tmp_path / "password").write_text(PASSWORD + "\n")
    for name, role in (("ann", "write"), ("root", "admin")):
        add_user(tmp_path / "users", name, PASSWORD, parse_grants(role))
    token = create_token(tmp_path / "tokens", "", parse_grants("read"), None, 0.0)
    (tmp_path / "token").write_text(token)
    return tmp_path


def run(*arguments: object) -> str:
    done = zeolith(*map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def server(folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(folder, options=ACCESS) as server:
        yield server
    text = server.stderr_text()
    assert PASSWORD not in text
    assert (folder / "token").read_text().strip() not in text


def ann_at(
    server: ServerProcess, folder: Path, **options: Any
) -> "closing[ClientStorage]":
    """A storage of the user ann, to be closed."""
    password = str(folder / "password")
    return closing(
        ClientStorage(server.address, username="ann", password_file=password, **options)
    )


def address_of(server: ServerProcess) -> str:
    host, port = server.address
    return f"{host}:{port}"


def test_commands_say_who_they_are(server: ServerProcess, folder: Path):
    address = address_of(server)
    run("ping", address)
    done = zeolith("status", address)
    assert done.returncode == 1
    assert "status needs the role admin" in complaint(done)
    who = ("--username", "root", "--password-file", folder / "password")
    assert "storage 1:" in run("status", *who, address)
    run("pack", "--quiet", *who, address)
    done = zeolith("pack", "--token-file", str(folder / "token"), address)
    assert done.returncode == 1
    assert "needs the role pack" in complaint(done) or "read-only" in complaint(done)
    done = zeolith("status", "--username", "root", address)
    assert done.returncode == 2
    assert "there is no password for root" in done.stderr


def test_a_client_comes_back_as_who_it_was(server: ServerProcess, folder: Path):
    with (
        ann_at(server, folder) as ann,
        closing(
            ClientStorage(server.address, token_file=str(folder / "token"))
        ) as reader,
    ):
        commit(ann, x=b"1")
        server.restart()
        commit(ann, x=b"2")
        wait_until(reader.is_connected, "the return of the other one")
        assert reader.isReadOnly()
        with pytest.raises(ReadOnlyError):
            commit(reader, x=b"3")


def test_who_is_removed_is_let_go_within_seconds(server: ServerProcess, folder: Path):
    with ann_at(server, folder, wait_timeout=5) as ann:
        run("user", "remove", folder / "users", "ann")
        wait_until(lambda: not ann.is_connected(), "the end of the session")
        with pytest.raises(ClientDisconnected, match="the login failed"):
            wait_until(ann.ping, "the refusal")
    assert "user ann may not come in any more" in server.stderr_text()


def test_a_file_that_breaks_lets_everybody_stay(server: ServerProcess, folder: Path):
    with ann_at(server, folder) as ann:
        (folder / "users").write_text("{")
        wait_until(
            lambda: "what was known of users and tokens stays" in server.stderr_text(),
            "the complaint",
        )
        ann.ping()
        with ann_at(server, folder) as again:
            again.ping()


def test_the_rules_are_read_again_on_a_signal(server: ServerProcess):
    with pytest.raises(ClientDisconnected, match="anonymous has no role"):
        ClientStorage(server.address)
    server.rewrite("users users", "users users\nanonymous read")
    server.send(signal.SIGHUP)

    def is_let_in() -> bool:
        try:
            ClientStorage(server.address).close()
        except ClientDisconnected:
            return False
        return True

    wait_until(is_let_in, "new rules")


def test_a_server_does_not_start_without_its_users(folder: Path):
    (folder / "users").unlink()
    conf = folder / "server.conf"
    conf.write_text(
        f"<zeolith>\naddress 127.0.0.1:0\n{ACCESS}\n</zeolith>\n"
        "<filestorage 1>\npath Data.fs\n</filestorage>\n"
    )
    done = zeolith("serve", "-C", str(conf), cwd=folder)
    assert done.returncode == 1
    assert complaint(done) == "users: No such file or directory"
    assert zeolith("check-config", "-C", str(conf), cwd=folder).returncode == 2


def test_a_relay_says_who_it_is(server: ServerProcess, folder: Path):
    host, port = server.address
    below = folder / "relay"
    below.mkdir()
    upstream = (
        "%import zeolith.client.upstream\n<upstream 1>\n"
        f"server {host}:{port}\nusername ann\npassword-file {folder / 'password'}\n"
        "</upstream>\n"
    )
    with (
        ServerProcess(below, storages=upstream) as relay,
        closing(ClientStorage(relay.address)) as client,
    ):
        commit(client, x=b"1")


def test_a_login_goes_through_tls_and_holds_for_it_alone(folder: Path):
    authority = Authority(folder)
    signed = authority.sign()
    tls = f"<tls>\ncertificate {signed.certificate}\nkey {signed.key}\n</tls>\n"
    with ServerProcess(folder, options=tls + ACCESS) as server:
        with ann_at(server, folder, tls_ca=authority.ca) as ann:
            commit(ann, x=b"1")
        # From now on clients see another certificate.
        authority.sign()
        server.send(signal.SIGHUP)
        wait_until(
            lambda: "the configuration was read again" in server.stderr_text(),
            "the new certificate",
        )
        with ann_at(server, folder, tls_ca=authority.ca) as ann:
            commit(ann, x=b"2")
        who = ("--username", "root", "--password-file", folder / "password")
        options = (*who, "--tls-ca", authority.ca, address_of(server))
        assert "storage 1:" in run("status", *options)
        run("pack", "--quiet", *options)
        token = str(folder / "token")
        with closing(
            ClientStorage(server.address, token_file=token, tls_ca=authority.ca)
        ) as reader:
            assert reader.isReadOnly()


def test_a_certificate_says_who_one_is(folder: Path):
    authority = Authority(folder)
    signed, web = authority.sign(), authority.sign("web.example.org", file="web")
    subject = subject_in(web)
    tls = (
        f"<tls>\ncertificate {signed.certificate}\nkey {signed.key}\n"
        f"client-ca {authority.ca}\n</tls>\n"
    )
    access = (
        f"<access>\n<certificate>\nsubject {subject}\nroles write\n</certificate>\n"
        "anonymous read\n</access>"
    )
    with ServerProcess(folder, options=tls + access) as server:
        options: dict[str, Any] = {
            "tls_certificate": web.certificate,
            "tls_key": web.key,
        }
        with closing(
            ClientStorage(server.address, tls_ca=authority.ca, **options)
        ) as known:
            commit(known, x=b"1")
        with closing(ClientStorage(server.address, tls_ca=authority.ca)) as stranger:
            assert stranger.isReadOnly()


def subject_in(signed: Signed) -> str:
    """As the configuration has it; what is signed for tests has an O and an OU."""
    name = x509.load_pem_x509_certificate(Path(signed.certificate).read_bytes()).subject
    short = {"organizationName": "O", "organizationalUnitName": "OU"}
    return ",".join(f"{short[each.oid._name]}={each.value!s}" for each in name)

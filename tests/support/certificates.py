"""Certificates for tests: an authority, what it has signed, and how it fails."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from zeolith.protocol.tls import ClientTls, client_context, trust

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")


class Signed(NamedTuple):
    """A certificate with its key in one file, and in two."""

    both: str
    certificate: str
    key: str


class Authority:
    """A certificate authority whose files are in ``folder``."""

    def __init__(self, folder: Path, name: str = "ca"):
        self._folder = folder
        self._authority = trustme.CA(organization_name=name)
        self.ca = str(folder / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def sign(
        self,
        *names: str,
        file: str = "server",
        begin: datetime | None = None,
        end: datetime | None = None,
    ) -> Signed:
        """A certificate for ``names`` (this machine's), in files called ``file``."""
        issued = self._authority.issue_cert(
            *(names or NAMES), not_before=begin, not_after=end
        )
        signed = self.signed_in(self._folder, file)
        issued.private_key_and_cert_chain_pem.write_to_path(signed.both)
        issued.cert_chain_pems[0].write_to_path(signed.certificate)
        issued.private_key_pem.write_to_path(signed.key)
        return signed

    @staticmethod
    def signed_in(folder: Path, file: str = "server") -> Signed:
        """What ``sign`` has left in ``folder``."""
        return Signed(*(str(folder / f"{file}.{end}") for end in ("pem", "crt", "key")))

    def revoke(self, *revoked: Signed, is_old: bool = False) -> str:
        """A list of the ``revoked``, in a file together with the authority."""
        now = datetime.now(UTC)
        pem = self._authority.cert_pem.bytes()
        made = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(x509.load_pem_x509_certificate(pem).subject)
            .last_update(now - timedelta(9))
            .next_update(now - timedelta(1) if is_old else now + timedelta(9))
        )
        for each in revoked:
            shown = Path(each.certificate).read_bytes()
            number = x509.load_pem_x509_certificate(shown).serial_number
            made = made.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(number)
                .revocation_date(now - timedelta(2))
                .build()
            )
        key = serialization.load_pem_private_key(
            self._authority.private_key_pem.bytes(), None
        )
        assert isinstance(key, EllipticCurvePrivateKey)
        listed = made.sign(key, SHA256()).public_bytes(serialization.Encoding.PEM)
        path = self._folder / "crl.pem"
        path.write_bytes(pem + listed)
        return str(path)

    def expired(self) -> Signed:
        """One that was good once."""
        now = datetime.now(UTC)
        return self.sign(
            file="expired", begin=now - timedelta(2), end=now - timedelta(1)
        )

    def not_yet_valid(self) -> Signed:
        """One that will be good."""
        now = datetime.now(UTC)
        return self.sign(
            file="future", begin=now + timedelta(1), end=now + timedelta(9)
        )

    def trusting(self, certificate: str | None = None) -> ClientTls:
        """A client that trusts this authority, and has a certificate or not."""
        return ClientTls(client_context(self.ca, certificate))


def encrypted(key: str, password: str) -> None:
    """Give the key in the file ``key`` a password."""
    path = Path(key)
    loaded = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password.encode()),
        )
    )


def context_of(
    signed: Signed,
    *,
    wants: Authority | None = None,
    ca: str | None = None,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
) -> ssl.SSLContext:
    """The context of a server that shows ``signed``.

    It wants certificates that ``wants`` has signed; ``ca`` is its file, or another one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = version
    context.load_cert_chain(signed.both)
    if wants is not None:
        trust(context, ca or wants.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def encrypted_pair(
    near: socket.socket, far: socket.socket, authority: Authority
) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """The two ends of a connection, as a client and a server that speak TLS."""
    client = authority.trusting().wrap(near, HOST)
    server = context_of(authority.sign()).wrap_socket(
        far, server_side=True, do_handshake_on_connect=False
    )
    shaking = threading.Thread(target=server.do_handshake)
    shaking.start()
    client.do_handshake()
    shaking.join()
    return client, server


class End:
    """One end of a conversation in memory."""

    def __init__(self, context: ssl.SSLContext, name: str | None = None):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming, self.outgoing, server_side=name is None, server_hostname=name
        )
        self.is_ready = False

    def step(self, arrived: bytes) -> bytes:
        """What it says to what has ``arrived``; raises as TLS does."""
        self.incoming.write(arrived)
        try:
            if not self.is_ready:
                self.tls.do_handshake()
                self.is_ready = True
            self.tls.read(1)
        except ssl.SSLWantReadError:
            pass
        return self.outgoing.read()


def rejection(
    client: ClientTls,
    server: Signed,
    *,
    name: str = HOST,
    wants: Authority | None = None,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    answer: bytes | None = None,
) -> ssl.SSLError:
    """The error of a client whose handshake fails; ``answer`` is not a server's."""
    if version is ssl.TLSVersion.TLSv1_3:
        client.context.maximum_version = ssl.TLSVersion.TLSv1_2
    far = End(context_of(server, wants=wants, version=version))
    near = End(client.context, name)
    said = b""
    for _ in range(10):
        try:
            said = near.step(said)
        except ssl.SSLError as error:
            return error
        try:
            said = answer or far.step(said)
        except ssl.SSLError:
            # The alert.
            said = far.outgoing.read()
    raise AssertionError("the handshake has not failed")

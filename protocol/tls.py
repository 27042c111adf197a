"""What both ends need of TLS: files that become a context, and errors that say why.

Pure but for the files that are read; nothing here waits for a socket. The server's own
half is server/tls.py; clients of both packages (``ClientStorage``, ``zeolith status``)
use ``client_tls``, whose arguments have the same names in Python, in a configuration
file, in a URI and on a command line. A mistake of an operator's is a TlsMistake.
"""

import logging
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

# Verify codes of OpenSSL (X509_V_ERR_...) that have a remedy of their own.
_EXPIRED, _NOT_YET_VALID = 10, 9
_OTHER_NAMES = (62, 64)
_REVOKED = 23
# There is no list of an authority's revoked certificates, or not one of today.
_NO_LIST = (3, 11, 12)
_NO_TLS = (
    "WRONG_VERSION_NUMBER",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
)
_NO_COMMON_VERSION = ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION")
_CERTIFICATE_WANTED = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
# How OpenSSL spells that the other end does not like our certificate.
_CERTIFICATE_REFUSED = (
    "TLSV1_ALERT_UNKNOWN_CA",
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_CERTIFICATE_REVOKED",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
    "TLSV1_ALERT_DECRYPT_ERROR",
)


class TlsMistake(ValueError):
    """A file or an option cannot be used; the text is one line that says why."""


class HandshakeFailed(OSError):
    """The two ends cannot agree on TLS; to try again is of no use until one changes.

    The text is one line that says what to do.
    """


@dataclass(frozen=True)
class ClientTls:
    """How a client speaks TLS; used by all its threads."""

    context: ssl.SSLContext
    # The name that the server's certificate must have; None: the host of the address.
    server_name: str | None = None

    def wrap(
        self, sock: socket.socket, host: str, session: ssl.SSLSession | None = None
    ) -> ssl.SSLSocket:
        """``sock`` as one that speaks TLS; the caller does the handshake.

        ``session`` is that of an earlier socket to the same server: the handshake is
        cheaper then.
        """
        return self.context.wrap_socket(
            sock,
            do_handshake_on_connect=False,
            server_hostname=self.server_name or host,
            session=session,
        )


class TlsFiles(NamedTuple):
    """The arguments that are paths; see protocol.tls.client_context."""

    tls_ca: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_key_password_file: str | None = None


NO_FILES = TlsFiles()


def client_tls(
    context: ssl.SSLContext | None = None,
    wanted: bool | None = None,
    files: TlsFiles = NO_FILES,
    server_name: str | None = None,
    *,
    verifies: bool = True,
) -> ClientTls | None:
    """How to speak TLS; None: not at all.

    It is spoken if it is ``wanted``, or if that is None and any argument is about it.
    Raises ValueError for arguments that contradict each other, TlsMistake (a
    ValueError) for files that cannot be used, TypeError for a ``context`` that is none.
    """
    given = [name for name, path in files._asdict().items() if path is not None]
    given += [] if verifies else ["tls_verify"]
    if context is not None:
        if not isinstance(context, ssl.SSLContext):
            raise TypeError(f"ssl is an ssl.SSLContext, and not {context!r}")
        if given:
            raise ValueError(f"with ssl, {given[0]} is a matter of that context")
        given.append("ssl")
    elif server_name is not None:
        given.append("tls_server_name")
    if wanted is False and given:
        raise ValueError(f"tls is off, so {given[0]} means nothing")
    if not (wanted or given):
        return None
    if not verifies:
        logger.warning(
            "tls_verify is off: whoever is between this client and its server can read"
            " and change everything"
        )
    made = context or client_context(*files, verifies=verifies)
    if server_name is not None:
        try:
            made.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), False, server_name)
        except ValueError as error:
            raise TlsMistake(f"{server_name!r} is no name of a server") from error
    return ClientTls(made, server_name)


def client_context(
    ca: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    key_password_file: str | None = None,
    *,
    verifies: bool = True,
) -> ssl.SSLContext:
    """The context of a client; raises TlsMistake.

    ``ca`` is a file or a directory of certificates that are trusted instead of the
    system's. ``certificate`` and ``key`` are shown to a server that asks.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verifies:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca is None:
        context.load_default_certs()
    if ca is not None:
        trust(context, ca)
    if certificate is not None:
        password = None if key_password_file is None else first_line(key_password_file)
        load_chain(context, certificate, key, password)
    elif key is not None or key_password_file is not None:
        raise TlsMistake("a key of its own is of no use without its certificate")
    return context


def trust(context: ssl.SSLContext, ca: str) -> None:
    """Have ``context`` trust the certificates at ``ca``; raises TlsMistake.

    If lists of revoked certificates (CRLs) are there, too, whoever connects needs one
    of his authority in which he is not.
    """
    if Path(ca).is_dir():
        context.load_verify_locations(capath=ca)
        # As `openssl rehash` names them.
        if any(Path(ca).glob("*.r[0-9]*")):
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return
    if "-----BEGIN CERTIFICATE-----" not in _text_of(ca):
        raise TlsMistake(f"{ca}: there is no certificate in it (in PEM format)")
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise TlsMistake(f"{ca}: {_reason(error)}") from error
    if context.cert_store_stats()["crl"]:
        # OpenSSL reads them and asks none of them.
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def load_chain(
    context: ssl.SSLContext, certificate: str, key: str | None, password: str | None
) -> None:
    """Have ``context`` show what is in the file ``certificate``; raises TlsMistake.

    The key is in the file ``key``, or in the same one.
    """
    key = key or certificate
    if "-----BEGIN CERTIFICATE-----" not in _text_of(certificate):
        raise TlsMistake(
            f"{certificate}: there is no certificate in it (in PEM format)"
        )
    if "PRIVATE KEY-----" not in _text_of(key):
        raise TlsMistake(f"{key}: there is no private key in it (in PEM format)")
    was_asked = False

    def answer() -> str:
        # Without this OpenSSL would ask at the terminal.
        nonlocal was_asked
        was_asked = True
        if password is None:
            raise TlsMistake(f"{key}: the private key has a password; say where it is")
        return password

    try:
        context.load_cert_chain(certificate, key, answer)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"the private key does not belong to the certificate {certificate}"
        elif was_asked:
            text = "the password does not open the private key"
        else:
            text = f"the certificate or the private key is damaged ({_reason(error)})"
        raise TlsMistake(f"{key}: {text}") from error


def first_line(path: str) -> str:
    """The password in the file at ``path``; raises TlsMistake."""
    lines = _text_of(path).splitlines()
    if not lines or not lines[0]:
        raise TlsMistake(f"{path}: there is no password in its first line")
    return lines[0]


def explained(error: ssl.SSLError) -> OSError:
    """What a client's user wants to know of an ``error`` of a handshake, to be raised.

    A HandshakeFailed, or a ConnectionResetError for one that may pass.
    """
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return ConnectionResetError(
            "the server closed the connection in the TLS handshake"
        )
    return HandshakeFailed(_explained(error))


def _explained(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _mistrust(error)
    reason = _reason(error)
    if reason in _NO_TLS:
        return "the server speaks no TLS: connect without, or to another port"
    if reason in _NO_COMMON_VERSION:
        return "the server and this client have no version of TLS in common"
    if reason == _CERTIFICATE_WANTED:
        return (
            "the server wants a certificate of its clients: give tls_certificate and"
            " tls_key"
        )
    if reason in _CERTIFICATE_REFUSED:
        return f"the server does not accept this client's certificate ({reason})"
    if reason == "SSLV3_ALERT_HANDSHAKE_FAILURE":
        return (
            "the server refuses the TLS handshake; it may want a certificate of its"
            " clients (tls_certificate and tls_key)"
        )
    return f"the TLS handshake failed: {reason}"


def _mistrust(error: ssl.SSLCertVerificationError) -> str:
    why = error.verify_message.rstrip(".")
    if error.verify_code == _EXPIRED:
        return "the server's certificate has expired, or the clock here is wrong"
    if error.verify_code == _NOT_YET_VALID:
        return "the server's certificate is not valid yet, or the clock here is wrong"
    if error.verify_code == _REVOKED:
        return "the server's certificate was revoked by the authority that signed it"
    if error.verify_code in _NO_LIST:
        return (
            "the server's certificate cannot be looked for among those that were"
            f" revoked ({why}): renew the list (CRL) in tls_ca"
        )
    if error.verify_code in _OTHER_NAMES:
        return (
            f"the server's certificate is for another name: {why}; if it is the right"
            " server, say the name in the certificate with tls_server_name"
        )
    return (
        f"the server's certificate is not trusted: {why}; if it is the right server,"
        " name the authority that signed it with tls_ca"
    )


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError as error:
        raise TlsMistake(f"{path}: {error.strerror or error}") from error


def _reason(error: ssl.SSLError) -> str:
    # One that Python raises itself has none.
    return getattr(error, "reason", None) or str(error)

"""The server's certificate: read, checked, shown to new clients, and read again.

``server_context`` makes what the ``<tls>`` section says into a context; a
``Certificate`` has the one that new handshakes use. Read together with the
configuration, at the start, for ``check-config``, and for SIGHUP in a thread that may
wait: a command may have to print a password.
"""

import logging
import ssl
import subprocess
import time
from dataclasses import dataclass

from zeolith.protocol.tls import TlsMistake, first_line, load_chain, trust

logger = logging.getLogger(__name__)

# The command that prints the password of a key.
PASSWORD_COMMAND_TIMEOUT_S = 10
# A certificate that ends sooner than this is worth a warning.
EXPIRY_WARNING_S = 14 * 86400
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@dataclass(frozen=True)
class TlsOptions:
    """What the section ``<tls>`` says."""

    certificate: str
    key: str | None = None
    key_password_file: str | None = None
    key_password_command: str | None = None
    client_ca: str | None = None
    requires_client_certificate: bool = False
    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2


def server_context(options: TlsOptions) -> ssl.SSLContext:
    """The context that ``options`` describe; raises TlsMistake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = options.minimum_version
    # A client has no reason to ask for it, but to keep the server busy.
    context.options |= ssl.OP_NO_RENEGOTIATION
    load_chain(context, options.certificate, options.key, _password(options))
    if options.client_ca is not None:
        trust(context, options.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    if options.requires_client_certificate:
        if options.client_ca is None:
            raise TlsMistake(
                "require-client-certificate needs client-ca, which says who may sign"
            )
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def warning(options: TlsOptions, now_s: float) -> str | None:
    """What an operator should know of a certificate that can be used, in one line.

    ``now_s`` is in seconds since the epoch.
    """
    with open(options.certificate) as file:
        der = ssl.PEM_cert_to_DER_cert(_first_certificate(file.read()))
    begin_s, end_s = validity(der)
    day = time.strftime("%Y-%m-%d", time.gmtime(end_s))
    if now_s >= end_s:
        return f"{options.certificate}: the certificate has expired on {day}"
    if now_s < begin_s:
        day = time.strftime("%Y-%m-%d", time.gmtime(begin_s))
        return f"{options.certificate}: the certificate is not valid before {day}"
    if end_s - now_s < EXPIRY_WARNING_S:
        return f"{options.certificate}: the certificate expires on {day}"
    return None


class Certificate:
    """What new handshakes use; belongs to the loop, once it is made."""

    def __init__(self, options: TlsOptions):
        """Read the files; raises TlsMistake."""
        self.options = options
        self.context = server_context(options)
        # What clients see of it, to which they bind their logins.
        with open(options.certificate) as file:
            self.pem = _first_certificate(file.read())

    def replace_by(self, renewed: "Certificate") -> None:
        """Show new clients another one from now on."""
        self.options, self.context = renewed.options, renewed.context
        self.pem = renewed.pem

    def warn(self) -> None:
        """Log what an operator should know of it."""
        text = warning(self.options, time.time())
        if text is not None:
            logger.warning("%s", text)


def validity(der: bytes) -> tuple[float, float]:
    """From when to when a certificate is valid, in seconds since the epoch.

    Python itself tells it only of a certificate that was verified.
    """
    # To import it takes a while, which only a server with TLS has to.
    from asn1crypto.x509 import Certificate as Parsed

    parsed = Parsed.load(der)
    begin_s: float = parsed.not_valid_before.timestamp()
    end_s: float = parsed.not_valid_after.timestamp()
    return begin_s, end_s


def _first_certificate(text: str) -> str:
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return text[text.index(begin) : text.index(end) + len(end)]


def _password(options: TlsOptions) -> str | None:
    if options.key_password_command is not None:
        if options.key_password_file is not None:
            raise TlsMistake("give either key-password-file or key-password-command")
        return _printed_by(options.key_password_command)
    if options.key_password_file is not None:
        return first_line(options.key_password_file)
    return None


def _printed_by(command: str) -> str:
    try:
        done = subprocess.run(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=PASSWORD_COMMAND_TIMEOUT_S,
            check=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        raise TlsMistake(
            f"key-password-command ended with status {error.returncode}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TlsMistake(
            f"key-password-command took more than {PASSWORD_COMMAND_TIMEOUT_S} s"
        ) from error
    password = done.stdout.split("\n", 1)[0]
    if not password:
        raise TlsMistake("key-password-command printed no password")
    return password

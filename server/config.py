"""The configuration file: read, checked, and turned into Options.

The schema, with the description of each key, is ``schema.xml`` beside this file; the
functions named there are here. Reading opens no storage and touches no socket; it reads
the files of a certificate, too, and may wait for a command that tells a password. Every
mistake becomes a ConfigError of one line that says where.
"""

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ZConfig

from zeolith.protocol.addresses import DEFAULT_HOST, DEFAULT_PORT, Address
from zeolith.protocol.durations import parse_seconds
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.tls import TlsMistake
from zeolith.server.access import Identity
from zeolith.server.exposure import exposed, refusal, resolved
from zeolith.server.keyring import AccessOptions
from zeolith.server.listener import SOCKET_MODE
from zeolith.server.replays import REPLAY_BYTES
from zeolith.server.tls import VERSIONS, Certificate, TlsOptions
from zeolith.server.zeo_words import advice
from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.opening import open_database, open_file

SCHEMA = Path(__file__).with_name("schema.xml")
DEFAULT_STORAGE = "1"
LOG_LEVELS = ("debug", "info", "warning", "error")


class ConfigError(Exception):
    """The configuration is wrong; the text is one line that says where and what."""


@dataclass(frozen=True)
class Options:
    """What a server needs to know."""

    addresses: list[Address]
    # Name -> how to open it.
    storages: dict[str, Callable[[], AdaptedStorage]]
    is_read_only: bool = False
    transaction_timeout_s: float = 30.0
    shutdown_timeout_s: float = 10.0
    index_interval_s: float = 600.0
    replay_bytes: int = REPLAY_BYTES
    log_level: int = logging.INFO
    is_insecure: bool = False
    socket_mode: int = SOCKET_MODE
    limits: Limits = DEFAULT
    # Who may do what; None: everybody everything.
    access: AccessOptions | None = None
    # None: TCP is plain.
    tls: Certificate | None = None

    @property
    def may_be_exposed(self) -> bool:
        """Whether it may listen on addresses that strangers reach."""
        return self.is_insecure or (self.tls is not None and self.has_login)

    @property
    def has_login(self) -> bool:
        """Whether whoever comes must say who he is, or was given what he may do."""
        tls = self.tls
        return self.access is not None or (
            tls is not None and tls.options.requires_client_certificate
        )


def read_file(path: str) -> Options:
    """The options that the file at ``path`` describes; raises ConfigError."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")
    schema = ZConfig.loadSchema(str(SCHEMA))
    try:
        document, _handlers = ZConfig.loadConfig(schema, path)
    except ZConfig.ConfigurationError as error:
        raise ConfigError(_one_line(path, error)) from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    return _options(path, document)


def quick_options(
    addresses: list[Address],
    path: str,
    blob_dir: str | None,
    *,
    is_insecure: bool = False,
) -> Options:
    """The options of a server without a file, for the one Data.fs at ``path``."""
    return Options(
        addresses=addresses or [(DEFAULT_HOST, DEFAULT_PORT)],
        storages={DEFAULT_STORAGE: partial(open_file, DEFAULT_STORAGE, path, blob_dir)},
        is_insecure=is_insecure,
    )


def refuse_exposed(options: Options) -> None:
    """Raise ConfigError if strangers would reach an address, and nobody allowed it.

    Names of hosts are looked up, which may take a while.
    """
    if options.is_insecure:
        return
    addresses = resolved(options.addresses)
    found = exposed(addresses, options.tls is not None, options.has_login)
    if found:
        raise ConfigError(refusal(found))


def Document(section: Any) -> Any:
    """Datatype of the whole file."""
    return section


def ServerSection(section: Any) -> Any:
    """Datatype of the <zeolith> section."""
    return section


def AccessSection(section: Any) -> AccessOptions:
    """Datatype of the <access> section."""
    certificates = tuple(section.certificates)
    subjects = {each.name for each in certificates}
    if len(subjects) < len(certificates):
        raise ValueError("<access> has two sections for the same certificate")
    return AccessOptions(
        anonymous=section.anonymous,
        users=Path(section.users) if section.users else None,
        tokens=Path(section.tokens) if section.tokens else None,
        certificates=certificates,
    )


def CertificateSection(section: Any) -> Identity:
    """Datatype of a <certificate> section."""
    return Identity("certificate", section.subject, section.roles)


def TlsSection(section: Any) -> TlsOptions:
    """Datatype of the <tls> section."""
    return TlsOptions(
        certificate=section.certificate,
        key=section.key,
        key_password_file=section.key_password_file,
        key_password_command=section.key_password_command,
        client_ca=section.client_ca,
        requires_client_certificate=section.require_client_certificate,
        minimum_version=section.minimum_version,
    )


def tls_version(text: str) -> ssl.TLSVersion:
    """Datatype: a version of TLS."""
    try:
        return VERSIONS[text]
    except KeyError:
        raise ValueError(f"{text!r} is none of {', '.join(VERSIONS)}") from None


def seconds(text: str) -> float:
    """Datatype: a time like 30, 0.5, 30s or 2m, more than none."""
    value = parse_seconds(text)
    if value == 0:
        raise ValueError(f"{text!r} is no time to wait; write for example 30s")
    return value


def socket_mode(text: str) -> int:
    """Datatype: the mode of a file in octal, as in 0660."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise ValueError(f"{text!r} is no mode of a file; write for example 0660")
    return mode


def log_level(text: str) -> int:
    """Datatype: the name of a level of the logging module."""
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"{text!r} is none of {', '.join(LOG_LEVELS)}")
    level: int = getattr(logging, text.upper())
    return level


def _options(path: str, document: Any) -> Options:
    if not document.storages:
        raise ConfigError(
            f"{path}: there is no storage to serve; add for example a <filestorage>"
        )
    server = document.server
    is_read_only = bool(server and server.read_only)
    storages: dict[str, Callable[[], AdaptedStorage]] = {}
    for factory in document.storages:
        name = factory.name or DEFAULT_STORAGE
        if getattr(factory.config, "path", None) == "":
            raise ConfigError(f"{path}: the path of storage {name!r} is empty")
        if name in storages:
            raise ConfigError(
                f"{path}: there are two storages with the name {name!r}; a name is"
                " what follows the section's type, as in <filestorage main>"
            )
        storages[name] = partial(
            open_database, name, factory, is_read_only=is_read_only
        )
    if server is None:
        return Options([(DEFAULT_HOST, DEFAULT_PORT)], storages)
    return Options(
        addresses=server.addresses or [(DEFAULT_HOST, DEFAULT_PORT)],
        storages=storages,
        is_read_only=is_read_only,
        transaction_timeout_s=server.transaction_timeout,
        shutdown_timeout_s=server.shutdown_timeout,
        index_interval_s=server.index_interval,
        replay_bytes=server.replay_bytes,
        log_level=server.log_level,
        is_insecure=server.is_insecure,
        socket_mode=server.socket_mode,
        access=server.access,
        limits=server.limits or DEFAULT,
        tls=None if server.tls is None else _certificate(path, server.tls),
    )


def _certificate(path: str, options: TlsOptions) -> Certificate:
    try:
        return Certificate(options)
    except TlsMistake as mistake:
        raise ConfigError(f"{path}: <tls>: {mistake}") from mistake


def _one_line(path: str, error: ZConfig.ConfigurationError) -> str:
    where = path
    line = getattr(error, "lineno", None)
    if line is not None and line > 0:
        where = f"{path}:{line}"
    message = getattr(error, "message", None) or str(error)
    told = [" ".join(str(message).split()), advice(str(message))]
    return f"{where}: {'; '.join(filter(None, told))}"

"""What the arguments of a ClientStorage say of TLS.

Pure but for the files that are read, in the thread that makes the storage. The names
are the same in Python, in a configuration file and in a URI; ``ssl`` and
``ssl_server_hostname`` are ZEO's and only for programs.
"""

import logging
import ssl
from typing import NamedTuple

from zeolith.protocol.tls import ClientTls, client_context

logger = logging.getLogger(__name__)


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
    return ClientTls(made, server_name)

"""Which addresses let strangers in, and the refusal to listen there unprotected.

Without TLS and a login whoever reaches an address may do everything, so such a server
listens only where nobody but this machine can reach it: on loopback addresses and on
Unix sockets. Whoever wants it otherwise writes ``insecure true``. Asked twice: before
the storages are opened, of what is configured, and by the listener, of what was bound.
"""

import ipaddress
import socket
from collections.abc import Iterable

from zeolith.protocol.addresses import Address, format_address


def exposed(
    addresses: Iterable[Address], has_tls: bool, has_login: bool
) -> list[Address]:
    """Those of ``addresses`` that others reach, and nothing asks who they are.

    A name that is no IP address counts as reachable, for nobody knows what it means
    until it is resolved; ``localhost`` (RFC 6761) excepted.
    """
    if has_tls and has_login:
        return []
    return [
        address
        for address in addresses
        if not isinstance(address, str) and not _is_loopback(address[0])
    ]


def resolved(addresses: Iterable[Address]) -> list[Address]:
    """``addresses`` with IP addresses for the names of hosts; this may take a while.

    What cannot be resolved is left out: nobody will listen there.
    """
    found: list[Address] = []
    for address in addresses:
        if isinstance(address, str) or _is_loopback(address[0]):
            found.append(address)
            continue
        host, port = address
        try:
            infos = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, UnicodeError):
            continue
        found += [(str(info[4][0]), port) for info in infos]
    return found


def refusal(addresses: Iterable[Address]) -> str:
    """What to tell somebody who wants to listen on exposed ``addresses``."""
    names = ", ".join(dict.fromkeys(map(format_address, addresses)))
    return (
        f"{names}: whoever reaches this address could read, write and pack everything,"
        " for there is no TLS and no login; configure both, or listen on 127.0.0.1 or"
        " a Unix socket, or, where everybody on the network may be trusted, write"
        " 'insecure true' into <zeolith> (serve --insecure without a file)"
    )


def _is_loopback(host: str) -> bool:
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback

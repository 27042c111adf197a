"""Where a peer comes from: how it is shown, and with whom it is counted.

Pure but for ``origin_of``, which asks a transport; called on the loop for each socket
that is accepted.
"""

import asyncio
import socket
import struct
from ipaddress import IPv6Address
from typing import NamedTuple

_CREDENTIALS = struct.Struct("3i")
# Whoever has one IPv6 address usually has all that share its first 64 bits (RFC 6177).
_NETWORK_BITS = 64


class Origin(NamedTuple):
    """The other end of a socket."""

    # For people: host and port, or the process at the other end of a Unix socket.
    address: str
    # What its sockets have in common: a host, an IPv6 network, or a user.
    source: str


def origin_of(transport: asyncio.BaseTransport) -> Origin:
    """Where the socket of ``transport`` leads to."""
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return tcp_origin(str(name[0]), name[1])
    sock = transport.get_extra_info("socket")
    if sock is not None and hasattr(socket, "SO_PEERCRED"):
        credentials = sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        pid, uid, gid = _CREDENTIALS.unpack(credentials)
        return Origin(f"unix:pid={pid},uid={uid},gid={gid}", f"unix:uid={uid}")
    return Origin("unix", "unix")


def tcp_origin(host: str, port: int) -> Origin:
    """The origin that has this IP address."""
    if ":" not in host:
        return Origin(f"{host}:{port}", host)
    shown = f"[{host}]:{port}"
    try:
        address = IPv6Address(host)
    except ValueError:
        return Origin(shown, host)
    if address.ipv4_mapped is not None:
        return Origin(shown, str(address.ipv4_mapped))
    shift = 128 - _NETWORK_BITS
    network = IPv6Address(int(address) >> shift << shift)
    return Origin(shown, f"{network}/{_NETWORK_BITS}")

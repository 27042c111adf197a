"""What may stand for an address in a client's arguments. Pure."""

from typing import Any

from zeolith.protocol.addresses import DEFAULT_HOST, Address, parse_address


def addresses_of(addr: Any) -> list[Address]:
    """The addresses that ``addr`` spells: one, or a list of them.

    One is ``(host, port)``, a port, ``"host:port"`` or a Unix socket's path. Raises
    ValueError for anything else.
    """
    if isinstance(addr, list) or (isinstance(addr, tuple) and not _is_pair(addr)):
        addresses = [address for each in addr for address in addresses_of(each)]
        if not addresses:
            raise ValueError("there is no address to connect to")
        return addresses
    if _is_pair(addr):
        return [(addr[0] or DEFAULT_HOST, addr[1])]
    if _is_port(addr):
        return [(DEFAULT_HOST, addr)]
    if isinstance(addr, str):
        return [parse_address(addr)]
    raise ValueError(
        f"{addr!r} is not an address: give (host, port), a port, 'host:port', the path"
        " of a Unix socket, or a list of these"
    )


def _is_pair(addr: Any) -> bool:
    return (
        isinstance(addr, tuple)
        and len(addr) == 2
        and isinstance(addr[0], str)
        and _is_port(addr[1])
    )


def _is_port(value: Any) -> bool:
    return type(value) is int and 0 < value < 65536

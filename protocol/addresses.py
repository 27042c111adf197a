"""How the address of a server is spelled, for the server and its clients alike.

Pure functions; any thread may call them. An address inside zeolith is a pair
``(host, port)`` for TCP or a ``str`` path for a Unix socket.
"""

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8100

Address = tuple[str, int] | str


def parse_address(text: str) -> Address:
    """The address that ``text`` spells.

    Accepted are ``host:port``, ``[v6-address]:port``, ``:port``, a bare port
    (both meaning 127.0.0.1), a bare host (port 8100), and a path containing
    ``/`` for a Unix socket. Raises ValueError with a sentence for anything else.
    """
    text = text.strip()
    if not text:
        raise ValueError("an address is missing: write host:port or a socket's path")
    if "/" in text:
        return text
    if _is_number(text):
        return DEFAULT_HOST, _port(text, text)
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, DEFAULT_PORT
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(
            f"{text!r} is ambiguous: write an IPv6 address as [address]:port"
        )
    return host or DEFAULT_HOST, _port(port, text)


def format_address(address: Address) -> str:
    """The spelling of ``address`` that ``parse_address`` understands."""
    if isinstance(address, str):
        return address
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(digits: str, text: str) -> int:
    if not _is_number(digits) or len(digits) > 5 or int(digits) > 65535:
        raise ValueError(
            f"{text!r} is not an address: {digits!r} is no port (0 to 65535);"
            " write host:port, or a path with a slash for a Unix socket"
        )
    return int(digits)


def _is_number(text: str) -> bool:
    # isdigit alone knows the digits of other scripts too, and superscripts.
    return text.isascii() and text.isdigit()

"""A ClientStorage from a URI, for zodburi and through it for Pyramid and others.

::

    zeolith://host:port?storage=1&wait_timeout=5&cache_size=100MB
    zeolith://host1:port1,host2:port2/?read_only_fallback=on
    zeolith://[::1]:8100
    zeolith:///path/to/socket?database_name=main&connection_pool_size=7

zodburi finds ``resolver`` through an entry point and calls it in the thread that asks
for the database. The parameters are the arguments of ClientStorage by their own
names, but for what ``NOT_IN_URI`` leaves out. Every other parameter goes back to
zodburi, which knows those of the database and refuses the rest by name.

Errors never repeat a whole URI: someone may have put a password into it.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote

from zodburi.datatypes import FALSETYPES, TRUETYPES, convert_bytesize

from zeolith.client.storage import ClientStorage
from zeolith.protocol.addresses import Address, parse_address
from zeolith.protocol.durations import parse_seconds

SCHEME = "zeolith://"

# Arguments of ClientStorage that no parameter sets, and why.
NOT_IN_URI = {
    "addr": "is what stands before the question mark",
    "password": "would end up in logs and process lists",
    "ssl": "an ssl.SSLContext is made by a program, not written in a URI",
    "ssl_server_hostname": "is called tls_server_name",
    "credentials": "made by a program; username and the files are for a URI",
    "limits": "the bounds of the wire are the same for everybody",
}


def _flag(text: str) -> bool:
    word = text.lower()
    if word in TRUETYPES:
        return True
    if word in FALSETYPES:
        return False
    raise ValueError(f"{text!r} is neither on nor off")


def _bytes(text: str) -> int:
    try:
        return int(convert_bytesize(text))
    except ValueError:
        raise ValueError(
            f"{text!r} is not a size: write bytes, or a number with KB, MB or GB"
        ) from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


PARAMETERS: dict[str, Callable[[str], Any]] = {
    "storage": str,
    "cache": str,
    "cache_size": _bytes,
    "warm_up": _flag,
    "client": str,
    "var": str,
    "cache_trace": str,
    "name": str,
    "wait": _flag,
    "wait_timeout": parse_seconds,
    "read_only": _flag,
    "read_only_fallback": _flag,
    "blob_dir": str,
    "shared_blob_dir": _flag,
    "blob_cache_size": _bytes,
    "blob_cache_size_check": _integer,
    "client_label": str,
    "server_sync": _flag,
    "read_ahead": _flag,
    "username": str,
    "tls": _flag,
    "tls_ca": str,
    "tls_certificate": str,
    "tls_key": str,
    "tls_key_password_file": str,
    "tls_server_name": str,
    "tls_verify": _flag,
    "password_file": str,
    "token_file": str,
}


def resolver(uri: str) -> tuple[Callable[[], ClientStorage], dict[str, str]]:
    """``(factory, database keywords)`` of ``uri``, as zodburi wants it.

    Raises ValueError with a sentence for what cannot be meant; a parameter that is
    neither ClientStorage's nor the database's is refused by zodburi.
    """
    place, _question_mark, query = uri.removeprefix(SCHEME).partition("?")
    if "#" in uri:
        raise ValueError("a zeolith URI has no fragment: write %23 for a #")
    addr = _addr(place)
    parameters = _parameters(query)
    arguments = {
        name: _converted(name, parameters.pop(name))
        for name in PARAMETERS
        if name in parameters
    }

    def factory() -> ClientStorage:
        return ClientStorage(addr, **arguments)

    return factory, parameters


def _addr(place: str) -> Address | list[Address]:
    servers, _slash, path = place.partition("/")
    if "@" in servers:
        raise ValueError(
            "a zeolith URI has no user before the host: write the parameter username;"
            " a password goes into a file, and that is the parameter password_file"
        )
    if servers:
        if path:
            raise ValueError(
                f"a zeolith URI has no path after the servers, as in '/{path}';"
                " the storage is the parameter storage, and a Unix socket is"
                " zeolith:///path/to/socket"
            )
        addresses = [parse_address(unquote(each)) for each in servers.split(",")]
        return addresses[0] if len(addresses) == 1 else addresses
    if path:
        return "/" + unquote(path)
    raise ValueError(
        "a zeolith URI without a server: write zeolith://host:port"
        " or zeolith:///path/to/socket"
    )


def _parameters(query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in ("password", "token"):
            raise ValueError(
                f"a zeolith URI takes no {name}, which would end up in logs;"
                f" write {name}_file and put it there, or into ZEOLITH_{name.upper()}"
            )
        if name in parameters:
            raise ValueError(f"a zeolith URI with two values for {name}")
        parameters[name] = value
    return parameters


def _converted(name: str, text: str) -> Any:
    if not text:
        raise ValueError(f"a zeolith URI with an empty {name}")
    try:
        return PARAMETERS[name](text)
    except ValueError as error:
        raise ValueError(f"a zeolith URI whose {name} is wrong: {error}") from None

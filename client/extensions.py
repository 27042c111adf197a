"""What transactions say of themselves, read without importing what it names.

The extension of a transaction is a pickle that another client has written. ZODB loads
it with every class at hand, so whoever may write could run code in whoever looks at the
undo log. Here only values that programs note are made: containers, text, numbers,
bytes, moments, decimals. The unpickler is the one that is written in Python: in the one
written in C, five bytes are enough to take all memory. Pure; any thread.
"""

import datetime
import decimal
from collections.abc import Callable
from io import BytesIO
from typing import Any, NoReturn

from ZODB import _compat
from zodbpickle.slowpickle import Unpickler

_zodb_loads = _compat.loads


def _as_protocol_2_writes_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding[:20]!r}")
    return text.encode("latin1")


_PLAIN = (dict, list, tuple, set, frozenset, bool, int, float, complex)


def _bytes(*nothing: object) -> bytes:
    """How protocol 2 writes bytes of no length; of a number it would take memory."""
    if nothing:
        raise ValueError("bytes of what is not told")
    return b""


def _plain_names() -> dict[tuple[str, str], Callable[..., Any]]:
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("_codecs", "encode"): _as_protocol_2_writes_bytes,
        ("decimal", "Decimal"): decimal.Decimal,
    }
    for kind in ("date", "datetime", "time", "timedelta", "timezone"):
        names["datetime", kind] = getattr(datetime, kind)
    for module in ("builtins", "__builtin__"):
        for of_kind in _PLAIN:
            names[module, of_kind.__name__] = of_kind
        names[module, "bytes"] = _bytes
    return names


_NAMES = _plain_names()


class _PlainUnpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise ValueError(f"it names {module[:80]}.{name[:80]}") from None

    def get_extension(self, code: int) -> NoReturn:
        """Codes stand for classes that were loaded before."""
        raise ValueError(f"it names a class by the code {code}")


def load_extension(extension: bytes) -> dict[str, Any]:
    """The items of a transaction's extension.

    Raises ValueError if it names anything that is not plain, or is no dictionary, and
    whatever else an unpickler raises for what is no pickle.
    """
    if not extension:
        return {}
    if _compat.loads is not _zodb_loads:
        # A server that has a client in it passes them on as they are, and says so here.
        handed_on: dict[str, Any] = _compat.loads(extension)
        return handed_on
    unpickler = _PlainUnpickler(BytesIO(extension), encoding="ASCII", errors="bytes")
    loaded = unpickler.load()
    if type(loaded) is not dict:
        raise ValueError("it is no dictionary")
    return loaded

"""How a length of time is spelled in a configuration, for server and client. Pure."""

from ZConfig.datatypes import stock_datatypes


def parse_seconds(text: str) -> float:
    """``text`` in seconds: ``30``, ``0.5``, ``30s``, ``2m``, ``1h 30m``.

    Raises ValueError with a sentence for anything else.
    """
    # ZConfig's datatype wants a unit everywhere, ours is seconds.
    with_units = f"{text}s" if text[-1:].isdigit() else text
    try:
        value = float(stock_datatypes["timedelta"](with_units).total_seconds())
    except (TypeError, ValueError, OverflowError):
        value = -1.0
    if value < 0 or not text.strip():
        raise ValueError(f"{text!r} is not a time to wait: write 30, 0.5, 30s or 2m")
    return value

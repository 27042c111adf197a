"""The section <limits> of the configuration file, turned into Limits.

A key is called like the limit in protocol.limits, with hyphens, and without the ``_s``
of a time; what is not said stays as it is there. Called while the file is read.
"""

from dataclasses import replace
from typing import Any

from ZConfig.datatypes import SuffixMultiplier

from zeolith.protocol.limits import DEFAULT, Limits

# A client sends batches of a MiB, and a record behind one.
FRAME_BYTES_MIN = 2 * DEFAULT.batch_bytes_max

_size = SuffixMultiplier({"kb": 1024, "mb": 1024**2, "gb": 1024**3})


def Section(section: Any) -> Limits:
    """Datatype of the section; raises ValueError for what contradicts itself."""
    said = {name: getattr(section, name) for name in section.getSectionAttributes()}
    frame_bytes = said["frame_bytes_max"]
    if not FRAME_BYTES_MIN <= frame_bytes <= DEFAULT.frame_bytes_max:
        raise ValueError(
            f"frame-bytes-max is {frame_bytes}; clients need {FRAME_BYTES_MIN}, and"
            f" take {DEFAULT.frame_bytes_max} at most"
        )
    if said["hello_frame_bytes_max"] > said["hello_bytes_max"]:
        raise ValueError("hello-frame-bytes-max is more than hello-bytes-max")
    if said["hello_bytes_max"] > frame_bytes:
        raise ValueError("hello-bytes-max is more than frame-bytes-max")
    return replace(DEFAULT, **said)


def count(text: str) -> int:
    """Datatype: a number, at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(f"{text!r} would let nothing through; write 1 or more")
    return value


def size(text: str) -> int:
    """Datatype: a number of bytes, or with a unit (64KB, 256MB, 1GB), at least 1."""
    value: int = _size(text)
    if value < 1:
        raise ValueError(f"{text!r} would let nothing through; write for example 64KB")
    return value

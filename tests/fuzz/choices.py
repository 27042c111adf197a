"""Bytes as a list of choices: how a fuzzer says what a target is to do."""

from collections.abc import Iterator


class Choices:
    """Takes from ``data`` until nothing is left; then everything is 0 or empty."""

    def __init__(self, data: bytes):
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def number(self, size: int = 1) -> int:
        """An unsigned number of ``size`` bytes."""
        return int.from_bytes(self.some(size), "little")

    def some(self, size: int) -> bytes:
        """The next ``size`` bytes, or what is left."""
        taken = self._data[self._position : self._position + size]
        self._position += size
        return taken

    def rest(self) -> bytes:
        """All that is left."""
        return self.some(len(self._data))


def pieces(data: bytes) -> Iterator[bytes]:
    """``data`` cut where its first byte says: 0, not at all."""
    size = data[0] if data else 0
    rest = data[1:]
    if not size:
        yield rest
        return
    for start in range(0, len(rest), size):
        yield rest[start : start + size]


def changed(whole: bytes, choices: Choices) -> bytes:
    """``whole`` with the bytes changed, or the end missing, that ``choices`` say."""
    damaged = bytearray(whole)
    if choices.number() & 1:
        del damaged[choices.number(3) % (1 + len(damaged)) :]
    while choices and damaged:
        at = choices.number(3) % len(damaged)
        damaged[at] = choices.number()
    return bytes(damaged)

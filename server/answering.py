"""The short way of a load on the loop: one compiled call between two system calls.

Nearly all that a server is asked for are current revisions that are in the page cache.
The general way of such a load, through some twenty functions in Python, takes half as
long as what the kernel does to receive the request and to send the answer. The compiled
``answer`` has all of it in one function, from the bytes of the request to those of the
answer.

It refuses nothing and raises nothing: what it does not answer goes the general way, as
everything does where it was not built or is switched off, and where what clients know
is not what is in a file. The tests hold one way against the other.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zeolith.protocol.compiled import compiled_module
from zeolith.protocol.connection import Answer

if TYPE_CHECKING:
    from zeolith.server.served import Served

_Compiled = Callable[[bytes, int, int, Any, bytes, bytes], tuple[int, bytes] | None]


def compiled() -> _Compiled | None:
    """The compiled function; None if it is switched off or was not built."""
    module = compiled_module("zeolith.server._answering")
    return None if module is None else module.answer


_answer = compiled()


def answering(served: "Served") -> Answer | None:
    """The short way to what ``served`` serves; None if there is none."""
    answer = _answer
    if answer is None:
        return None

    def answer_load(data: bytes, last_request: int) -> tuple[int, bytes] | None:
        # A pack replaces it. As long as it is ours its file is open.
        near = served.database.near()
        if near is None:
            return None
        answered = answer(
            data,
            last_request,
            near.fd,
            near.buckets,
            served.horizon,
            served.changes.last_tid,
        )
        if answered is not None:
            served.counters.loads += 1
        return answered

    return answer_load

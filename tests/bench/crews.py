"""Client processes that start their measurement together.

The processes are forked from one that has imported everything and opened nothing, so
a crew of sixteen starts at once. Pipes carry the signals; nothing is shared.
"""

import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from . import costs
from .costs import Cost
from .servers import Running
from .workloads import Work, Workload, combined

SAME_CORE, OTHER_CORE = "same core", "other core"

ANSWER_S = 300
READY, GO = "ready", "go"
_context = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a crew did, by member, and what it cost."""

    works: list[Work]
    server: Cost
    clients: Cost

    @property
    def work(self) -> Work:
        """What the members did together."""
        return combined(self.works)


class Crew:
    """Processes that are prepared, have their storages open, and wait."""

    def __init__(self, running: Running, pipes: list[Pipe]) -> None:
        self._running = running
        self._pipes = pipes

    def go(self) -> Measured:
        """Let them do at the same time what is measured."""
        with self._running.observer.watch(self._running):
            before = self._running.cost()
            for pipe in self._pipes:
                pipe.send(GO)
            answers = [_answer(pipe) for pipe in self._pipes]
            server = self._running.cost().since(before)
        clients = sum((cost for _work, cost in answers), Cost())
        measured = Measured([work for work, _cost in answers], server, clients)
        self._running.observer.saw(measured)
        return measured


def measure(
    running: Running, workload: Callable[..., Workload], **how: Any
) -> Measured:
    """What a crew did that does nothing but this; arguments as those of a crew."""
    with prepared(running, workload, **how) as crew:
        return crew.go()


@contextmanager
def prepared(
    running: Running,
    workload: Callable[..., Workload],
    *,
    members: int = 1,
    placement: str = "",
    **options: int,
) -> Iterator[Crew]:
    """A crew of ``members`` processes, each of which does ``workload``.

    ``placement`` says on which core they are, as seen from the server. A round trip
    between two cores includes waking one of them, and may take five times as long;
    left alone, the kernel chooses now this, now that.
    """
    cores = sorted(os.sched_getaffinity(0))
    its_cores = {cores[0]} if placement else set(cores)
    our_cores = {cores[-1]} if placement == OTHER_CORE else its_cores
    running.keep_to(its_cores)
    crew = []
    for share in range(members):
        crew.append(_start(running, workload, share, options, our_cores))
        # One after the other: a ZEO client that connects while others commit may be
        # told of a commit twice, and starts over.
        _answer(crew[-1][0])
    yield Crew(running, [pipe for pipe, _process in crew])
    for pipe, process in crew:
        pipe.send(GO)
        process.join(ANSWER_S)
        pipe.close()


def _start(
    running: Running,
    workload: Callable[..., Workload],
    share: int,
    options: dict[str, int],
    cores: set[int],
) -> tuple[Pipe, multiprocessing.process.BaseProcess]:
    ours, theirs = _context.Pipe()
    process = _context.Process(
        target=_member,
        args=(theirs, workload, running.endpoint, share, options, cores),
        daemon=True,
    )
    process.start()
    theirs.close()
    return ours, process


def _member(
    pipe: Pipe,
    workload: Callable[..., Workload],
    endpoint: Any,
    share: int,
    options: dict[str, int],
    cores: set[int],
) -> None:
    os.sched_setaffinity(0, cores)
    # The traceback that such a start costs says nothing new.
    logging.getLogger("ZEO").addHandler(logging.NullHandler())
    try:
        steps = workload(endpoint, share=share, **options)
        next(steps)
        pipe.send(READY)
        pipe.recv()
        before = costs.own()
        work = next(steps)
        pipe.send((work, costs.own().since(before)))
        # Closing is not part of what others still measure.
        pipe.recv()
        next(steps, None)
    except BaseException:
        pipe.send(RuntimeError(traceback.format_exc()))
        raise


def _answer(pipe: Pipe) -> Any:
    if not pipe.poll(ANSWER_S):
        raise TimeoutError(f"a client has not answered for {ANSWER_S} s")
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer

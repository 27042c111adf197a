"""Client processes that start their measurement together.

The processes are forked from one that has imported everything and opened nothing, so
a crew of sixteen starts at once. Pipes carry the signals; nothing is shared.
"""

import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

from .servers import Running
from .workloads import Work, Workload, combined

SAME_CORE, OTHER_CORE = "same core", "other core"

ANSWER_S = 300
READY, GO = "ready", "go"
_context = multiprocessing.get_context("fork")


def measure(
    running: Running,
    workload: Callable[..., Workload],
    *,
    members: int = 1,
    placement: str = "",
    **options: int,
) -> tuple[Work, float]:
    """What ``members`` processes did together, and the server's processor seconds.

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
    cpu_before_s = running.cpu_s()
    for pipe, _process in crew:
        pipe.send(GO)
    works = [_answer(pipe) for pipe, _process in crew]
    cpu_s = running.cpu_s() - cpu_before_s
    for pipe, process in crew:
        pipe.send(GO)
        process.join(ANSWER_S)
        pipe.close()
    return combined(works), cpu_s


def _start(
    running: Running,
    workload: Callable[..., Workload],
    share: int,
    options: dict[str, int],
    cores: set[int],
) -> tuple[Pipe, Any]:
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
        pipe.send(next(steps))
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

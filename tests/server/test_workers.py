import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from zeolith.server.workers import READERS, Workers

WAIT_S = 30


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    workers = Workers(asyncio.get_running_loop(), "main")
    yield workers
    assert await workers.close(WAIT_S)


async def test_a_step_runs_in_a_thread_and_its_end_comes_back_to_the_loop(workers):
    name = await workers.write(lambda: threading.current_thread().name)
    assert name.startswith("main-writer")
    name = await workers.read(lambda: threading.current_thread().name)
    assert name.startswith("main-reader")
    ended = asyncio.Event()
    done_in: list[str] = []
    reading = workers.read(int, "7")

    def note(_done: object) -> None:
        done_in.append(threading.current_thread().name)
        ended.set()

    reading.add_done_callback(note)
    await ended.wait()
    assert reading.result() == 7
    assert done_in == [threading.current_thread().name]


async def test_an_error_of_a_step_is_the_futures(workers):
    for step in (workers.write, workers.read):
        with pytest.raises(ValueError, match="seven"):
            await step(int, "seven")


async def test_the_writer_takes_one_step_after_the_other(workers):
    first_may_end = threading.Event()
    steps: list[str] = []

    def first() -> None:
        assert first_may_end.wait(WAIT_S)
        steps.append("first")

    writing = [workers.write(first), workers.write(steps.append, "second")]
    # Readers do not wait for the writer.
    await workers.read(steps.append, "a reader")
    first_may_end.set()
    await asyncio.gather(*writing)
    assert steps == ["a reader", "first", "second"]


async def test_readers_work_at_the_same_time(workers):
    all_there = threading.Barrier(READERS)
    reading = [workers.read(all_there.wait, WAIT_S) for _ in range(READERS)]
    assert sorted(await asyncio.gather(*reading)) == list(range(READERS))


@pytest.mark.parametrize("way", ["aside", "look_back"])
async def test_what_takes_long_is_in_nobodys_way(workers, way):
    may_end = threading.Event()
    aside = getattr(workers, way)(may_end.wait, WAIT_S)
    names = [
        await workers.read(lambda: threading.current_thread().name),
        await workers.write(lambda: threading.current_thread().name),
    ]
    assert [name.split("_")[0] for name in names] == ["main-reader", "main-writer-0"]
    assert not aside.done()
    may_end.set()
    assert await aside


async def test_closing_waits_for_what_is_under_way():
    workers = Workers(asyncio.get_running_loop(), "main")
    started, may_end = threading.Event(), threading.Event()

    def step() -> None:
        started.set()
        assert may_end.wait(WAIT_S)

    writing = workers.write(step)
    await asyncio.get_running_loop().run_in_executor(None, started.wait, WAIT_S)
    closing = asyncio.ensure_future(workers.close(WAIT_S))
    await asyncio.sleep(0)
    assert not closing.done()
    may_end.set()
    assert await closing
    await writing
    assert not [t for t in threading.enumerate() if t.name.startswith("main-")]


async def test_closing_lets_the_writer_do_what_was_asked_and_readers_not():
    workers = Workers(asyncio.get_running_loop(), "main")
    may_go_on = threading.Event()
    steps: list[str] = []
    for _ in range(READERS):
        workers.read(may_go_on.wait, WAIT_S)
    late = workers.read(steps.append, "read")
    workers.write(may_go_on.wait, WAIT_S)
    writing = workers.write(steps.append, "written")
    closing = asyncio.ensure_future(workers.close(WAIT_S))
    await asyncio.sleep(0)
    may_go_on.set()
    assert await closing
    await writing
    assert steps == ["written"]
    assert late.cancelled()


async def test_closing_does_not_wait_for_ever():
    workers = Workers(asyncio.get_running_loop(), "main")
    may_end = threading.Event()
    reading = workers.read(may_end.wait, WAIT_S)
    assert await workers.close(0.01) is False
    may_end.set()
    await reading


async def test_nothing_can_be_asked_for_after_closing():
    workers = Workers(asyncio.get_running_loop(), "main")
    assert await workers.close(WAIT_S)
    for step in (workers.write, workers.read):
        with pytest.raises(RuntimeError):
            step(int)

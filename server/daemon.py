"""From options to a running server, and back to nothing.

``run`` owns the process: it opens the databases, runs the loop, and ends in order.
Signals: TERM and INT stop, HUP re-reads the configuration.

The end, in order: accept nobody new; let voted transactions finish within
``shutdown_timeout_s``; hang up; wait for the worker threads; close the databases, so
that indexes are saved. Whatever goes wrong, later steps are still taken.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from zeolith.protocol.addresses import format_address
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.server.config import Options
from zeolith.server.descriptors import Watch, connections_possible
from zeolith.server.indexing import IndexSaver
from zeolith.server.interpreter import share_interpreter
from zeolith.server.keyring import Keyring, KeyWatch
from zeolith.server.listener import Listener, ListenError
from zeolith.server.memory import keep_freed_memory
from zeolith.server.peer import Peer
from zeolith.server.readiness import notify
from zeolith.server.relay import Relay
from zeolith.server.served import Served
from zeolith.server.service import Service
from zeolith.server.tls import Certificate
from zeolith.server.workers import Workers
from zeolith.storage.adapted import AdaptedStorage, forbid_unpickling
from zeolith.storage.changes import Changes
from zeolith.storage.opening import OpeningError

logger = logging.getLogger(__name__)

TICK_INTERVAL_S = 1.0
# How long the transports may take to deliver the server's goodbyes.
LAST_WORDS_TIMEOUT_S = 2.0

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class _Stopped(BaseException):
    """The process was told to stop before it served anything."""


def _stop_early(_number: int, _frame: object) -> None:
    raise _Stopped


def run(
    options: Options,
    announce: Callable[[str], None],
    reread: Callable[[], Options | None],
) -> None:
    """Serve until told to stop.

    ``announce`` gets a line for each address and for readiness; ``reread`` gives the
    options anew, or None (and has said why). Raises KeyFileError, ListenError and
    OpeningError.
    """
    databases = {}
    keyring = Keyring(options.access)
    forbid_unpickling()
    keep_freed_memory()
    # Opening may take long; the loop has handlers of its own later.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in _STOPPING:
        signal.signal(number, _stop_early)
    try:
        for name, open_storage in options.storages.items():
            databases[name] = open_storage()
        share_interpreter()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            all_ended = runner.run(
                _serve(options, databases, keyring, announce, reread)
            )
    except _Stopped:
        logger.info("stopped while opening")
        all_ended = True
    finally:
        for name, database in databases.items():
            try:
                database.close()
            except Exception:
                logger.exception("closing storage %s failed", name)
    if not all_ended:
        # Python would wait at its exit for a thread that packs, perhaps for hours. The
        # databases are closed, so it can do no harm; it leaves a .pack file behind.
        logger.warning("a pack is given up")
        logging.shutdown()
        os._exit(0)


async def _serve(
    options: Options,
    databases: dict[str, AdaptedStorage],
    keyring: Keyring,
    announce: Callable[[str], None],
    reread: Callable[[], Options | None],
) -> bool:
    """Serve until told to stop; false if a worker thread could not be waited for."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    limits = options.limits
    served = {
        name: await _prepare(name, database, options.is_read_only, limits)
        for name, database in databases.items()
    }
    service = Service(served, limits, keyring.access)
    service.admission.connections_max = connections_possible(limits.connections_max)
    key_watch = KeyWatch(keyring, service.greeting.renew)
    for each in served.values():
        Relay(service, each)
    index_saver = IndexSaver(served.values(), options.index_interval_s)
    _configure(service, index_saver, options)

    tls = options.tls
    if tls is not None:
        service.greeting.certificate = tls.pem
        tls.warn()

    async def read_again() -> None:
        # A password may take its time.
        renewed = await loop.run_in_executor(None, reread)
        if renewed is not None:
            _configure(service, index_saver, renewed)
            _renew(service, tls, renewed.tls)
            key_watch.configure(renewed.access)
            logger.info("the configuration was read again")

    for number in _STOPPING:
        _heed(number, loop, stop.set)
    _heed(signal.SIGHUP, loop, _one_by_one(read_again))
    listener = Listener(
        lambda: Peer(service, limits),
        None if tls is None else lambda: tls.context,
        may_be_exposed=options.may_be_exposed,
        socket_mode=options.socket_mode,
    )
    ticking = loop.create_task(_tick(service, index_saver, key_watch))
    try:
        for address in options.addresses:
            await listener.listen(address)
        for address in listener.addresses:
            announce(f"listening on {format_address(address)}")
        announce("ready")
        notify("READY=1")
        await stop.wait()
        logger.info("stopping")
        notify("STOPPING=1")
    finally:
        await listener.close()
        ticking.cancel()
        all_ended = await _wind_down(service, options.shutdown_timeout_s)
        _heed_no_more_signals()
    return all_ended


def _heed(
    number: signal.Signals,
    loop: asyncio.AbstractEventLoop,
    callback: Callable[[], object],
) -> None:
    """Have the loop call ``callback`` for each signal ``number``.

    Not by the loop's own ``add_signal_handler``: such a handler can only be removed by
    way of the default, which is to die, and the loop removes it when it is closed.
    """
    signal.signal(number, lambda *_: loop.call_soon_threadsafe(callback))


def _one_by_one(
    work: Callable[[], Coroutine[Any, Any, None]],
) -> Callable[[], None]:
    """What has the loop do ``work`` each time that it is called, never two at once."""
    under_way = asyncio.Lock()
    tasks = set[asyncio.Task[None]]()

    async def work_alone() -> None:
        async with under_way:
            await work()

    def begin() -> None:
        task = asyncio.get_running_loop().create_task(work_alone())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return begin


def _heed_no_more_signals() -> None:
    """Let nobody who is impatient end the process before the indexes are saved."""
    for number in (*_STOPPING, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


async def _prepare(
    name: str, database: AdaptedStorage, is_read_only: bool, limits: Limits = DEFAULT
) -> Served:
    workers = Workers(asyncio.get_running_loop(), name)
    try:
        last_tid, recent = await workers.read(database.last_changes)
    except OSError as error:
        raise OpeningError(f"storage {name}: {error}") from error
    changes = Changes(recent[0].since if recent else last_tid)
    changes.extend(recent)
    info = await workers.read(database.info)
    return Served(
        database,
        workers,
        changes,
        info=info,
        is_read_only=is_read_only,
        limits=limits,
    )


def _configure(service: Service, index_saver: IndexSaver, options: Options) -> None:
    """Put into force what may change while the server runs."""
    index_saver.interval_s = options.index_interval_s
    service.transaction_timeout_s = options.transaction_timeout_s
    for served in service.databases.values():
        served.replays.bytes_max = options.replay_bytes
    logging.getLogger().setLevel(options.log_level)


def _renew(
    service: Service, tls: Certificate | None, renewed: Certificate | None
) -> None:
    if tls is None or renewed is None:
        if tls is not renewed:
            logger.warning("TLS is switched on or off by a restart only")
        return
    tls.replace_by(renewed)
    service.greeting.certificate = tls.pem
    tls.warn()


async def _tick(service: Service, index_saver: IndexSaver, key_watch: KeyWatch) -> None:
    loop = asyncio.get_running_loop()
    descriptors = Watch()
    while True:
        await asyncio.sleep(TICK_INTERVAL_S)
        try:
            descriptors.tick()
            service.tick(loop.time())
            index_saver.tick(loop.time())
            key_watch.tick()
        except Exception:
            # Without the clock a client that hangs would hang everybody.
            logger.exception("a tick of the clock failed")


async def _wind_down(service: Service, timeout_s: float) -> bool:
    service.is_stopping = True
    service.packs.give_up("the server is stopping; the pack is given up")
    databases = service.databases.values()
    await asyncio.gather(*(served.committer.drain(timeout_s) for served in databases))
    for peer in tuple(service.peers):
        peer.hang_up("stopping", "the server is stopping")
    await service.wait_until_empty(LAST_WORDS_TIMEOUT_S)
    loop = asyncio.get_running_loop()
    for served in databases:
        await loop.run_in_executor(None, served.database.stop_waiting)
    return all([await served.workers.close(timeout_s) for served in databases])


__all__ = ["ListenError", "run"]

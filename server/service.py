"""What the server does for its clients: one function for each method of the wire.

Called on the loop, by peers, with messages that protocol.methods has checked. A method
whose answer is at hand returns it; one that must wait hands the work to the database's
worker threads or to its committer, returns LATER, and the answer is sent from the
callback. Who may do what is decided in one place, ``access.permit``; who comes in, in
``greeting``.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ZODB.POSException import (
    POSError,
    StorageSystemError,
    StorageTransactionError,
)

from zeolith.protocol.codec import encode
from zeolith.protocol.errors import Forbidden, LocalProtocolError, ZeolithError
from zeolith.protocol.limits import Limits
from zeolith.protocol.messages import Notice, Reply, Request
from zeolith.protocol.methods import METHODS
from zeolith.server import blobs, staging
from zeolith.server.access import OPEN, Access, permit
from zeolith.server.admission import Admission
from zeolith.server.answering import load_shortly
from zeolith.server.committer import Commit, Phase
from zeolith.server.delivery import CHANGES_MAX, Delivery
from zeolith.server.greeting import Greeting
from zeolith.server.iteration import Iteration
from zeolith.server.loading import (
    answer_of,
    load_announced,
    load_several,
    load_several_slowly,
    refuse_unannounced,
)
from zeolith.server.packing import Packs
from zeolith.server.peer import Peer
from zeolith.server.reading_ahead import ReadingAhead
from zeolith.server.readings import Readings
from zeolith.server.returning import Returning
from zeolith.server.served import Served
from zeolith.server.sessions import Session
from zeolith.server.status import status_of
from zeolith.server.turns import Turns
from zeolith.storage.changes import Change
from zeolith.storage.database import (
    Finished,
    NotCommitted,
    Transaction,
    Unresolved,
    Voted,
    WouldBlock,
)

logger = logging.getLogger(__name__)

LATER = object()
# Errors that are answers: nothing is wrong with the server when they occur.
_EXPECTED = (POSError, KeyError, ZeolithError, OSError)


class Service:
    """The databases of one server, and everybody who is connected to it."""

    def __init__(
        self,
        databases: dict[str, Served],
        limits: Limits,
        access: Access = OPEN,
    ):
        self.databases = databases
        self.limits = limits
        self.peers: set[Peer] = set()
        self.admission = Admission(limits)
        # What members have asked for, but for loads.
        self._requests = 0
        self.turns = Turns(self._done, limits.guest_burst_s)
        for served in databases.values():
            served.readings = Readings(served.workers, self.turns.rest)
        self.stock = staging.Stock(limits.staged_bytes_max)
        self.sessions: dict[bytes, Session] = {}
        self.transaction_timeout_s = 30.0
        self.started_at = time.time()
        self.is_stopping = False
        self._someone_left = asyncio.Event()
        # What peers report first.
        self.greeting = Greeting(self, access)
        self.hello = self.greeting.hello
        self.response = self.greeting.response
        self.packs = Packs(self, later=LATER, fail=self._fail)
        elsewhere = {
            **blobs.Blobs(self._read, limits).handlers,
            **Iteration(self._read, limits).handlers,
            **ReadingAhead(self._read, limits).handlers,
            **self.packs.handlers,
            **Returning(
                self._read, self._answer_with, self._reply, limits, later=LATER
            ).handlers,
        }
        self._handlers: dict[str, Callable[..., Any]] = {
            name: elsewhere.get(name) or getattr(self, f"_{name}")
            for name, method in METHODS.items()
            if method.sender == "client"
        }

    # What peers report

    def request(self, peer: Peer, request: Request) -> None:
        """Answer a request, now or later."""
        number, name, args = request
        if peer.account is None:
            self._requests += 1
        try:
            self._permit(peer, name, args)
            value = self._handlers[name](peer, number, *args)
        except Exception as error:  # noqa: BLE001 - every error is an answer
            self._fail(peer, number, name, error)
            return
        if value is not LATER:
            self._reply(peer, number, value)

    def notice(self, peer: Peer, notice: Notice) -> None:
        """Do what needs no answer; an error ends the socket, for nobody hears it."""
        try:
            self._permit(peer, notice.method, notice.args)
            self._handlers[notice.method](peer, 0, *notice.args)
        except Forbidden as error:
            peer.hang_up("forbidden", str(error))
        except _EXPECTED as error:
            # As after an offence: it would be the same the next time.
            text = f"{notice.method}: {error}"
            peer.complain(f"is disconnected: {text}")
            peer.hang_up("protocol", text)

    def catch_up(self) -> None:
        """Let everybody see what is on the disk, of all databases."""
        for served in self.databases.values():
            served.committer.catch_up()

    def lost(self, peer: Peer) -> None:
        """A socket is gone: let go of everything that hung on it."""
        self.peers.discard(peer)
        self.admission.leave(peer)
        self.greeting.forget(peer)
        self._someone_left.set()
        session = peer.session
        commit = peer.transactions.commit
        if session is None:
            return
        session.served.readings.forget(peer)
        blobs.discard(peer)
        peer.transactions.drop()
        if commit is not None:
            gone = StorageTransactionError("the connection was lost")
            session.served.committer.abandon(commit, gone, None)
        session.channels.discard(peer)
        if peer is session.stream and session.token in self.sessions:
            del self.sessions[session.token]
            logger.info("%s has left storage %s", session.name, session.served.name)
            session.end("the session has ended")

    def end_sessions(self, served: Served, reason: str) -> None:
        """End all sessions at ``served``; no channel joins them any more."""
        for token, session in tuple(self.sessions.items()):
            if session.served is served:
                del self.sessions[token]
                session.end(reason)

    async def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until every peer is gone; those that linger are cut off."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.peers:
                    self._someone_left.clear()
                    await self._someone_left.wait()
        except TimeoutError:
            for peer in tuple(self.peers):
                peer.cut_off()

    def tick(self, now: float) -> None:
        """What is due: heartbeats, and the end of what takes or lasts too long."""
        self.greeting.tick()
        self.turns.tick()
        for peer in tuple(self.peers):
            peer.tick(now)
            timeout_s = self.transaction_timeout_s
            if peer.expire(now, timeout_s):
                logger.warning(
                    "%s has sent no more for its vote in %g s", peer.address, timeout_s
                )
        for served in self.databases.values():
            served.committer.tick(now, self.transaction_timeout_s)

    def _permit(self, peer: Peer, name: str, args: list[Any]) -> None:
        session = peer.session
        if session is None:
            roles = peer.identity.roles_anywhere(self.databases)
            permit(name, args, roles, in_session=False, is_read_only=False)
        else:
            read_only = session.is_read_only
            permit(name, args, session.roles, in_session=True, is_read_only=read_only)

    def _done(self) -> int:
        loads = sum(served.counters.loads for served in self.databases.values())
        return self._requests + loads

    # The way back

    def _reply(self, peer: Peer, number: int, value: Any) -> bool:
        """Whether ``value`` could be sent."""
        try:
            peer.reply(number, value)
        except LocalProtocolError as error:
            peer.fail(number, error)
            return False
        return peer.is_there

    def _fail(self, peer: Peer, number: int, name: str, error: BaseException) -> None:
        if not isinstance(error, _EXPECTED):
            logger.error("%s of %s failed", name, peer.address, exc_info=error)
        elif isinstance(error, OSError):
            # The disk's fault, not the client's: the operator must hear of it.
            logger.error("%s of %s failed: %s", name, peer.address, error)
        peer.fail(number, error)

    def _read(
        self,
        peer: Peer,
        number: int,
        step: Callable[..., Any],
        *args: Any,
        then: Callable[[Any], Any] = lambda value: value,
    ) -> object:
        """Answer with ``then(step(*args))``, ``step`` being run in a reader thread."""
        assert peer.session is not None
        what = getattr(step, "__name__", "read")
        answer = self._answering(peer, number, what, then)
        peer.session.served.readings.read(peer, answer, step, *args)
        return LATER

    def _answer_with(
        self,
        peer: Peer,
        number: int,
        what: str,
        reading: "asyncio.Future[Any]",
        then: Callable[[Any], Any] = lambda value: value,
    ) -> object:
        """Answer with ``then`` of what ``reading`` comes to."""
        reading.add_done_callback(self._answering(peer, number, what, then))
        return LATER

    def _answering(
        self, peer: Peer, number: int, what: str, then: Callable[[Any], Any]
    ) -> Callable[["asyncio.Future[Any]"], None]:
        """What sends the answer when something has been read."""

        def done(reading: "asyncio.Future[Any]") -> None:
            if reading.cancelled():
                # The server has stopped, and the peer was told so.
                return
            error = reading.exception()
            if error is None:
                self._reply(peer, number, then(reading.result()))
            else:
                self._fail(peer, number, what, error)

        return done

    # Methods that need no session

    def _ping(self, _peer: Peer, _number: int) -> None:
        return None

    def _status(self, peer: Peer, number: int) -> object:
        async def collect() -> None:
            try:
                status = await status_of(self, peer.identity)
            except Exception as error:  # noqa: BLE001 - every error is an answer
                self._fail(peer, number, "status", error)
            else:
                self._reply(peer, number, status)

        asyncio.get_running_loop().create_task(collect())
        return LATER

    # Methods that read

    def _load(self, peer: Peer, number: int, oid: bytes, before: bytes) -> Any:
        served = peer.session.served  # type: ignore[union-attr]
        served.counters.loads += 1
        if before > served.horizon:
            before = served.horizon
        as_of = served.changes.last_tid
        try:
            found = served.database.load_nowait(oid, before)
            if found is None:
                # What load_announced does, spelled out, for this is the hot path.
                refuse_unannounced(served.database.load_nowait, oid, served.horizon)
        except WouldBlock:
            return self._read(
                peer,
                number,
                load_announced,
                served.database.load,
                oid,
                before,
                served.horizon,
                then=partial(answer_of, as_of),
            )
        if found is None:
            return answer_of(as_of, found)
        data, tid, end = found
        return data, tid, end, as_of

    def _load_many(
        self, peer: Peer, number: int, oids: list[bytes], before: bytes
    ) -> Any:
        served = _session(peer).served
        if len(oids) > self.limits.load_many_max:
            raise ValueError(f"more than {self.limits.load_many_max} oids at once")
        # The client asks again for the others; meanwhile it is the others' turn.
        oids = oids[: self.limits.load_many_answered_max]
        served.counters.loads += len(oids)
        before = min(before, served.horizon)
        as_of = served.changes.last_tid
        bytes_max = self.limits.batch_bytes_max
        try:
            loaded = load_several(load_shortly(served), oids, before, bytes_max)
        except WouldBlock:
            return self._read(
                peer,
                number,
                partial(load_several_slowly, served.database, oids, before, bytes_max),
                then=lambda value: (as_of, value),
            )
        return (as_of, loaded)

    def _load_serial(self, peer: Peer, number: int, oid: bytes, tid: bytes) -> object:
        database = _session(peer).served.database
        return self._read(peer, number, database.load_serial, oid, tid)

    def _get_tid(self, peer: Peer, number: int, oid: bytes) -> object:
        return self._read(peer, number, _session(peer).served.database.get_tid, oid)

    def _history(self, peer: Peer, number: int, oid: bytes, size: int) -> object:
        size = min(size, self.limits.log_entries_max)
        database = _session(peer).served.database
        return self._read(peer, number, database.history, oid, size)

    def _undo_log(
        self, peer: Peer, number: int, before: bytes | None, size: int
    ) -> object:
        size = min(size, self.limits.log_entries_max)
        database = _session(peer).served.database
        return self._read(peer, number, database.undo_log, before, size)

    def _info(self, peer: Peer, number: int) -> object:
        return self._read(peer, number, _session(peer).served.database.info)

    def _outcome(
        self,
        peer: Peer,
        number: int,
        transaction_id: bytes,
        tid: bytes | None,
        position: bytes,
    ) -> object:
        served = _session(peer).served

        def settled() -> None:
            recent = served.changes.since(position) or []
            ids = {change.transaction: change.tid for change in recent}
            # Of a finish that failed on the disk a restart tells, and a read-only copy
            # need not have all that there is: neither can deny.
            may_deny = served.committer.broken is None and not served.is_read_only
            if transaction_id in ids:
                self._reply(peer, number, ("committed", ids[transaction_id]))
            elif served.database.tells_own:
                # It is the upstream's transaction: what we have not heard of may be.
                ask = served.database.outcome
                self._read(peer, number, ask, transaction_id, tid, position)
            elif may_deny and (
                position == served.changes.last_tid or (recent and None not in ids)
            ):
                self._reply(peer, number, ("not committed", None))
            elif tid is None:
                self._reply(peer, number, ("unknown", None))
            else:
                then = partial(_outcome, tid, may_deny)
                self._read(peer, number, served.database.committed, tid, then=then)

        served.committer.settle(transaction_id, settled)
        return LATER

    # Methods that write

    def _new_oids(self, peer: Peer, number: int, count: int) -> object:
        count = min(count, self.limits.new_oids_max)
        return self._read(peer, number, _session(peer).served.database.new_oids, count)

    def _stage(
        self, peer: Peer, _number: int, transaction_id: bytes, operations: list[Any]
    ) -> None:
        workers = _session(peer).served.workers
        peer.transactions.stage(transaction_id, operations, peer, workers)

    def _vote(
        self,
        peer: Peer,
        number: int,
        transaction_id: bytes,
        metadata: list[Any],
        operations: list[list[Any]],
    ) -> object:
        voted = partial(self._voted, peer, number)
        self._begin(peer, transaction_id, metadata, operations, voted)
        return LATER

    def _commit(
        self,
        peer: Peer,
        number: int,
        transaction_id: bytes,
        metadata: list[Any],
        operations: list[list[Any]],
        position: bytes,
    ) -> object:
        def voted(
            commit: Commit,
            result: Voted | Unresolved | None,
            error: BaseException | None,
        ) -> None:
            if isinstance(result, Voted):
                then = partial(_committed, result.resolved)
                self._finish_voted(peer, number, commit, position, then)
                return
            if isinstance(error, StorageSystemError):
                # Of a finish it would say that nobody knows.
                error = NotCommitted(str(error))
            self._voted(peer, number, commit, result, error)

        self._begin(peer, transaction_id, metadata, operations, voted)
        return LATER

    def _begin(
        self,
        peer: Peer,
        transaction_id: bytes,
        metadata: list[Any],
        operations: list[list[Any]],
        voted: Callable[[Commit, Any, BaseException | None], None],
    ) -> None:
        """Let a new transaction vote, and call ``voted(commit, result, error)``."""
        current = peer.transactions.commit
        if current is not None and current.phase is not Phase.ENDED:
            raise StorageTransactionError("the channel is in another transaction")
        transaction = Transaction(transaction_id)
        transaction.user, transaction.description, transaction.extension = metadata[:3]
        transaction.tid, transaction.status = metadata[3:]
        session = _session(peer)
        commit = Commit(transaction, session.name)
        peer.transactions.commit = commit
        answer = partial(voted, commit)
        staging.vote(peer, session.served, commit, operations, self.limits, answer)

    def _resolve(
        self, peer: Peer, number: int, transaction_id: bytes, resolutions: list[Any]
    ) -> object:
        commit = peer.transactions.commit_of(transaction_id)
        answer = partial(self._voted, peer, number, commit)
        _session(peer).served.committer.resolve(commit, dict(resolutions), answer)
        return LATER

    def _voted(
        self,
        peer: Peer,
        number: int,
        commit: Commit,
        result: Voted | Unresolved | None,
        error: BaseException | None,
    ) -> None:
        if error is not None:
            self._fail(peer, number, "vote", error)
        elif isinstance(result, Voted):
            self._reply(peer, number, ("voted", result.tid, result.resolved))
        else:
            assert result is not None
            try:
                peer.reply(number, ("conflicts", result.conflicts))
            except LocalProtocolError as too_large:
                committer = _session(peer).served.committer
                committer.abandon(commit, too_large, None)
                peer.fail(number, too_large)

    def _finish(
        self, peer: Peer, number: int, transaction_id: bytes, position: bytes
    ) -> object:
        commit = peer.transactions.commit_of(transaction_id)
        self._finish_voted(peer, number, commit, position, lambda *told: told)
        return LATER

    def _finish_voted(
        self,
        peer: Peer,
        number: int,
        commit: Commit,
        position: bytes,
        then: Callable[[bytes, list[Change] | None], Any],
    ) -> None:
        """Finish, and answer with ``then(tid, other changes since position)``."""
        served = _session(peer).served

        def offer() -> Delivery | None:
            changes = served.changes
            others = changes.since(position)
            if others is None or len(others) > CHANGES_MAX:
                return None
            return peer.offer(
                number,
                changes.last_tid,
                lambda tid: encode(Reply(number, then(tid, others))),
            )

        def finished(result: Finished | None, error: BaseException | None) -> None:
            was_delivered = peer.was_delivered(number)
            if result is None:
                assert error is not None
                self._fail(peer, number, "finish", error)
                return
            tells_all = was_delivered
            if not was_delivered:
                others = served.changes.others_since(position, result.tid)
                tells_all = others is not None
                try:
                    peer.reply(number, then(result.tid, others))
                except LocalProtocolError:
                    # More than a frame holds: it comes over the stream.
                    tells_all = False
                    peer.reply(number, then(result.tid, None))
            if peer.is_there and tells_all:
                # What this answer tells, the stream need not tell again.
                _session(peer).stream.told_tid = served.changes.last_tid

        served.committer.finish(commit, finished, offer)

    def _abort(self, peer: Peer, number: int, transaction_id: bytes) -> object:
        commit = peer.transactions.commit
        if commit is None or commit.transaction.id != transaction_id:
            # Staged at most, or unknown: nothing to undo.
            peer.transactions.drop()
            blobs.discard(peer, transaction_id)
            return None

        def aborted(_value: None, error: BaseException | None) -> None:
            if error is None:
                self._reply(peer, number, None)
            else:
                self._fail(peer, number, "abort", error)

        reason = StorageTransactionError("the transaction was aborted")
        _session(peer).served.committer.abandon(commit, reason, aborted)
        return LATER


def _session(peer: Peer) -> Session:
    assert peer.session is not None
    return peer.session


def _committed(
    resolved: list[bytes], tid: bytes, others: list[Change] | None
) -> tuple[str, bytes, list[bytes], list[Change] | None]:
    """The answer to a vote and a finish in one."""
    return "committed", tid, resolved, others


def _outcome(
    tid: bytes, may_deny: bool, is_committed: bool | None
) -> tuple[str, bytes | None]:
    if is_committed:
        return "committed", tid
    if is_committed is None or not may_deny:
        return "unknown", None
    return "not committed", None

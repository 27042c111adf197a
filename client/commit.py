"""One transaction of a ClientStorage, from tpc_begin to its end.

Each phase only knows its legal next steps; what is out of order is ZODB's
StorageTransactionError. A transaction belongs to the session in which it began, and
from vote to finish to one channel of it: if either is lost before finish was sent,
nothing was committed and ClientDisconnected says so; if the answer to finish is lost,
the server is asked what became of the transaction, and the truth is told.

Where nobody else takes part in a transaction (client.participants), its vote decides
all, and asks the server to finish at once: a round trip less. Between the two phases
the transaction is COMMITTED then, and all that finish does is to let it be seen here.

Used by the thread that commits; several transactions of one storage run side by side.
"""

import logging
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from ZODB.ConflictResolution import tryToResolveConflict
from ZODB.POSException import (
    ConflictError,
    StorageSystemError,
    StorageTransactionError,
    UndoError,
)

from zeolith.client.changes import Change, changes_of
from zeolith.client.channel import Channel
from zeolith.client.errors import ChannelLost, ClientDisconnected, CommitOutcomeUnknown
from zeolith.client.session import Session
from zeolith.client.stores import Stores
from zeolith.client.uploads import Uploads

if TYPE_CHECKING:
    from zeolith.client.storage import ClientStorage

logger = logging.getLogger(__name__)


class Phase(Enum):
    """Where a transaction stands."""

    BEGUN = "begun"
    VOTED = "voted"
    FINISHING = "finishing"
    COMMITTED = "committed"
    ENDED = "ended"


class _Committed(NamedTuple):
    """What the server has told of a transaction that it has committed."""

    change: Change
    # The other changes since the position that was sent; None: it cannot say.
    others: list[Change] | None
    # The cache's, when the request was sent.
    history: int


class _States:
    """Three states of an object, as ZODB's conflict resolution asks a storage."""

    def __init__(self, storage: "ClientStorage", states: dict[bytes, bytes]):
        self._states = states
        self._crs_transform_record_data = storage._crs_transform_record_data
        self._crs_untransform_record_data = storage._crs_untransform_record_data

    def loadSerial(self, _oid: bytes, serial: bytes) -> bytes:
        return self._states[serial]


def _as_bytes(text: bytes | str) -> bytes:
    # Whoever sets the attributes of TransactionMetaData may set text.
    return text.encode() if isinstance(text, str) else text


class Commit:
    """A transaction between tpc_begin and its end."""

    def __init__(
        self,
        storage: "ClientStorage",
        session: Session,
        metadata: Any,
        tid: bytes | None,
        status: str,
    ):
        # Who it is to those who call.
        self.transaction = metadata
        self._storage = storage
        self._session = session
        self._metadata = [
            _as_bytes(metadata.user),
            _as_bytes(metadata.description),
            metadata.extension_bytes,
            tid,
            status,
        ]
        self.stores = Stores(storage.limits)
        if storage.is_relayed:
            # Its own client may ask what became of it, of us or of anybody.
            self.stores.id = getattr(metadata, "transaction_id", self.stores.id)
        # If it has blobs.
        self._uploads: Uploads | None = None
        self.phase = Phase.BEGUN
        # Borrowed for the first blob, or for the vote.
        self._channel: Channel | None = None
        # The tid it will have, if the server told that with the vote.
        self.tid: bytes | None = None
        # What the server holds differently from what was sent.
        self.resolved: list[bytes] = []
        self._committed: _Committed | None = None

    # Blobs

    def store_blob(self, oid: bytes, serial: bytes, data: bytes, path: str) -> None:
        """Take over the file at ``path``, and send it unless the server can see it."""
        uploads, number = self._take(oid, path)
        if uploads.is_shared:
            self.stores.store_blob(oid, serial, data, uploads.name(number))
        else:
            self.stores.store_blob(oid, serial, data, number)
            self._upload(uploads, number)

    def restore_blob(
        self, oid: bytes, tid: bytes, data: bytes, previous: bytes | None, path: str
    ) -> None:
        """Like ``store_blob``, for a transaction that is copied; always sent."""
        uploads, number = self._take(oid, path)
        self.stores.restore_blob(oid, tid, data, previous, number)
        self._upload(uploads, number)

    def _take(self, oid: bytes, path: str) -> tuple[Uploads, int]:
        if self._uploads is None:
            self._uploads = Uploads(self._storage.blobs, self.stores.id)
        return self._uploads, self._uploads.take(oid, path)

    def _upload(self, uploads: Uploads, number: int) -> None:
        try:
            channel = self._take_channel()
            uploads.send(number, channel, self._storage.limits)
        except ChannelLost as error:
            self.end()
            cause = self._session.lost(error)
            raise ClientDisconnected(f"{cause}; nothing was committed") from error

    def _take_channel(self) -> Channel:
        """The channel of this transaction; raises ChannelLost, ClientDisconnected."""
        if self._storage.current_session is not self._session:
            raise ClientDisconnected(
                "the connection was lost since the transaction began; nothing of it"
                " was committed"
            )
        if self._channel is None:
            self._channel = self._session.borrow()
        return self._channel

    # Vote

    def vote(self) -> list[bytes]:
        """Send everything, and resolve what the server cannot."""
        return self._resolve_all(self.begin_vote())

    def vote_and_finish(self) -> list[bytes]:
        """``vote``, for a transaction in which nobody else takes part.

        If there is nothing that the server cannot resolve, it is committed then, and
        ``finish`` asks nobody. Raises what either of them does.
        """
        self._refuse_if_lost()
        self._step(self._send_spilled)
        operations = self.stores.operations
        return self._resolve_all(
            self._ask_to_finish("commit", self._metadata, operations)
        )

    def begin_vote(self) -> list[list[bytes]]:
        """Send everything; returns what the server could not resolve.

        If that is nothing, the transaction has voted.
        """
        self._step(self._send_spilled)
        operations = self.stores.operations
        return self._heard(self._step(self._call, "vote", self._metadata, operations))

    def resolve(self, resolutions: list[list[bytes]]) -> list[list[bytes]]:
        """Go on with records made of the conflicts; returns what is still left."""
        return self._heard(self._step(self._call, "resolve", resolutions))

    def _resolve_all(self, conflicts: list[list[bytes]]) -> list[bytes]:
        while conflicts:
            conflicts = self.resolve(self._step(self._resolutions, conflicts))
        return self.resolved

    def _send_spilled(self) -> None:
        channel = self._take_channel()
        for chunk in self.stores.spilled():
            channel.send(chunk)

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        """A step of the vote: any error is the end of the transaction."""
        try:
            return step(*args)
        except ChannelLost as error:
            self.end()
            cause = self._session.lost(error)
            raise ClientDisconnected(f"{cause}; nothing was committed") from error
        except BaseException as error:
            self._refused(error)
            raise

    def _refused(self, error: BaseException) -> None:
        """The end of a transaction that was not committed."""
        if isinstance(error, ConflictError) and error.oid is not None:
            # If it is our copy that is wrong, the next try must not use it again.
            self._storage.cache.forget(error.oid)
        self._abort_quietly()

    def _heard(self, answer: Any) -> list[list[bytes]]:
        """What an answer to a vote leaves to be resolved."""
        if answer[0] == "conflicts":
            conflicts: list[list[bytes]] = answer[1]
            return conflicts
        _voted, self.tid, self.resolved = answer
        self.phase = Phase.VOTED
        return []

    def _resolutions(self, conflicts: list[list[bytes]]) -> list[list[bytes]]:
        """Resolve with the application's classes; raises ConflictError, UndoError."""
        resolutions = []
        for oid, committed_tid, old_tid, committed, old, new in conflicts:
            if self._storage.is_relayed:
                # A server has no classes, and imports none that a record names.
                raise ConflictError(oid=oid, serials=(committed_tid, old_tid))
            states = _States(self._storage, {committed_tid: committed, old_tid: old})
            try:
                resolved = tryToResolveConflict(
                    states, oid, committed_tid, old_tid, new, committed
                )
            except ConflictError:
                if oid in self.stores.oids:
                    raise
                # It is an undo's. Another attempt would meet the same states.
                raise UndoError(
                    "Some data were modified by a later transaction", oid
                ) from None
            resolutions.append([oid, resolved])
        return resolutions

    def _call(self, method: str, *args: Any) -> Any:
        channel = self._channel
        if channel is None:
            # Another thread has closed the storage.
            raise ChannelLost("the storage is closed")
        return channel.call(method, self.stores.id, *args)

    # Finish

    def finish(self, callback: Callable[[bytes], Any]) -> bytes:
        """Commit; calls ``callback(tid)`` in its place among the changes."""
        if self.phase is Phase.VOTED:
            self._refuse_if_lost()
            self._ask_to_finish("finish")
        if self.phase is not Phase.COMMITTED or self._committed is None:
            raise StorageTransactionError("tpc_finish before tpc_vote")
        change, others, history = self._committed
        position = self._storage.position

        def apply(tid: bytes) -> None:
            self._fill_cache(tid, history)
            if self._uploads is not None:
                self._uploads.adopt(tid)
            callback(tid)

        try:
            position.finished(self._session, change, others, apply)
        except BaseException:
            if (position.tid_now or b"") < change.tid:
                # The thread was interrupted before it had applied the change.
                self._forgo_answer("an answer was given up before its turn")
            # Nobody is left to apply it, and all later ones would wait for that.
            position.give_up(self.stores.id)
            raise
        finally:
            self.end()
        return change.tid

    def _refuse_if_lost(self) -> None:
        if self._session.ended is not None:
            # The server aborts what it loses sight of: there is nobody to ask.
            self.end()
            raise ClientDisconnected(f"{self._session.ended}; nothing was committed")

    def _ask_to_finish(self, method: str, *args: Any) -> list[list[bytes]]:
        """Have the server commit; returns what it could not resolve before that.

        If that is nothing, the transaction is committed.
        """
        position = self._storage.position
        history = self._storage.cache.history
        self.phase = Phase.FINISHING
        sent_at = position.begin_finish(self.stores.id)
        answer = None
        try:
            answer = self._call(method, *args, sent_at)
            if answer[0] == "conflicts":
                # As after a vote: nothing of it is being finished.
                position.give_up(self.stores.id)
                self.phase = Phase.BEGUN
                return self._heard(answer)
            if method == "commit":
                _committed, tid, self.resolved, others = answer
            else:
                tid, others = answer
            changes = None if others is None else changes_of(others)
            self._note_committed(tid, changes, sent_at, history)
        except ChannelLost as error:
            cause = self._session.lost(error)
            self._forgo_answer(str(cause))
            position.give_up(self.stores.id)
            tid = self._ask_for_outcome(sent_at, cause)
            if method == "commit":
                # What the server has merged, nobody tells any more.
                self.resolved = list(self.stores.oids)
            self._note_committed(tid, None, sent_at, history)
        except StorageSystemError as error:
            self.end()
            raise CommitOutcomeUnknown(str(error)) from error
        except BaseException as error:
            channel = self._channel
            is_refused = isinstance(error, Exception) and answer is None
            if not is_refused or channel is None or channel.is_busy or channel.is_lost:
                # The thread was interrupted.
                self._forgo_answer(f"an answer was given up: {error!r}")
            position.give_up(self.stores.id)
            self._refused(error)
            raise
        return []

    def _note_committed(
        self, tid: bytes, changes: list[Change] | None, sent_at: bytes, history: int
    ) -> None:
        """The server has committed; ``finish`` lets it be seen."""
        since = sent_at
        for each in changes or ():
            if each.tid < tid:
                since = each.tid
        oids = list({*self.stores.oids, *self.resolved})
        change = Change(since, tid, oids, self.stores.id)
        self._committed = _Committed(change, changes, history)
        self.phase = Phase.COMMITTED

    def _forgo_answer(self, reason: str) -> None:
        """The answer to finish will not come, or is not heeded, nor what it tells.

        The stream may have been spared that, so a new session has to bring it.
        """
        self._session.close(reason)
        self._storage.position.leave(self._session)

    def _ask_for_outcome(self, sent_at: bytes, cause: ChannelLost) -> bytes:
        """The tid of the transaction, if it was committed; else raises the truth."""
        unknown = CommitOutcomeUnknown(
            "the server was lost while it finished the transaction; it may have been"
            f" committed{f' as {self.tid.hex()}' if self.tid else ''}: {cause}"
        )
        was = self._session.welcome
        try:
            outcome, tid = self._storage.call(
                "outcome", self.stores.id, self.tid, sent_at
            )
            session = self._storage.current_session
        except Exception as error:
            # No server, or one that cannot say.
            self.end()
            raise unknown from error
        now = session.welcome if session is not None else {}
        is_same = all(was[key] == now.get(key) for key in ("database_id", "epoch"))
        if outcome == "committed":
            return bytes(tid)
        self.end()
        if outcome == "not committed" and is_same:
            raise ClientDisconnected(f"{cause}; nothing was committed") from cause
        raise unknown from cause

    def _fill_cache(self, tid: bytes, history: int) -> None:
        """Keep what we have just written; never at the price of the commit."""
        cache = self._storage.cache
        kept = self.stores.kept
        try:
            for oid in self.resolved:
                kept.pop(oid, None)
            cache.store_committed(tid, kept, history)
        except Exception:
            # The server has committed: nothing may look like a failure any more.
            logger.exception("the cache failed at a commit and is emptied")
            cache.forget_all(cache.valid_through)

    # The end

    def abort(self) -> None:
        """Give up, whatever the phase."""
        if self.phase is Phase.COMMITTED and self._committed is not None:
            self._disown(self._committed)
        else:
            self._abort_quietly()

    def _disown(self, committed: _Committed) -> None:
        """Give up what is committed: to whoever did so it is somebody else's change.

        Between the phases a thread can only have been interrupted.
        """
        change, others, _history = committed
        logger.warning(
            "a transaction was given up after its vote, with which it was committed as"
            " %s, for nobody else took part in it",
            change.tid.hex(),
        )
        position = self._storage.position
        if others is not None:
            # The stream was spared this.
            position.receive(self._session, [*others, change])
        position.give_up(self.stores.id)
        self.end()

    def _abort_quietly(self) -> None:
        channel = self._channel
        if channel is not None and not channel.is_lost and not channel.is_busy:
            try:
                channel.call("abort", self.stores.id)
            except Exception as error:  # noqa: BLE001 - whatever the server may answer
                # The server aborts what it loses sight of.
                logger.debug("abort was not done: %s", error)
                channel.shut()
        self.end()

    def end(self) -> None:
        """Give back what the transaction holds; may be called again."""
        if self.phase is Phase.FINISHING:
            # Or all later changes would wait for a thread that was interrupted.
            self._storage.position.give_up(self.stores.id)
        self.phase = Phase.ENDED
        channel, self._channel = self._channel, None
        if channel is not None:
            self._session.give_back(channel)
        self.stores.close()
        if self._uploads is not None:
            self._uploads.close()
        self._storage.forget_commit(self)

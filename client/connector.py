"""Keeps a storage connected: dials, adopts, listens, and begins again.

One thread for each storage, named ``zeolith-<storage>``. It dials all addresses until
one accepts, makes that session the storage's (``Position.adopt``, then ``current``),
reads its stream until it is lost, and dials again. Only the session that was adopted
last feeds the storage.

A read-only fallback is a session like any other, except that a second, short-lived
thread (``-upgrade``) looks for a server that takes writes; when it has one, the first
thread goes on with that session.

A session is current when all is applied that was missed before it. Where the server
cannot say what that is, another short-lived thread (``-verify``) asks what of the cache
is still right, while the first one reads the stream; what comes waits in the position.

Everything that other threads ask (``session``, ``close``, ``new_addresses``) goes
through one condition; nothing waits for the network while holding it.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from zeolith.client.cache import Cache
from zeolith.client.dial import (
    LOCKED_OUT_S,
    RETRY_MAX_S,
    Wish,
    delays,
    dial_any,
    is_locked_out,
    is_refusal,
)
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.client.position import Position
from zeolith.client.session import Session
from zeolith.client.verification import Verified, verify
from zeolith.protocol.addresses import Address, format_address
from zeolith.protocol.errors import HelloRefused, ZeolithError
from zeolith.protocol.limits import Limits
from zeolith.protocol.login import NO_CREDENTIALS, Credentials
from zeolith.protocol.tls import ClientTls

logger = logging.getLogger(__name__)

UPGRADE_INTERVAL_S = 1.0
# How long close() waits for the thread, which may be in the middle of a dial; it ends
# by itself soon after.
CLOSE_TIMEOUT_S = 2.0


class Arrival(NamedTuple):
    """How the last session came to be current."""

    address: Address
    is_read_only: bool
    # From the first attempt that succeeded until all that was missed was applied.
    took_s: float
    # Changes that were missed and then applied.
    replayed: int
    # What was asked for instead, if the server could not say what was missed.
    verified: Verified | None

    def describe(self) -> dict[str, Any]:
        """The same, for programs."""
        revisions, dropped = self.verified or (0, 0)
        return {
            "address": format_address(self.address),
            "read_only": self.is_read_only,
            "ready_s": self.took_s,
            "changes_replayed": self.replayed,
            "records_verified": revisions,
            "records_dropped": dropped,
        }

    def __str__(self) -> str:
        text = format_address(self.address)
        if self.is_read_only:
            text += " (read-only)"
        text += f" in {self.took_s * 1000:.0f} ms"
        if self.replayed:
            text += f", {self.replayed} changes replayed"
        if self.verified is not None:
            revisions, dropped = self.verified
            text += f", {revisions} cached records verified, {dropped} of them dropped"
        return text


class Connector:
    """The one who sees to it that there is a session."""

    def __init__(
        self,
        addresses: list[Address],
        position: Position,
        cache: Cache,
        *,
        storage: str,
        label: str | None,
        is_read_only: bool,
        falls_back: bool,
        limits: Limits,
        tls: ClientTls | None,
        credentials: Credentials = NO_CREDENTIALS,
        on_session: Callable[[Session], None],
    ):
        self._addresses = addresses
        self._position = position
        self._cache = cache
        self._storage = storage
        self._label = label
        self._is_read_only = is_read_only
        self._falls_back = falls_back
        self._limits = limits
        # None: plain.
        self._tls = tls
        self._credentials = credentials
        # Called with each session before it becomes the current one.
        self._on_session = on_session
        self._thread: threading.Thread | None = None
        self._reset()
        # Database id and epoch of the session that is, or is being, adopted.
        self.identity: tuple[bytes, int] | None = None
        # Of the database, to know it again.
        known = cache.identity
        self._database_id: bytes | None = None if known is None else known[0]
        self._epoch: int | None = None if known is None else known[1]
        # Of the session that is current, or was.
        self.arrival: Arrival | None = None

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._current: Session | None = None
        # The one that was adopted last: current, or about to be.
        self._adopted: Session | None = None
        # A writable session that waits to replace a read-only one.
        self._better: Session | None = None
        self._is_closed = False
        # Why there is no session.
        self._cause: BaseException | None = None

    # For any thread

    @property
    def current(self) -> Session | None:
        """The session now, if there is one."""
        session = self._current
        return session if session is not None and session.ended is None else None

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._thread = threading.Thread(
            target=self._run, name=f"zeolith-{self._storage}", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """See to it that somebody connects: a forked child has no thread yet.

        It may live of what its parent has loaded, and must still hear of changes.
        """
        if self._thread is None:
            with self._changed:
                if self._thread is None and not self._is_closed:
                    self.start()

    def session(self, timeout_s: float) -> Session:
        """The session, waited for if need be; raises ClientDisconnected with the cause.

        A server that refuses us for good is not waited for.
        """
        session = self._current
        if session is not None and session.ended is None:
            return session
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._is_closed:
                    raise ClientDisconnected("the storage is closed")
                if self.current is not None:
                    return self.current
                if self._thread is None:
                    # We are a forked child: the parent's thread is not here.
                    self.start()
                if is_refusal(self._cause):
                    raise self._disconnected("refused") from self._cause
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise self._disconnected(
                        f"no connection within {timeout_s:g} s"
                    ) from self._cause
                self._changed.wait(left_s)

    def new_addresses(self, addresses: list[Address]) -> None:
        """Connect to ``addresses`` from now on; a session elsewhere ends."""
        with self._changed:
            self._addresses = addresses
            self._cause = None
            self._changed.notify_all()
            session = self._adopted
        if session is not None and session.address not in addresses:
            session.close("the storage was given a new address")

    def close(self) -> None:
        """End the session and the thread; nobody connects again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            session = self._adopted
            better, self._better = self._better, None
        if session is not None:
            session.close("the storage is closed")
        if better is not None:
            better.discard("the storage is closed")
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_TIMEOUT_S)

    def forget(self) -> None:
        """In a forked child: nothing of the parent's is ours; connect when asked to."""
        for session in (self._adopted, self._better):
            if session is not None:
                session.forget()
        is_closed = self._is_closed
        self._reset()
        self._is_closed = is_closed
        self._thread = None

    def _disconnected(self, what: str) -> ClientDisconnected:
        where = ", ".join(map(format_address, self._addresses))
        cause = self._cause
        text = f": {getattr(cause, 'strerror', None) or cause}" if cause else ""
        return ClientDisconnected(f"{where}: {what}{text}")

    # The thread

    def _run(self) -> None:
        waits = delays()
        while not self._is_closed:
            try:
                session = self._take_better() or self._dial()
            except (OSError, ZeolithError) as error:
                self._note(error)
                self._pause(LOCKED_OUT_S if is_locked_out(error) else next(waits))
            except Exception as error:
                # A mistake of ours, or of a name's; the storage must not be left alone.
                logger.exception("storage %s: connecting failed", self._storage)
                self._note(error)
                self._pause(next(waits))
            else:
                if self._is_cached_otherwise(session):
                    continue
                began = time.monotonic()
                self._live(session)
                lived_s = time.monotonic() - began
                if session.has_answered or lived_s > RETRY_MAX_S:
                    waits = delays()
                if lived_s <= RETRY_MAX_S and self._better is None:
                    # A server that accepts us and then drops us is not hurried.
                    self._pause(next(waits))

    def _is_cached_otherwise(self, session: Session) -> bool:
        """Whether we have to come again: we know more of the database, or another."""
        welcome = session.welcome
        if not self._cache.identify(welcome["database_id"], welcome["epoch"]):
            return False
        self._position.take_up_cache()
        self._database_id, self._epoch = welcome["database_id"], welcome["epoch"]
        session.discard("the cache stands elsewhere")
        return True

    def _live(self, session: Session) -> None:
        """Adopt ``session`` and listen to it until it is lost."""
        try:
            self._adopt(session)
            reason = session.listen(
                self._position, partial(self._make_current, session)
            )
        except Exception as error:
            # Most likely the application's database did not take an invalidation.
            logger.exception("storage %s: following failed", self._storage)
            reason = repr(error)
            session.discard(reason)
            self._pause(RETRY_MAX_S)
        self._position.leave(session)
        if not self._is_closed:
            logger.warning(
                "storage %s: %s is lost: %s",
                self._storage,
                format_address(session.address),
                reason,
            )
            self._note(ConnectionError(reason))

    def _dial(self) -> Session:
        """A session at any address, a writable one first if we may write."""
        try:
            return self._reach(is_read_only=self._is_read_only)
        except HelloRefused as refusal:
            if refusal.reason != "read-only" or not self._falls_back:
                raise
        return self._reach(is_read_only=True)

    def _reach(self, *, is_read_only: bool) -> Session:
        wish = Wish(
            self._storage,
            is_read_only,
            self._label,
            self._database_id,
            self._epoch,
            self._position.tid,
            self._credentials,
        )
        began_at = time.monotonic()
        reached = dial_any(list(self._addresses), wish, self._limits, self._tls)
        return Session(reached, self._limits, began_at)

    def _adopt(self, session: Session) -> None:
        """Feed the position from ``session``; make it the current one, or begin to."""
        welcome = session.welcome
        identity = welcome["database_id"], welcome["epoch"]
        with self._changed:
            self._adopted = session
            is_closed = self._is_closed
            is_elsewhere = session.address not in self._addresses
        # Whoever is told to start afresh may ask where he is.
        self.identity = identity
        is_same = identity == (self._database_id, self._epoch)
        must_verify = session.missed is None and is_same
        if must_verify:
            self._position.await_verification(session)
        else:
            self._position.adopt(session, welcome["last_tid"], session.missed)
            self._database_id, self._epoch = identity
        session.missed = None
        if is_closed:
            session.close("the storage is closed")
        elif is_elsewhere:
            session.close("the storage was given a new address")
        elif must_verify:
            threading.Thread(
                target=self._verify,
                args=(session,),
                name=f"zeolith-{self._storage}-verify",
                daemon=True,
            ).start()
        elif not session.is_incomplete:
            self._make_current(session)

    def _verify(self, session: Session) -> None:
        """In a thread of its own: find out what of the cache is right, and go on."""
        try:
            verified = self._verified(session)
            if verified is not None and session.ended is None:
                self._make_current(session, verified)
        except (ChannelLost, ClientDisconnected) as error:
            session.close(str(error))
        except Exception as error:
            # Most likely the application's database did not take an invalidation.
            logger.exception("storage %s: following failed", self._storage)
            session.close(repr(error))

    def _verified(self, session: Session) -> Verified | None:
        try:
            return verify(session, self._position, self._cache, self._limits)
        except (ChannelLost, ClientDisconnected):
            raise
        except Exception:
            logger.exception("storage %s: nothing could be verified", self._storage)
            self._position.verified(session, session.welcome["last_tid"], None)
            return Verified(0, 0)

    def _make_current(self, session: Session, verified: Verified | None = None) -> None:
        """All that was missed is applied: calls may use ``session`` now."""
        took_s = time.monotonic() - session.began_at
        is_read_only = session.is_read_only
        arrival = Arrival(
            session.address, is_read_only, took_s, session.replayed, verified
        )
        self._on_session(session)
        logger.info("storage %s: connected to %s", self._storage, arrival)
        with self._changed:
            late = None
            if session is self._adopted:
                self.arrival = arrival
                self._current = session
                self._cause = None
                late, self._better = self._better, None
            is_closed = self._is_closed
            is_elsewhere = session.address not in self._addresses
            self._changed.notify_all()
        if late is not None:
            late.discard("another server was found before it")
        if is_closed:
            session.close("the storage is closed")
        elif is_elsewhere:
            session.close("the storage was given a new address")
        elif is_read_only and not self._is_read_only and session.may_write:
            # Else nobody would give us one.
            self._look_for_better()

    def _note(self, error: Exception) -> None:
        with self._changed:
            self._cause = error
            self._changed.notify_all()

    def _pause(self, delay_s: float) -> None:
        with self._changed:
            if not self._is_closed:
                self._changed.wait(delay_s)

    # A better session than a read-only one

    def _look_for_better(self) -> None:
        threading.Thread(
            target=self._upgrade, name=f"zeolith-{self._storage}-upgrade", daemon=True
        ).start()

    def _upgrade(self) -> None:
        fallback = self._current
        while fallback is not None:
            self._pause(UPGRADE_INTERVAL_S)
            if fallback.ended is not None or self._is_closed:
                return
            try:
                better = self._reach(is_read_only=False)
            except (OSError, ZeolithError):
                continue
            if better.is_read_only:
                better.discard("it takes no writes from us any more")
                continue
            with self._changed:
                # Whatever is adopted next takes it or discards it.
                is_late = self._is_closed or self._current is not fallback
                if not is_late:
                    self._better = better
            if is_late:
                better.discard("it is not needed any more")
            fallback.close("a server that takes writes is there again")
            return

    def _take_better(self) -> Session | None:
        with self._changed:
            better, self._better = self._better, None
        return better if better is not None and better.ended is None else None

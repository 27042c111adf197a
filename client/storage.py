"""ClientStorage: ZODB's storage interfaces over a session with a server.

ZODB's spelling (``tpc_begin``, ``loadBefore``) lives here; what the methods do is in
the modules they call. Any thread may call any method; the thread that calls does its
own reading and writing, on a channel of its own.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from ssl import SSLContext
from typing import Any

from ZODB import interfaces
from ZODB.ConflictResolution import ConflictResolvingStorage
from ZODB.POSException import POSKeyError, ReadOnlyError, StorageTransactionError
from zope.interface import implementer

from zeolith.client import forks, iteration, loading, packing, uploads
from zeolith.client.addressing import addresses_of
from zeolith.client.cache import DEFAULT_CACHE_BYTES
from zeolith.client.cache_opening import directory_of, open_cache
from zeolith.client.cache_stats import cache_stats
from zeolith.client.cache_trace import traced
from zeolith.client.changes import Change
from zeolith.client.commit import Commit, Phase
from zeolith.client.connector import Connector
from zeolith.client.dial import delays
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.client.log_methods import LogMethods
from zeolith.client.participants import is_alone
from zeolith.client.position import Position
from zeolith.client.provided import provide
from zeolith.client.read_ahead import reading_ahead
from zeolith.client.relaying import Upstream
from zeolith.client.session import Session
from zeolith.client.tids import MAX_TID, Z64, following
from zeolith.client.warming import WarmUp
from zeolith.client.wrapped import WrapperListener, is_wrapper
from zeolith.protocol.addresses import format_address
from zeolith.protocol.credentials import credentials_of
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.login import Credentials
from zeolith.protocol.tls import TlsFiles, client_tls

logger = logging.getLogger(__name__)

# How many oids are asked for first, and, by somebody who makes many objects, at last:
# the time that the round trip takes counts. What is left of them is dropped some day.
NEW_OIDS = 100
NEW_OIDS_MAX = 1600


@implementer(interfaces.IMultiCommitStorage, interfaces.IPrefetchStorage)
class ClientStorage(uploads.BlobMethods, LogMethods, ConflictResolvingStorage):
    """A storage whose data are in a server.

    ``addr`` is ``(host, port)``, a port, ``"host:port"``, a Unix socket's path, or a
    list of these, all of the same database. ``wait_timeout`` (seconds) bounds every
    wait for a connection, at the start (with ``wait``) and later; other arguments are
    described in docs/reference.md. Raises ClientDisconnected with the cause if there
    is no connection in time, at once if the server refuses, ValueError for a wrong
    argument.
    """

    # Whether a server serves us to others: see client.relaying.
    is_relayed = False
    _is_closed = False

    def __init__(
        self,
        addr: Any,
        storage: str = "1",
        cache: str | None = None,
        cache_size: int = DEFAULT_CACHE_BYTES,
        name: str | None = None,
        wait: bool = True,
        wait_timeout: float = 30,
        read_only: bool = False,
        read_only_fallback: bool = False,
        blob_dir: str | None = None,
        shared_blob_dir: bool = False,
        blob_cache_size: int | None = None,
        blob_cache_size_check: int = 10,
        client_label: str | None = None,
        ssl: SSLContext | None = None,
        ssl_server_hostname: str | None = None,
        server_sync: bool = False,
        username: str | None = None,
        password: str | None = None,
        *,
        client: str | None = None,
        var: str | None = None,
        warm_up: bool = False,
        cache_trace: str | None = None,
        read_ahead: bool = True,
        tls: bool | None = None,
        tls_ca: str | None = None,
        tls_certificate: str | None = None,
        tls_key: str | None = None,
        tls_key_password_file: str | None = None,
        tls_server_name: str | None = None,
        tls_verify: bool = True,
        password_file: str | None = None,
        token_file: str | None = None,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT,
    ):
        who = username, password, password_file, token_file
        files = TlsFiles(tls_ca, tls_certificate, tls_key, tls_key_password_file)
        named = tls_server_name or ssl_server_hostname
        secured = client_tls(ssl, tls, files, named, verifies=tls_verify)
        credentials = credentials or credentials_of(*who)
        addresses = addresses_of(addr)
        self.limits, self._storage = limits, storage
        self.__name__ = name or ", ".join(map(format_address, addresses))
        self._wait_timeout_s, self._server_sync = wait_timeout, server_sync
        self._is_read_only = bool(read_only)
        self.blobs = uploads.open_blobs(
            blob_dir, shared_blob_dir, blob_cache_size, blob_cache_size_check
        )
        directory = directory_of(cache, client, var, storage)
        self._open_cache(directory, cache_size, warm_up, cache_trace)
        self.read_ahead = reading_ahead(self) if read_ahead else None
        self._connector = Connector(
            addresses,
            self.position,
            self.cache,
            storage=storage,
            label=client_label,
            is_read_only=self._is_read_only,
            falls_back=bool(read_only_fallback),
            limits=limits,
            tls=secured,
            credentials=credentials,
            on_session=self._welcome,
        )
        self._start(wait)

    def _start(self, waits: bool) -> None:
        self._commits: dict[Any, Commit] = {}
        self._take_nothing_ahead()
        forks.watch(self)
        self._connector.start()
        if waits:
            try:
                self._connector.session(self._wait_timeout_s)
            except BaseException:
                self.close()
                raise

    def _open_cache(
        self,
        directory: str | None,
        cache_bytes: int,
        warms_up: bool,
        trace: str | None,
    ) -> None:
        if warms_up and directory is None:
            raise ValueError("warm_up needs a cache that lasts: give cache, too")
        cache = open_cache(directory, self._storage, cache_bytes, self._changes_after)
        self.cache = traced(cache, trace)
        self.position = Position(self.cache)
        self._warm_up: WarmUp | None = None
        if warms_up:
            self._warm_up = WarmUp(self._prefetch_current, self.cache.__len__)

    # Connection

    @property
    def current_session(self) -> Session | None:
        """The session now, if there is one."""
        return self._connector.current

    def identity(self) -> tuple[bytes, int]:
        """Database id and epoch, as of the last session; waits for the first one."""
        if self._connector.identity is None:
            self._connector.session(self._wait_timeout_s)
        assert self._connector.identity is not None
        return self._connector.identity

    def is_connected(self) -> bool:
        """Whether there is a session now."""
        return self._connector.current is not None

    def new_addr(self, addr: Any) -> None:
        """Connect to ``addr`` (as for the constructor) from now on."""
        self._connector.new_addresses(addresses_of(addr))

    def call(self, method: str, *args: Any) -> Any:
        """A call that may be repeated: a lost connection is waited for and replaced.

        Raises ClientDisconnected if there is none within ``wait_timeout``.
        """
        try:
            return self._connector.session(self._wait_timeout_s).call(method, *args)
        except ChannelLost as error:
            return self._again(lambda session: session.call(method, *args), error)

    def converse(self, step: Callable[[Session], Any]) -> Any:
        """What ``step`` makes of a session; as ``call``, for more than one call."""
        try:
            return step(self._connector.session(self._wait_timeout_s))
        except ChannelLost as error:
            return self._again(step, error)

    def _again(self, step: Callable[[Session], Any], lost: ChannelLost) -> Any:
        deadline = time.monotonic() + self._wait_timeout_s
        for delay_s in delays():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            try:
                return step(self._connector.session(left_s))
            except ChannelLost as error:
                lost = error
            # A server that takes the session and drops its channels is not hurried.
            time.sleep(delay_s)
        raise ClientDisconnected(str(lost)) from lost

    def sync(self, force: bool = True) -> None:
        """With ``server_sync``: see everything committed before this call.

        Without a connection the snapshot stays what it is.
        """
        if self._server_sync:
            self.catch_up()

    def catch_up(self) -> None:
        """Apply what the server has committed until now, if it is there."""
        session = self._connector.current
        position = self.position.tid
        if session is None or position is None:
            return
        try:
            last_tid, changes = session.call("changes_since", position)
        except ChannelLost:
            return
        if changes is None:
            session.close("the server forgot the changes since our position")
            return
        self.position.catch_up(
            session, last_tid, [Change(*change) for change in changes]
        )

    def _changes_after(self, position: bytes) -> list[Change] | None:
        """For the cache, when other processes have brought it less far than we are."""
        session = self._connector.current
        if session is None:
            raise ClientDisconnected("there is no session now")
        _last_tid, changes = session.call("changes_since", position)
        return None if changes is None else [Change(*change) for change in changes]

    def ping(self) -> None:
        """A round trip to the server and back."""
        self.call("ping")

    def server_status(self) -> dict[str, Any]:
        """What ``zeolith status`` shows."""
        status: dict[str, Any] = self.call("status")
        return status

    def cache_stats(self) -> dict[str, Any]:
        """How the cache does: hits, misses, sizes; see docs/reference.md."""
        return cache_stats(self.cache, self.read_ahead)

    def connection_info(self) -> dict[str, Any] | None:
        """How the last connection came about; None before the first one."""
        arrival = self._connector.arrival
        return None if arrival is None else arrival.describe()

    def close(self) -> None:
        """End the connection; what was begun and not finished is aborted."""
        self._is_closed = True
        if self.read_ahead is not None:
            self.read_ahead.close()
        # First, for this wakes the threads that commit: a channel is used by its owner
        # alone. The server aborts what it loses sight of.
        self._connector.close()
        for commit in tuple(self._commits.values()):
            if commit.phase in (Phase.BEGUN, Phase.VOTED):
                commit.abort()
            # Whatever became of the others, only their threads know.
        if self.blobs is not None:
            self.blobs.close()
        if self._warm_up is not None:
            self._warm_up.close()
        self.cache.close()
        forks.forget(self)

    def _welcome(self, session: Session) -> None:
        provide(self, session.welcome["interfaces"], has_blobs=self.blobs is not None)
        path = self.cache.path
        if self._warm_up is not None and path is not None:
            self._warm_up.session_began(path.with_suffix(".hot"))

    def forget_parent(self) -> None:
        """In a forked child; see forks."""
        if self._warm_up is not None:
            self._warm_up.forget_parent()
        self.position.forget()
        self._commits.clear()
        if self.read_ahead is not None:
            self.read_ahead.forget()
        self._take_nothing_ahead()
        self._connector.forget()

    def _take_nothing_ahead(self) -> None:
        """At the beginning, and in a forked child, which must not use its parent's."""
        # The session that gave the oids, those not used yet, how many were asked for.
        self._oids: tuple[Session | None, list[bytes], int] = (None, [], 0)
        self._oids_lock = threading.Lock()
        self._current_records = iteration.CurrentRecords(self.call)

    # What it is

    def getName(self) -> str:
        """The name given, or the addresses."""
        return self.__name__

    def sortKey(self) -> str:
        """The same for all storages of the same database, in every process."""
        welcome = self._connector.session(self._wait_timeout_s).welcome
        return f"zeolith:{welcome['database_id'].hex()}:{self._storage}"

    def isReadOnly(self) -> bool:
        """Whether writes are refused now; a fallback may end."""
        session = self._connector.current
        return self._is_read_only or (session is not None and session.is_read_only)

    def supportsUndo(self) -> bool:
        """Whether the server's storage can undo, and this client may."""
        session = self._connector.session(self._wait_timeout_s)
        return bool(session.welcome["supports_undo"]) and session.may_undo

    def __len__(self) -> int:
        return int(self.call("info")[1])

    def __bool__(self) -> bool:
        # Or the truth of a storage would ask the server for its length.
        return True

    def getSize(self) -> int:
        """The size of the database in bytes."""
        return int(self.call("info")[0])

    def registerDB(self, wrapper: Any) -> None:
        """Tell ``wrapper`` of changes from now on."""
        super().registerDB(wrapper)
        is_between = is_wrapper(wrapper)
        self.position.register(WrapperListener(wrapper) if is_between else wrapper)
        # ZODB.DB looks for the root next, which somebody else may just have made.
        self.catch_up()

    def lastTransaction(self) -> bytes:
        """The last transaction that this process has been told of completely."""
        self._connector.wake()
        tid = self.position.tid
        if tid is None:
            self._connector.session(self._wait_timeout_s)
            tid = self.position.tid
        return tid or Z64

    # Reading

    def loadBefore(
        self, oid: bytes, tid: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """``(data, tid, end)`` of the last revision before ``tid``, or None."""
        found = self.cache.load(oid, tid)
        if found is not None:
            if self._warm_up is not None:
                self._warm_up.heat.note(oid)
            return found
        ahead = self.read_ahead
        if ahead is not None:
            found = ahead.load(oid, tid)
            if found is not None:
                return found
        history = self.cache.history
        data, start, end, as_of = self._load(oid, tid)
        if data is None:
            return None
        self.cache.store(oid, start, end, data, as_of, history)
        if ahead is not None:
            ahead.loaded(oid, data)
        return data, start, end

    def _load(self, oid: bytes, tid: bytes) -> Any:
        try:
            return self._connector.session(self._wait_timeout_s).load(oid, tid)
        except ChannelLost as error:
            return self._again(lambda session: session.load(oid, tid), error)

    def load(self, oid: bytes, version: str = "") -> tuple[bytes, bytes]:
        """The current record and its tid."""
        found = self.loadBefore(oid, MAX_TID)
        if found is None:
            raise POSKeyError(oid)
        return found[:2]

    def load_many(
        self, oids: Iterable[bytes], before: bytes
    ) -> dict[bytes, loading.Found]:
        """``loadBefore`` for many oids, without waiting for each answer.

        What is not there is not in the result.
        """
        loaded: dict[bytes, loading.Found] = {}
        self._load_many(oids, before, loaded.__setitem__)
        return loaded

    def prefetch(self, oids: Iterable[bytes], tid: bytes) -> None:
        """Have the revisions of ``oids`` in the cache."""
        self._load_many(oids, tid, lambda _oid, _found: None)

    def _prefetch_current(self, oids: Iterable[bytes]) -> None:
        self.prefetch(oids, following(self.lastTransaction()))

    def _load_many(
        self, oids: Iterable[bytes], before: bytes, take: Callable[..., object]
    ) -> None:
        loading.load_many(self.converse, self.cache, oids, before, self.limits, take)

    def loadSerial(self, oid: bytes, serial: bytes) -> bytes:
        """The record that transaction ``serial`` wrote."""
        data: bytes = self.call("load_serial", oid, serial)
        return data

    def getTid(self, oid: bytes) -> bytes:
        """The tid of the current record."""
        tid: bytes = self.call("get_tid", oid)
        return tid

    def new_oid(self) -> bytes:
        """An oid that was never given out."""
        if self.isReadOnly():
            raise ReadOnlyError("the storage is read-only")
        session = self._connector.session(self._wait_timeout_s)
        with self._oids_lock:
            source, oids, asked = self._oids
            if source is session and oids:
                return oids.pop()
        count = min(2 * asked, NEW_OIDS_MAX) if source is session else NEW_OIDS
        # Not under the lock: two threads that find nothing both ask.
        oids = list(reversed(self.call("new_oids", count)))
        oid: bytes = oids.pop()
        with self._oids_lock:
            self._oids = (session, oids, count)
        return oid

    # Committing

    def tpc_begin(
        self, transaction: Any, tid: bytes | None = None, status: str = " "
    ) -> None:
        """Begin; nothing is sent before the vote."""
        session = self._connector.current
        if self._is_read_only or (session is not None and session.is_read_only):
            raise ReadOnlyError("the storage is read-only")
        if transaction in self._commits:
            raise StorageTransactionError("Duplicate tpc_begin for one transaction")
        if session is None:
            session = self._connector.session(self._wait_timeout_s)
        self._commits[transaction] = Commit(self, session, transaction, tid, status)

    def store(
        self,
        oid: bytes,
        serial: bytes | None,
        data: bytes,
        version: str,
        transaction: Any,
    ) -> None:
        """Write a record that was read as of ``serial`` (None: it is new)."""
        assert not version, "versions are not supported"
        self._begun(transaction).stores.store(oid, serial or Z64, data)

    def checkCurrentSerialInTransaction(
        self, oid: bytes, serial: bytes, transaction: Any
    ) -> None:
        """The transaction depends on ``oid`` not having changed since ``serial``."""
        self._begun(transaction).stores.check(oid, serial)

    def restore(
        self,
        oid: bytes,
        serial: bytes,
        data: bytes | None,
        version: str,
        prev_txn: bytes | None,
        transaction: Any,
    ) -> None:
        """Write a record of transaction ``serial`` as it is in another database.

        ``data`` is None where the object is gone; ``prev_txn`` is the transaction
        whose data these are, a hint. The transaction must have been begun with
        ``serial`` as its tid (IStorageRestoreable).
        """
        assert not version, "versions are not supported"
        self._begun(transaction).stores.restore(oid, serial, data, prev_txn)

    def deleteObject(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        """Remove an object that nothing refers to; the vote may raise ConflictError."""
        self._begun(transaction).stores.delete(oid, serial)

    def tpc_vote(self, transaction: Any) -> list[bytes]:
        """Everything is checked and will be kept; returns resolved oids.

        What nobody else takes part in is committed at once (client.participants).
        """
        commit = self._begun(transaction)
        if is_alone(self, transaction):
            return commit.vote_and_finish()
        return commit.vote()

    def tpc_finish(
        self, transaction: Any, func: Callable[[bytes], Any] = lambda tid: None
    ) -> bytes:
        """Commit; ``func(tid)`` is called before anybody here sees the transaction."""
        return self._commit_of(transaction).finish(func)

    def tpc_abort(self, transaction: Any) -> None:
        """Forget the transaction; nothing, if it is none of ours."""
        commit = self._commits.get(transaction)
        if commit is not None:
            commit.abort()

    def tpc_transaction(self) -> Any:
        """Any transaction between begin and end; there may be several."""
        return next(iter(self._commits), None)

    def for_relay(self) -> Upstream:
        """For a server that serves this storage to others, before anything else.

        From then on no record and no extension is unpickled here.
        """
        self.is_relayed = True
        # Here many clients are mixed up; they read ahead themselves.
        self.read_ahead = None
        return Upstream(self)

    def commit_to_vote(self, transaction: Any) -> Commit:
        """For a relay: the commit of a transaction that has not voted yet."""
        return self._begun(transaction)

    def forget_commit(self, commit: Commit) -> None:
        """``commit`` has ended."""
        if self._commits.get(commit.transaction) is commit:
            self._commits.pop(commit.transaction, None)

    def _commit_of(self, transaction: Any) -> Commit:
        commit = self._commits.get(transaction)
        if commit is None:
            raise StorageTransactionError(self, transaction)
        return commit

    def _begun(self, transaction: Any) -> Commit:
        commit = self._commits.get(transaction)
        if commit is None:
            # It could not begin on one that only reads, and that is why.
            if self.isReadOnly():
                raise ReadOnlyError("the storage is read-only")
            raise StorageTransactionError(self, transaction)
        if commit.phase is not Phase.BEGUN:
            raise StorageTransactionError("the transaction has voted")
        return commit

    # Packing

    def pack(
        self,
        pack_time: float | None = None,
        referencesf: Any = None,
        gc: bool | None = None,
        *,
        wait: bool = True,
        days: float = 0,
    ) -> None:
        """Pack to ``pack_time`` (seconds since the epoch; now), less ``days``.

        The server finds references itself; ``referencesf`` is not needed. ``gc`` says
        whether garbage is collected; None: as the server's storage is configured.
        Without ``wait`` an error is only logged.
        """
        moment = time.time() if pack_time is None else pack_time
        session = self._connector.session(self._wait_timeout_s)
        pack = packing.pack if wait else packing.begin_pack
        pack(session, moment - days * 86400, gc)

    def pack_progress(self) -> dict[str, Any] | None:
        """How far the pack is that is under way; None if there is none."""
        progress: dict[str, Any] | None = self.call("pack_progress")
        return progress

    def pack_cancel(self) -> bool:
        """Give up the pack that is under way; whether there was one to give up."""
        return bool(self.call("pack_cancel"))

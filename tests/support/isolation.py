"""Random transactions of several clients, step by step, against what is promised.

One thread, the test's, decides every step from a seeded random generator: which hand
begins, reads, writes, votes, finishes, gives up; when a disk syncs slowly, a client
hears late, loses its connection, is timed out, undoes or packs. After each step it
waits until everything has happened that must (``_settle``), so a seed repeats its run.
`History` says what each read must give and how each vote must end; whatever differs is
an `Anomaly`.

Who waits for whom is promised too: ``claims`` are in the order of arrival, a vote must
wait while an earlier one conflicts with it, and must not wait otherwise.
"""

import random
import sys
from base64 import encodebytes
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import transaction
from BTrees.Length import Length
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError, ReadConflictError, UndoError
from ZODB.TimeStamp import TimeStamp

from zeolith.client.errors import ClientDisconnected
from zeolith.protocol.errors import TransactionTimeout
from zeolith.storage.disk import Disk
from zeolith.storage.tids import tid_at

from .gates import Gate
from .hands import (
    AtOnce,
    Cell,
    Hand,
    RawHand,
    Tally,
    TellingStorage,
    ZodbHand,
    value_in,
)
from .history import Committed, History, Refused, Revision
from .inprocess import HeldStream, InProcessServer, serving
from .waiting import wait_until

WAIT_S = 30
TIMEOUT_S = 0.002
# Cells, counters that the server merges, and such that only the client can.
KINDS = {"cell": Cell, "length": Length, "tally": Tally}
OBJECTS_OF_A_KIND = 4


class Anomaly(AssertionError):
    """Something that is not promised."""


class Phase(Enum):
    """Where the transaction of a hand stands, as far as the test has heard."""

    IDLE = "idle"
    BEGUN = "begun"
    VOTING = "voting"
    VOTED = "voted"
    FINISHING = "finishing"
    ABORTING = "aborting"


class Actor:
    """A hand, and what the model knows of its transaction."""

    def __init__(self, hand: Hand, client: "Client"):
        self.hand: Any = hand
        self.client = client
        self.phase = Phase.IDLE
        self.snapshot = bytes(8)
        self.clear()

    def clear(self) -> None:
        self.phase = Phase.IDLE
        self.read: dict[bytes, Revision] = {}
        self.written: dict[bytes, Any] = {}
        self.depends_on: dict[bytes, Revision] = {}
        self.undoes: bytes | None = None
        # What it leaves if it is committed; known since the vote.
        self.values: dict[bytes, Any] = {}
        self.pending: Future[Any] | None = None
        # Whether its connection broke since it began; whether the server gave it up.
        self.is_cut = False
        self.is_timed_out = False
        # The last tid when its finish was sent.
        self.finishes_after = bytes(8)

    def conflicts_with(self, other: "Actor") -> bool:
        """Whether one of them must wait for the other."""
        if self.undoes or other.undoes:
            return True
        mine, theirs = set(self.written), set(other.written)
        return bool(
            mine & theirs
            or mine & set(other.depends_on)
            or theirs & set(self.depends_on)
        )

    def __repr__(self) -> str:
        return f"{self.hand.name}:{self.phase.value}"


class Client:
    """A storage, and whether it hears of changes late."""

    def __init__(self, storage: TellingStorage):
        self.storage = storage
        self.held: HeldStream | None = None


class Simulation:
    """One run. ``votes_side_by_side``: those that have nothing in common do."""

    def __init__(self, server: InProcessServer, seed: int, *, votes_side_by_side: bool):
        self.random = random.Random(seed)
        self.server = server
        self._votes_side_by_side = votes_side_by_side
        # Before a sync, and between the disk and the server's loop.
        self.sync, self.told = Gate(), Gate()
        self._shut = self.sync
        self.is_sync_slow = False
        self.actors: list[Actor] = []
        self.clients: list[Client] = []
        # In the order of arrival: those that vote, have voted or finish.
        self.claims: list[Actor] = []
        self.packing: Future[Any] | None = None
        self.packs_until = bytes(8)
        self.is_undone_meanwhile = False
        # How often what has happened; a run in which little does proves little.
        self.seen: Counter[str] = Counter()
        self.log: list[str] = []
        self._values = iter(range(1, sys.maxsize))
        self.oids: list[bytes] = []
        self.history: History

    def open(self, stack: ExitStack) -> None:
        """Make the objects, and everybody who uses them."""
        self._count_finishes()
        database: Any = self.server.database
        database.append = self.told.after(database.append)
        database.finish = self.told.after(database.finish)
        # It is never cut off: how a pack ends must be known.
        self._packing_storage = TellingStorage(self.server.address)
        self._packer = ThreadPoolExecutor(1, "packer")
        stack.callback(self._packing_storage.close)
        stack.callback(self._packer.shutdown)
        for number in range(4):
            storage = TellingStorage(self.server.address)
            stack.callback(storage.close)
            client = Client(storage)
            self.clients.append(client)
            db = DB(storage) if number < 2 else None
            if db is not None:
                stack.callback(db.close)
            if number == 0:
                assert db is not None
                self._make_objects(db)
            for letter in "ab" if db else "abc":
                name = f"{number}{letter}"
                hand: Hand = (
                    ZodbHand(name, storage, db) if db else RawHand(name, storage)
                )
                stack.callback(hand.close)
                self.actors.append(Actor(hand, client))
        self._settle()

    def _make_objects(self, db: DB) -> None:
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        for kind, of_class in KINDS.items():
            for number in range(OBJECTS_OF_A_KIND):
                connection.root()[f"{kind} {number}"] = of_class()
        manager.commit()
        names = sorted(connection.root())
        self.oids = [connection.root()[name]._p_oid for name in names]
        counters = {
            oid
            for name, oid in zip(names, self.oids, strict=True)
            if "cell" not in name
        }
        connection.close()
        commits = committed_by(self.clients[0].storage.iterator())
        self.history = History(commits, counters)

    # Steps

    def run(self, steps: int) -> None:
        """Do so many steps, end what was begun, and compare everybody's view."""
        ways: dict[Callable[[], None], int] = {
            self._work: 1000,
            self._hold_or_release: 25,
            self._sync_slowly_or_not: 25,
            self._cut: 8,
            self._time_out: 8,
            self._undo: 40,
            self._pack: 1,
        }
        for _ in range(steps):
            (step,) = self.random.choices(list(ways), list(ways.values()))
            step()
            self._settle()
        self._end_everything()
        self._compare_views()

    def _work(self) -> None:
        """Somebody goes on with his transaction, or begins one."""
        actor = self.random.choice(self.actors)
        if actor.phase is Phase.IDLE:
            self._begin(actor)
        elif actor.phase is Phase.BEGUN:
            self._go_on(actor)
        elif actor.phase is Phase.VOTED:
            # Some are slow: the others go on meanwhile.
            if self.random.random() < 0.5:
                self._finish(actor)
            elif self.random.random() < 0.1:
                self._abort(actor)

    def _go_on(self, actor: Actor) -> None:
        oid = self.random.choice(self.oids)
        chance = self.random.random()
        if chance < 0.25:
            self._read(actor, oid)
        elif chance < 0.6 and not actor.undoes and oid not in actor.depends_on:
            self._write(actor, oid)
        elif chance < 0.7 and not actor.undoes and oid not in actor.written:
            self._depend(actor, oid)
        elif chance < 0.73:
            self._abort(actor)
        elif self._may_commit_at_once(actor) and self.random.random() < 0.3:
            self._commit_at_once(actor)
        elif actor.written or actor.undoes:
            self._vote(actor)

    def _begin(self, actor: Actor) -> None:
        was = actor.snapshot
        actor.snapshot = actor.hand.begin()
        actor.phase = Phase.BEGUN
        self._note(actor, "begins at", actor.snapshot)
        last_tid = self.history.last_tid
        self._expect(was <= actor.snapshot <= last_tid, actor, "sees a wrong moment")
        if actor.client.held is None:
            self._expect(actor.snapshot == last_tid, actor, "heard of nothing")

    def _read(self, actor: Actor, oid: bytes) -> Revision:
        if oid in actor.written:
            return actor.read[oid]
        position = actor.client.storage.position.tid_now or bytes(8)
        found, end = actor.hand.read(oid)
        self._note(actor, "reads", oid, found)
        expected = self.history.at(oid, actor.snapshot)
        self._expect(found == expected, actor, f"should see {expected}, sees {found}")
        if isinstance(actor.hand, RawHand):
            real_end = self.history.next_tid(oid, expected.tid)
            is_unknown = end is None and (real_end is None or real_end > position)
            # What is on the disk will be announced under that tid, whatever happens.
            is_on_disk = self.is_sync_slow and self._shut is self.told
            is_to_come = (end or b"") > self.history.last_tid and is_on_disk
            self._expect(
                end == real_end or is_unknown or (real_end is None and is_to_come),
                actor,
                f"is told that it ends at {end!r}, not {real_end!r}",
            )
            self._look_at_the_latest(actor, oid)
        actor.read[oid] = found
        return found

    def _look_at_the_latest(self, actor: Actor, oid: bytes) -> None:
        """Whoever does not name a moment must not see more than was announced."""
        storage = actor.client.storage
        position = storage.position.tid_now or bytes(8)
        data, tid = storage.load(oid)
        latest = Revision(tid, value_in(data))
        end = self.history.next_tid(oid, tid)
        self._expect(
            latest in self.history.revisions(oid) and (end is None or end > position),
            actor,
            f"loads {latest} as the latest",
        )

    def _write(self, actor: Actor, oid: bytes) -> None:
        found = self._read(actor, oid)
        value = next(self._values)
        if oid in self.history._counters:
            was = actor.written.get(oid, found.value)
            value = was + self.random.choice([-1, 1, 10, 1000])
        actor.hand.write(oid, found, value)
        actor.written[oid] = value
        self._note(actor, "writes", oid, value)

    def _depend(self, actor: Actor, oid: bytes) -> None:
        found = self._read(actor, oid)
        actor.hand.depend(oid, found)
        actor.depends_on[oid] = found
        self._note(actor, "depends on", oid, found)

    def _undo(self) -> None:
        """Somebody who is idle begins to undo one of the last transactions."""
        idle = [
            each
            for each in self.actors
            if each.phase is Phase.IDLE and isinstance(each.hand, RawHand)
        ]
        if not idle:
            return
        actor = self.random.choice(idle)
        self._begin(actor)
        latest = self.history.commits[2:][-8:]
        if latest:
            undone = self.random.choice(latest)
            actor.hand.undo(encodebytes(undone.tid).rstrip())
            actor.undoes = undone.tid
            self._note(actor, "undoes", undone.tid)

    def _vote(self, actor: Actor) -> None:
        self._note(actor, "votes")
        actor.phase = Phase.VOTING
        # Sent in a session that is not there any more, it never arrives.
        if not (actor.is_cut and isinstance(actor.hand, RawHand)):
            self.claims.append(actor)
        actor.pending = pending = actor.hand.vote()
        if actor in self.claims and self._in_the_way_of(actor):
            self.seen["votes that wait"] += 1
            in_line = sum(
                each.phase is Phase.VOTING and self._in_the_way_of(each) is not None
                for each in self.claims
            )
            committer = self.server.served.committer

            def has_come() -> bool:
                waiting = self.server.on_loop(lambda: len(committer.waiting))
                return pending.done() or waiting >= in_line

            wait_until(has_come, f"{actor} in the line", poll_interval_s=0.0005)

    def _may_commit_at_once(self, actor: Actor) -> bool:
        """Whether nothing can come between its vote and the end of its finish."""
        if not actor.written or actor.is_cut or self.is_sync_slow:
            return False
        return not any(self._conflict(each, actor) for each in self.claims)

    def _commit_at_once(self, actor: Actor) -> None:
        self._note(actor, "votes and finishes")
        actor.phase = Phase.VOTING
        actor.finishes_after = self.history.last_tid
        self.claims.append(actor)
        actor.pending = actor.hand.commit_at_once()

    def _finish(self, actor: Actor) -> None:
        self._note(actor, "finishes")
        actor.phase = Phase.FINISHING
        actor.finishes_after = self.history.last_tid
        arrived = self.finishes_arrived
        actor.pending = pending = actor.hand.finish()
        wait_until(
            lambda: pending.done() or self.finishes_arrived > arrived,
            f"the finish of {actor}",
            poll_interval_s=0.0005,
        )

    def _abort(self, actor: Actor) -> None:
        self._note(actor, "gives up")
        self.seen[f"given up when {actor.phase.value}"] += 1
        actor.phase = Phase.ABORTING
        actor.pending = actor.hand.abort()

    def _hold_or_release(self) -> None:
        """The changes for a client stay on the way, or come at last."""
        client = self.random.choice(self.clients)
        if client.held is None:
            client.held = HeldStream(self.server, client.storage).hold()
            self.log.append(f"client {self.clients.index(client)} hears nothing")
        else:
            self._release(client)

    def _release(self, client: Client) -> None:
        assert client.held is not None
        client.held.release()
        client.held = None
        self.log.append(f"client {self.clients.index(client)} hears again")

    def _sync_slowly_or_not(self) -> None:
        self.is_sync_slow = not self.is_sync_slow
        if self.is_sync_slow:
            self._shut = self.random.choice([self.sync, self.told])
        self.log.append(f"the disk syncs {'not' if self.is_sync_slow else 'again'}")
        (self._shut.shut if self.is_sync_slow else self._shut.open)()

    def _cut(self) -> None:
        """A client loses its connections, whatever it does."""
        client = self.random.choice(self.clients)
        session = client.storage.current_session
        if session is None:
            return
        self.log.append(f"client {self.clients.index(client)} is cut off")
        self.seen["cut"] += 1
        token = session.welcome["session"]

        def cut() -> None:
            ours = self.server.service.sessions[token]
            for peer in (*ours.channels, ours.stream):
                peer.cut_off()

        self.server.on_loop(cut)
        wait_until(
            lambda: token not in self.server.service.sessions, "the end of a session"
        )
        client.held = None
        for actor in self.actors:
            if actor.client is client and actor.phase is not Phase.IDLE:
                actor.is_cut = True
                self.seen[f"cut when {actor.phase.value}"] += 1
                if actor.phase is not Phase.FINISHING:
                    self._give_up_claim(actor)
        wait_until(
            lambda: client.storage.current_session not in (None, session),
            "a new session",
            poll_interval_s=0.001,
        )

    def _time_out(self) -> None:
        """The time is over for those whom others wait for, perhaps for all voted."""
        voted = [each for each in self.claims if each.phase is Phase.VOTED]
        blocking = [
            each
            for each in voted
            if any(
                self._in_the_way_of(other) and self._conflict(each, other)
                for other in self.claims
                if other.phase is Phase.VOTING
            )
        ]
        counters = self.server.served.counters
        # Who votes only now, because another one is timed out, has all the time.
        began_at = self.server.on_loop(self.server._loop.time)
        wait_until(
            lambda: self.server.on_loop(self.server._loop.time) > began_at + TIMEOUT_S,
            "time",
            poll_interval_s=TIMEOUT_S,
        )

        def tick() -> int:
            before = counters.timeouts
            self.server.served.committer.tick(self.server._loop.time(), TIMEOUT_S)
            return counters.timeouts - before

        count = self.server.on_loop(tick)
        self.log.append(f"{count} of {voted} are timed out; others wait for {blocking}")
        self._expect(count in (len(voted), len(blocking)), None, "other timeouts")
        self.seen["timeouts"] += count
        for actor in voted if count == len(voted) else blocking:
            actor.is_timed_out = True
            self._give_up_claim(actor)

    def _pack(self) -> None:
        """Pack as far as nobody looks back."""
        if self.packing is not None:
            return
        used = [each.snapshot for each in self.actors if each.phase is not Phase.IDLE]
        heard = [each.storage.position.tid_now or bytes(8) for each in self.clients]
        until = min([*used, *heard, self.history.last_tid])
        # Seconds are coarser than tids.
        time_s = TimeStamp(until).timeTime() - 1e-6
        self.packs_until = tid_at(time_s)
        self.is_undone_meanwhile = any(each.undoes for each in self.claims)
        self.log.append(f"pack until {self.packs_until.hex()}")
        self.packing = self._packer.submit(self._packing_storage.pack, time_s)

    # What must happen, and whether it was right

    def _settle(self) -> None:
        """Wait for everything that must happen now, and judge it."""
        while True:
            # What ends is judged before what waited for it.
            ending = [
                each
                for each in self.actors
                if each.phase is Phase.ABORTING
                or (each.phase is Phase.FINISHING and not self._is_held_up(each))
            ]
            voting = [each for each in self.actors if each.phase is Phase.VOTING]
            due = ending or [each for each in voting if not self._in_the_way_of(each)]
            if not due:
                break
            pending = [each.pending for each in due if each.pending]
            done, _late = wait(pending, WAIT_S, FIRST_COMPLETED)
            self._expect(done, due[0], f"waits without a cause; {self.claims}")
            self._judge_all(due)
        early = [each for each in voting if each.pending and each.pending.done()]
        for each in early:
            self._judge_vote(each)
        for each in self.actors:
            if each.phase is Phase.FINISHING and each.pending and each.pending.done():
                raise self._anomaly(each, "is told of a commit before it is on disk")
        self._settle_pack()
        for client in self.clients:
            if client.held is None:
                position = client.storage.position
                wait_until(
                    lambda position=position: (  # type: ignore[misc]
                        (position.tid_now or b"") >= self.history.last_tid
                    ),
                    f"all changes at client {self.clients.index(client)}",
                    poll_interval_s=0.0005,
                )

    def _is_held_up(self, actor: Actor) -> bool:
        """Whether the finish of ``actor`` waits for the disk."""
        return self.is_sync_slow and not actor.is_timed_out and actor in self.claims

    def _settle_pack(self) -> None:
        if self.packing is None:
            return
        if not self.claims and not self.is_sync_slow:
            wait([self.packing], WAIT_S)
        if self.packing.done():
            error = self.packing.exception()
            self.log.append(f"has packed: {error!r}")
            self._expect(
                error is None or self.is_undone_meanwhile, None, f"packs not: {error!r}"
            )
            self.seen["packs" if error is None else "packs that gave up"] += 1
            if error is None:
                self.history.pack(self.packs_until)
            self.packing = None

    def _judge_all(self, due: list[Actor]) -> None:
        finished = []
        for actor in due:
            assert actor.pending is not None
            if not actor.pending.done():
                continue
            if actor.phase is Phase.VOTING:
                self._judge_vote(actor)
            elif actor.phase is Phase.ABORTING:
                self._judge_abort(actor)
            else:
                finished.append(actor)
        if finished and len(finished) < sum(
            each.phase is Phase.FINISHING for each in due
        ):
            # Only together they can be put in order.
            wait([each.pending for each in due if each.pending], WAIT_S)
            self._judge_all(due)
            return
        for actor in sorted(finished, key=_tid_of):
            self._judge_finish(actor)

    def _judge_vote(self, actor: Actor) -> None:
        assert actor.pending is not None
        error = actor.pending.exception()
        self._note(actor, "has voted:", repr(error))
        causes = self._causes(actor)
        if error is None:
            in_the_way = self._in_the_way_of(actor)
            self._expect(not in_the_way, actor, f"voted in spite of {in_the_way}")
            self._expect(not causes, actor, f"was not refused: {causes}")
            actor.phase = Phase.VOTED
            actor.values = self._outcome(actor)
            self.is_undone_meanwhile |= bool(actor.undoes)
            self.seen["voted"] += 1
            result = actor.pending.result()
            if isinstance(result, AtOnce):
                self.seen["committed at once"] += 1
                if result.resolved is not None:
                    self._judge_resolved(actor, result.resolved)
                self._judge_committed(actor, result.tid)
            else:
                self._judge_resolved(actor, result)
            return
        is_known = isinstance(error, ConflictError | UndoError) and bool(causes)
        if isinstance(error, UndoError) and self.packing is not None:
            # The pack may have taken it away, and has not told yet.
            is_known = is_known or (actor.undoes or b"") <= self.packs_until
        is_lost = isinstance(error, ClientDisconnected) and actor.is_cut
        self._expect(is_known or is_lost, actor, f"is refused: {error!r}")
        if isinstance(error, ConflictError):
            expected = causes.get(error.oid or b"")
            self._expect(
                type(error) is expected, actor, f"{error!r}, causes are {causes}"
            )
        self.seen[type(error).__name__] += 1
        self._give_up_claim(actor)
        self._abort(actor)

    def _judge_resolved(self, actor: Actor, resolved: Any) -> None:
        """Both have changed it, and nothing is lost."""
        merged = {
            oid for oid in actor.written if actor.values[oid] != actor.written[oid]
        }
        self.seen["merged"] += len(merged)
        if isinstance(actor.hand, RawHand) and not actor.undoes:
            told = set(resolved)
            changed = {
                oid
                for oid in actor.written
                if self.history.has_changed(oid, actor.read[oid].tid)
            }
            self._expect(told == changed, actor, f"was told of {told}, not {changed}")

    def _causes(self, actor: Actor) -> dict[bytes, type[Exception]]:
        """What a vote now must be refused for."""
        causes: dict[bytes, type[Exception]] = {
            oid: ReadConflictError
            for oid, found in actor.depends_on.items()
            if self.history.has_changed(oid, found.tid)
        }
        for oid, value in actor.written.items():
            try:
                self.history.outcome(actor.read, {oid: value})
            except Refused:
                causes[oid] = ConflictError
        if actor.undoes:
            try:
                self.history.undone(actor.undoes)
            except Refused:
                causes[actor.undoes] = UndoError
        return causes

    def _outcome(self, actor: Actor) -> dict[bytes, Any]:
        if actor.undoes:
            return self.history.undone(actor.undoes)
        return self.history.outcome(actor.read, actor.written)

    def _judge_finish(self, actor: Actor) -> None:
        assert actor.pending is not None
        error = actor.pending.exception()
        self._note(actor, "has finished:", repr(error))
        if error is None:
            self._judge_committed(actor, actor.pending.result())
            return
        self._give_up_claim(actor)
        is_lost = isinstance(error, ClientDisconnected) and actor.is_cut
        is_late = isinstance(error, TransactionTimeout) and actor.is_timed_out
        self._expect(is_lost or is_late, actor, f"could not finish: {error!r}")
        self.seen[f"{type(error).__name__} in finish"] += 1
        self._abort(actor)

    def _judge_committed(self, actor: Actor, tid: bytes) -> None:
        self._give_up_claim(actor)
        self._expect(not actor.is_timed_out, actor, "was timed out and committed")
        self._expect(tid > actor.finishes_after, actor, "has an old tid")
        self.history.append(tid, actor.values)
        self.seen["undone" if actor.undoes else "committed"] += 1
        actor.clear()

    def _judge_abort(self, actor: Actor) -> None:
        assert actor.pending is not None
        actor.pending.result()
        self._give_up_claim(actor)
        actor.clear()

    def _in_the_way_of(self, actor: Actor) -> Actor | None:
        """Whom ``actor`` must wait for."""
        if actor not in self.claims:
            return None
        earlier = self.claims[: self.claims.index(actor)]
        return next((each for each in earlier if self._conflict(each, actor)), None)

    def _conflict(self, one: Actor, other: Actor) -> bool:
        return not self._votes_side_by_side or one.conflicts_with(other)

    def _give_up_claim(self, actor: Actor) -> None:
        if actor in self.claims:
            self.claims.remove(actor)

    # The end

    def _end_everything(self) -> None:
        if self.is_sync_slow:
            self._sync_slowly_or_not()
        self._settle()
        for client in self.clients:
            if client.held is not None:
                self._release(client)
        while busy := [each for each in self.actors if each.phase is not Phase.IDLE]:
            voted = [each for each in busy if each.phase is Phase.VOTED]
            if voted:
                self._finish(voted[0])
            else:
                self._abort(next(each for each in busy if each.phase is Phase.BEGUN))
            self._settle()

    def _compare_views(self) -> None:
        """Everybody sees the same, which is the last of everything."""
        for actor in self.actors:
            self._begin(actor)
            for oid in self.oids:
                self._read(actor, oid)
            self._abort(actor)
        self._settle()

    def compare_file(self, path: Path) -> None:
        """The file says, to plain ZODB, what the model says."""
        storage = FileStorage(str(path), read_only=True)
        try:
            found = committed_by(storage.iterator())
        finally:
            storage.close()
        found = self.history.without_what_a_pack_may_keep(found)
        for mine, its in zip(self.history.commits, found, strict=False):
            self._expect(mine == its, None, f"the file has {its}, not {mine}")
        self._expect(len(found) == len(self.history.commits), None, "another length")

    def end(self) -> None:
        """Nobody waits for anything any more, whatever has happened."""
        for gate in (self.sync, self.told):
            gate.open()
        for client in self.clients:
            client.storage.close()

    # For all

    def _count_finishes(self) -> None:
        self.finishes_arrived = 0
        service = self.server.service
        answer = service.request

        def request(peer: Any, asked: Any) -> None:
            answer(peer, asked)
            if asked.method == "finish":
                self.finishes_arrived += 1

        service.request = request  # type: ignore[assignment,method-assign]

    def _note(self, actor: Actor, *what: Any) -> None:
        words = (each.hex() if isinstance(each, bytes) else str(each) for each in what)
        self.log.append(f"{actor} {' '.join(words)}")

    def _expect(self, is_right: Any, actor: Actor | None, what: str) -> None:
        if not is_right:
            raise self._anomaly(actor, what)

    def _anomaly(self, actor: Actor | None, what: str) -> Anomaly:
        return Anomaly("\n".join([*self.log[-60:], f"{actor or 'the server'} {what}"]))


def _tid_of(actor: Actor) -> bytes:
    assert actor.pending is not None
    if actor.pending.exception() is not None:
        return b"\xff" * 8
    tid: bytes = actor.pending.result()
    return tid


def committed_by(transactions: Any) -> list[Committed]:
    """What an iterator of a storage brings, as the model has it."""
    return [
        Committed(each.tid, {record.oid: value_in(record.data) for record in each})
        for each in transactions
    ]


@contextmanager
def syncing_through(gate: Gate, monkeypatch: Any) -> Iterator[None]:
    """Every sync of a Data.fs goes through ``gate``."""
    module = sys.modules[FileStorage.__module__]
    with monkeypatch.context() as patch:
        patch.setattr(module, "fsync", gate.before(module.fsync))
        patch.setattr(Disk, "sync", gate.before(Disk.sync))
        yield


def simulate(
    path: Path, seed: int, steps: int, monkeypatch: Any, *, votes_side_by_side: bool
) -> Counter[str]:
    """One run from beginning to end; returns how often what has happened."""
    with serving(path) as server:
        simulation = Simulation(server, seed, votes_side_by_side=votes_side_by_side)
        with ExitStack() as stack:
            stack.enter_context(syncing_through(simulation.sync, monkeypatch))
            simulation.open(stack)
            # First of all: whoever is to end may wait for the disk, or for another.
            stack.callback(simulation.end)
            simulation.run(steps)
    simulation.compare_file(path)
    return simulation.seen

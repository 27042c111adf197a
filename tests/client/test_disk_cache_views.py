"""Several processes' views of one cache never show what is not in their history.

Hypothesis chooses what happens, and in the middle of what. Each rule that makes the
cache right can be switched off: the same machine then finds what is wrong.
"""

import inspect
import random
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import lmdb
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from zeolith.client.cache_backlog import Backlog
from zeolith.client.cache_file import CacheFile
from zeolith.client.cache_place import Presence
from zeolith.client.disk_cache import DiskCache
from zeolith.client.tids import following

from ..support.cache_views import OIDS, View, World, by_hand

VIEWS = 3
# How far into a step another one may happen, in lines.
LINES = 120
LOAD_LINES = 40
# Bytes of a revision that is stored: of its checksum, its tid and its data.
PLACES = (0, 15, 16, -1)
# So many are enough to find out that a rule is switched off.
EXAMPLES = 3000


class Step(NamedTuple):
    """Something that happens to a view, for which numbers may be chosen."""

    name: str
    view: int
    oid: bytes
    number: int


def _commit(world: World, _view: View, oid: bytes, number: int) -> None:
    world.commit(1 if number == 3 else 0, {oid, *OIDS[: number % 2]})


def _hear_and_write(world: World, view: View, oid: bytes, number: int) -> None:
    """Another one's change comes and is in the file, then one more comes."""
    world.flush(view)
    world.commit(view.server or 0, [oid])
    world.advance(view, number + 1)


def _go_back(world: World, view: View, _oid: bytes, number: int) -> None:
    """The server is restored, has new commits, and the view is there again."""
    server = view.server or 0
    world.restore(server, number % 3 + 1)
    world.commit(server, [OIDS[number - 1]])
    world.connect(view, server)


def _bring_all(world: World, _view: View, _oid: bytes, _number: int) -> None:
    for view in world.views:
        world.advance(view, 100)
        world.flush(view)


def _list(world: World, view: View, _oid: bytes, number: int) -> None:
    """The changes are too many to be told."""
    world.connect(view, view.server or 0)
    world.begin_verification(view)
    world.commit(view.server or 0, OIDS[: number % 3])


# Some stand here more than once, for they happen more often.
STEPS: dict[str, Callable[[World, View, bytes, int], object]] = {
    "commit": _commit,
    "commit again": _commit,
    "hear and write": _hear_and_write,
    "go back": _go_back,
    "bring all": _bring_all,
    "restore": lambda world, view, oid, n: world.restore(int(n == 3), n % 3 + 1),
    "connect": lambda world, view, oid, n: world.connect(view, n % 2),
    "reconnect": lambda world, view, oid, n: world.connect(view, 0),
    "disconnect": lambda world, view, oid, n: world.disconnect(view),
    "advance": lambda world, view, oid, n: world.advance(view, n // 2 + 1),
    "catch up": lambda world, view, oid, n: world.advance(view, 100),
    "ask": lambda world, view, oid, n: world.ask(view, oid, n - 1),
    "deliver": lambda world, view, oid, n: world.deliver(view, n),
    "load": lambda world, view, oid, n: world.load(view, oid),
    "load again": lambda world, view, oid, n: world.load(view, oid),
    "write": lambda world, view, oid, n: world.write(view, [oid]),
    "flush": lambda world, view, oid, n: world.flush(view),
    "flush again": lambda world, view, oid, n: world.flush(view),
    "fail to write": lambda world, view, oid, n: world.fail_to_write(view),
    "damage": lambda world, view, oid, n: world.damage(view, oid, PLACES[n]),
    "reboot": lambda world, view, oid, n: world.reboot(),
    "forget": lambda world, view, oid, n: world.forget(view, oid),
    "evict": lambda world, view, oid, n: world.evict(view, n + 1),
    "forget all": lambda world, view, oid, n: world.forget_all(view),
    "go aside": lambda world, view, oid, n: world.go_aside(view),
    "list": _list,
    "verify": lambda world, view, oid, n: world.end_verification(view),
    "end": lambda world, view, oid, n: world.reopen(view, is_killed=n % 2 == 0),
    "fork": lambda world, view, oid, n: world.fork(view, world.views[n % VIEWS]),
}


def step_of(code: int) -> Step:
    """One number stands for a step: to choose many would take most of the time."""
    code, view = divmod(code, 2 * VIEWS)
    code, oid = divmod(code, len(OIDS))
    name, number = divmod(code, 4)
    return Step(_NAMES[name], view, OIDS[oid], number)


_NAMES = list(STEPS)
STEP_CODES = len(_NAMES) * 2 * VIEWS * len(OIDS) * 4
steps = st.integers(0, STEP_CODES - 1).map(step_of)
# In the middle of another one: half of them happen to the same view.
views = st.integers(0, VIEWS - 1)
others = st.lists(steps, min_size=1, max_size=3)


def do(world: World, step: Step, view: int) -> None:
    at = step.view if step.view < VIEWS else view
    STEPS[step.name](world, world.views[at], step.oid, step.number)


class Views(RuleBasedStateMachine):
    """Steps in any order, and in the middle of another."""

    def __init__(self) -> None:
        super().__init__()
        shm = Path("/dev/shm")
        self._directory = tempfile.mkdtemp(dir=shm if shm.is_dir() else None)
        self.world = World(Path(self._directory), VIEWS)

    @initialize()
    def connect_all(self) -> None:
        for view in self.world.views:
            self.world.connect(view, 0)

    @rule(steps=others, view=views)
    def some_steps(self, steps: list[Step], view: int) -> None:
        self._do_all(steps, view)

    @rule(step=steps, view=views, line=st.integers(0, LINES), others=others)
    def a_step_and_others_in_the_middle(
        self, step: Step, view: int, line: int, others: list[Step]
    ) -> None:
        at = self.world.views[view]
        with self.world.amid(at, line, lambda: self._do_all(others, view)):
            do(self.world, step, view)

    @rule(
        view=views,
        oid=st.sampled_from(OIDS),
        line=st.integers(0, LOAD_LINES),
        others=others,
    )
    def a_load_and_others_in_the_middle(
        self, view: int, oid: bytes, line: int, others: list[Step]
    ) -> None:
        world = self.world
        steps = [partial(do, world, step, view) for step in others]
        world.load_amid(world.views[view], oid, line, steps)

    def _do_all(self, steps: list[Step], view: int) -> None:
        for step in steps:
            do(self.world, step, view)

    @invariant()
    def nobody_reads_what_is_wrong(self) -> None:
        for view in self.world.views:
            self.world.check_all(view)

    def teardown(self) -> None:
        self.world.close()
        shutil.rmtree(self._directory)


@pytest.fixture(autouse=True)
def writers_by_hand() -> Iterator[pytest.MonkeyPatch]:
    with by_hand() as patch:
        yield patch


def run(examples: int) -> None:
    run_state_machine_as_test(
        Views,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            derandomize=True,
            database=None,
        ),
    )


def wander(seed: int) -> None:
    """The same machine, fed by chance alone: it gets about ten times as fast.

    What it finds it cannot make small, as hypothesis does.
    """
    chance = random.Random(seed)
    machine = Views()
    try:
        machine.connect_all()
        for _ in range(60):
            step, *others = (
                step_of(chance.randrange(STEP_CODES))
                for _ in range(chance.randrange(2, 5))
            )
            view = chance.randrange(VIEWS)
            kind = chance.randrange(3)
            if kind == 0:
                machine.some_steps([step], view)
            elif kind == 1:
                line = chance.randrange(LINES)
                machine.a_step_and_others_in_the_middle(step, view, line, others)
            else:
                oid, line = chance.choice(OIDS), chance.randrange(LOAD_LINES)
                machine.a_load_and_others_in_the_middle(view, oid, line, others)
            machine.nobody_reads_what_is_wrong()
    finally:
        machine.teardown()


def wander_often(first: int, count: int) -> None:
    for seed in range(first, first + count):
        wander(seed)


class Break(NamedTuple):
    """A rule that is switched off: what stands in the code, and what in its place."""

    owner: type
    method: str
    old: str
    new: str


BREAKS: dict[str, Break | tuple[Break, ...]] = {
    "who is of another history reads": Break(
        CacheFile,
        "_is_on_the_way",
        "return state.through == base or state.through in tids",
        "return True",
    ),
    "who is behind reads a file that has gone another way": Break(
        CacheFile, "_is_on_the_way", "return self._has_passed(txn, at)", "return True"
    ),
    "a state is trusted wherever we go": Break(
        Backlog, "add_change", 'self.trusted = b""', "pass"
    ),
    "the changes are read after the file": Break(
        DiskCache,
        "load",
        "changed.get(oid)",
        "backlog.changed.get(oid)",
    ),
    "what is open is open for ever": Break(
        DiskCache, "load", "if before <= limit:", "if before <= limit or end is None:"
    ),
    "changes of ours are not looked at": Break(
        DiskCache, "load", "first_after(tids, tid)", "None"
    ),
    "the age of an answer is not looked at": Break(
        CacheFile, "_keep", "if as_of < state.through:", "if False:"
    ),
    "what is not remembered has not changed": Break(
        CacheFile, "_keep", "as_of < state.since or", ""
    ),
    "an answer from before all was forgotten is kept": Break(
        DiskCache, "store", "history is None or history == self.history", "True"
    ),
    "an answer that is older than what is written is read": Break(
        Backlog, "add_revision", "or revision.as_of >= self.base", "or True"
    ),
    "a change ends nothing": Break(
        CacheFile, "_apply", "txn.delete(oid, db=self._current)", "pass"
    ),
    "what is taken out is taken from who reads": Break(
        Backlog, "written", "self.changed = rest.changed", "self.changed.clear()"
    ),
    "the file moves over a gap": Break(
        DiskCache,
        "_extend",
        "changes=(*missing, *batch.changes)",
        "changes=(*missing[1:], *batch.changes)",
    ),
    "who goes another way writes": Break(
        CacheFile,
        "extend",
        "if not self._is_on_the_way(txn, state, batch.base, tids):",
        "if False:",
    ),
    "what is ahead of us is written": Break(
        Backlog, "batch", "if each.as_of <= upto", ""
    ),
    "what is ahead of us outlives its session": Break(
        DiskCache, "_forget_what_is_ahead", "self._backlog.drop_ahead()", "pass"
    ),
    "what ended after the cut stays": Break(
        CacheFile,
        "_drop_ended_after",
        "self._drop_if(txn, self._ended, lambda key, _value: key[8:] > tid)",
        "pass",
    ),
    "changes after the cut stay": Break(
        CacheFile,
        "_drop_ended_after",
        "self._drop_if(txn, self._changes, lambda key, _value: key > tid)",
        "pass",
    ),
    "what began after the cut stays": Break(
        CacheFile, "cut_back", "value[TID] > through", "False"
    ),
    "what is stale is verified": Break(
        CacheFile, "verified", "txn.delete(oid, db=self._current)", "pass"
    ),
    "what came too late is verified": Break(
        CacheFile,
        "verified",
        "txn.delete(cursor.value()[:8], db=self._current)",
        "pass",
    ),
    "changes are remembered beyond what was verified": Break(
        CacheFile, "_new_lineage", "through, through)", "through, Z64)"
    ),
    "a forked child has not heard what its parent has": Break(
        DiskCache,
        "reset",
        "Backlog(backlog.base, backlog.changes)",
        "Backlog(backlog.base)",
    ),
    "what could not be written is forgotten": Break(
        Backlog,
        "drop_revisions",
        "self._revision_bytes = 0",
        "self.base, self.changes, self.changed = self.through, [], {}",
    ),
    "what is later than was asked for is read": Break(
        CacheFile, "find", "value is None or value[TID] >= before", "value is None"
    ),
    "what had ended before is read": (
        # Two places make sure of it.
        Break(
            CacheFile, "find", "cursor.set_range(oid + before)", "cursor.set_range(oid)"
        ),
        Break(DiskCache, "load", "if before <= limit:", "if before <= limit or end:"),
    ),
    "what is damaged is read": Break(CacheFile, "find", "!= value[CHECKSUM]", "== b''"),
    "an error reaches the application": Break(
        DiskCache, "load", "except _FILE_ERRORS as error", "except KeyError as error"
    ),
    "a file is used after the machine has stopped": Break(
        Presence, "__init__", "found in (_CLEAN, boot_id())", "True"
    ),
    "what is forgotten is read": Break(
        DiskCache, "load", "or oid in backlog.forgotten", ""
    ),
}


def broken(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have a method of the code do something else."""
    found = BREAKS[name]
    for each in (found,) if isinstance(found, Break) else found:
        _break(patch, each)


def _break(patch: pytest.MonkeyPatch, rule: Break) -> None:
    owner, method, old, new = rule
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    assert old in source, f"{method} is not what it was"
    module = inspect.getmodule(owner)
    scope: dict[str, Any] = {}
    path = inspect.getsourcefile(owner)
    assert path is not None
    code = compile(
        "from __future__ import annotations\n" + source.replace(old, new), path, "exec"
    )
    exec(code, vars(module), scope)
    patch.setattr(owner, method, scope[method])


def test_nobody_reads_what_is_not_in_his_history():
    run(30)
    wander_often(0, 100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nobody_reads_what_is_not_in_his_history_for_long():
    run(1000)
    wander_often(EXAMPLES, 10_000)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BREAKS)
def test_a_rule_that_is_switched_off_is_missed(name: str, writers_by_hand):
    """Else the machine would not look."""
    broken(writers_by_hand, name)
    with pytest.raises((AssertionError, lmdb.Error)):
        wander_often(0, EXAMPLES)


@pytest.mark.parametrize("line", range(LOAD_LINES))
def test_what_is_written_while_an_object_is_read_is_not_missed(tmp_path, line: int):
    """The changes leave memory for the file at each line of a load."""
    world = World(tmp_path)
    reader, writer, _other = world.views
    for view in world.views:
        world.connect(view, 0)
    world.load(reader, OIDS[0])
    world.flush(reader)
    world.commit(0, [OIDS[0]])
    world.advance(reader)
    world.flush(writer)
    world.load_amid(reader, OIDS[0], line, [lambda: world.flush(reader)])
    world.commit(0, OIDS)
    world.advance(writer)
    world.load_amid(
        reader,
        OIDS[0],
        line,
        [partial(world.flush, writer), partial(world.advance, reader)],
    )
    world.check_all(reader)
    world.close()


def test_who_is_up_to_date_reads_what_others_have_loaded(tmp_path):
    """A cache that is never wrong because it is empty would be found out."""
    world = World(tmp_path)
    for view in world.views:
        world.connect(view, 0)
    first, *others = world.views
    for oid in OIDS:
        world.load(first, oid)
    world.commit(0, [OIDS[0]])
    world.advance(first)
    world.flush(first)
    for view in others:
        assert view.cache.load(OIDS[1], following(view.position))
        world.advance(view)
        for oid in OIDS[1:]:
            assert view.cache.load(oid, following(view.position))
        assert view.cache.load(OIDS[0], view.position), "it ended there"
    world.reopen(others[0], is_killed=True)
    again = world.views[1]
    assert again.position == first.position
    assert again.cache.load(OIDS[1], following(again.position))
    world.close()

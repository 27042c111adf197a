"""What the cleaner of a blob cache removes, when, and what it leaves."""

import os
import threading
import time

import pytest
from ZODB.utils import p64

from zeolith.client import blob_cleaner
from zeolith.client.blob_cleaner import Bound, Cleaner, clean, idle_s, touch
from zeolith.client.blob_directory import BlobDirectory, remove_locked
from zeolith.client.file_locks import locked, open_lockable, release, try_lock

from ..support.gates import Background, Gate
from ..support.waiting import wait_until

TID = p64(5)


@pytest.fixture
def directory(tmp_path):
    made = BlobDirectory(tmp_path / "cache")
    made.claim()
    return made


def put(directory, number, size=100, idle_s=1000.0):
    path = directory.blob_path(p64(number), TID)
    directory.make_room_for(path)
    with open(path, "wb") as file:
        file.write(b"x" * size)
    used = time.time() - idle_s
    os.utime(path, (used, used))
    return path


def run(directory, size_bytes, **kwargs):
    return clean(directory, Bound(size_bytes, 10, **kwargs), lambda: False)


def left(directory):
    return {path for _mtime, _size, path in directory.blobs()}


def test_what_was_used_least_recently_goes_until_a_share_is_free(directory):
    paths = [put(directory, number, idle_s=1000 - number) for number in range(20)]
    cleaned = run(directory, 1000)
    assert left(directory) == set(paths[11:])
    assert cleaned == blob_cleaner.Cleaned(11, 1100, 900)


def test_what_fits_stays(directory):
    paths = {put(directory, number) for number in range(9)}
    assert run(directory, 1000).removed == 0
    assert left(directory) == paths


def test_what_was_used_lately_stays_though_there_is_too_much(directory):
    old = put(directory, 1, idle_s=61)
    young = {put(directory, number, idle_s=50) for number in range(2, 8)}
    assert run(directory, 500).remaining_bytes == 600
    assert left(directory) == young
    assert not os.path.exists(old)


def test_far_above_the_bound_the_grace_period_is_short(directory):
    for number in range(30):
        put(directory, number, idle_s=11)
    young = {put(directory, number, idle_s=5) for number in range(30, 40)}
    assert run(directory, 500).remaining_bytes == 1000
    assert left(directory) == young


def test_a_time_in_the_future_protects_only_for_the_grace_period(directory):
    put(directory, 1, idle_s=-1000)
    assert run(directory, 0).removed == 1
    assert idle_s(100, 90) == 10


def test_more_than_can_be_remembered_is_removed_in_rounds(directory, monkeypatch):
    monkeypatch.setattr(blob_cleaner, "CANDIDATES_MAX", 3)
    for number in range(20):
        put(directory, number, idle_s=1000 - number)
    assert run(directory, 500).removed == 16


def test_files_of_other_names_are_left_alone(directory):
    path = put(directory, 1)
    beside = os.path.join(os.path.dirname(path), "notes.txt")
    with open(beside, "wb") as file:
        file.write(b"mine")
    run(directory, 0)
    assert os.path.exists(beside)
    assert not os.path.exists(path)


def test_a_blob_that_somebody_locked_is_left_and_counted(directory):
    put(directory, 1)
    path = put(directory, 2, idle_s=2000)
    fd = open_lockable(path, os.O_RDONLY)
    assert try_lock(fd)
    assert run(directory, 0).remaining_bytes == 100
    assert left(directory) == {path}
    release(fd)


def test_a_blob_that_vanishes_is_no_error(directory, monkeypatch):
    paths = [put(directory, number) for number in range(3)]
    remove = blob_cleaner._remove_idle

    def vanished(path, protection_s):
        os.unlink(path)
        return remove(path, protection_s)

    monkeypatch.setattr(blob_cleaner, "_remove_idle", vanished)
    assert run(directory, 0).removed == 0
    assert not any(os.path.exists(path) for path in paths)


def test_a_blob_that_is_used_after_it_was_chosen_stays(directory, monkeypatch):
    path = put(directory, 1)
    gate = Gate()
    gate.shut()
    with monkeypatch.context() as patched:
        patched.setattr(
            blob_cleaner, "_remove_idle", gate.before(blob_cleaner._remove_idle)
        )
        running = Background(run, directory, 0)
        gate.wait_until_reached()
        assert touch(path)
        gate.open()
        assert running.result().removed == 0
    assert os.path.exists(path)


def test_a_blob_is_not_marked_while_it_is_removed(directory, monkeypatch):
    """The mark would promise a file that goes in the next moment."""
    path = put(directory, 1)
    gate = Gate()
    gate.shut()
    with monkeypatch.context() as patched:
        patched.setattr(blob_cleaner, "remove_locked", gate.before(remove_locked))
        removing = Background(run, directory, 0)
        gate.wait_until_reached()
        marking = Background(touch, path)
        assert not marking.returns_soon()
        gate.open()
        assert removing.result().removed == 1
    assert marking.result() is False


def test_marks_do_not_hinder_each_other(directory):
    path = put(directory, 1)
    marks = [Background(touch, path) for _ in range(5)]
    assert all(mark.result() for mark in marks)


def test_who_is_stopped_in_the_middle_of_a_mark_hinders_nobody_for_long(
    directory, monkeypatch
):
    monkeypatch.setattr(blob_cleaner, "TOUCH_WAIT_S", 0.01)
    path = put(directory, 1)
    with locked(path):
        assert touch(path)


def test_what_is_not_there_cannot_be_marked(directory):
    assert not touch(directory.blob_path(p64(1), TID))


def test_a_stopped_run_ends(directory):
    put(directory, 1)
    assert clean(directory, Bound(0, 10), lambda: True).removed == 0


@pytest.mark.parametrize(
    ("size_bytes", "percent", "goal"),
    [(1000, 10, 900), (1000, 0, 1000), (1000, 100, 500), (0, 10, 0)],
)
def test_the_goal_is_a_share_below_the_bound(size_bytes, percent, goal):
    assert Bound(size_bytes, percent).goal_bytes == goal


@pytest.mark.parametrize(("size_bytes", "percent"), [(-1, 10), (1, -1), (1, 101)])
def test_a_bound_without_meaning_is_refused(size_bytes, percent):
    with pytest.raises(ValueError, match="blob cache"):
        Bound(size_bytes, percent)


# When it runs.


@pytest.fixture
def cleaner(directory):
    """Of a cache for 1000 bytes, which looks after 100 more."""
    cleaner = Cleaner(directory, Bound(1000, 10, grace_s=0))
    yield cleaner
    cleaner.close()
    wait_until(lambda: not threads(), "the end of the cleaner")


def threads():
    return [each for each in threading.enumerate() if each.name.endswith("-cleaner")]


def test_it_runs_when_a_share_of_the_bound_was_added(directory, cleaner):
    for number in range(20):
        put(directory, number)
    cleaner.added(100)
    assert not threads()
    cleaner.added(1)
    wait_until(lambda: cleaner.last, "a run")
    assert cleaner.last.remaining_bytes == 900
    wait_until(lambda: not threads(), "the end of the thread")


def test_what_is_added_during_a_run_is_seen_to_in_the_next(
    directory, cleaner, monkeypatch
):
    gate = Gate()
    gate.shut()
    with monkeypatch.context() as patched:
        patched.setattr(blob_cleaner, "clean", gate.after(clean))
        cleaner.look()
        gate.wait_until_reached()
        for number in range(20):
            put(directory, number)
        cleaner.added(2000)
        gate.open()
        wait_until(lambda: len(left(directory)) == 9, "a second run")


def test_one_process_cleans_at_a_time(directory, cleaner):
    put(directory, 1, size=2000)
    with locked(directory.cleaner_lock):
        cleaner.look()
        assert not Background(wait_until, lambda: cleaner.last, "a run").returns_soon()
        assert len(left(directory)) == 1
        cleaner.close()
    wait_until(lambda: not threads(), "the end of the thread")


def test_who_waited_while_another_process_cleaned_leaves_it_at_that(
    directory, cleaner, monkeypatch
):
    monkeypatch.setattr(blob_cleaner, "BUSY_S", 0.01)
    with locked(directory.cleaner_lock) as fd:
        cleaner.look()
        wait_until(threads, "a run")
        os.pwrite(fd, b"\n", 0)
        later = time.time() + 1
        os.utime(fd, (later, later))
    wait_until(lambda: not threads(), "the end of the thread")
    assert cleaner.last is None


def test_at_the_start_it_runs_unless_somebody_did_lately(directory, cleaner):
    cleaner.look_unless_lately()
    wait_until(lambda: cleaner.last and not threads(), "a run")
    first = cleaner.last
    cleaner.look_unless_lately()
    assert not threads()
    long_ago = time.time() - blob_cleaner.LATELY_S - 1
    os.utime(directory.cleaner_lock, (long_ago, long_ago))
    cleaner.look_unless_lately()
    wait_until(lambda: cleaner.last is not first, "a run")


def test_what_was_in_use_is_removed_when_it_is_not_any_more(directory):
    cleaner = Cleaner(directory, Bound(100, 10, grace_s=0.3, far_grace_s=0.3))
    path = put(directory, 1, size=1000, idle_s=0)
    cleaner.look()
    wait_until(lambda: not os.path.exists(path), "the end of the grace period")
    cleaner.close()


def test_it_ends_when_it_is_closed(directory):
    cleaner = Cleaner(directory, Bound(100, 10))
    put(directory, 1, size=1000, idle_s=0)
    cleaner.look()
    wait_until(lambda: cleaner.last, "a run")
    assert threads()
    cleaner.close()
    wait_until(lambda: not threads(), "the end of the thread")
    cleaner.added(1000)
    assert not threads()


def test_an_error_is_logged_and_the_next_run_is_not_hindered(
    directory, cleaner, monkeypatch, caplog
):
    def fail(*args):
        raise OSError("broken disk")

    with monkeypatch.context() as patched:
        patched.setattr(blob_cleaner, "clean", fail)
        cleaner.look()
        wait_until(lambda: "was not cleaned" in caplog.text, "the error")
    wait_until(lambda: not threads(), "the end of the thread")
    cleaner.look()
    wait_until(lambda: cleaner.last, "a run")


def test_it_tidies_up_after_the_dead(directory, cleaner):
    part = directory.part_path(p64(1), TID)
    with open(part, "wb"):
        pass
    cleaner.look()
    wait_until(lambda: cleaner.last, "a run")
    assert not os.path.exists(part)


def test_a_thread_that_cannot_be_started_is_no_error(cleaner, monkeypatch, caplog):
    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        cleaner.look()
    assert "cannot be cleaned now" in caplog.text
    cleaner.look()
    wait_until(lambda: cleaner.last, "a run")


def test_what_came_during_a_run_is_seen_by_the_next_one(directory, monkeypatch):
    """Also if a next run was wanted before the first one had begun."""
    lock_gate, clean_gate = Gate(), Gate()
    monkeypatch.setattr(blob_cleaner, "open_lockable", lock_gate.before(open_lockable))
    monkeypatch.setattr(blob_cleaner, "clean", clean_gate.after(clean))
    lock_gate.shut()
    clean_gate.shut()
    cleaner = Cleaner(directory, Bound(1000, 10))
    cleaner.look()
    lock_gate.wait_until_reached()
    cleaner.look()
    lock_gate.open()
    clean_gate.wait_until_reached()
    paths = {put(directory, number) for number in range(20)}
    cleaner.look()
    clean_gate.open()
    wait_until(lambda: len(left(directory)) == 9, "a run that sees them")
    assert left(directory) < paths
    cleaner.close()

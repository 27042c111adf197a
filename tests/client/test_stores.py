"""What a transaction wants to write, until its vote."""

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import StorageError
from ZODB.utils import p64

from zeolith.client import stores as stores_module
from zeolith.client.stores import TRANSACTION_ID_BYTES, Stores
from zeolith.client.tids import Z64
from zeolith.protocol.codec import decode
from zeolith.protocol.frames import FrameReader
from zeolith.protocol.limits import Limits
from zeolith.protocol.messages import Notice
from zeolith.protocol.methods import METHODS

A, B = p64(1), p64(2)
T1 = p64(1)
SMALL = Limits(
    hello_frame_bytes_max=1024, frame_bytes_max=512 * 1024, batch_bytes_max=1000
)


def staged(stores: Stores) -> list[Notice]:
    """The messages that the spill holds."""
    reader = FrameReader(SMALL.frame_bytes_max)
    messages: list[Any] = []
    for chunk in stores.spilled():
        messages += map(decode, reader.feed(chunk))
    assert all(isinstance(message, Notice) for message in messages)
    return messages


def test_operations_keep_their_order():
    stores = Stores(SMALL)
    stores.store(A, T1, b"a")
    stores.check(B, T1)
    stores.undo(T1)
    stores.store(B, Z64, b"b")
    assert stores.operations == [
        ["store", A, T1, b"a"],
        ["check", B, T1],
        ["undo", T1],
        ["store", B, Z64, b"b"],
    ]
    assert staged(stores) == []


def test_every_transaction_has_an_id_of_its_own():
    ids = {Stores(SMALL).id for _ in range(100)}
    assert len(ids) == 100
    assert {len(each) for each in ids} == {TRANSACTION_ID_BYTES}


def test_only_stored_objects_are_written():
    stores = Stores(SMALL)
    stores.store(A, T1, b"a")
    stores.check(B, T1)
    assert stores.oids == {A}


operation = st.one_of(
    st.tuples(st.just("store"), st.integers(0, 5), st.integers(0, 2000)),
    st.tuples(st.just("check"), st.integers(0, 5)),
    st.tuples(st.just("undo"), st.integers(0, 5)),
)


@given(st.lists(operation, max_size=60))
def test_nothing_is_lost_or_out_of_order_however_much_is_spilled(operations):
    stores = Stores(SMALL)
    expected: list[list[object]] = []
    for name, number, *size in operations:
        if name == "store":
            stores.store(p64(number), T1, b"x" * size[0])
            expected.append(["store", p64(number), T1, b"x" * size[0]])
        elif name == "check":
            stores.check(p64(number), T1)
            expected.append(["check", p64(number), T1])
        else:
            stores.undo(p64(number))
            expected.append(["undo", p64(number)])
    come = []
    for method, args in staged(stores):
        assert method == "stage"
        METHODS[method].check(args)
        assert args[0] == stores.id
        come += args[1]
    assert come + stores.operations == expected
    stores.close()


@given(st.lists(st.integers(0, 600), min_size=1, max_size=100))
def test_a_message_is_not_larger_than_a_batch(sizes):
    stores = Stores(SMALL)
    for size in sizes:
        stores.store(A, T1, b"x" * size)
    batches = [args[1] for _method, args in staged(stores)]
    for batch in [*batches, stores.operations]:
        assert sum(len(each[3]) for each in batch) <= SMALL.batch_bytes_max
    stores.close()


def test_a_record_larger_than_a_batch_travels_alone():
    stores = Stores(SMALL)
    stores.store(A, T1, b"before")
    stores.store(A, T1, b"x" * 5000)
    stores.store(A, T1, b"after")
    batches = [args[1] for _method, args in staged(stores)]
    assert [len(batch) for batch in batches] == [1, 1]
    assert stores.operations == [["store", A, T1, b"after"]]
    stores.close()


def test_a_record_that_no_frame_can_hold_is_refused_at_once():
    stores = Stores(SMALL)
    stores.store(A, T1, b"x" * SMALL.record_bytes_max)
    with pytest.raises(StorageError, match="too large"):
        stores.store(A, T1, b"x" * (SMALL.record_bytes_max + 1))
    assert [len(each[3]) for each in stores.operations] == [SMALL.record_bytes_max]
    stores.close()


def test_a_large_transaction_is_in_a_file_and_not_in_memory(monkeypatch):
    monkeypatch.setattr(stores_module, "SPILL_MEMORY_BYTES", 100_000)
    monkeypatch.setattr(stores_module, "KEPT_BYTES_MAX", 100_000)
    stores = Stores(Limits(batch_bytes_max=100_000))
    tracemalloc.start()
    for number in range(1000):
        stores.store(p64(number), T1, b"%06d" % number * 2000)
    _now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3_000_000, "12 MB were stored"
    come = 0
    reader = FrameReader(2**20)
    for chunk in stores.spilled():
        for payload in reader.feed(chunk):
            message = decode(payload)
            assert isinstance(message, Notice)
            come += len(message.args[1])
    assert come + len(stores.operations) == 1000
    stores.close()


def test_the_spill_can_be_read_again():
    stores = Stores(SMALL)
    for _ in range(10):
        stores.store(A, T1, b"x" * 600)
    assert staged(stores) == staged(stores) != []
    stores.close()


def test_closing_twice_does_no_harm():
    stores = Stores(SMALL)
    for _ in range(10):
        stores.store(A, T1, b"x" * 600)
    stores.close()
    stores.close()
    Stores(SMALL).close()


# What is kept for the cache


def test_the_record_last_stored_is_kept():
    stores = Stores(SMALL)
    stores.store(A, T1, b"first")
    stores.store(A, T1, b"second")
    assert stores.kept == {A: b"second"}


def test_of_too_many_records_none_is_kept(monkeypatch):
    monkeypatch.setattr(stores_module, "KEPT_BYTES_MAX", 10)
    stores = Stores(SMALL)
    stores.store(A, T1, b"x" * 10)
    assert stores.kept == {A: b"x" * 10}
    stores.store(B, T1, b"x")
    assert stores.kept == {}
    stores.store(A, T1, b"")
    assert stores.kept == {}, "some would be there and some not"


def test_a_buffer_that_changes_later_is_stored_as_it_was():
    stores = Stores(SMALL)
    buffer = bytearray(b"as it was")
    stores.store(A, T1, buffer)  # type: ignore[arg-type]
    buffer[:] = b"and is no more"
    assert stores.operations == [["store", A, T1, b"as it was"]]
    assert stores.kept == {A: b"as it was"}

"""Classes of records, without importing one."""

import pickle
import sys
import zlib

import pytest
from BTrees.OOBTree import OOBTree
from hypothesis import given
from hypothesis import strategies as st
from persistent.mapping import PersistentMapping
from ZODB import DB, blob
from ZODB.blob import Blob
from ZODB.MappingStorage import MappingStorage
from ZODB.serialize import ObjectWriter

from zeolith.client.record_class import UNKNOWN, class_of, is_blob_record

GLOBAL = b"cshop.models\nOrder\n"
STATE = b"\x80\x03N."


@pytest.mark.parametrize(
    ("instance", "name"),
    [
        (PersistentMapping(), "persistent.mapping.PersistentMapping"),
        (OOBTree(), "BTrees.OOBTree.OOBTree"),
        (Blob(), "ZODB.blob.Blob"),
    ],
)
def test_what_zodb_writes_today(instance, name):
    db = DB(MappingStorage())
    connection = db.open()
    connection.add(instance)
    assert class_of(ObjectWriter(instance).serialize(instance)) == name
    connection.transaction_manager.abort()
    connection.close()
    db.close()


@pytest.mark.parametrize(
    "head",
    [
        b"(" + GLOBAL + b"q\x01Ntq\x02.",
        GLOBAL + b"q\x01.",
        b"\x80\x03" + GLOBAL + b"q\x01.",
        b"\x80\x02(" + GLOBAL + b"Nt.",
        b"((U\x0bshop.modelsq\x01U\x05Orderq\x02tq\x03Ntq\x04.",
        b"\x80\x03X\x0b\x00\x00\x00shop.modelsX\x05\x00\x00\x00Order\x86N\x86.",
        b"(U\x0bshop.modelsq\x01U\x05Orderq\x02tq\x03.",
        b"\x80\x04\x8c\x0bshop.models\x94\x8c\x05Order\x94\x93\x94.",
        b"\x80\x04\x95\x20\0\0\0\0\0\0\0\x8c\x0bshop.models\x8c\x05Order\x93.",
    ],
)
def test_every_form_there_was(head):
    assert class_of(head + STATE) == "shop.models.Order"
    assert class_of(b".z" + zlib.compress(head + STATE)) == "shop.models.Order"
    assert "shop" not in sys.modules


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b".",
        b"no pickle",
        b".zno deflated record",
        b".xin a form of somebody's own",
        b"\x80\x03N." + STATE,
        GLOBAL[:-1],
        pickle.dumps({"a": 1}),
    ],
)
def test_what_cannot_be_told(record):
    assert class_of(record) == UNKNOWN


@given(st.binary())
def test_nothing_makes_it_fail(record):
    assert class_of(record).isprintable()
    assert class_of(b"\x80\x03" + record).isprintable()
    assert class_of(b".z" + record).isprintable()


def test_a_bomb_is_not_inflated():
    bomb = zlib.compress(b"c" + b"m" * 100_000_000 + b"\nC\n")
    assert class_of(b".z" + bomb) == UNKNOWN


def test_a_name_does_nothing_to_a_terminal():
    name = class_of(b"cmodule\n\x1b[2JName\xff\n.")
    assert name == "module.?[2JName\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("record", [b"c\\\x00\n", b"S'\\ '\n."])
def test_an_escape_that_python_does_not_know_is_no_error(record):
    """Where warnings are errors, reading one would be."""
    assert class_of(record) == UNKNOWN
    assert not is_blob_record(b"ZODB.blob" + record)


# Whether it is a blob

BLOB = b"cZODB.blob\nBlob\n"


def written_by_zodb(instance: object) -> bytes:
    db = DB(MappingStorage())
    connection = db.open()
    connection.add(instance)
    record: bytes = ObjectWriter(instance).serialize(instance)
    connection.transaction_manager.abort()
    connection.close()
    db.close()
    return record


@pytest.mark.parametrize(
    "record",
    [
        written_by_zodb(Blob()),
        written_by_zodb(PersistentMapping({"a": "ZODB.blob"})),
        BLOB + b"." + STATE,
        b"\x80\x01" + BLOB + b"p0\n." + STATE,
        b"\x80\x02" + BLOB + b"r\x00\x00\x00\x00." + STATE,
        b"(" + BLOB + b"Nt." + STATE,
        BLOB + b"q\x01N." + STATE,
        b"cZODB.blob\nBlobFile\n." + STATE,
        b"ZODB.blob",
        BLOB,
        b"",
    ],
)
def test_what_is_a_blob_for_zodb_is_one_here(record):
    assert is_blob_record(record) == blob.is_blob_record(record)


def test_a_record_that_calls_the_class_of_blobs_makes_none(monkeypatch):
    made = []
    monkeypatch.setattr(Blob, "__setstate__", lambda *_args: made.append(1))
    record = BLOB + b")\x81}b." + STATE
    assert not is_blob_record(record)
    assert not made
    blob.is_blob_record(record)
    assert made, "a record that does nothing proves nothing"

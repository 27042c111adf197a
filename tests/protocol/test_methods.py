"""The table of what can be asked, and the kinds of its arguments."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.protocol import methods
from zeolith.protocol.errors import RemoteProtocolError
from zeolith.protocol.methods import (
    HELLO,
    METHODS,
    OPERATIONS,
    WELCOME,
    Kind,
    check_fields,
    list_of,
    optional,
    roles_of_call,
)
from zeolith.protocol.roles import AccessRole

from .strategies import arguments_of, hellos, of_kind, plain, welcomes

ID = b"12345678"
SIXTEEN = ID + ID
# One value of every sort that can arrive.
SAMPLES: dict[str, Any] = {
    "nil": None,
    "true": True,
    "zero": 0,
    "one": 1,
    "negative": -1,
    "2**64-1": 2**64 - 1,
    "0.5": 0.5,
    "-0.5": -0.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "empty text": "",
    "text": "text",
    "text of 8": "12345678",
    "no bytes": b"",
    "7 bytes": ID[:7],
    "8 bytes": ID,
    "9 bytes": ID + b"9",
    "15 bytes": SIXTEEN[:15],
    "16 bytes": SIXTEEN,
    "17 bytes": SIXTEEN + b"7",
    "map": {},
    "empty list": [],
    "list of nil": [None],
    "list of ids": [ID, ID],
    "list of id and text": [ID, "12345678"],
    "list of texts": ["a", "b"],
    "list of bytes": [b"a"],
    "store": ["store", ID, ID, b"data"],
    "check": ["check", ID, ID],
    "undo": ["undo", ID],
    "store without data": ["store", ID, ID],
    "store of text": ["store", ID, ID, "data"],
    "store of a short oid": ["store", ID[:7], ID, b"data"],
    "check with data": ["check", ID, ID, b"data"],
    "undo of nil": ["undo", None],
    "unknown operation": ["delete", ID],
    "operation in bytes": [b"undo", ID],
    "resolution": [ID, b"data"],
    "metadata": [b"user", b"text", b"extension", None, " "],
    "metadata with tid": [b"", b"", b"", ID, "p"],
    "metadata of texts": ["user", "text", "extension", None, " "],
    "metadata without status": [b"", b"", b"", None],
    "metadata with a short tid": [b"", b"", b"", b"tid", " "],
    "change": [ID, ID, [ID], SIXTEEN],
    "change of unknown origin": [ID, ID, [], None],
    "change of a short oid": [ID, ID, [b"oid"], None],
    "change without oids": [ID, ID, None, None],
    "change of too few": [ID, ID, [ID]],
    "list of changes": [[ID, ID, [ID], SIXTEEN]],
    "list of operations": [["undo", ID], ["check", ID, ID]],
    "list of a bad operation": [["undo", ID], ["undo", "12345678"]],
    "list of resolutions": [[ID, b"data"]],
    "list of revisions": [[ID, ID]],
    "list of a revision of nil": [[ID, None]],
    "list of a revision of 7": [[ID, ID[:7]]],
    "list of a strange revision": [[ID, ID, ID]],
}
BYTES = {
    "no bytes",
    "7 bytes",
    "8 bytes",
    "9 bytes",
    "15 bytes",
    "16 bytes",
    "17 bytes",
}
# They might as well be records.
REVISIONS = {"list of revisions", "list of a revision of 7"}
# Kind -> the samples that it accepts; it refuses all others.
ACCEPTED = {
    "oid": {"8 bytes"},
    "oid or nil": {"8 bytes", "nil"},
    "tid": {"8 bytes"},
    "tid or nil": {"8 bytes", "nil"},
    "bytes": BYTES,
    "bytes or nil": {*BYTES, "nil"},
    "text": {"empty text", "text", "text of 8"},
    "text or nil": {"empty text", "text", "text of 8", "nil"},
    "count": {"zero", "one", "2**64-1"},
    "count or nil": {"zero", "one", "2**64-1", "nil"},
    "bool": {"true"},
    "bool or nil": {"true", "nil"},
    "time": {"zero", "one", "0.5"},
    "transaction id": {"16 bytes"},
    "transaction id or nil": {"16 bytes", "nil"},
    "token": {"16 bytes"},
    "token or nil": {"16 bytes", "nil"},
    "operation": {"store", "check", "undo"},
    "metadata": {"metadata", "metadata with tid"},
    "[text, text]": {"list of texts"},
    "[text, text] or nil": {"list of texts", "nil"},
    "[oid, bytes]": {"resolution", "list of ids"},
    "change": {"change", "change of unknown origin"},
    "list of oid": {"empty list", "list of ids"},
    "list of text": {"empty list", "list of texts"},
    "list of operation": {"empty list", "list of operations"},
    "list of [oid, bytes]": {"empty list", "list of resolutions", *REVISIONS},
    "[oid, tid]": {"list of ids"},
    "list of tid": {"empty list", "list of ids"},
    "list of [oid, tid]": {"empty list", "list of revisions"},
    "list of change": {"empty list", "list of changes"},
    "list of change or nil": {"empty list", "list of changes", "nil"},
}


def kinds_in_use() -> dict[str, Kind]:
    kinds = [kind for method in METHODS.values() for _name, kind in method.arguments]
    kinds += [*HELLO.values(), *WELCOME.values()]
    kinds += [kind for operands in OPERATIONS.values() for kind in operands]
    kinds += [each for each in vars(methods).values() if isinstance(each, Kind)]
    return {kind.name: kind for kind in kinds}


ARGUMENTS = [
    (method, position, argument, kind)
    for method in METHODS.values()
    for position, (argument, kind) in enumerate(method.arguments)
]


def sample_arguments(method: methods.Method) -> list[Any]:
    return [SAMPLES[sorted(ACCEPTED[kind.name])[0]] for _name, kind in method.arguments]


@pytest.mark.parametrize("kind", kinds_in_use().values(), ids=lambda kind: kind.name)
def test_a_kind_accepts_its_samples_and_refuses_all_others(kind):
    accepted = {name for name, value in SAMPLES.items() if kind.accepts(value)}
    assert accepted == ACCEPTED[kind.name]


@given(st.data(), st.sampled_from(list(kinds_in_use().values())))
def test_a_kind_accepts_whatever_is_of_it(data, kind):
    assert kind.accepts(data.draw(of_kind(kind)))


@given(plain, st.sampled_from(list(kinds_in_use().values())))
def test_a_kind_answers_yes_or_no_to_whatever_can_arrive(value, kind):
    assert kind.accepts(value) in (True, False)


def test_kinds_of_kinds_say_so_in_their_names():
    assert list_of(optional(methods.OID)).name == "list of oid or nil"


@pytest.mark.parametrize(
    ("method", "position", "argument", "kind"),
    ARGUMENTS,
    ids=[f"{method.name}-{name}" for method, _position, name, _kind in ARGUMENTS],
)
def test_a_method_refuses_an_argument_of_another_kind(method, position, argument, kind):
    for sample in SAMPLES.keys() - ACCEPTED[kind.name]:
        args = sample_arguments(method)
        args[position] = SAMPLES[sample]
        with pytest.raises(RemoteProtocolError) as raised:
            method.check(args)
        assert str(raised.value).startswith(f"{method.name}: {argument} must be")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_a_method_takes_its_arguments_and_not_one_more_or_less(method):
    args = sample_arguments(method)
    method.check(args)
    with pytest.raises(RemoteProtocolError, match="arguments, not"):
        method.check([*args, None])
    if args:
        with pytest.raises(RemoteProtocolError, match="arguments, not"):
            method.check(args[:-1])


@given(st.data(), st.sampled_from(list(METHODS.values())))
def test_a_method_accepts_whatever_is_of_its_kinds(data, method):
    method.check(data.draw(arguments_of(method)))


def test_methods_are_called_by_their_names():
    assert all(name == method.name for name, method in METHODS.items())
    assert len(METHODS) == len(methods._TABLE)


def test_what_is_not_answered_is_what_comes_before_a_vote_and_the_changes():
    unanswered = {name for name, method in METHODS.items() if not method.answers}
    assert unanswered == {"stage", "blob_chunk", "changes"}


def test_the_server_sends_only_changes():
    sent = {name for name, method in METHODS.items() if method.sender == "server"}
    assert sent == {"changes"}


def test_a_stranger_may_ask_how_the_server_is_and_nothing_else():
    free = {name for name, method in METHODS.items() if not method.needs_session}
    assert free == {"ping", "status"}


def test_every_role_is_on_the_right_methods():
    by_role = {
        role: {name for name, method in METHODS.items() if method.role is role}
        for role in (None, *AccessRole)
    }
    steps = {"vote", "commit", "resolve", "finish", "abort"}
    transaction = {"stage", "blob_chunk", *steps}
    reading = by_role.pop(AccessRole.READ)
    assert by_role == {
        None: {"ping"},
        AccessRole.WRITE: {"new_oids", *transaction},
        AccessRole.UNDO: set(),
        AccessRole.PACK: {"pack", "pack_cancel"},
        AccessRole.ADMIN: {"status"},
    }
    assert {"load", "undo_log", "pack_progress"} <= reading


def test_an_operation_that_is_more_than_a_write_needs_more():
    store, undo = ["store", ID, ID, b"data"], ["undo", ID]
    delete, restore = ["delete", ID, ID], ["restore", ID, ID, None, None]
    metadata = [b"", b"", b"", None, " "]
    assert roles_of_call("load", [ID, ID]) == set()
    assert roles_of_call("vote", [SIXTEEN, metadata, [store, store]]) == set()
    assert roles_of_call("vote", [SIXTEEN, metadata, [store, undo]]) == {"undo"}
    assert roles_of_call("commit", [SIXTEEN, metadata, [undo], ID]) == {"undo"}
    assert roles_of_call("stage", [SIXTEEN, [store, undo, delete]]) == {"undo", "pack"}
    assert roles_of_call("stage", [SIXTEEN, [restore]]) == {"admin"}


def test_who_keeps_the_tid_of_a_transaction_administers():
    metadata = [b"", b"", b"", ID, " "]
    assert roles_of_call("vote", [SIXTEEN, metadata, []]) == {"admin"}


@pytest.mark.parametrize(("kinds", "strategy"), [(HELLO, hellos), (WELCOME, welcomes)])
@given(st.data())
def test_fields_are_checked_one_by_one(kinds, strategy, data):
    fields = data.draw(strategy)
    check_fields("Hello", fields, kinds)
    name = data.draw(st.sampled_from(sorted(kinds)))
    without = {key: value for key, value in fields.items() if key != name}
    with pytest.raises(RemoteProtocolError, match=f"a Hello without {name}"):
        check_fields("Hello", without, kinds)
    foreign = SAMPLES.keys() - ACCEPTED[kinds[name].name]
    wrong = {**fields, name: SAMPLES[data.draw(st.sampled_from(sorted(foreign)))]}
    with pytest.raises(RemoteProtocolError, match=f"a Hello whose {name} is not"):
        check_fields("Hello", wrong, kinds)


@given(hellos, st.dictionaries(st.text() | st.binary(), plain, max_size=3))
def test_fields_of_a_later_version_are_ignored(fields, later):
    check_fields("Hello", {**later, **fields}, HELLO)

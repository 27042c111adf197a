"""One socket's conversation: states, open requests, limits, heartbeats."""

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from ZODB.POSException import POSKeyError, ReadOnlyError

from zeolith.protocol.codec import encode
from zeolith.protocol.connection import (
    HEARTBEAT,
    RECEIVING,
    SENDING,
    Connection,
    Role,
    SocketKind,
    State,
)
from zeolith.protocol.errors import (
    HelloRefused,
    LocalProtocolError,
    RemoteProtocolError,
)
from zeolith.protocol.frames import frame
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import (
    KINDS,
    Challenge,
    Failure,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Notice,
    Reply,
    Request,
    Response,
    Welcome,
)

from ..support.pair import Pair, cut, hello_fields, welcome_fields
from .strategies import calls, chunkings, messages

OID, TID = b"oid45678", b"tid45678"
SMALL = Limits(
    hello_frame_bytes_max=1000,
    frame_bytes_max=5000,
    batch_bytes_max=1000,
    requests_open_max=3,
    hello_timeout_s=10,
    heartbeat_interval_s=5,
    heartbeat_timeout_s=20,
)
LATER = 5.0


def in_state(role: Role, state: State, limits: Limits = DEFAULT) -> Connection:
    """A connection that a conversation has brought to `state`."""
    pair = Pair(limits)
    end = pair.client if role is Role.CLIENT else pair.server
    if state is State.GREETED:
        pair.deliver(pair.client, pair.client.hello(hello_fields(), 0.0))
    elif state is State.CHALLENGED:
        pair.deliver(pair.client, pair.client.hello(hello_fields(), 0.0))
        pair.deliver(pair.server, pair.server.challenge("who?", 0.0))
    elif state in (State.STREAM, State.CHANNEL):
        pair.greet(state.value)
    elif state is State.CLOSED:
        pair.greet()
        end.goodbye("closing", "the test wants it", 0.0)
    assert end.state is state
    return end


EVERY_STATE = [(role, state) for role in Role for state in State]
every_state = pytest.mark.parametrize(("role", "state"), EVERY_STATE)


def valid(kind: type[Message], role: Role, end: Connection) -> Message:
    """A message of `kind` with nothing wrong in it, for `end` to receive."""
    one_of_each: dict[type[Message], Message] = {
        Hello: Hello(hello_fields()),
        Welcome: Welcome(welcome_fields()),
        Request: Request(end.last_request + 1, "load", [OID, TID]),
        Reply: Reply(max(end.open_requests, default=1), None),
        Failure: Failure(max(end.open_requests, default=0), "KeyError", {}, "no"),
        Notice: Notice("stage", [b"t" * 16, []])
        if role is Role.SERVER
        else Notice("changes", [[]]),
        Heartbeat: Heartbeat(),
        Goodbye: Goodbye("closing", "done"),
        Challenge: Challenge("who?"),
        Response: Response("me"),
    }
    return one_of_each[kind]


# Login


def test_a_login_is_a_challenge_and_a_response_before_the_welcome():
    pair = Pair()
    hello = pair.client.hello(hello_fields(login=["scram", "first"]), 0.0)
    (received,) = pair.deliver(pair.client, hello)
    assert received == Hello(hello_fields(login=["scram", "first"]))
    challenge = pair.server.challenge("who?", 0.0)
    assert pair.deliver(pair.server, challenge) == [Challenge("who?")]
    response = pair.client.respond("me", 0.0)
    assert pair.deliver(pair.client, response) == [Response("me")]
    welcome = pair.server.welcome(welcome_fields(proof="and I"), 0.0)
    pair.deliver(pair.server, welcome)
    assert pair.client.state is pair.server.state is State.CHANNEL


def test_who_is_challenged_may_not_do_anything_else():
    for forbidden in (
        Hello(hello_fields()),
        Request(1, "ping", []),
        Notice("stage", [b"t" * 16, []]),
        Heartbeat(),
    ):
        server = in_state(Role.SERVER, State.CHALLENGED)
        assert server.receive_data(encode(forbidden), LATER) == []
        assert server.is_closed


def test_nobody_logs_in_twice():
    server = in_state(Role.SERVER, State.CHALLENGED)
    twice = encode(Response("me")) * 2
    assert server.receive_data(twice, LATER) == [Response("me")]
    assert server.is_closed
    server = in_state(Role.SERVER, State.STREAM)
    assert server.receive_data(encode(Response("me")), LATER) == []
    assert server.is_closed


def test_a_challenge_is_not_waited_for_longer_than_a_hello():
    server = in_state(Role.SERVER, State.CHALLENGED, SMALL)
    assert server.tick(10.0) == b""
    assert not server.is_closed
    server.tick(10.1)
    assert server.is_closed
    assert "no hello in time" in str(server.error)


@pytest.mark.parametrize("size", [DEFAULT.login_chars_max, DEFAULT.login_chars_max + 1])
def test_the_messages_of_a_login_are_bounded(size):
    is_allowed = size == DEFAULT.login_chars_max
    text = "x" * size
    for end, message in (
        (in_state(Role.SERVER, State.OPENING), Hello(hello_fields(login=["a", text]))),
        (in_state(Role.SERVER, State.CHALLENGED), Response(text)),
        (in_state(Role.CLIENT, State.GREETED), Challenge(text)),
    ):
        assert end.receive_data(encode(message), LATER) == [message] * is_allowed
        assert end.is_closed is not is_allowed


# The table of states


@every_state
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_that_the_table_does_not_know_is_the_peers_offence(role, state, kind):
    end = in_state(role, state)
    if role is Role.CLIENT and state is State.CHANNEL:
        end.request("ping", [], 0.0)
    message = valid(kind, role, end)
    received = end.receive_data(encode(message), LATER)
    if kind in RECEIVING[role][state]:
        assert received == [message]
        assert end.error is None or end.is_closed
    else:
        assert received == []
        assert end.is_closed
        if state is not State.CLOSED:
            assert isinstance(end.error, RemoteProtocolError)
            assert kind.__name__ in str(end.error)


@every_state
@settings(max_examples=50)
@given(st.lists(messages, max_size=10), chunkings)
def test_random_messages_never_leave_the_table(role, state, sent, sizes):
    end = in_state(role, state, SMALL)
    received = []
    for piece in cut(b"".join(map(encode, sent)), sizes):
        before = end.state
        received += end.receive_data(piece, LATER)
        assert before is not State.CLOSED or end.state is State.CLOSED
    assert received == sent[: len(received)]
    assert len(end.open_requests) <= SMALL.requests_open_max
    if end.is_closed:
        assert state is State.CLOSED or isinstance(end.error, Exception)
    else:
        assert len(received) == len(sent)


@every_state
@given(st.binary(max_size=100), chunkings)
def test_garbage_ends_that_conversation_and_raises_nothing(role, state, garbage, sizes):
    end = in_state(role, state, SMALL)
    for piece in cut(garbage, sizes):
        end.receive_data(piece, LATER)
    assert end.state in State
    # What is kept of it never exceeds what came.
    assert end._reader.have_bytes <= len(garbage)


@given(st.lists(calls("client", answers=True), max_size=5), chunkings)
def test_any_cut_of_the_stream_gives_the_same_messages(asked, sizes):
    pair = Pair(sizes=sizes)
    pair.greet()
    sent = b"".join(pair.client.request(name, args, 0.0) for name, args in asked)
    assert pair.deliver(pair.client, sent) == [
        Request(number, name, args) for number, (name, args) in enumerate(asked, 1)
    ]


def test_what_one_end_may_send_the_other_may_receive():
    assert SENDING[Role.CLIENT] == RECEIVING[Role.SERVER]
    assert SENDING[Role.SERVER] == RECEIVING[Role.CLIENT]


def test_no_way_leads_out_of_closed():
    for role in Role:
        assert RECEIVING[role][State.CLOSED] == {}
        assert set(RECEIVING[role]) == set(State)


@every_state
def test_what_the_table_forbids_to_send_is_ones_own_mistake(role, state):
    says: dict[type[Message], Any] = {
        Hello: lambda end: end.hello(hello_fields(), LATER),
        Welcome: lambda end: end.welcome(welcome_fields(), LATER),
        Request: lambda end: end.request("ping", [], LATER),
        Reply: lambda end: end.reply(1, None, LATER),
        Failure: lambda end: end.failure(1, POSKeyError(OID), LATER),
        Notice: lambda end: end.notice("changes", [[]], LATER),
    }
    for kind, say in says.items():
        end = in_state(role, state)
        sent_at = end.sent_at
        if kind in SENDING[role][state]:
            assert say(end)
            assert end.sent_at == LATER
        else:
            with pytest.raises(LocalProtocolError, match=f"a {kind.__name__} cannot"):
                say(end)
            # Nothing was said, and the conversation is where it was.
            assert end.state is state
            assert end.sent_at == sent_at
            assert end.open_requests == set()


# Hello and welcome


@pytest.mark.parametrize("kind", SocketKind)
def test_the_hello_says_what_the_socket_is_for(kind):
    pair = Pair()
    pair.greet(kind.value)
    state = State(kind.value)
    assert pair.client.kind is pair.server.kind is kind
    assert pair.client.state is pair.server.state is state


def test_a_hello_of_another_version_reaches_the_owner_who_refuses_it():
    pair = Pair()
    hello = Hello({"version": 99})
    assert pair.server.receive_data(encode(hello), LATER) == [hello]
    assert pair.server.state is State.GREETED
    refusal = pair.server.refuse(HelloRefused("version", "this is version 1"), LATER)
    assert pair.server.is_closed
    pair.client.hello(hello_fields(), LATER)
    pair.client.receive_data(refusal, LATER)
    assert pair.client.is_closed
    assert isinstance(pair.client.error, HelloRefused)
    assert pair.client.error.reason == "version"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"version": 1},
        {**hello_fields(), "kind": "tunnel"},
        {**hello_fields(), "kind": 1},
        {**hello_fields(), "position": b"short"},
        {**hello_fields(), "session": "text"},
    ],
)
def test_a_hello_with_wrong_fields_is_an_offence(fields):
    server = in_state(Role.SERVER, State.OPENING)
    # Without a version nothing can be said of the other fields.
    expected = [Hello(fields)] if "version" not in fields else []
    assert server.receive_data(encode(Hello(fields)), LATER) == expected
    assert server.is_closed is ("version" in fields)


def test_a_welcome_with_wrong_fields_is_an_offence():
    client = in_state(Role.CLIENT, State.GREETED)
    fields = {**welcome_fields(), "last_tid": 1}
    assert client.receive_data(encode(Welcome(fields)), LATER) == []
    assert "last_tid" in str(client.error)


def test_any_error_may_refuse_a_hello():
    pair = Pair()
    pair.deliver(pair.client, pair.client.hello(hello_fields(), 0.0))
    pair.deliver(pair.server, pair.server.refuse(ReadOnlyError("no writes"), LATER))
    assert isinstance(pair.client.error, ReadOnlyError)
    assert pair.client.is_closed
    assert pair.server.is_closed


@pytest.mark.parametrize(
    ("name", "attributes"),
    [("ConflictError", {"oid": 1}), ("MultipleUndoErrors", {"errors": [1]})],
)
def test_a_refusal_that_makes_no_sense_is_an_offence(name, attributes):
    client = in_state(Role.CLIENT, State.GREETED)
    client.receive_data(encode(Failure(0, name, attributes, "")), LATER)
    assert client.is_closed
    assert isinstance(client.error, RemoteProtocolError)


def test_who_does_not_wait_for_the_welcome_breaks_the_rules():
    server = in_state(Role.SERVER, State.OPENING)
    hello, request = Hello(hello_fields()), Request(1, "ping", [])
    received = server.receive_data(encode(hello) + encode(request), LATER)
    assert received == [hello]
    assert server.is_closed


# Requests and answers


def test_requests_are_open_until_they_are_answered():
    pair = Pair()
    pair.greet()
    assert pair.ask("load", OID, TID) == [Request(1, "load", [OID, TID])]
    assert pair.ask("get_tid", OID) == [Request(2, "get_tid", [OID])]
    assert pair.client.open_requests == pair.server.open_requests == {1, 2}
    assert pair.client.last_request == pair.server.last_request == 2
    reply = pair.server.reply(2, TID, LATER)
    assert pair.deliver(pair.server, reply) == [Reply(2, TID)]
    assert pair.client.open_requests == pair.server.open_requests == {1}
    failure = pair.server.failure(1, POSKeyError(OID), LATER)
    [received] = pair.deliver(pair.server, failure)
    assert isinstance(received, Failure)
    assert received.name == "POSKeyError"
    assert pair.client.open_requests == pair.server.open_requests == set()


@pytest.mark.parametrize("number", [0, 2, -1, 2**63])
def test_an_answer_to_what_was_never_asked_is_an_offence(number):
    pair = Pair()
    pair.greet()
    pair.ask("ping")
    assert pair.client.receive_data(encode(Reply(number, None)), LATER) == []
    assert pair.client.is_closed


def test_a_second_answer_is_an_offence():
    pair = Pair()
    pair.greet()
    pair.ask("ping")
    twice = pair.server.reply(1, None, LATER) * 2
    assert pair.client.receive_data(twice, LATER) == [Reply(1, None)]
    assert pair.client.is_closed


@pytest.mark.parametrize("number", [-1, 0, 1, 5])
def test_requests_count_up(number):
    server = in_state(Role.SERVER, State.CHANNEL)
    assert server.receive_data(encode(Request(5, "ping", [])), LATER)
    assert server.receive_data(encode(Request(number, "ping", [])), LATER) == []
    assert server.is_closed


def test_only_so_many_requests_are_open_at_once():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    for number in (1, 2, 3):
        assert server.receive_data(encode(Request(number, "ping", [])), LATER)
    server.reply(1, None, LATER)
    assert server.receive_data(encode(Request(4, "ping", [])), LATER)
    assert server.receive_data(encode(Request(5, "ping", [])), LATER) == []
    assert "more than 3 open requests" in str(server.error)
    assert server.open_requests == {2, 3, 4}


@pytest.mark.parametrize(
    "request_",
    [
        Request(1, "drop_table", []),
        Request(1, "", []),
        Request(1, "__class__", []),
        Request(1, "stage", [b"t" * 16, []]),
        Request(1, "changes", [[]]),
        Request(1, "load", []),
        Request(1, "load", [OID]),
        Request(1, "load", [OID, "tid45678"]),
        Request(1, "load", [OID, TID, None]),
        Notice("load", [OID, TID]),
        Notice("changes", [[]]),
        Notice("stage", [b"short", []]),
        Notice("x" * 10_000, []),
    ],
    ids=repr,
)
def test_a_call_that_is_not_in_the_table_of_methods_is_an_offence(request_):
    server = in_state(Role.SERVER, State.CHANNEL)
    assert server.receive_data(encode(request_), LATER) == []
    assert server.is_closed
    assert isinstance(server.error, RemoteProtocolError)
    assert len(str(server.error)) < 200


def test_a_client_takes_no_calls_but_changes():
    for notice in (Notice("stage", [b"t" * 16, []]), Notice("ping", [])):
        client = in_state(Role.CLIENT, State.STREAM)
        assert client.receive_data(encode(notice), LATER) == []
        assert client.is_closed


def test_what_came_before_the_offence_is_received():
    server = in_state(Role.SERVER, State.CHANNEL)
    good: list[Message] = [Request(1, "ping", []), Heartbeat(), Request(2, "info", [])]
    sent = [*good, Request(3, "nonsense", []), *good]
    assert server.receive_data(b"".join(map(encode, sent)), LATER) == good
    assert server.is_closed


def test_a_request_that_cannot_be_said_was_not_made():
    client = in_state(Role.CLIENT, State.CHANNEL)
    with pytest.raises(TypeError):
        client.request("load", [object()], LATER)
    assert client.open_requests == set()
    client.request("ping", [], LATER)
    assert client.last_request == 1


# Limits


def test_a_hello_may_be_small_and_nothing_else_comes_before_it():
    server = in_state(Role.SERVER, State.OPENING, SMALL)
    data = encode(Hello(hello_fields(label="x" * 1000)))
    assert server.receive_data(data[:4], LATER) == []
    assert server.is_closed
    assert "1 to 1000 are allowed" in str(server.error)


def test_frames_may_be_large_after_the_welcome():
    pair = Pair(SMALL)
    pair.greet()
    data = b"x" * 4000
    transaction = b"t" * 16
    sent = pair.client.notice(
        "stage", [transaction, [["store", OID, TID, data]]], LATER
    )
    assert len(sent) > SMALL.hello_frame_bytes_max
    assert len(pair.deliver(pair.client, sent)) == 1


def test_a_welcome_may_be_large():
    pair = Pair(SMALL)
    pair.deliver(pair.client, pair.client.hello(hello_fields(), 0.0))
    changes = [[TID, TID, [OID] * 200, None]]
    welcome = pair.server.welcome(welcome_fields(changes=changes), LATER)
    assert len(welcome) > SMALL.hello_frame_bytes_max
    assert len(pair.deliver(pair.server, welcome)) == 1


def test_a_frame_beyond_the_limit_is_refused_by_its_length():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    length = SMALL.frame_bytes_max + 1
    server.receive_data(length.to_bytes(4, "big"), LATER)
    assert server.is_closed
    assert "a frame of 5001 bytes" in str(server.error)


# Answers that are made at once, without the codec


def answer_seven(_data: bytes, last_request: int) -> tuple[int, bytes] | None:
    """Answers request 7, whatever is asked."""
    return (7, b"the answer") if last_request < 7 else None


def test_what_is_answered_at_once_was_received_and_sent():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    assert server.answer_at_once(b"data", LATER, answer_seven) == b"the answer"
    assert server.last_request == 7
    assert server.sent_at == server.rcvd_at == LATER
    assert not server.open_requests
    # Its number is used.
    assert server.receive_data(encode(Request(7, "ping", [])), LATER) == []
    assert "request 7 after request 7" in str(server.error)


def test_what_is_not_answered_at_once_has_changed_nothing():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    request = Request(9, "ping", [])
    assert server.receive_data(encode(request), 1.0) == [request]
    assert server.answer_at_once(b"data", LATER, answer_seven) is None
    assert (server.last_request, server.sent_at, server.rcvd_at) == (9, 0.0, 1.0)
    assert server.open_requests == {9}


@every_state
def test_only_what_comes_on_a_channel_to_a_server_is_answered_at_once(role, state):
    end = in_state(role, state)
    answered = end.answer_at_once(b"data", LATER, answer_seven)
    assert (answered is not None) is (role is Role.SERVER and state is State.CHANNEL)


def test_what_comes_inside_a_frame_is_not_answered_at_once():
    server = in_state(Role.SERVER, State.CHANNEL)
    ping = encode(Request(1, "ping", []))
    assert server.receive_data(ping[:5], 1.0) == []
    assert server.answer_at_once(ping[5:], LATER, answer_seven) is None
    assert server.receive_data(ping[5:], LATER) == [Request(1, "ping", [])]
    assert server.answer_at_once(b"data", LATER, answer_seven) is not None


def test_with_too_many_open_requests_nothing_is_answered_at_once():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    for number in range(1, SMALL.requests_open_max + 1):
        assert server.receive_data(encode(Request(number, "ping", [])), 1.0)
    assert server.answer_at_once(b"data", LATER, answer_seven) is None
    server.reply(1, None, LATER)
    assert server.answer_at_once(b"data", LATER, answer_seven) is not None


@pytest.mark.parametrize("beyond", [0, 1])
def test_an_answer_at_once_is_no_larger_than_any(beyond):
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    sent = bytes(SMALL.frame_bytes_max + beyond)
    answered = server.answer_at_once(b"data", LATER, lambda _data, _last: (1, sent))
    assert (answered is None) is (beyond > 0)
    assert server.last_request == 1 - beyond


def test_what_the_peer_would_refuse_as_too_large_is_not_sent():
    pair = Pair(SMALL)
    pair.greet()
    pair.ask("ping")
    with pytest.raises(LocalProtocolError, match="frame_bytes_max is 5000"):
        pair.server.reply(1, b"x" * 5000, LATER)
    # So that the owner can answer with an error instead.
    assert pair.server.open_requests == {1}
    assert pair.server.failure(1, ReadOnlyError(), LATER)


def test_a_closed_connection_keeps_nothing_of_what_still_comes():
    server = in_state(Role.SERVER, State.CLOSED)
    for _ in range(3):
        assert server.receive_data(b"\0\0\xff\xff" + b"x" * 1000, LATER) == []
    assert server._reader.have_bytes == 0


# The end


@pytest.mark.parametrize("state", [State.STREAM, State.CHANNEL])
def test_a_goodbye_ends_the_conversation_for_both(state):
    pair = Pair()
    pair.greet(state.value)
    said = pair.server.goodbye("stopping", "the server stops", LATER)
    [received] = pair.deliver(pair.server, said)
    assert received == Goodbye("stopping", "the server stops")
    assert pair.server.is_closed
    assert pair.client.is_closed
    assert pair.client.goodbye_rcvd is not None
    assert str(pair.client.error) == "stopping: the server stops"


def test_nothing_is_received_behind_a_goodbye():
    client = in_state(Role.CLIENT, State.STREAM)
    data = encode(Goodbye("stopping", "")) + HEARTBEAT
    assert client.receive_data(data, LATER) == [Goodbye("stopping", "")]
    assert str(client.error) == "stopping: "


@every_state
def test_goodbye_can_be_said_at_any_time_and_says_something_where_it_may(role, state):
    end = in_state(role, state)
    said = end.goodbye("closing", "", LATER)
    assert bool(said) is (Goodbye in SENDING[role][state])
    assert end.is_closed


def test_the_farewell_tells_the_peer_what_it_did_wrong():
    pair = Pair()
    pair.greet()
    pair.server.receive_data(encode(Request(1, "nonsense", [])), LATER)
    [goodbye] = pair.deliver(pair.server, pair.server.farewell())
    assert isinstance(goodbye, Goodbye)
    assert goodbye.reason == "protocol"
    assert "nonsense" in goodbye.text
    assert pair.client.is_closed


# Heartbeats: time is an argument


def ticks(end: Connection, *moments: float) -> list[bytes]:
    return [end.tick(now) for now in moments]


@pytest.mark.parametrize("role", Role)
def test_both_ends_of_a_stream_beat_when_they_had_nothing_to_say(role):
    end = in_state(role, State.STREAM, SMALL)
    assert ticks(end, 0.0, 2.4, 2.5, 2.6, 4.9, 5.0) == [
        b"",
        b"",
        HEARTBEAT,
        b"",
        b"",
        HEARTBEAT,
    ]


def test_a_reply_that_the_owner_encoded_is_an_answer_like_any():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    server.receive_data(encode(Request(1, "ping", [])), 1.0)
    server.answered(1, 2.0)
    assert not server.open_requests
    assert server.sent_at == 2.0


def test_whatever_is_said_counts_as_a_heartbeat():
    server = in_state(Role.SERVER, State.STREAM, SMALL)
    server.notice("changes", [[]], 2.0)
    assert server.tick(2.6) == b""
    server.sent_shared(4.0)
    assert ticks(server, 6.4, 6.5) == [b"", HEARTBEAT]


@pytest.mark.parametrize("role", Role)
def test_a_stream_is_given_up_when_the_peer_is_silent(role):
    end = in_state(role, State.STREAM, SMALL)
    end.receive_data(HEARTBEAT, 3.0)
    end.tick(23.0)
    assert end.is_open
    assert end.tick(23.1) == b""
    assert end.is_closed
    assert str(end.error) == "silent for 20 s"


def test_half_a_message_is_a_sign_of_life():
    end = in_state(Role.CLIENT, State.STREAM, SMALL)
    end.receive_data(HEARTBEAT[:2], 15.0)
    end.tick(30.0)
    assert end.is_open


@pytest.mark.parametrize("role", Role)
def test_a_channel_that_nobody_waits_on_may_be_silent_for_days(role):
    end = in_state(role, State.CHANNEL, SMALL)
    assert ticks(end, 10.0, 100.0, 1e6) == [b""] * 3
    assert end.is_open


def test_half_a_frame_is_not_kept_for_a_silent_client():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    request = encode(Request(1, "ping", []))
    server.receive_data(request[:5], 100.0)
    server.receive_data(request[5:7], 119.0)
    server.tick(139.0)
    assert server.is_open, "slow is not silent"
    server.tick(139.1)
    assert str(server.error) == "silent for 20 s"


def test_the_server_beats_on_a_channel_while_it_owes_an_answer():
    server = in_state(Role.SERVER, State.CHANNEL, SMALL)
    server.receive_data(encode(Request(1, "pack", [1.0, None])), 100.0)
    assert server.tick(100.1) == HEARTBEAT
    assert ticks(server, 102.5, 102.6) == [b"", HEARTBEAT]
    server.reply(1, None, 103.0)
    assert ticks(server, 110.0, 1000.0) == [b"", b""]
    assert server.is_open


def test_a_client_that_waits_gives_up_a_silent_server():
    client = in_state(Role.CLIENT, State.CHANNEL, SMALL)
    client.request("pack", [1.0, None], 0.0)
    client.receive_data(HEARTBEAT, 10.0)
    assert client.tick(30.0) == b""
    assert client.is_open
    client.tick(30.1)
    assert client.is_closed


def test_silence_counts_from_when_somebody_waits():
    """The channel was idle before, and rightly silent."""
    client = in_state(Role.CLIENT, State.CHANNEL, SMALL)
    client.request("ping", [], 1000.0)
    client.tick(1010.0)
    assert client.is_open
    client.request("ping", [], 1015.0)
    client.tick(1020.1)
    assert client.is_closed


def test_a_heartbeat_is_heard_and_needs_no_answer():
    pair = Pair()
    pair.greet("stream")
    assert pair.deliver(pair.server, HEARTBEAT) == [Heartbeat()]
    assert pair.client.tick(0.1) == b""


def test_who_does_not_say_hello_in_time_is_given_up():
    server = in_state(Role.SERVER, State.OPENING, SMALL)
    assert server.tick(10.0) == b""
    assert not server.is_closed
    server.tick(10.1)
    assert server.is_closed
    assert str(server.error).startswith("no hello in time: ")


def test_a_hello_that_trickles_in_is_no_hello_in_time():
    server = in_state(Role.SERVER, State.OPENING, SMALL)
    for second, byte in enumerate(encode(Hello(hello_fields()))[:11], 1):
        assert server.state is State.OPENING
        server.receive_data(bytes([byte]), second)
        server.tick(second)
    assert server.is_closed
    assert str(server.error).startswith("no hello in time: ")


@pytest.mark.parametrize("state", [State.OPENING, State.GREETED])
def test_what_comes_before_the_welcome_is_bounded(state):
    limits = replace(SMALL, hello_bytes_max=4000)
    server = in_state(Role.SERVER, state, limits)
    hello = encode(Hello(hello_fields()))
    assert server.receive_data(hello + bytes(4000), 1.0) == []
    assert server.is_closed
    assert "more than 4000 bytes before the welcome" in str(server.error)


def bomb(items: int) -> bytes:
    """A frame in which a thousand arrays promise so many items each, and have one."""
    return frame((b"\xdd" + items.to_bytes(4, "big")) * 1000)


def test_an_array_before_the_welcome_is_bounded_before_it_is_made():
    server = in_state(Role.SERVER, State.OPENING)
    tracemalloc.start()
    try:
        assert server.receive_data(bomb(5000), 1.0) == []
        _now, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "5000 exceeds max_array_len(64)" in str(server.error)
    assert peak_bytes < 1_000_000


def test_a_hello_with_few_capabilities_is_not_too_long():
    server = in_state(Role.SERVER, State.OPENING)
    fields = hello_fields(capabilities=[f"capability {n}" for n in range(60)])
    assert len(server.receive_data(encode(Hello(fields)), 1.0)) == 1


def test_a_bomb_of_arrays_leaves_nothing_behind():
    """From whoever was welcomed; some versions of msgpack keep it all for ever."""
    server = in_state(Role.SERVER, State.CHANNEL)
    tracemalloc.start()
    try:
        server.receive_data(bomb(4000), 1.0)
        now_bytes, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "not msgpack" in str(server.error)
    assert now_bytes < 100_000


def test_what_comes_after_the_welcome_is_not_counted():
    limits = replace(SMALL, hello_bytes_max=1000)
    server = in_state(Role.SERVER, State.CHANNEL, limits)
    for number in range(1, 100):
        server.receive_data(encode(Request(number, "ping", [])), 1.0)
        server.reply(number, None, 1.0)
    assert server.is_open


def test_a_client_takes_a_long_welcome():
    client = in_state(Role.CLIENT, State.GREETED, replace(SMALL, hello_bytes_max=1000))
    welcome = welcome_fields(interfaces=["x" * 4000])
    assert len(client.receive_data(encode(Welcome(welcome)), 1.0)) == 1


@pytest.mark.parametrize("state", [State.STREAM, State.CHANNEL])
def test_heartbeats_are_no_way_to_keep_a_server_busy(state):
    server = in_state(Role.SERVER, state, replace(SMALL, heartbeats_max=10))
    for second in range(5):
        assert len(server.receive_data(HEARTBEAT * 10, second)) == 10
        server.tick(second)
    received = server.receive_data(HEARTBEAT * 11, 5.0)
    assert len(received) == 10
    assert "more than 10 heartbeats at once" in str(server.error)


def test_a_server_that_was_stopped_for_long_may_beat_often():
    client = in_state(Role.CLIENT, State.STREAM, replace(SMALL, heartbeats_max=10))
    assert len(client.receive_data(HEARTBEAT * 100, 1.0)) == 100


def test_a_server_that_does_not_answer_the_hello_is_given_up():
    client = in_state(Role.CLIENT, State.GREETED, SMALL)
    client.tick(10.1)
    assert client.is_closed


@pytest.mark.parametrize("kind", SocketKind)
def test_two_ends_that_tick_never_give_each_other_up(kind):
    """With a tick every half interval, and every third heartbeat lost."""
    pair = Pair(SMALL)
    pair.greet(kind.value)
    if kind is SocketKind.CHANNEL:
        pair.ask("pack", 1.0, None)
    half = SMALL.heartbeat_interval_s / 2
    for beat in range(200):
        pair.now = beat * half
        for end in (pair.client, pair.server):
            data = end.tick(pair.now)
            if beat % 3:
                pair.deliver(end, data)
    assert pair.client.is_open
    assert pair.server.is_open


def test_limits_of_the_two_ends_need_not_be_the_same():
    pair = Pair(replace(SMALL, requests_open_max=1), server_limits=SMALL)
    pair.greet()
    for _ in range(SMALL.requests_open_max):
        assert pair.ask("ping")
    assert pair.server.is_open


class Conversation(RuleBasedStateMachine):
    """Whatever two ends that keep to the rules do: neither finds fault with the other.

    What is under way in a direction is a list of bytes; a delivery takes some of it.
    """

    @initialize(kind=st.sampled_from(["stream", "channel"]))
    def open(self, kind: str) -> None:
        self.pair = Pair()
        self.kind = kind
        self.now = 0.0
        self.under_way = {Role.CLIENT: b"", Role.SERVER: b""}
        self.sent: dict[Role, list[Message]] = {Role.CLIENT: [], Role.SERVER: []}
        self.heard: dict[Role, list[Message]] = {Role.CLIENT: [], Role.SERVER: []}
        fields = hello_fields(kind)
        self.say(Role.CLIENT, Hello(fields), self.pair.client.hello(fields, 0.0))

    def say(self, role: Role, message: Message, data: bytes) -> None:
        self.sent[role].append(message)
        self.under_way[role] += data

    def end(self, role: Role) -> Connection:
        return self.pair.client if role is Role.CLIENT else self.pair.server

    @rule(role=st.sampled_from(Role), count=st.integers(1, 300))
    def deliver(self, role: Role, count: int) -> None:
        data = self.under_way[role][:count]
        self.under_way[role] = self.under_way[role][count:]
        receiver = self.pair.other(self.end(role))
        self.heard[role] += receiver.receive_data(data, self.now)

    @precondition(lambda self: self.pair.server.state is State.GREETED)
    @rule()
    def welcome(self) -> None:
        fields = welcome_fields()
        data = self.pair.server.welcome(fields, self.now)
        self.say(Role.SERVER, Welcome(fields), data)

    @precondition(lambda self: self.pair.client.state is State.CHANNEL)
    @rule(call=calls("client", answers=True))
    def ask(self, call: tuple[str, list[Any]]) -> None:
        client = self.pair.client
        data = client.request(*call, self.now)
        self.say(Role.CLIENT, Request(client.last_request, *call), data)

    @precondition(lambda self: self.pair.client.state is State.CHANNEL)
    @rule(call=calls("client", answers=False))
    def stage(self, call: tuple[str, list[Any]]) -> None:
        data = self.pair.client.notice(*call, self.now)
        self.say(Role.CLIENT, Notice(*call), data)

    @precondition(lambda self: self.pair.server.open_requests)
    @precondition(lambda self: self.pair.server.state is State.CHANNEL)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        server = self.pair.server
        number = data.draw(st.sampled_from(sorted(server.open_requests)))
        self.say(Role.SERVER, Reply(number, OID), server.reply(number, OID, self.now))

    @precondition(lambda self: self.pair.server.state is State.STREAM)
    @rule(call=calls("server", answers=False))
    def publish(self, call: tuple[str, list[Any]]) -> None:
        data = self.pair.server.notice(*call, self.now)
        self.say(Role.SERVER, Notice(*call), data)

    @rule(role=st.sampled_from(Role), seconds=st.floats(0, 1))
    def tick(self, role: Role, seconds: float) -> None:
        """Time never runs so far that anybody was silent for too long."""
        self.now = min(self.now + seconds, 9.0)
        data = self.end(role).tick(self.now)
        if data:
            self.say(role, Heartbeat(), data)

    @precondition(lambda self: self.pair.client.is_open)
    @rule(role=st.sampled_from(Role))
    def hang_up(self, role: Role) -> None:
        if self.end(role).is_open:
            data = self.end(role).goodbye("closing", "", self.now)
            self.say(role, Goodbye("closing", ""), data)

    @invariant()
    def nobody_finds_fault(self) -> None:
        for end in (self.pair.client, self.pair.server):
            assert end.error is None or end.goodbye_rcvd

    @invariant()
    def what_is_heard_is_what_was_said(self) -> None:
        for role in Role:
            heard = self.heard[role]
            assert heard == self.sent[role][: len(heard)]

    @invariant()
    def the_server_knows_no_request_that_was_not_made(self) -> None:
        client, server = self.pair.client, self.pair.server
        assert server.last_request <= client.last_request
        if client.is_open:
            unheard = range(server.last_request + 1, client.last_request + 1)
            assert client.open_requests >= server.open_requests | set(unheard)


TestConversation = Conversation.TestCase

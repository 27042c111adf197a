"""One socket's conversation, for either end, without the socket.

A Connection is fed what a socket received and returns the messages in it; it turns
what its owner wants to say into bytes. It knows the state of the conversation, the
requests that are open, and when a heartbeat is due or overdue; time comes in as
``now`` (seconds of any steady clock). It belongs to one thread at a time: the server's
loop, or the client thread that holds the socket.

Two rules (after h11): every change of state is a row of ``RECEIVING`` or ``SENDING``,
and what is not in the tables is a protocol error, the peer's or ours.

::

              Hello              Welcome
    OPENING ---------> GREETED ------------> STREAM   changes and heartbeats
                       |  ^ |      `-------> CHANNEL  requests and replies
             Challenge |  | | Failure
                       v  | `-> CLOSED <------- Goodbye, or an error
                 CHALLENGED
                    Response
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

from zeolith.protocol import errors
from zeolith.protocol.codec import decode, encode
from zeolith.protocol.errors import LocalProtocolError, RemoteProtocolError
from zeolith.protocol.frames import FrameReader
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.loads import (
    decode_load,
    decode_loaded,
    encode_load,
    encode_loaded,
)
from zeolith.protocol.messages import (
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
from zeolith.protocol.methods import HELLO, METHODS, VERSION, WELCOME, check_fields


class Role(Enum):
    """Which end of the socket this is."""

    CLIENT = "client"
    SERVER = "server"


class SocketKind(Enum):
    """What a socket is for; the Hello says it."""

    STREAM = "stream"
    CHANNEL = "channel"


class State(Enum):
    """Where the conversation stands."""

    # Enum's own is a function in Python, and every message asks for it twice.
    __hash__ = object.__hash__

    OPENING = "opening"
    GREETED = "greeted"
    CHALLENGED = "challenged"
    STREAM = "stream"
    CHANNEL = "channel"
    CLOSED = "closed"


_OPENED = {SocketKind.STREAM: State.STREAM, SocketKind.CHANNEL: State.CHANNEL}
# A Welcome leads to the state that the Hello asked for.
_AS_ASKED = State.OPENING

_Table = dict[State, dict[type[Message], State]]
_FROM_CLIENT: _Table = {
    State.OPENING: {Hello: State.GREETED},
    State.GREETED: {Goodbye: State.CLOSED},
    State.CHALLENGED: {Response: State.GREETED, Goodbye: State.CLOSED},
    State.STREAM: {Heartbeat: State.STREAM, Goodbye: State.CLOSED},
    State.CHANNEL: {
        Request: State.CHANNEL,
        Notice: State.CHANNEL,
        Heartbeat: State.CHANNEL,
        Goodbye: State.CLOSED,
    },
    State.CLOSED: {},
}
_FROM_SERVER: _Table = {
    State.OPENING: {Goodbye: State.CLOSED},
    State.GREETED: {
        Welcome: _AS_ASKED,
        Challenge: State.CHALLENGED,
        Failure: State.CLOSED,
        Goodbye: State.CLOSED,
    },
    State.CHALLENGED: {Goodbye: State.CLOSED},
    State.STREAM: {
        Notice: State.STREAM,
        Heartbeat: State.STREAM,
        Goodbye: State.CLOSED,
    },
    State.CHANNEL: {
        Reply: State.CHANNEL,
        Failure: State.CHANNEL,
        Heartbeat: State.CHANNEL,
        Goodbye: State.CLOSED,
    },
    State.CLOSED: {},
}
# For all of them together there is one time-out.
_BEFORE_WELCOME = (State.OPENING, State.GREETED, State.CHALLENGED)
RECEIVING = {Role.CLIENT: _FROM_SERVER, Role.SERVER: _FROM_CLIENT}
SENDING = {Role.CLIENT: _FROM_CLIENT, Role.SERVER: _FROM_SERVER}

HEARTBEAT = encode(Heartbeat())

# What some bytes ask for and its answer, as a frame, without the general codec; None
# for all that it does not know, or does not follow the request with that number.
Answer = Callable[[bytes, int], tuple[int, bytes] | None]


class Connection:
    """The conversation on one socket, as its ``role`` sees it."""

    def __init__(self, role: Role, now: float, limits: Limits = DEFAULT):
        self.role = role
        self.limits = limits
        self.state = State.OPENING
        # What the Hello asked for; None before it.
        self.kind: SocketKind | None = None
        # Why the conversation ended, for the owner's log and errors; None until then.
        self.error: Exception | None = None
        # The peer's last words, if it had any.
        self.goodbye_rcvd: Goodbye | None = None
        # Requests sent (client) or received (server) that have no answer yet.
        self.open_requests: set[int] = set()
        # When this end last said something, and when it last heard something.
        self.sent_at = self.rcvd_at = now
        # When the time for the hello began.
        self._began_at = now
        # What a client may still send before it is welcomed, and until the next tick.
        self._hello_bytes_left = limits.hello_bytes_max
        self._heartbeats_left = limits.heartbeats_max
        self._last_request = 0
        # A client trusts the server it dialled with a long welcome.
        self._reader = FrameReader(
            limits.hello_frame_bytes_max
            if role is Role.SERVER
            else limits.frame_bytes_max
        )
        # What an array may have, of whoever is not known.
        self._items_max = limits.hello_items_max if role is Role.SERVER else -1
        self._receiving = RECEIVING[role]
        self._sending = SENDING[role]
        # For a frame with its prefix, so a little less than is allowed.
        self._known_bytes_max = limits.frame_bytes_max
        # For loads, and only on a channel: whether this end asks or answers, and how
        # it recognises the frame that the other end makes of one.
        self._asks_loads = self._answers_loads = False
        self._recognise: Callable[[bytes], Request | Reply | None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the hello was accepted and the conversation goes on."""
        return self.state is State.STREAM or self.state is State.CHANNEL

    # Receiving

    def receive_data(self, data: bytes, now: float) -> list[Message]:
        """The messages that ``data`` completes, checked against state and table.

        After an offence of the peer's the list ends before it, ``error`` says what it
        was and ``is_closed`` is true: the owner sends ``farewell()`` and hangs up.
        """
        self.rcvd_at = now
        if self._recognise is not None and not self._reader.have_bytes:
            known = self._recognise(data)
            if known is not None and self._accept_known(known, len(data)):
                return [known]
        state = self.state
        if (
            state is not State.CHANNEL
            and state is not State.STREAM
            and not self._may_feed(len(data))
        ):
            return []
        received: list[Message] = []
        try:
            for payload in self._reader.feed(data):
                message = decode(payload, self._items_max)
                self._accept(message)
                received.append(message)
                if self.state is State.CLOSED:
                    break
        except RemoteProtocolError as error:
            self._fail(error)
        return received

    def answer_at_once(self, data: bytes, now: float, answer: Answer) -> bytes | None:
        """Server: the frame that ``answer`` makes for ``data``, to be sent; or None.

        Then nothing has happened, and ``data`` is for ``receive_data``. ``answer``
        knows only loads, which may come on a channel and only between two frames.
        """
        if (
            not self._answers_loads
            or self._reader.have_bytes
            or len(self.open_requests) >= self.limits.requests_open_max
        ):
            return None
        answered = answer(data, self._last_request)
        if answered is None:
            return None
        number, sent = answered
        # What asks is shorter than the hello was.
        if len(sent) > self._known_bytes_max:
            return None
        self._last_request = number
        self.rcvd_at = self.sent_at = now
        return sent

    @property
    def is_closed(self) -> bool:
        """Whether the conversation is over."""
        return self.state is State.CLOSED

    def _may_feed(self, size: int) -> bool:
        """Whether ``size`` bytes more may be looked at, before the welcome."""
        if self.state is State.CLOSED:
            return False
        if self.role is Role.SERVER:
            self._hello_bytes_left -= size
            if self._hello_bytes_left < 0:
                self._fail(
                    RemoteProtocolError(
                        f"more than {self.limits.hello_bytes_max} bytes before the"
                        " welcome (hello_bytes_max)"
                    )
                )
                return False
        return True

    def _accept(self, message: Message) -> None:
        kind = type(message)
        try:
            state = self._receiving[self.state][kind]
        except KeyError:
            raise RemoteProtocolError(
                f"a {kind.__name__} is not expected in state {self.state.value}"
            ) from None
        if kind is Reply or kind is Failure:
            self._accept_answer(message)  # type: ignore[arg-type]
        elif kind is Request:
            self._accept_request(message)  # type: ignore[arg-type]
        elif kind is Notice:
            self._check_call(message.method, message.args, False)  # type: ignore[union-attr]
        elif kind is Hello:
            self._accept_hello(message.fields)  # type: ignore[union-attr]
        elif kind is Heartbeat:
            self._accept_heartbeat()
        elif kind is Welcome:
            check_fields("Welcome", message.fields, WELCOME)  # type: ignore[union-attr]
        elif kind is Challenge or kind is Response:
            self._check_login(message.text)  # type: ignore[union-attr]
        elif kind is Goodbye:
            self.goodbye_rcvd = message  # type: ignore[assignment]
            self.error = RemoteProtocolError(f"{message.reason}: {message.text}")  # type: ignore[union-attr]
        if state is not self.state:
            self._enter(state)

    def _accept_known(self, message: Request | Reply, size: int) -> bool:
        """Accept a frame that was recognised; false if it must be looked at again.

        What ``_accept`` does for a load and its answer, but for errors: these are the
        general way's, which finds the same.
        """
        number = message[0]
        if size > self._known_bytes_max:
            return False
        if self._asks_loads:
            if number not in self.open_requests:
                return False
            self.open_requests.discard(number)
            return True
        if number <= self._last_request:
            return False
        if len(self.open_requests) >= self.limits.requests_open_max:
            return False
        self._last_request = number
        self.open_requests.add(number)
        return True

    def _accept_answer(self, answer: Reply | Failure) -> None:
        if self.state is State.GREETED:
            assert isinstance(answer, Failure)
            self.error = errors.error_of(answer.name, answer.attributes, answer.text)
        elif answer.id not in self.open_requests:
            raise RemoteProtocolError(f"an answer to request {answer.id}, never asked")
        else:
            self.open_requests.discard(answer.id)

    def _accept_request(self, request: Request) -> None:
        if request.id <= self._last_request:
            raise RemoteProtocolError(
                f"request {request.id} after request {self._last_request}"
            )
        self._last_request = request.id
        if len(self.open_requests) >= self.limits.requests_open_max:
            raise RemoteProtocolError(
                f"more than {self.limits.requests_open_max} open requests; wait for"
                " answers (requests_open_max)"
            )
        self._check_call(request.method, request.args, True)
        self.open_requests.add(request.id)

    def _accept_heartbeat(self) -> None:
        if self.role is Role.SERVER:
            self._heartbeats_left -= 1
            if self._heartbeats_left < 0:
                raise RemoteProtocolError(
                    f"more than {self.limits.heartbeats_max} heartbeats at once"
                    " (heartbeats_max)"
                )

    def _check_call(self, name: str, args: list[Any], answers: bool) -> None:
        method = METHODS.get(name)
        if method is None or method.answers is not answers:
            raise RemoteProtocolError(f"there is no method {name[:40]!r}")
        if (method.sender == "client") is not (self.role is Role.SERVER):
            raise RemoteProtocolError(f"{name} is not sent by the {method.sender}")
        method.check(args)

    def _accept_hello(self, fields: dict[str, Any]) -> None:
        if fields.get("version") != VERSION:
            # Its other fields may be anything; the owner refuses it with a reason.
            self.kind = SocketKind.STREAM
            return
        check_fields("Hello", fields, HELLO)
        if fields["login"] is not None:
            self._check_login(fields["login"][1])
        try:
            self.kind = SocketKind(fields["kind"])
        except ValueError:
            raise RemoteProtocolError(
                f"a Hello for a {fields['kind'][:20]!r}"
            ) from None

    def _check_login(self, text: str) -> None:
        if len(text) > self.limits.login_chars_max:
            raise RemoteProtocolError(
                f"{len(text)} characters of a login, which are more than"
                f" {self.limits.login_chars_max}"
            )

    def _enter(self, state: State) -> None:
        if state is _AS_ASKED:
            assert self.kind is not None
            state = _OPENED[self.kind]
            self._reader.bound(self.limits.frame_bytes_max, "frame_bytes_max")
            if self.role is Role.SERVER:
                self._items_max = self.limits.array_items_max
        self._turn_to(state)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._turn_to(State.CLOSED)

    def _turn_to(self, state: State) -> None:
        self.state = state
        is_channel = state is State.CHANNEL
        self._asks_loads = is_channel and self.role is Role.CLIENT
        self._answers_loads = is_channel and self.role is Role.SERVER
        self._recognise = None
        if is_channel:
            self._recognise = decode_loaded if self._asks_loads else decode_load

    # Sending: each method returns the bytes to send, and nothing else is sent

    def hello(self, fields: dict[str, Any], now: float) -> bytes:
        """Client: the first message; see methods.HELLO for ``fields``."""
        self.kind = SocketKind(fields["kind"])
        return self._send(Hello(fields), now)

    def welcome(self, fields: dict[str, Any], now: float) -> bytes:
        """Server: accept the peer; see methods.WELCOME for ``fields``."""
        return self._send(Welcome(fields), now)

    def refuse(self, error: Exception, now: float) -> bytes:
        """Server: answer the Hello with ``error``; the conversation is over."""
        return self._send(Failure(0, *errors.failure_of(error)), now)

    def challenge(self, text: str, now: float) -> bytes:
        """Server: have the peer prove who it is, before it is welcome."""
        return self._send(Challenge(text), now)

    def respond(self, text: str, now: float) -> bytes:
        """Client: the answer to a challenge."""
        return self._send(Response(text), now)

    def request(self, method: str, args: list[Any], now: float) -> bytes:
        """Client: ask; the answer carries the id in ``last_request``."""
        number = self._last_request + 1
        sent = None
        if self._asks_loads:
            if method == "load":
                sent = encode_load(number, args)
            # Other answers need not be looked at twice.
            self._recognise = None if sent is None else decode_loaded
        if sent is None or len(sent) > self._known_bytes_max:
            sent = self._send(Request(number, method, args), now)
        self.sent_at = now
        self._last_request = number
        if not self.open_requests:
            # A channel may have been silent, for nobody waited; from now on it counts.
            self.rcvd_at = now
        self.open_requests.add(number)
        return sent

    @property
    def last_request(self) -> int:
        """The id of the request that was last sent or received."""
        return self._last_request

    def reply(self, number: int, value: Any, now: float) -> bytes:
        """Server: the value of request ``number``."""
        sent = encode_loaded(number, value) if self._answers_loads else None
        if sent is None or len(sent) > self._known_bytes_max:
            sent = self._send(Reply(number, value), now)
        self.sent_at = now
        self.open_requests.discard(number)
        return sent

    def answered(self, number: int, now: float) -> None:
        """Server: the owner has sent what it encoded as the reply to ``number``."""
        self.sent_at = now
        self.open_requests.discard(number)

    def failure(self, number: int, error: BaseException, now: float) -> bytes:
        """Server: the error of request ``number``."""
        sent = self._send(Failure(number, *errors.failure_of(error)), now)
        self.open_requests.discard(number)
        return sent

    def notice(self, method: str, args: list[Any], now: float) -> bytes:
        """Either end: a call without an answer."""
        return self._send(Notice(method, args), now)

    def sent_shared(self, now: float) -> None:
        """The owner sends bytes that were encoded once for many connections."""
        self.sent_at = now

    def goodbye(self, reason: str, text: str, now: float) -> bytes:
        """The last words; empty if the state knows none. The conversation is over."""
        if Goodbye not in self._sending[self.state]:
            self._turn_to(State.CLOSED)
            return b""
        return self._send(Goodbye(reason, text), now)

    def farewell(self) -> bytes:
        """The last words to a peer that broke the rules; state is CLOSED already."""
        return encode(Goodbye("protocol", str(self.error)))

    def _send(self, message: Message, now: float) -> bytes:
        try:
            state = self._sending[self.state][type(message)]
        except KeyError:
            raise LocalProtocolError(
                f"a {type(message).__name__} cannot be sent in state {self.state.value}"
            ) from None
        data = encode(message)
        if len(data) > self.limits.frame_bytes_max:
            raise LocalProtocolError(
                f"a message of {len(data)} bytes is too large for the wire"
                f" (frame_bytes_max is {self.limits.frame_bytes_max})"
            )
        if state is not self.state:
            self._enter(state)
        self.sent_at = now
        return data

    # Heartbeats

    @property
    def _must_beat(self) -> bool:
        """Whether the peer waits for a sign of life from this end.

        On a stream both ends do, always. On a channel it is the client that waits for
        an answer: a channel nobody waits on may be silent for days.
        """
        if self.state is State.STREAM:
            return True
        return (
            self.state is State.CHANNEL
            and self.role is Role.SERVER
            and bool(self.open_requests)
        )

    def frame_end(self, data: bytes, start: int = 0) -> int:
        """Where the first frame of ``data[start:]``, which is to be received, ends."""
        return self._reader.frame_end(data, start)

    def bound_frames(self, bytes_max: int, name: str) -> None:
        """Server: receive no longer frame after the welcome; the limit's ``name``."""
        self._reader.bound(min(bytes_max, self.limits.frame_bytes_max), name)

    @property
    def is_inside_frame(self) -> bool:
        """Whether the rest of a frame is still to come."""
        return self._reader.have_bytes > 0

    @property
    def _must_hear(self) -> bool:
        if self.state is State.STREAM:
            return True
        if self.state is not State.CHANNEL:
            return False
        if self.role is Role.CLIENT:
            return bool(self.open_requests)
        # Half of a large frame takes the memory of half of it.
        return self.is_inside_frame

    def tick(self, now: float) -> bytes:
        """What is due at ``now``: a heartbeat to send, or nothing (b"").

        A peer silent for too long ends the conversation: look at ``is_closed``. Call
        it at least every half ``heartbeat_interval_s``.
        """
        limits = self.limits
        self._heartbeats_left = limits.heartbeats_max
        if self.state in _BEFORE_WELCOME:
            if now - self._began_at > limits.hello_timeout_s:
                self._fail(
                    RemoteProtocolError(
                        f"no hello in time: {limits.hello_timeout_s:g} s"
                        " (hello_timeout_s)"
                    )
                )
            return b""
        if self._must_hear and now - self.rcvd_at > limits.heartbeat_timeout_s:
            self._fail(
                RemoteProtocolError(f"silent for {limits.heartbeat_timeout_s:g} s")
            )
            return b""
        if self._must_beat and now - self.sent_at >= limits.heartbeat_interval_s / 2:
            self.sent_at = now
            return HEARTBEAT
        return b""

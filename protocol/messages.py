"""The ten kinds of message, as they look between codec and connection.

Plain named tuples: no behaviour, and no trust either, for what came from a peer is of
the right shape only after ``codec.decode`` (fields) and ``methods`` (arguments).

========= ========= ============================================================
kind      from      meaning
========= ========= ============================================================
Hello     client    first message of a socket: who I am and what I want
Welcome   server    accepted; everything a client must know, in one answer
Request   client    a method to call; ``id`` names the answer
Reply     server    what request ``id`` returned
Failure   server    what request ``id`` raised; id 0 answers the Hello
Notice    both      a method that is not answered
Heartbeat both      nothing but a sign of life
Goodbye   both      last message of a socket: why it ends
Challenge server    what a client must answer to prove who it is
Response  client    the answer
========= ========= ============================================================
"""

from typing import Any, NamedTuple


class Hello(NamedTuple):
    """A client's first message; its fields are in methods.HELLO."""

    fields: dict[str, Any]


class Welcome(NamedTuple):
    """The server's answer to an accepted Hello; its fields are in methods.WELCOME."""

    fields: dict[str, Any]


class Request(NamedTuple):
    """A call that wants an answer. Ids count up from 1 on each socket."""

    id: int
    method: str
    args: list[Any]


class Reply(NamedTuple):
    """The value that a request returned."""

    id: int
    value: Any


class Failure(NamedTuple):
    """The error that a request raised; see errors.error_of."""

    id: int
    name: str
    attributes: dict[str, Any]
    text: str


class Notice(NamedTuple):
    """A call that wants no answer."""

    method: str
    args: list[Any]


class Heartbeat(NamedTuple):
    """A sign of life."""


class Goodbye(NamedTuple):
    """The sender closes the socket; ``reason`` is a word, ``text`` a sentence."""

    reason: str
    text: str


class Challenge(NamedTuple):
    """What the server wants answered before it welcomes; see ``login``."""

    text: str


class Response(NamedTuple):
    """The client's answer to a challenge."""

    text: str


Message = (
    Hello
    | Welcome
    | Request
    | Reply
    | Failure
    | Notice
    | Heartbeat
    | Goodbye
    | Challenge
    | Response
)

# The position of a class is its code on the wire: only ever append.
KINDS: tuple[type[Message], ...] = (
    Hello,
    Welcome,
    Request,
    Reply,
    Failure,
    Notice,
    Heartbeat,
    Goodbye,
    Challenge,
    Response,
)

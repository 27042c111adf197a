"""The kinds of message, and the codes that nobody may ever change."""

import pytest

from zeolith.protocol import messages
from zeolith.protocol.messages import KINDS

# A code on the wire is for ever: a new kind goes to the end.
WIRE = [
    ("Hello", ("fields",)),
    ("Welcome", ("fields",)),
    ("Request", ("id", "method", "args")),
    ("Reply", ("id", "value")),
    ("Failure", ("id", "name", "attributes", "text")),
    ("Notice", ("method", "args")),
    ("Heartbeat", ()),
    ("Goodbye", ("reason", "text")),
    ("Challenge", ("text",)),
    ("Response", ("text",)),
]


@pytest.mark.parametrize(
    ("code", "name", "fields"), [(n, *row) for n, row in enumerate(WIRE)]
)
def test_codes_and_fields_stay_what_they_are(code, name, fields):
    assert KINDS[code].__name__ == name
    assert KINDS[code]._fields == fields


def test_every_kind_has_one_code():
    defined = {
        each
        for each in vars(messages).values()
        if isinstance(each, type) and issubclass(each, tuple) and each is not tuple
    }
    assert len(KINDS) == len(set(KINDS)) == len(WIRE)
    assert defined == set(KINDS)

"""What an application catches."""

import pytest
from transaction.interfaces import TransientError
from ZODB.POSException import StorageError

from zeolith.client.errors import (
    ChannelLost,
    ClientDisconnected,
    CommitOutcomeUnknown,
)


def test_a_lost_connection_may_be_tried_again():
    assert issubclass(ClientDisconnected, TransientError)
    assert issubclass(ClientDisconnected, StorageError)


def test_an_unknown_outcome_is_not_tried_again():
    """Trying again might commit the same thing twice."""
    assert issubclass(CommitOutcomeUnknown, StorageError)
    assert not issubclass(CommitOutcomeUnknown, TransientError)


def test_a_lost_channel_is_no_error_of_a_storage():
    """It is internal; an application that catches StorageError must not meet it."""
    assert not issubclass(ChannelLost, StorageError | OSError | TransientError)


@pytest.mark.parametrize("error", [ClientDisconnected, CommitOutcomeUnknown])
def test_the_text_is_what_happened(error):
    assert str(error("the server closed the connection")) == (
        "the server closed the connection"
    )

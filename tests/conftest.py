"""What holds for every test; fixtures for some of them live in tests/support."""

from collections.abc import Iterator

import pytest
import transaction


@pytest.fixture(autouse=True)
def no_transaction_from_another_test() -> Iterator[None]:
    """A test that fails in mid-transaction leaves the next one an empty one.

    The thread's transaction manager outlives the test, and with it everything
    that joined.
    """
    transaction.abort()
    yield
    transaction.abort()

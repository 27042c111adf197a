"""What holds for every test; fixtures for some of them live in tests/support."""

from collections.abc import Iterator

import hypothesis
import pytest
import transaction

# A machine that is busy with something else is no reason to fail.
hypothesis.settings.register_profile(
    "zeolith",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("zeolith")


@pytest.fixture(autouse=True)
def no_transaction_from_another_test() -> Iterator[None]:
    """A test that fails in mid-transaction leaves the next one an empty one.

    The thread's transaction manager outlives the test, and with it everything
    that joined.
    """
    transaction.abort()
    yield
    transaction.abort()

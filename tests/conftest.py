"""What holds for every test; fixtures for some of them live in tests/support."""

import gc
import os
import signal
import sys
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


def pytest_configure(config: pytest.Config) -> None:
    """No process of the hundreds that tests start compiles what another compiled.

    Where the environment forbids to keep bytecode, which is so in many images, it is
    kept outside the tree.
    """
    if sys.dont_write_bytecode:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        kept = config.rootpath / ".pytest_cache" / "bytecode"
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(kept)
        sys.dont_write_bytecode = False


@pytest.fixture(autouse=True, scope="session")
def interrupts_are_heard() -> None:
    """A shell has what it runs in the background ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is there before the first test is no garbage for as long as there are tests.

    Thousands of tests are many objects, and every full collection, one for each test
    that looks for what a client has left behind, would go through all of them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_transaction_from_another_test() -> Iterator[None]:
    """A test that fails in mid-transaction leaves the next one an empty one.

    The thread's transaction manager outlives the test, and with it everything
    that joined.
    """
    transaction.abort()
    yield
    transaction.abort()

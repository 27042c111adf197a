"""Every target takes any bytes: those of its corpus, and what hypothesis makes of them.

What a fuzzer has found once is in the corpus, and is tried each time.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import files, targets
from .targets import Target

CORPUS = Path(__file__).parent / "corpus"
TARGETS: dict[str, Target] = {
    "decoder": targets.decoder,
    "server_connection": targets.server_connection,
    "client_connection": targets.client_connection,
    "session": targets.session,
    "conflict": targets.conflict,
    "extension": targets.extension,
    "record": targets.record,
    "trace": targets.trace,
    "saved_index": targets.saved_index,
    "data_fs": files.data_fs,
    "cache_record": files.cache_record,
    "cache_page": files.cache_page,
}
# Each of these opens files, or a process.
SLOWER = {"data_fs", "cache_record", "cache_page", "session"}


def corpus(name: str) -> Iterator[Path]:
    yield from sorted((CORPUS / name).iterdir())


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_kept_is_taken(name):
    tried = 0
    for path in corpus(name):
        TARGETS[name](path.read_bytes())
        tried += 1
    assert tried, "a target without a corpus begins at nothing"


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_taken(name):
    kept = [path.read_bytes() for path in corpus(name)]
    examples = 20 if name in SLOWER else 150

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300) | damaged(kept))
    def take(data: bytes) -> None:
        TARGETS[name](data)

    take()


@st.composite
def damaged(draw: st.DrawFn, kept: list[bytes]) -> bytes:
    """One of the corpus with a few bytes changed, or two of them cut together."""
    data = bytearray(draw(st.sampled_from(kept)))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(kept))[at:]
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def test_the_corpus_is_small():
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 256 * 1024
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TARGETS)
def test_a_search_for_what_is_not_taken_finds_nothing(name, tmp_path):
    """By which lines an input has reached; ``FUZZ_SECONDS`` for each target."""
    pytest.importorskip("atheris")
    seconds = os.environ.get("FUZZ_SECONDS", "20")
    command = [sys.executable, "-m", "tests.fuzz.drive", name, seconds, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [path.read_bytes() for path in tmp_path.glob("crash-*")]
    assert not found, done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done " in done.stderr

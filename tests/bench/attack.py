"""How much others notice of an attack: `python -m tests.bench.attack`.

One client loads and another commits, each with a short pause after each call, while an
attacker does one thing after the other, as fast as the server lets it (attackers.py).
Between two attacks there is a pause of the same length, and what is measured in it is
what an attack is compared with; a figure is the median of the rounds.

Where there is more than one core the attacker has one of them for itself, and the
server and its clients the others: somebody who takes the processor's time otherwise
than by what he sends is a matter of the machine.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

from ZODB.utils import maxtid

from zeolith.server.access import parse_grants
from zeolith.server.key_files import add_user, create_token

from .attackers import ATTACKS, Attack, Crowd, Target
from .pack import all_oids, make, write
from .servers import Endpoint, Running, memory_mb, running_with_sections
from .table import aligned, machine

REVISIONS = 40_000
LOAD_PAUSE_S = 0.001
COMMIT_PAUSE_S = 0.01
# Every so many loads, a call that the server answers from a thread.
SLOW_CALL_EVERY = 5
# After an attack has begun or ended, and before anything counts.
SETTLING_S = 0.5
START_S = 60
CALLS = ("load", "history", "commit")


class Sample(NamedTuple):
    """When a call began, how long it took, and what was called."""

    at: float
    took_s: float
    call: str


@dataclass(slots=True)
class Found:
    """What was measured of one attack: the calls of each round, without and with it."""

    rounds: list[tuple[list[Sample], list[Sample]]] = field(default_factory=list)
    said: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


# The clients


def load(
    endpoint: Endpoint, oids: list[bytes], options: dict[str, Any], to: Connection
) -> None:
    """Load records that are in no cache, and now and then the history of one."""
    random.shuffle(oids)
    samples: list[Sample] = []
    clock = time.monotonic
    storage = endpoint.open(**options)
    to.send("ready")
    number = 0
    while not to.poll():
        oid = oids[number % len(oids)]
        number += 1
        if number % len(oids) == 0:
            storage.close()
            storage = endpoint.open(**options)
        begun = clock()
        if number % SLOW_CALL_EVERY:
            storage.loadBefore(oid, maxtid)
            samples.append(Sample(begun, clock() - begun, "load"))
        else:
            storage.history(oid)
            samples.append(Sample(begun, clock() - begun, "history"))
        time.sleep(LOAD_PAUSE_S)
    storage.close()
    to.send(samples)


def commit(
    endpoint: Endpoint, oids: list[bytes], options: dict[str, Any], to: Connection
) -> None:
    """Write one record after the other, each in a transaction."""
    storage = endpoint.open(**options)
    data, tid = storage.load(oids[-1])
    samples: list[Sample] = []
    to.send("ready")
    while not to.poll():
        begun = time.monotonic()
        tid = write(storage, oids[-1], tid, data)
        samples.append(Sample(begun, time.monotonic() - begun, "commit"))
        time.sleep(COMMIT_PAUSE_S)
    storage.close()
    to.send(samples)


def attack(
    number: int, target: Target, cores: set[int], is_over: Event, to: Connection
) -> None:
    """Play the attack of that number until it is over."""
    os.sched_setaffinity(0, cores)
    crowd = Crowd(ATTACKS[number], target)
    to.send("ready")
    began_s = time.monotonic()
    crowd.play(is_over.is_set)
    to.send(crowd.said / (time.monotonic() - began_s))


# The stand


@dataclass(slots=True)
class Stand:
    """A server, what it knows, and its cores."""

    server: Running
    target: Target
    # Of one who may write.
    token_file: str

    @property
    def options(self) -> dict[str, Any]:
        """Of the clients' storages."""
        options: dict[str, Any] = {"token_file": self.token_file}
        tls = self.server.endpoint.tls
        if tls is not None:
            options["tls_ca"] = tls.ca
        return options

    @property
    def endpoint(self) -> Endpoint:
        """Where it is; who trusts whom is said with the options."""
        return Endpoint("zeolith", self.server.endpoint.place)


@contextmanager
def standing(
    folder: Path, data: Path, oids: list[bytes], cores: set[int], is_encrypted: bool
) -> Iterator[Stand]:
    """A server with users and tokens."""
    folder.mkdir()
    for each in data.parent.iterdir():
        if each.suffix != ".lock":
            shutil.copy(each, folder / each.name)
    add_user(folder / "users", "ann", "correct horse battery", parse_grants("write"))
    tokens = {
        role: create_token(folder / "tokens", "", parse_grants(role), None, 0.0)
        for role in ("read", "write")
    }
    (folder / "token").write_text(tokens["write"])
    (folder / "token").chmod(0o600)
    sections = f"<access>\nusers {folder}/users\ntokens {folder}/tokens\n</access>\n"
    with running_with_sections(folder, sections, is_encrypted=is_encrypted) as server:
        server.keep_to(cores)
        target = Target(server.endpoint.place, tokens["read"], oids)
        yield Stand(server, target, str(folder / "token"))


def cores_of(available: Sequence[int]) -> tuple[set[int], set[int]]:
    """The server's and its clients' cores, and the attacker's."""
    *others, last = sorted(available)
    return (set(others), {last}) if others else ({last}, {last})


@contextmanager
def clients(stand: Stand, oids: list[bytes]) -> Iterator[Callable[[], list[Sample]]]:
    """The two who work; what they have measured, when they are told to stop."""
    context = multiprocessing.get_context("spawn")
    those = []
    for work in (load, commit):
        here, there = context.Pipe()
        process = context.Process(
            target=work, args=(stand.endpoint, list(oids), stand.options, there)
        )
        process.start()
        those.append((process, here))
    for _process, pipe in those:
        assert pipe.poll(START_S)
        assert pipe.recv() == "ready"

    def stop() -> list[Sample]:
        for _process, pipe in those:
            pipe.send("stop")
        return [sample for _process, pipe in those for sample in pipe.recv()]

    try:
        yield stop
    finally:
        for process, pipe in those:
            pipe.close()
            process.join(START_S)
            process.terminate()


def round_of(
    stand: Stand,
    attacks: list[Attack],
    cores: set[int],
    seconds: float,
    oids: list[bytes],
    found: dict[str, Found],
) -> None:
    """Each of ``attacks`` once, and as long a pause before it."""
    context = multiprocessing.get_context("spawn")
    spans = []
    with clients(stand, oids) as stop:
        for each in attacks:
            is_over = context.Event()
            here, there = context.Pipe()
            arguments = ATTACKS.index(each), stand.target, cores, is_over, there
            process = context.Process(target=attack, args=arguments)
            time.sleep(SETTLING_S)
            quiet = time.monotonic(), time.monotonic() + seconds
            time.sleep(seconds)
            process.start()
            assert here.recv() == "ready"
            time.sleep(SETTLING_S)
            under = time.monotonic(), time.monotonic() + seconds
            time.sleep(seconds)
            is_over.set()
            found[each.key].said.append(here.recv())
            process.join()
            found[each.key].memory_mb.append(memory_mb(stand.server, "VmHWM"))
            spans.append((each, quiet, under))
        samples = stop()
    for each, quiet, under in spans:
        parts = within(samples, *quiet), within(samples, *under)
        found[each.key].rounds.append(parts)


# What comes of it


def within(samples: list[Sample], begin: float, end: float) -> list[Sample]:
    """Calls that met that time, also those that took all of it."""
    return [
        each for each in samples if each.at < end and each.at + each.took_s >= begin
    ]


def quantile_us(samples: list[Sample], call: str, percent: int) -> float:
    """So many of a hundred calls took not longer than this."""
    took = [each.took_s for each in samples if each.call == call]
    if len(took) < 2:
        # One that has taken all the time, or none at all.
        return max(took, default=float("inf")) * 1e6
    return statistics.quantiles(took, n=100, method="inclusive")[percent - 1] * 1e6


def compared(found: Found, call: str, percent: int) -> tuple[float, float, float]:
    """Microseconds without and with the attack, and the ratio: medians of rounds."""
    pairs = [
        (quantile_us(quiet, call, percent), quantile_us(under, call, percent))
        for quiet, under in found.rounds
    ]
    return (
        statistics.median(quiet for quiet, _under in pairs),
        statistics.median(under for _quiet, under in pairs),
        statistics.median(under / quiet for quiet, under in pairs),
    )


def table(attacks: list[Attack], found: dict[str, Found]) -> str:
    """Markdown: an attack a line."""
    header = ["attack", "said/s", "server, MB"]
    header += [f"{call} p{percent}, us" for call in CALLS for percent in (50, 99)]
    lines = [header]
    for each in attacks:
        those = found[each.key]
        said = statistics.median(those.said)
        line = [each.title, f"{said:.0f}", f"{max(those.memory_mb):.0f}"]
        for call in CALLS:
            for percent in (50, 99):
                quiet, under, ratio = compared(those, call, percent)
                line.append(f"{quiet:.0f} -> {under:.0f} ({ratio:.1f})")
        lines.append(line)
    return aligned(lines, words=1)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    keys = [each.key for each in ATTACKS]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each attack")
    parser.add_argument("--attacks", default=",".join(keys), help="some of %(default)s")
    parser.add_argument("--directory", help="where the data is")
    options = parser.parse_args()
    chosen = options.attacks.split(",")
    if unknown := set(chosen) - set(keys):
        parser.error(f"there is no attack {', '.join(sorted(unknown))}")
    wanted = [each for each in ATTACKS if each.key in chosen]
    found = {each.key: Found() for each in wanted}
    cores, attackers_cores = cores_of(sorted(os.sched_getaffinity(0)))
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as name,
        ExitStack() as all_,
    ):
        folder = Path(name)
        (folder / "made").mkdir()
        data = folder / "made" / "Data.fs"
        make(data, REVISIONS)
        oids = all_oids(data)
        os.sched_setaffinity(0, cores)
        for is_encrypted in (False, True):
            those = [each for each in wanted if each.is_encrypted is is_encrypted]
            if not those:
                continue
            place = folder / f"server{is_encrypted:d}"
            stand = all_.enter_context(standing(place, data, oids, cores, is_encrypted))
            for _number in range(options.rounds):
                round_of(stand, those, attackers_cores, options.seconds, oids, found)
    print(f"{machine()}; medians of {options.rounds} rounds")
    print()
    print(table(wanted, found))


if __name__ == "__main__":
    main()

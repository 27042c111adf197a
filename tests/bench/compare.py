"""zeolith, ZEO and what bounds them on the same work: one markdown table.

Run as ``python -m tests.bench.compare``. Every peer has a copy of the same data and a
server process of its own; client processes are others. The rounds are interleaved,
and the peers change their order from round to round, so that what else happens on the
machine happens to all of them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from . import dataset, profiling, servers, table
from .rows import FULL, QUICK, Scale, Trial, trials
from .servers import Running


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = _options()
    scale = QUICK if options.quick else FULL
    if options.rounds:
        scale = replace(scale, rounds=options.rounds)
    peers = _peers(options)
    wanted = _wanted(options.profile or options.rows, scale)
    if options.profile is not None:
        return _profile(peers, wanted, scale, options.directory)
    rows = [row for trial in wanted for row in trial.rows]
    began_s = time.monotonic()
    with ExitStack() as stack:
        stand = stack.enter_context(standing(options.directory))
        ready = _start(stack, stand, peers)
        figures = _measure(stand, ready, wanted, scale)
    print(table.markdown(rows, list(ready), figures))
    print(f"\n{table.machine()}; medians; interleaved rounds: {scale.rounds}")
    _say(f"{time.monotonic() - began_s:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(table.report(rows, figures), indent=1))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.compare", description=__doc__
    )
    keys = [row.key for trial in trials(FULL) for row in trial.rows]
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--json", metavar="FILE", help="write every figure to FILE")
    parser.add_argument(
        "--rows", metavar="KEY,...", default="", help=f"only some of {', '.join(keys)}"
    )
    parser.add_argument(
        "--peers",
        metavar="PEER,...",
        default="zeo,zeolith,relstorage,filestorage,socket",
        help=f"some of {', '.join(servers.PEERS)}; default %(default)s",
    )
    parser.add_argument(
        "--profile",
        metavar="KEY,...",
        nargs="?",
        const="",
        help="say where the time goes in these rows, or in those of --rows, instead",
    )
    parser.add_argument(
        "--zeo-msgpack", action="store_true", help="also ZEO with msgpack"
    )
    parser.add_argument("--rounds", type=int, help="how often each row is measured")
    parser.add_argument(
        "--directory", help="where the data is; on a disk whose fsync is what you mean"
    )
    options = parser.parse_args()
    asked = _listed(options.rows) + _listed(options.profile or "")
    unknown = [key for key in asked if key not in keys]
    unknown += [peer for peer in _listed(options.peers) if peer not in servers.PEERS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if options.profile is not None and options.json:
        parser.error("a profile is not written as JSON")
    return options


def _listed(text: str) -> list[str]:
    return [each for each in text.split(",") if each]


def _peers(options: argparse.Namespace) -> list[str]:
    asked = _listed(options.peers)
    if options.zeo_msgpack and "zeo-msgpack" not in asked:
        asked.insert(1, "zeo-msgpack")
    lacking = {peer: servers.missing(peer) for peer in asked}
    for peer, what in lacking.items():
        if what:
            _say(f"{peer} is left out, here is not: {what}")
    return [peer for peer in asked if not lacking[peer]]


def _wanted(keys: str, scale: Scale) -> list[Trial]:
    listed = _listed(keys)
    return [
        trial
        for trial in trials(scale)
        if not listed or any(row.key in listed for row in trial.rows)
    ]


@dataclass(frozen=True, slots=True)
class Stand:
    """Where peers get their folders and their data from."""

    folder: Path
    data: Path

    @contextmanager
    def fresh(
        self, peer: str, profile: Path | None = None, *, is_encrypted: bool = False
    ) -> Iterator[Running]:
        """A server that has served nobody yet; ``profile`` as for servers.running."""
        with tempfile.TemporaryDirectory(dir=self.folder) as own:
            servers.let_pass(Path(own))
            folder = Path(own) / peer
            with servers.running(
                peer, folder, self.data, profile, is_encrypted=is_encrypted
            ) as running:
                yield running


@contextmanager
def standing(directory: str | None) -> Iterator[Stand]:
    """The data set in a folder of its own, below ``directory`` if there is one."""
    with tempfile.TemporaryDirectory("-bench", dir=directory) as folder:
        servers.let_pass(Path(folder))
        data = Path(folder) / "made.fs"
        dataset.make(data)
        yield Stand(Path(folder), data)


def _start(stack: ExitStack, stand: Stand, peers: list[str]) -> dict[str, Running]:
    """Those of the peers that start, by name."""
    ready = {}
    for peer in peers:
        try:
            ready[peer] = stack.enter_context(stand.fresh(peer))
        except servers.CannotRun as error:
            _say(f"{peer} is left out, it does not run here: {error}")
    return ready


def _measure(
    stand: Stand, ready: dict[str, Running], wanted: list[Trial], scale: Scale
) -> table.Figures:
    figures: table.Figures = {row.key: {} for trial in wanted for row in trial.rows}
    peers = list(ready)
    for number in range(scale.rounds):
        for trial in wanted:
            for at in range(len(peers)):
                peer = peers[(number + at) % len(peers)]
                if peer not in trial.peers:
                    continue
                fresh = (
                    stand.fresh(peer, is_encrypted=trial.is_encrypted)
                    if trial.is_fresh
                    else nullcontext(ready[peer])
                )
                with fresh as running:
                    found = trial.run(running, scale)
                for row, figure in zip(trial.rows, found, strict=True):
                    figures[row.key].setdefault(peer, []).append(figure)
        _say(f"round {number + 1} of {scale.rounds}")
    return figures


def _profile(
    peers: list[str], wanted: list[Trial], scale: Scale, directory: str | None
) -> int:
    served = [peer for peer in peers if peer not in table.BOUNDS]
    with standing(directory) as stand:
        for trial in wanted:
            if trial.is_fresh:
                _say(f"no operation to look at: {trial.rows[0].title}")
                continue
            print(profiling.markdown(trial, served, scale, stand.fresh, stand.folder))
            print(flush=True)
    print(table.machine())
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

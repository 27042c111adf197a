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
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from . import dataset, servers, table
from .rows import FULL, QUICK, Scale, Trial, trials
from .servers import Running


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = _options()
    scale = QUICK if options.quick else FULL
    if options.rounds:
        scale = replace(scale, rounds=options.rounds)
    peers = _peers(options)
    wanted = _wanted(options.rows, scale)
    rows = [row for trial in wanted for row in trial.rows]
    began_s = time.monotonic()
    figures = _measure(peers, wanted, scale, options.directory)
    print(table.markdown(rows, peers, figures))
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
        default="zeo,zeolith,filestorage,socket",
        help=f"some of {', '.join(servers.PEERS)}; default %(default)s",
    )
    parser.add_argument(
        "--zeo-msgpack", action="store_true", help="also ZEO with msgpack"
    )
    parser.add_argument("--rounds", type=int, help="how often each row is measured")
    parser.add_argument(
        "--directory", help="where the data is; on a disk whose fsync is what you mean"
    )
    options = parser.parse_args()
    unknown = [key for key in _listed(options.rows) if key not in keys]
    unknown += [peer for peer in _listed(options.peers) if peer not in servers.PEERS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


def _listed(text: str) -> list[str]:
    return [each for each in text.split(",") if each]


def _peers(options: argparse.Namespace) -> list[str]:
    asked = _listed(options.peers)
    if options.zeo_msgpack and "zeo-msgpack" not in asked:
        asked.insert(1, "zeo-msgpack")
    missing = [peer for peer in asked if not servers.is_installed(peer)]
    if missing:
        _say(f"not installed, left out: {', '.join(missing)}")
    return [peer for peer in asked if peer not in missing]


def _wanted(keys: str, scale: Scale) -> list[Trial]:
    listed = _listed(keys)
    return [
        trial
        for trial in trials(scale)
        if not listed or any(row.key in listed for row in trial.rows)
    ]


def _measure(
    peers: list[str], wanted: list[Trial], scale: Scale, directory: str | None
) -> table.Figures:
    figures: table.Figures = {row.key: {} for trial in wanted for row in trial.rows}
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory("-bench", dir=directory))
        )
        data = folder / "made.fs"
        dataset.make(data)
        ready = {
            peer: stack.enter_context(servers.running(peer, folder / peer, data))
            for peer in peers
        }
        for number in range(scale.rounds):
            for trial in wanted:
                for at in range(len(peers)):
                    peer = peers[(number + at) % len(peers)]
                    _run(trial, ready[peer], scale, figures)
            _say(f"round {number + 1} of {scale.rounds}")
    return figures


def _run(trial: Trial, running: Running, scale: Scale, figures: table.Figures) -> None:
    if running.endpoint.peer not in trial.peers:
        return
    found = trial.run(running, scale)
    for row, figure in zip(trial.rows, found, strict=True):
        figures[row.key].setdefault(running.endpoint.peer, []).append(figure)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

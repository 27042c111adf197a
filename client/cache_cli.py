"""``zeolith cache``: looking into a client's cache, and how large it should be.

The program ``zeolith`` finds the commands through an entry point, so that the server
does not import the client. A mistake of the operator's is one line on standard error;
the exit codes are the program's.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from zeolith.client.cache_clearing import clear_place
from zeolith.client.cache_inspection import DamagedFile
from zeolith.client.cache_place import CachePlace, identity_of
from zeolith.client.cache_plot import bytes_text, several, svg, table
from zeolith.client.cache_report import examine
from zeolith.client.cache_simulation import (
    Workload,
    simulate,
    simulate_around,
    simulate_unbounded,
    workload,
)
from zeolith.client.cache_trace import blocks

_CLASSES = 20
_MOMENTS = {
    "valid_through": "current to",
    "oldest": "oldest",
    "newest": "newest",
}


# A table has tenths of a unit.
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?((?:[KMG]?B)?)", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, _parameter: Any, _context: Any) -> int:
        found = _SIZE.fullmatch(value.strip())
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
        if size < 1:
            self.fail(f"{value!r} is not a size: write bytes, or 500KB, 20MB, 1GB")
        return size


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cache() -> None:
    """Look into the cache of clients, and find out how large it should be."""


@cache.command("simulate")
@click.argument("trace")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=_Size(),
    help="Simulate this size (20MB); may be repeated. Without it: the size that was"
    " used, its halves and its doubles.",
)
@click.option(
    "--together",
    is_flag=True,
    help="As if all processes of the trace had shared one cache.",
)
@click.option(
    "--plot", metavar="FILE.svg", help="Draw the hit rates into this file, too."
)
def simulate_trace(
    trace: str, sizes: tuple[int, ...], together: bool, plot: str | None
) -> None:
    """Say what hit rate caches of several sizes would have had.

    TRACE is a file that clients with the option cache_trace have written.
    """
    if plot is not None and Path(plot).suffix.lower() != ".svg":
        raise click.UsageError(f"--plot {plot!r}: the file's name must end in .svg")
    recorded = _recorded(trace, together)
    if sizes:
        outcomes = [simulate(recorded, size) for size in sorted({*sizes})]
    else:
        outcomes = simulate_around(recorded)
    click.echo(table(recorded, outcomes, simulate_unbounded(recorded)))
    if plot is not None:
        try:
            Path(plot).write_text(svg(Path(trace).name, outcomes))
        except OSError as error:
            _exit(f"{plot}: {error.strerror}")


@cache.command()
@click.argument("path")
@click.option(
    "--classes",
    default=_CLASSES,
    show_default=True,
    type=click.IntRange(min=0),
    help="Show so many classes, those with the most data.",
)
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def info(path: str, classes: int, as_json: bool) -> None:
    """Show what the cache directory PATH has, by database and class.

    Nothing is imported for that. Processes may use the cache meanwhile.
    """
    summaries = [_examined("summary", file) for file in _files(path)]
    if as_json:
        click.echo(json.dumps(summaries, indent=2))
        return
    for number, summary in enumerate(summaries):
        if number:
            click.echo()
        click.echo("\n".join(_lines(summary, classes)))


@cache.command()
@click.argument("path")
def verify(path: str) -> None:
    """Check all that the cache directory PATH has; a line for each finding.

    Nothing is changed, and processes may use the cache meanwhile. Exit code 0 if all is
    well, 1 if not.
    """
    is_damaged = False
    for file in _files(path):
        try:
            findings = examine("findings", file)
        except DamagedFile as error:
            findings = [str(error)]
        for finding in findings:
            click.echo(f"{file.name}: {finding}")
        if findings:
            is_damaged = True
        else:
            click.echo(f"{file.name}: all is well")
    sys.exit(1 if is_damaged else 0)


@cache.command()
@click.argument("path")
@click.option(
    "--force",
    is_flag=True,
    help="Also what processes use. They go on with what they have; those that come"
    " later begin anew.",
)
def clear(path: str, force: bool) -> None:
    """Remove all that the cache directory PATH has.

    Nothing is lost but time: it is loaded again when it is needed.
    """
    files = _files(path)
    try:
        used = clear_place(CachePlace(path), force=force)
    except (OSError, ValueError) as error:
        _exit(f"{path}: {error}")
    if used and not force:
        names = ", ".join(file.name for file in used)
        _exit(
            f"{path}: processes use {names}; nothing is removed. Stop them, or say"
            " --force"
        )
    click.echo(f"{several(len(files), 'database', 'databases')} removed")


def _files(path: str) -> list[Path]:
    """The cache files in ``path``; ends the program if it is no such directory."""
    try:
        if not Path(path).is_dir():
            _exit(f"{path}: there is no such directory")
        found = [
            each
            for each in sorted(Path(path).iterdir())
            if identity_of(each) is not None
        ]
    except OSError as error:
        _exit(f"{path}: {error.strerror}")
    if not found:
        _exit(f"{path}: there is no cache in it")
    return found


def _examined(what: str, file: Path) -> Any:
    try:
        return examine(what, file)
    except DamagedFile as error:
        _exit(f"{file}: {error}")


def _lines(summary: dict[str, Any], classes: int) -> Iterator[str]:
    yield f"database {summary['database_id']}, epoch {summary['epoch']}"
    yield f"  file         {summary['file']}, {bytes_text(summary['file_bytes'])}"
    yield (
        f"  in use       {bytes_text(summary['used_bytes'])} for"
        f" {several(summary['revisions'], 'revision', 'revisions')} with"
        f" {bytes_text(summary['data_bytes'])} of data;"
        f" {summary['revisions'] - summary['open']} of them of older snapshots"
    )
    for key, words in _MOMENTS.items():
        if moment := summary[key]:
            yield f"  {words:12} {moment['time']}, {moment['tid']}"
    if loads := summary["hits"] + summary["misses"]:
        rate = summary["hits"] / loads
        yield f"  {'hit rate':12} {rate:.1%} of {several(loads, 'load', 'loads')}"
    pids = summary["pids"]
    yield (
        f"  {'used by':12} {several(len(pids), 'process', 'processes')}"
        + (f": {', '.join(map(str, pids))}" if pids else "")
    )
    shown = list(summary["classes"].items())[:classes]
    if not shown:
        return
    yield ""
    yield f"{'revisions':>12}  {'data':>9}  class"
    for name, counts in shown:
        size = bytes_text(counts["data_bytes"])
        yield f"{counts['revisions']:12}  {size:>9}  {name}"
    rest = len(summary["classes"]) - len(shown)
    if rest:
        yield f"{'':25}and {several(rest, 'class', 'classes')} more"


def _recorded(trace: str, together: bool) -> Workload:
    try:
        found = workload(blocks(trace), together=together)
    except OSError as error:
        _exit(f"{trace}: {error.strerror}")
    if not found.caches:
        _exit(f"{trace}: it is no trace of a cache, or nothing is in it yet")
    if not found.loads:
        _exit(f"{trace}: there are no loads in it yet")
    return found


def _exit(text: str) -> NoReturn:
    click.echo(f"zeolith: {text}", err=True)
    sys.exit(1)

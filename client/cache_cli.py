"""``zeolith cache``: looking into a client's cache, and how large it should be.

The program ``zeolith`` finds the commands through an entry point, so that the server
does not import the client. A mistake of the operator's is one line on standard error;
the exit codes are the program's.
"""

import sys
from pathlib import Path
from typing import Any, NoReturn

import click
from zodburi.datatypes import convert_bytesize

from zeolith.client.cache_plot import svg, table
from zeolith.client.cache_simulation import (
    Workload,
    simulate,
    simulate_around,
    simulate_unbounded,
    workload,
)
from zeolith.client.cache_trace import blocks


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, _parameter: Any, _context: Any) -> int:
        try:
            size = int(convert_bytesize(value))
        except ValueError:
            size = 0
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

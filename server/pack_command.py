"""``zeolith pack``: ask a server for a pack, show how far it is, report how it ends.

A client like any other, by ``visit``: it sees nothing of the storage. Ctrl-C asks the
server to give the pack up and waits for the answer; a second one only leaves. If the
command is killed, the server goes on packing.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click

from zeolith.protocol.addresses import Address
from zeolith.protocol.login import NO_CREDENTIALS, Credentials
from zeolith.protocol.tls import ClientTls
from zeolith.server.probe import NoAnswer
from zeolith.server.visit import Refused, Visit

DONE, FAILED, CANCELLED = 0, 1, 3
_LOOK_INTERVAL_S = 0.5
_STEPS = 1000
_DAY_S = 86400

# Called with what pack_progress says.
Show = Callable[[dict[str, Any]], None]


def pack_storage(
    address: Address,
    *,
    storage: str,
    days: float | None,
    at: str | None,
    gc: bool | None,
    cancel: bool,
    quiet: bool,
    timeout: float,
    tls: ClientTls | None = None,
    credentials: Credentials = NO_CREDENTIALS,
) -> int:
    """Do what the command's options say; returns the exit code.

    Raises click.UsageError for options that make no sense.
    """
    if cancel and (days is not None or at is not None or gc is not None):
        raise click.UsageError("--cancel goes with no other option of a pack")
    moment_s = _moment_s(days, at)
    try:
        with Visit(
            address,
            storage,
            "zeolith pack",
            timeout,
            tls=tls,
            credentials=credentials,
        ) as visit:
            if cancel:
                return _cancel(visit, timeout, quiet)
            return _pack(visit, moment_s, gc, quiet)
    except (NoAnswer, Refused) as error:
        click.echo(f"zeolith: {error}", err=True)
        return FAILED


def _moment_s(days: float | None, at: str | None) -> float:
    if at is None:
        moment_s = time.time() - (1 if days is None else days) * _DAY_S
        # Not by its opposite: --days nan is neither.
        if not moment_s >= 0:
            raise click.UsageError(f"--days {days:g} is before 1970")
        return moment_s
    if days is not None:
        raise click.UsageError("give either --days or --at")
    try:
        moment_s = datetime.fromisoformat(at).timestamp()
    except (ValueError, OverflowError) as error:
        raise click.UsageError(
            f"--at {at}: write for example 2026-01-31 or 2026-01-31T04:30"
        ) from error
    if moment_s > time.time():
        raise click.UsageError(f"--at {at} is in the future")
    if moment_s < 0:
        raise click.UsageError(f"--at {at} is before 1970")
    return moment_s


def _cancel(visit: Visit, timeout_s: float, quiet: bool) -> int:
    if visit.call("pack_cancel", timeout_s):
        _say(quiet, "the pack is given up")
        return DONE
    is_packing = visit.call("pack_progress", timeout_s) is not None
    click.echo(
        "zeolith: the pack under way cannot be given up (any more)"
        if is_packing
        else "zeolith: no pack is under way",
        err=True,
    )
    return FAILED


def _pack(visit: Visit, moment_s: float, gc: bool | None, quiet: bool) -> int:
    begun_s = time.monotonic()
    with _interrupts_noted() as interrupts:
        number = visit.ask("pack", moment_s, gc)
        with _shown(quiet) as show:
            answer = _wait(visit, number, show, interrupts)
    if answer is None:
        return CANCELLED
    if isinstance(answer, Refused):
        click.echo(f"zeolith: {answer}", err=True)
        return CANCELLED if interrupts else FAILED
    has_changed, before, after = answer
    if has_changed:
        taken_s = time.monotonic() - begun_s
        _say(quiet, f"packed: {before} bytes, now {after}, in {taken_s:.1f} s")
    else:
        _say(quiet, "there is nothing to pack")
    return DONE


def _wait(visit: Visit, number: int, show: Show, interrupts: list[int]) -> Any:
    """The answer to request ``number``; meanwhile the progress is shown.

    The first interrupt gives the pack up, at the second one there is no answer.
    """
    is_cancelled = False
    while len(interrupts) < 2:
        if interrupts and not is_cancelled:
            is_cancelled = True
            visit.ask("pack_cancel")
        looked_at = time.monotonic()
        visit.ask("pack_progress")
        while (left_s := looked_at + _LOOK_INTERVAL_S - time.monotonic()) > 0:
            answers = visit.wait(left_s)
            if number in answers:
                return answers[number]
            # That of a cancellation is none, nor that of a pack that ends now.
            for progress in answers.values():
                if isinstance(progress, dict):
                    show(progress)
    return None


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list; it ends nothing in the middle."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _shown(quiet: bool) -> Iterator[Show]:
    """How progress is shown: as a bar on a terminal, in a few lines elsewhere."""
    if quiet:
        yield _show_nothing
    elif sys.stdout.isatty():
        bar: Any
        with click.progressbar(length=_STEPS, label="starting") as bar:

            def draw(progress: dict[str, Any]) -> None:
                bar.label = progress["phase"]
                bar.update(round(progress["fraction"] * _STEPS) - bar.pos)

            yield draw
    else:
        said = ""

        def write(progress: dict[str, Any]) -> None:
            nonlocal said
            # In steps of ten, so that a day's log stays short.
            line = f"{progress['phase']}, {int(progress['fraction'] * 10) * 10} %"
            if line != said:
                said = line
                click.echo(line)

        yield write


def _show_nothing(_progress: dict[str, Any]) -> None:
    """Nobody looks."""


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        click.echo(text)

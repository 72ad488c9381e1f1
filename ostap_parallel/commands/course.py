"""The steps of a command on its host: files go there, it runs, what it made comes back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ostap_parallel.commands import transfer as transfers
from ostap_parallel.commands.command import Done
from ostap_parallel.commands.outputs import Outputs
from ostap_parallel.commands.slots import Job
from ostap_parallel.commands.transfer import StepFailed
from ostap_parallel.worker.command import Ended, read_piece
from ostap_parallel.worker.command import run as run_command

Levels = tuple[int | None, int | None]

# A function that is to be called on the host, and its argument.
Step = tuple[Callable[[Any], Any], Any]

# Bytes of each piece in which a long output travels.
PIECE = 4 << 20

# What of `Done` is as the worker tells it.
_AS_IT_IS = (
    *("status", "signal", "start", "seconds", "error", "timed_out", "memory", "answer"),
    *("user", "system", "read", "written"),
)


def course_of(job: Job, outputs: Outputs, levels: Levels) -> Generator[Step, Any, None]:
    """Yield what is to be called on the host of a job, one by one; receives what that returned.

    Raises
    ------
    StepFailed
        It could not go on, for a reason that is none of the command's.
    """
    command = job.command
    try:
        stdin = command.input()
    except OSError as exc:
        raise StepFailed(f"its input cannot be read: {exc}") from exc
    job.tries += 1
    transfer, directory = command.transfer, str(command.directory)
    if transfer is None or (job.is_here and not directory):
        yield from _run(job, stdin, directory, outputs, levels)
        return
    if not job.is_here and not directory.startswith(("/", "~", "$")):
        directory = f"~/{directory}"
    home = yield from transfers.prepare(directory)
    if job.is_here:
        transfer = replace(transfer, send=(), fetch=(), base=())
    failure = None
    try:
        yield from transfers.send(transfer, home)
        yield from _run(job, stdin, str(home), outputs, levels)
        yield from transfers.fetch(transfer, home)
    except StepFailed as exc:
        failure = exc
    yield from transfers.clean(transfer, home)
    if failure is not None and (job.done.succeeded or not job.done.start):
        raise failure


def _run(
    job: Job, stdin: bytes, directory: str, outputs: Outputs, levels: Levels
) -> Generator[Step, Any, None]:
    command = job.command
    if any(levels):
        log = logging.getLogger(f"{job.label}.{command.label}")
        out, err = (level if level and log.isEnabledFor(level) else None for level in levels)
        levels = out, err
    seat = job.seat.number if job.seat else 1
    spec = command.spec(job.label, stdin, levels, outputs.keep, outputs.is_whole, slot=seat)
    if directory != spec.directory:
        spec = replace(spec, directory=directory)
    ended: Ended = yield run_command, spec
    done = job.done
    take(done, ended)
    done.host, done.attempts = job.label, job.tries
    try:
        for path, place, size in outputs.put(done, ended.stdout, ended.stderr):
            yield from _fetch(path, place, size)
    except OSError as exc:
        for taken in (ended.stdout, ended.stderr):
            with contextlib.suppress(OSError):  # it was lost there, too
                if taken.place:
                    yield _released(taken.place)
        raise StepFailed(f"its output cannot be written: {exc}") from exc


def take(done: Done, ended: Ended) -> None:
    """Take how a command has ended."""
    for name in _AS_IT_IS:
        setattr(done, name, getattr(ended, name))
    done.sizes = (ended.stdout.size, ended.stderr.size)


def _fetch(path: Path, place: str, size: int) -> Generator[Step, Any, None]:
    """Fetch an output, a piece at a time; at the end have it kept there no more."""
    with path.open("wb") as file:
        while (position := file.tell()) < size:
            piece = yield read_piece, (place, position, min(PIECE, size - position))
            if not piece:
                raise OSError(f"{path}: the rest of it was lost")
            file.write(piece)
    yield _released(place)


def _released(place: str) -> Step:
    """Return the step after which an output is kept no more where it was made."""
    return read_piece, (place, 0, 0)

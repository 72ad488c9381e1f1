"""A file with a line for each command that has ended, in the form of GNU parallel's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ostap_parallel.errors import ConfigError
from ostap_parallel.worker.files import write_all

HEADER = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand"


@dataclass(frozen=True)
class Entry:
    """One line: a command that has ended, and how. The fields are in the order of the columns."""

    number: int
    host: str
    start: float
    seconds: float
    sent: int
    received: int
    status: int
    signal: int
    command: str

    def line(self) -> str:
        """Return the line, with its end; line ends in the command are null bytes there."""
        command = self.command.replace("\n", "\0")
        return (
            f"{self.number}\t{self.host}\t{self.start:.3f}\t{self.seconds:10.3f}\t{self.sent}\t"
            f"{self.received}\t{self.status}\t{self.signal}\t{command}\n"
        )

    @property
    def succeeded(self) -> bool:
        """Whether the command has ended well."""
        return self.status == 0 and self.signal == 0


def read(path: Path) -> dict[int, Entry]:
    """Return the entries of a file by number, of each the last; none if there is no file.

    A last line without an end is none: whoever wrote it was killed.

    Raises
    ------
    ConfigError
        It is no job log.
    """
    try:
        text = path.read_text("utf-8", "surrogateescape")
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise ConfigError(f"job log {path}: {exc.strerror}") from exc
    first, *lines = text.split("\n")
    if not (first.startswith("Seq\t") or (HEADER.startswith(first) and not lines)):
        raise ConfigError(f"{path} is no job log: it begins with {first[:60]!r}")
    entries = {}
    whole = lines[:-1]  # behind the last line end is nothing, or half a line
    for position, line in enumerate(whole, 2):
        try:
            number, host, start, seconds, *sizes, command = line.split("\t", 8)
            sent, received, status, signal = map(int, sizes)
            entry = Entry(
                number=int(number),
                host=host,
                start=float(start),
                seconds=float(seconds),
                sent=sent,
                received=received,
                status=status,
                signal=signal,
                command=command.replace("\0", "\n"),
            )
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"job log {path}: line {position} cannot be read: {exc}") from exc
        entries[entry.number] = entry
    return entries


@contextlib.contextmanager
def writer(path: Path, append: bool) -> Iterator[Callable[[Entry], None]]:
    """Open a job log; yield what adds an entry, which is there at once, or raises OSError.

    With `append` they come behind those that are there. Raises ConfigError if it cannot be opened.
    """
    try:
        opened = path.open("ab", buffering=0)
    except OSError as exc:
        raise ConfigError(f"job log {path}: {exc.strerror}") from exc
    with opened as file:

        def write(line: str) -> None:
            try:
                write_all(file, line.encode("utf-8", "surrogateescape"))
            except OSError as exc:
                exc.filename = str(path)
                raise

        if path.is_file():  # not where it is shown, as on /dev/stderr
            if append:
                _cut(path)
            else:
                file.truncate(0)
        if not path.stat().st_size:
            write(f"{HEADER}\n")
        yield lambda entry: write(entry.line())


def _cut(path: Path) -> None:
    """Remove half a line at the end."""
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)

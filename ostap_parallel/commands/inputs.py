"""Values for commands: from words, files and standard input, as GNU parallel reads them."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ostap_parallel.commands.template import cross, recycled
from ostap_parallel.errors import ConfigError

Row = tuple[str, ...]

# How inputs begin on a command line.
SOURCES = (":::", ":::+", "::::", "::::+")

# Bytes that a command made of many values may have; one argument of a program can have some more.
ROOM = 131_000


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How values are read.

    Attributes
    ----------
    end
        What ends each in files and standard input.
    columns
        A regular expression for what is between the columns of a line, which are values each.
    is_csv
        Whether lines are of comma separated values, quoted perhaps; `columns` is the comma then.
    trim
        ``"l"``, ``"r"`` or both: on which sides blanks are taken away.
    stop
        A value that is the end of all.
    leave_empty
        Whether empty ones are left out.
    has_header
        Whether the first of each source is the name of its values.
    is_linked
        Whether the first values of all sources go together, and so on, in place of all
        combinations; the shorter ones begin anew.
    """

    end: bytes = b"\n"
    columns: str = ""
    is_csv: bool = False
    trim: str = ""
    stop: str | None = None
    leave_empty: bool = False
    has_header: bool = False
    is_linked: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.columns)
        except re.error as exc:
            raise ConfigError(f"{self.columns!r} is no regular expression: {exc}") from exc

    def read(
        self, sources: Sequence[tuple[str, Sequence[str]]]
    ) -> tuple[Iterable[Row], list[str]]:
        """Return the values of each command, and their names.

        They are a list where their number is known: not if standard input is all there is, which
        is read on demand.

        Parameters
        ----------
        sources
            One of `SOURCES`, and the words behind it.

        Raises
        ------
        ConfigError
            A file cannot be read.
        """
        names: list[str] = []
        if not sources:
            return self._named(self._rows(_lines(sys.stdin.buffer, self.end)), names), names
        groups: list[list[list[Row]]] = []
        for kind, words in sources:
            inputs: list[Iterable[str]] = [self._pieces(words)]
            if kind.startswith("::::"):
                inputs = [self._open(file) for file in words]
            read = [list(self._named(self._rows(values), names)) for values in inputs]
            for one in read:
                if kind.endswith("+") and groups:
                    groups[-1].append(one)
                else:
                    groups.append([one])
        linked = [list(map(_flat, zip(*group, strict=False))) for group in groups]
        rows = recycled(linked) if self.is_linked else cross(linked)
        return list(map(_flat, rows)), names

    def _pieces(self, words: Sequence[str]) -> Sequence[str]:
        """Return words, taken apart where another end than that of lines is in them."""
        if self.end in (b"\n", b"\0"):
            return words
        end = self.end.decode("utf-8", "surrogateescape")
        return [piece for word in words for piece in word.split(end)]

    def _open(self, file: str) -> Iterator[str]:
        if file == "-":
            yield from _lines(sys.stdin.buffer, self.end)
            return
        try:
            with Path(file).open("rb") as opened:
                yield from _lines(opened, self.end)
        except OSError as exc:
            raise ConfigError(f"{file}: {exc.strerror}") from exc

    def _rows(self, values: Iterable[str]) -> Iterator[Row]:
        """Yield values, or columns of them."""
        if self.stop is not None:
            values = itertools.takewhile(lambda value: value != self.stop, values)
        rows: Iterable[Sequence[str]] = ((value,) for value in values)
        if self.is_csv:
            rows = _of_csv(values, self.columns or ",")
        elif self.columns:
            pattern = re.compile(self.columns)
            rows = (pattern.split(value) for value in values)
        for row in rows:
            found = tuple(map(self._trimmed, row))
            if not self.leave_empty or any(map(str.strip, found)):
                yield found

    def _trimmed(self, value: str) -> str:
        value = value.lstrip() if "l" in self.trim else value
        return value.rstrip() if "r" in self.trim else value

    def _named(self, rows: Iterator[Row], names: list[str]) -> Iterator[Row]:
        """Return rows without the first, if that is of names."""
        if self.has_header:
            names += next(rows, ())
        return rows


def _of_csv(values: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader((f"{value}\n" for value in values), delimiter=delimiter)
    except csv.Error as exc:  # a field longer than 128 KiB, for example
        raise ConfigError(f"what is read is no CSV: {exc}") from exc


def _flat(rows: Iterable[Row]) -> Row:
    return tuple(itertools.chain(*rows))


def _lines(file: IO[bytes], end: bytes) -> Iterator[str]:
    """Yield what a file holds, by line or by another end."""
    parts: Iterable[bytes] = file if end == b"\n" else _parts(file, end)
    for part in parts:
        yield part.removesuffix(end).decode("utf-8", "surrogateescape")


def _parts(file: IO[bytes], end: bytes) -> Iterator[bytes]:
    rest = b""
    while data := file.read1(1 << 16) if hasattr(file, "read1") else file.read():
        *parts, rest = (rest + data).split(end)
        yield from parts
    if rest:
        yield rest


def in_groups(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yield so many rows together; of 0, none for each."""
    if not size:
        yield from ([] for _ in rows)
        return
    every = iter(rows)
    while group := list(itertools.islice(every, size)):
        yield group


def packed(
    rows: Iterable[Row],
    text_of: Callable[[list[Row]], str],
    *,
    room: int = ROOM,
    most: int | None = None,
    slots: int = 1,
) -> Iterator[list[Row]]:
    """Yield as many rows together as a command has room for.

    Parameters
    ----------
    text_of
        Returns the command for some rows.
    room
        Bytes.
    most
        How many go together at most.
    slots
        Among so many commands the last rows are shared out.

    Raises
    ------
    ConfigError
        One row is too long by itself.
    """
    group: list[Row] = []
    size = 0
    for row in rows:
        one = len(text_of([row]).encode("utf-8", "surrogateescape"))
        if one > room:
            raise ConfigError(
                f"a command of {one} bytes is too long, with {', '.join(row)[:40]!r}"
            )
        more = len(text_of([row, row]).encode("utf-8", "surrogateescape")) - one
        if group and (size + more > room or len(group) == most):
            yield group
            group = []
        size = size + more if group else one
        group.append(row)
    yield from in_groups(group, -(-len(group) // slots) or 1)

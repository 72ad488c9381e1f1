"""Failures by what was raised, and where: many items mostly fail for few reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ostap_parallel.views.words import cut, printable

_FRAME = re.compile(r'^\s+File "(.+)", line (\d+)', re.MULTILINE)

# Files of these are not the user's own: the place is where these were called.
_OTHERS = re.compile(
    r"/(site|dist)-packages/|/lib/python3[^/]*/|^<frozen |/ostap_parallel/worker/"
)

_MAX_REASON = 120


@dataclass(frozen=True)
class Group:
    """Failures that are alike.

    Attributes
    ----------
    count
        How many there are.
    name
        The exception's class.
    place
        The file and the line that raised it, of the user's own if that is known; else the reason.
    index, host
        The first item, and where that was.
    reason
        What was said of the first one.
    """

    count: int
    name: str
    place: str
    index: int
    host: str
    reason: str

    def __str__(self) -> str:
        text = f"{self.count} x {self.name}{self.place and f' in {self.place}'}"
        text += f", first item {self.index} on {self.host}"
        return printable(f"{text}: {self.reason}" if self.reason else text)


def groups_of(failures: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Return groups of failures, the largest first.

    `failures` have an ``index``, an ``error`` in one line that begins with its class, a
    ``traceback`` and a ``host``.
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for failure in failures:
        name, reason = failure["error"].partition(": ")[0], _reason_of(failure)
        place = place_of(failure["traceback"])
        # numbers in the reason are of processes: it is the same one
        alike = place or re.sub(r"\d+", "#", reason)
        found.setdefault((name, alike), []).append(failure)
    groups = []
    for (name, _), members in found.items():
        first = min(members, key=lambda failure: int(failure["index"]))
        reason = cut(_reason_of(first).split("\n")[0], _MAX_REASON)
        place = place_of(first["traceback"])
        groups.append(Group(len(members), name, place, first["index"], first["host"], reason))
    return sorted(groups, key=lambda group: (-group.count, group.index))


def _reason_of(failure: Mapping[str, Any]) -> str:
    """Return what was said, but for which item it was, and where."""
    reason: str = failure["error"].partition(": ")[2]
    return reason.removeprefix(f"item {failure['index']} on {failure['host']}: ")


def place_of(traceback: str) -> str:
    """Return the file and line that a traceback ends with, in the user's own code if it can."""
    frames = _FRAME.findall(traceback)
    own = [frame for frame in frames if not _OTHERS.search(frame[0])]
    if not frames:
        return ""
    file, line = (own or frames)[-1]
    return f"{file.rpartition('/')[2]}:{line}"

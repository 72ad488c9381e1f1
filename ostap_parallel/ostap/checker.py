"""Checker: whether objects can travel to workers, as Ostap asks."""

from __future__ import annotations

import array
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ostap_parallel.objects import serialize

_SURE = frozenset({type(None), bool, int, float, str, bytes, bytearray, array.array})
_READ = "import sys\nfrom ostap_parallel.objects import serialize\n"
_READ += "serialize.loads(sys.stdin.buffer.read())"


class Checker:
    """Tells whether objects can be serialised and read again; containers are looked into."""

    def __init__(self) -> None:
        self._known: set[type] = set()
        self._refused: set[type] = set()

    def __contains__(self, kind: type) -> bool:
        return kind in _SURE or kind in self._known

    def add(self, *kinds: type) -> None:
        """Have these types taken for good ones, without a trial."""
        self._known.update(kinds)

    def add_nonpickleable(self, *kinds: type) -> None:
        """Have these types taken for bad ones, without a trial."""
        self._refused.update(kinds)

    def known(self, *kinds: type) -> bool:
        """Return whether all types are known as good ones."""
        return all(kind in self for kind in kinds)

    def notgood(self, *kinds: type) -> bool:
        """Return whether any type is known as a bad one."""
        return not self._refused.isdisjoint(kinds)

    def pickles(self, *objects: Any) -> bool:
        """Return whether all objects can be written, and read here."""
        return self._check(objects, fast=True)

    def pickles_process(self, *objects: Any, fast: bool = False) -> bool:
        """Return whether another process can read all objects; `fast`: whether this one can."""
        return self._check(objects, fast)

    def pickles_all(self, *args: Any, **kwargs: Any) -> bool:
        """`pickles` for all arguments."""
        return self.pickles(*args, *kwargs.values())

    def pickles_process_all(self, *args: Any, **kwargs: Any) -> bool:
        """`pickles_process` for all arguments."""
        return self.pickles_process(*args, *kwargs.values())

    def _check(self, objects: tuple[Any, ...], fast: bool) -> bool:
        kinds = set(map(type, _flatten(objects)))
        if self.notgood(*kinds):
            return False
        if self.known(*kinds):
            return True
        try:
            data = serialize.dumps(objects)
            if fast:
                serialize.loads(data)
                return True
        except Exception:  # user code
            return False
        return (
            subprocess.run(
                [sys.executable, "-c", _READ], input=data, capture_output=True, check=False
            ).returncode
            == 0
        )

    def pickling_table(self, *args: Any, prefix: str = "", title: str = "", **kwargs: Any) -> str:
        """Return a table of arguments and whether they can be read, here and elsewhere."""
        rows: list[tuple[str, ...]] = [("Argument", "type", "here", "elsewhere")]
        for name, value in (*enumerate(args), *kwargs.items()):
            verdicts = self.pickles(value), self.pickles_process(value)
            rows.append(
                (str(name), type(value).__name__, *("+" if ok else "-" for ok in verdicts))
            )
        return _table(rows, title or "Arguments that can travel", prefix)

    def table_pickleable(self, title: str = "Pickleable types", prefix: str = "") -> str:
        """Return a table of the types that are known as good ones."""
        return _table(_names(_SURE | self._known), title, prefix)

    def table_nonpickleable(self, title: str = "Non-pickleable types", prefix: str = "") -> str:
        """Return a table of the types that are known as bad ones."""
        return _table(_names(self._refused), title, prefix)


def _flatten(objects: Iterable[Any]) -> Iterator[Any]:
    for obj in objects:
        if type(obj) in (list, tuple, set, frozenset):
            yield from _flatten(obj)
        elif type(obj) is dict:
            yield from _flatten(obj)
            yield from _flatten(obj.values())
        else:
            yield obj


def _names(kinds: Iterable[type]) -> list[tuple[str, ...]]:
    names = sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return [("#", "type"), *((str(n), name) for n, name in enumerate(names, start=1))]


def _table(rows: list[tuple[str, ...]], title: str, prefix: str) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(prefix + line for line in (title, *lines))

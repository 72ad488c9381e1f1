"""Commands made of a template and of values that take the places in it."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# {} {.} {/} {//} {/.} {#} {host} and, with a number, {2} {2.} {2/} {2//} {2/.}
_PLACE = re.compile(r"\{(?:(\d*)(\.|//|/\.|/)?|(#)|(host))\}")


@dataclass(frozen=True)
class Filled:
    """The text of a command whose host is known when its turn comes.

    Attributes
    ----------
    parts
        What stands before, between and behind the places of the host.
    """

    parts: tuple[str, ...]

    def on(self, host: str) -> str:
        """Return the text for a host."""
        return shlex.quote(host).join(self.parts)

    def __str__(self) -> str:
        return "{host}".join(self.parts)


@dataclass(frozen=True)
class Template:
    """Shell text with places for values, as GNU parallel has them.

    ``{}`` is the value, or all of them; ``{.}`` without its extension, ``{/}`` without its
    directory, ``{//}`` its directory, ``{/.}`` without both; ``{2}``, ``{2.}`` and so on are those
    of the second value; ``{#}`` is the number of the command and ``{host}`` where it runs. Each
    value is quoted for the shell, once: it arrives as it is, whatever is in it.
    """

    text: str

    def __post_init__(self) -> None:
        found = _PLACE.finditer(self.text)
        if not any(place[1] is not None for place in found):  # it needs the values somewhere
            object.__setattr__(self, "text", f"{self.text} {{}}".lstrip())

    def fill(self, values: Sequence[str], number: int = 1) -> str | Filled:
        """Return the command number `number`, for these values.

        Raises ValueError for a place of a value that there is none of.
        """
        parts, position, current = [], 0, ""
        for place in _PLACE.finditer(self.text):
            current += self.text[position : place.start()]
            position = place.end()
            if place[4]:
                parts.append(current)
                current = ""
            elif place[3]:
                current += str(number)
            else:
                current += self._value(values, place[1], place[2] or "", place[0])
        parts.append(current + self.text[position:])
        return Filled(tuple(parts)) if parts[1:] else parts[0]

    @staticmethod
    def _value(values: Sequence[str], index: str, form: str, place: str) -> str:
        chosen = values
        if index:
            if not 1 <= int(index) <= len(values):
                raise ValueError(f"{place}: there is no value number {index}, of {len(values)}")
            chosen = [values[int(index) - 1]]
        return " ".join(shlex.quote(_in_form(value, form)) for value in chosen)


def _in_form(value: str, form: str) -> str:
    if form == "//":
        return os.path.dirname(value) or "."  # noqa: PTH120 - text, not a path
    if form.startswith("/"):
        value = value.rpartition("/")[2]
    if form.endswith("."):
        directory, slash, name = value.rpartition("/")
        stem, dot, _ = name.rpartition(".")
        value = directory + slash + (stem if dot else name)
    return value


def cross(sources: Sequence[Iterable[T]]) -> Iterator[tuple[T, ...]]:
    """Yield each value of the first source with each of the others; the first may be endless."""
    first, *others = sources
    rest = list(itertools.product(*others))
    for value in first:
        for values in rest:
            yield (value, *values)

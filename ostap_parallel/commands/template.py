"""Commands made of a template and of values that take the places in it."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

Quote = Callable[[str], str]

# What a place makes of a value, and what besides with `more`, as GNU parallel's `--plus`.
_FORMS = (r"\.", "//", r"/\.", "/")
_MORE = (*(r"/\.\.\.", r"/\.\.", r"\.\.\.", r"\.\."), *(r"\+\.\.\.", r"\+\.\.", r"\+\.", r"\+/"))

# Places whose value is known when the turn of the command comes.
_LATE = ("host", "%")


@dataclass(frozen=True)
class Filled:
    """The text of a command whose host and slot are known when its turn comes.

    Attributes
    ----------
    parts
        By turns what stands in the text, and the name of a place.
    """

    parts: tuple[str, ...]

    def on(self, host: str, slot: int = 1, quote: Quote = shlex.quote) -> str:
        """Return the text for a host, and a slot."""
        late = {"host": quote(host), "%": str(slot)}
        return "".join(late[part] if n % 2 else part for n, part in enumerate(self.parts))

    def __str__(self) -> str:
        return "".join(f"{{{part}}}" if n % 2 else part for n, part in enumerate(self.parts))


@dataclass(frozen=True)
class Template:
    """Shell text with places for values, as GNU parallel has them.

    ``{}`` is the value, or all of them; ``{.}`` without its extension, ``{/}`` without its
    directory, ``{//}`` its directory, ``{/.}`` without both; ``{2}``, ``{2.}`` and so on are those
    of the second value, ``{-1}`` of the last; ``{#}`` is the number of the command, ``{%}`` that
    of the slot in which it runs and ``{host}`` where. Each value is quoted for the shell, once: it
    arrives as it is, whatever is in it.

    Attributes
    ----------
    text
        The place for all values is added at its end if it has none, not even for a number.
    names
        Of the values, by which places may call them, too: ``{name}``, ``{name.}`` and so on.
    more
        Whether there are the places of GNU parallel's ``--plus``, too: ``{..}``, ``{...}``,
        ``{/..}``, ``{/...}`` without two or three extensions, ``{+.}``, ``{+..}``, ``{+...}``,
        ``{+/}`` what the others leave out, and ``{##}`` how many commands there are.
    all
        What stands for all values in place of ``{}``.
    is_whole
        Whether it is left as it is if it has no place for a value.
    """

    text: str
    names: Sequence[str] = ()
    more: bool = False
    all: str = "{}"
    is_whole: bool = False
    _place: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = "|".join([r"-?\d+", *map(re.escape, sorted(self.names, key=len, reverse=True))])
        forms = "|".join([*_MORE, *_FORMS] if self.more else _FORMS)
        count = "##|" if self.more else ""
        pattern = rf"(?P<all>{re.escape(self.all)})|"
        pattern += rf"\{{(?:(?P<late>{'|'.join(_LATE)})|(?P<number>{count}\#)|"
        pattern += rf"(?P<which>{names})(?P<form>{forms})?|(?P<plain>{forms}))\}}"
        object.__setattr__(self, "_place", re.compile(pattern))
        places = self._place.finditer(self.text)
        if not self.is_whole and all(place["late"] == "host" for place in places):
            object.__setattr__(self, "text", f"{self.text} {self.all}".lstrip())

    @classmethod
    def of_words(cls, words: Iterable[str], **settings: object) -> Template:
        """Return a template in which words are quoted for the shell, but not their places."""
        found = cls("", **settings)  # type: ignore[arg-type]
        texts = []
        for word in words:
            pieces, position = "", 0
            for place in found._place.finditer(word):
                pieces += _quoted(word[position : place.start()]) + place[0]
                position = place.end()
            texts.append(pieces + _quoted(word[position:]) if word else "''")
        return cls(" ".join(texts), **settings)  # type: ignore[arg-type]

    def fill(
        self,
        values: Sequence[str],
        number: int = 1,
        *,
        count: int = 0,
        least: int = 0,
        quote: Quote = shlex.quote,
    ) -> str | Filled:
        """Return the command number `number` of `count`, for these values.

        Raises ValueError for a place of a value that there is none of; up to number `least` it
        is empty.
        """
        return self._filled(self.text, [values], number, count, least, quote)

    def fill_words(
        self, rows: Sequence[Sequence[str]], number: int = 1, *, count: int = 0
    ) -> str | Filled:
        """Return a command in which each word with a place for values comes for each row."""

        def repeat(match: re.Match[str]) -> str:
            if not any(map(_has_value, self._place.finditer(match[0]))):
                return match[0]
            # Marks which row: no text of a command has a null byte in it.
            return " ".join(f"\0{row}\0{match[0]}\0" for row in range(len(rows)))

        marked = re.sub(r"\S+", repeat, self.text).split("\0")
        pieces = []
        for position, piece in enumerate(marked):
            if position % 3 != 1:
                chosen = [rows[int(marked[position - 1])]] if position % 3 else rows
                pieces.append(self._filled(piece, chosen, number, count, 0, shlex.quote))
        return _joined(pieces)

    def _filled(
        self,
        text: str,
        rows: Sequence[Sequence[str]],
        number: int,
        count: int,
        least: int,
        quote: Quote,
    ) -> str | Filled:
        values = [value for row in rows for value in row]
        parts, position, current = [], 0, ""
        for place in self._place.finditer(text):
            current += text[position : place.start()]
            position = place.end()
            if place["late"]:
                parts += [current, place["late"]]
                current = ""
            elif place["number"]:
                current += str(number if place["number"] == "#" else count)
            else:
                current += self._value(values, place, least, quote)
        parts.append(current + text[position:])
        return Filled(tuple(parts)) if parts[1:] else parts[0]

    def _value(self, values: Sequence[str], place: re.Match[str], least: int, quote: Quote) -> str:
        form, chosen = place["form"] or place["plain"] or "", values
        if place["which"]:
            which = place["which"]
            index = self.names.index(which) + 1 if which in self.names else int(which)
            if 1 <= abs(index) <= len(values):
                chosen = [values[index - 1 if index > 0 else index]]
            elif 1 <= abs(index) <= least:
                chosen = []
            else:
                raise ValueError(f"{place[0]}: there is no value number {index}, of {len(values)}")
        return " ".join(quote(_in_form(value, form)) for value in chosen)


def _has_value(place: re.Match[str]) -> bool:
    return not place["late"] and not place["number"]


def _quoted(text: str) -> str:
    return shlex.quote(text) if text else ""


def _joined(pieces: Iterable[str | Filled]) -> str | Filled:
    parts = [""]
    for piece in pieces:
        first, *others = piece.parts if isinstance(piece, Filled) else (piece,)
        parts[-1] += first
        parts += others
    return Filled(tuple(parts)) if parts[1:] else parts[0]


def _in_form(value: str, form: str) -> str:
    if form == "//":
        directory = value.rstrip("/").rpartition("/")[0].rstrip("/")
        return directory or ("/" if value.startswith("/") else ".")
    if form == "+/":
        return value.rpartition("/")[0]
    if form.startswith("+"):
        pieces = value.rpartition("/")[2].split(".")
        return ".".join(pieces[1 - len(form) :]) if len(pieces) >= len(form) else ""
    if form.startswith("/"):
        value = value.rpartition("/")[2]
    dots = form.count(".")
    directory, slash, name = value.rpartition("/")
    pieces = name.split(".")
    if dots and len(pieces) > dots:
        value = directory + slash + ".".join(pieces[:-dots])
    return value


def cross(sources: Sequence[Iterable[T]]) -> Iterator[tuple[T, ...]]:
    """Yield each value of the first source with each of the others; the first may be endless."""
    first, *others = sources
    rest = list(itertools.product(*others))
    for value in first:
        for values in rest:
            yield (value, *values)


def recycled(sources: Sequence[Sequence[T]]) -> Iterator[tuple[T, ...]]:
    """Yield the first values of all sources, and so on; the shorter ones begin anew."""
    if all(sources):
        for number in range(max(map(len, sources))):
            yield tuple(source[number % len(source)] for source in sources)

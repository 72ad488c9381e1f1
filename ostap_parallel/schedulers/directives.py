"""Directives of ours beside those of the user's, which win."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable

# A directive of ours: the names by which it, or what excludes it, may be given; and its text.
Directive = tuple[tuple[str, ...], str]


def merge(
    ours: Iterable[Directive], options: str, skip: Collection[str], *, glued: bool
) -> list[str]:
    """Return the texts of our directives without those that are left out or given as options."""
    given = names_in(options, glued=glued) | set(skip)
    return [text for names, text in ours if given.isdisjoint(names)]


def names_in(options: str, *, glued: bool) -> set[str]:
    """Return the names of options, with those of resources behind ``-l``.

    If values may be `glued`, ``-pgpu`` is ``-p``.

    Raises ValueError if a quotation is not closed.
    """
    try:
        words = shlex.split(options)
    except ValueError as exc:
        raise ValueError(f"options: {exc}: {options!r}") from None
    names: set[str] = set()
    for before, word in zip(["", *words], words, strict=False):
        if before == "-l":
            names.update(part.partition("=")[0] for part in word.split(","))
        elif word.startswith("--"):
            names.add(word.partition("=")[0])
        elif word.startswith("-"):
            names.add(word[:2] if glued else word)
    return names

"""Directives of ours beside those of the user's, which win."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from ostap_parallel.schedulers.scheduler import JobSpec

# A directive of ours: the names by which it, or what excludes it, may be given; and its text.
Directive = tuple[tuple[str, ...], str]


def script_of(mark: str, ours: Iterable[Directive], spec: JobSpec, *, glued: bool) -> str:
    """Return a script of bash whose directives stand behind a mark: ours, and the user's options.

    Ours are those that are neither left out nor given as options; for `glued` see `names_in`.
    """
    given = names_in(spec.options, glued=glued) | set(spec.skip)
    lines = [text for names, text in ours if given.isdisjoint(names)]
    lines += [spec.options] * bool(spec.options.strip())
    directives = "".join(f"{mark} {line}\n" for line in lines)
    return f"#!/bin/bash\n{directives}\n{spec.body}"


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

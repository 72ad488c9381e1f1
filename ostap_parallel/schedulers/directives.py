"""Directives of ours beside those of the user's, which win."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Collection, Iterable

from ostap_parallel.schedulers.scheduler import JobSpec

# A directive of ours: the names by which it, or what excludes it, may be given; and its text. What
# follows in other lines of the text is for the script, before anything else.
Directive = tuple[tuple[str, ...], str]


def script_of(mark: str, ours: Iterable[Directive], spec: JobSpec, *, glued: bool) -> str:
    """Return a script of bash whose directives stand behind a mark: ours, and the user's options.

    Ours are those that are neither left out nor given as options; for `glued` see `names_in`. The
    first is the name. It stands last, and wins: by it a job is found again.
    """
    given = names_in(spec.options, glued=glued) | set(spec.skip)
    (_, name), *others = ours
    texts = [text.partition("\n") for names, text in others if given.isdisjoint(names)]
    lines = [directive for directive, _, _ in texts]
    lines += [*[spec.options] * bool(spec.options.strip()), name]
    directives = "".join(f"{mark} {line}\n" for line in lines)
    before = "".join(f"{line}\n" for _, _, line in texts if line)
    return f"#!/bin/bash\n{directives}\n{before}{spec.body}"


def joined(name: str, value: str | Iterable[str], between: str) -> str:
    """Return a text that may be given as several; raises TypeError for what is none."""
    texts = [value] if isinstance(value, str) else value
    texts = list(texts) if isinstance(texts, Iterable) else [texts]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text, or a list of texts, not {value!r}")
    return between.join(texts)


def enter(directory: str) -> str:
    """Return the line of a script that goes there."""
    return f"cd -- {shlex.quote(directory)} || exit 1"


def print_to(spec: JobSpec, index: str) -> str:
    """Return the line of a script that has all that it prints appended to a file.

    The variable `index` has the number of an element.
    """
    element = f".${index}" if spec.has_outputs else ""
    return f"exec >> {shlex.quote(spec.output)}{element} 2>&1"


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


def value_in(options: str, names: Collection[str]) -> str:
    """Return the value that options give by one of these names, or nothing."""
    words = shlex.split(options)
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        for name in names:
            if word == name:
                return following
            is_glued = word.startswith(f"{name}=") or (len(name) == 2 and word.startswith(name))
            if is_glued:
                return word.removeprefix(name).removeprefix("=")
    return ""


def name_in(options: str, names: Collection[str]) -> str:
    """Return the name for jobs that options have, made of what every scheduler takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", value_in(options, names))

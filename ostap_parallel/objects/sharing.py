"""Global variables that hold one another: they are sent together, or would be copies there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ostap_parallel.objects.program import Key

# What pickle itself takes apart, without asking anybody else.
NATIVE = (list, dict, set)


class Named:
    """Stands for an object that is a global variable: it is that there, too."""

    def __init__(self, place: tuple[str, str, str]) -> None:
        self.place = place


def held_by_others(values: Mapping[Key, tuple[dict[str, Any], Any]]) -> dict[int, Key]:
    """Return, by their ids, the values that something else than their name refers to.

    `values` are in the dictionaries of their modules, which come with them.
    """
    return {
        id(value): key
        for key, (names, value) in values.items()
        if type(value) not in (tuple, frozenset) and sys.getrefcount(names[key[1]]) > _ALONE
    }


def _count_alone() -> int:
    names = {"x": [object()]}
    values = {("", "x"): (names, names["x"])}
    for key, (names, _value) in values.items():
        return sys.getrefcount(names[key[1]])
    raise AssertionError


_ALONE = _count_alone()


def group(keys: Iterable[Key], find: Callable[[Key], set[Key]]) -> list[list[Key]]:
    """Return those that belong together; `find` returns which ones a value holds."""
    groups: dict[Key, list[Key]] = {key: [key] for key in keys}
    for key in list(groups):
        for other in find(key):
            if groups[other] is not groups[key]:
                joint = groups[key] + groups[other]
                groups.update(dict.fromkeys(joint, joint))
    found = {id(one): one for one in groups.values() if len(one) > 1}
    return list(found.values())

"""Calls with plain arguments, as most are: Python's own pickler writes them."""

from __future__ import annotations

import pickle
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from ostap_parallel.objects import program
from ostap_parallel.objects.parts import PLAIN, Parts
from ostap_parallel.objects.places import is_importable, place_of
from ostap_parallel.objects.program import Key

PROTOCOL = 5

# What was sent of functions with all that they use, and what they were made of.
known: WeakKeyDictionary[FunctionType, tuple[Parts, list[Key], bytes]]
known = WeakKeyDictionary()


def known_definitions(function: FunctionType) -> tuple[list[Key], bytes] | None:
    """Return the keys of the definitions that were sent with a function, and these; see `known`.

    ``None`` if there are none, or what they were made of has changed.
    """
    found = known.get(function)
    if found is None or not found[0].are_of(function, program.home()):
        return None
    return found[1:]


_ALL_PLAIN = frozenset(PLAIN)


class _Plain:
    """Reads as what its function is by a name of the program."""

    def __init__(self, *reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return program.find, self._reduced


def dumps_call(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> bytes | None:
    """Serialise a call of a function with plain arguments; ``None``: it is of another kind.

    What is written is what `serialize.dumps` writes, several times as fast.
    """
    function, args, kwargs = call
    values = (*args, *kwargs.values()) if kwargs else args
    if type(function) is not FunctionType or not _ALL_PLAIN.issuperset(map(type, values)):
        return None
    if is_importable(function):
        return pickle.dumps(call, PROTOCOL)
    place, found = place_of(function), known_definitions(function)
    if place is None or found is None or "." in place[2]:
        return None
    return pickle.dumps((_Plain(*place, found[1]), args, kwargs), PROTOCOL)

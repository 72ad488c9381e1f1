"""What functions consist of: to look whether that has changed is quicker than to pickle them."""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from ostap_parallel.objects import byvalue, program
from ostap_parallel.objects.byvalue import annotations_of, names_in
from ostap_parallel.objects.places import is_importable, last_import

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def are_same(before: list[Any], now: list[Any]) -> bool:
    """Return whether all parts are the very same objects."""
    return len(before) == len(now) and all(map(operator.is_, before, now))


_ABSENT = object()


class Parts:
    """All that makes a function, and those that it uses, what they are; asked whether it still is.

    To ask takes no longer than to look at each once: it is what a call in a loop waits for.

    Raises
    ------
    LookupError
        Some of it may change from within, and nobody could tell.
    """

    def __init__(self, function: FunctionType, token: str) -> None:
        self._token, self._modules = token, last_import()
        self._own = _own_parts(function)
        # weakly: they may use one another, and that function
        self._others: list[tuple[dict[str, Any], str, weakref.ref[Any], tuple[Any, ...]]] = []
        self._names: list[tuple[dict[str, Any], str, Any]] = []
        self._fixed: list[Any] = []
        self._add(function, {function})

    def _add(self, function: FunctionType, seen: set[FunctionType]) -> None:
        if parts_of(function, self._token) is None:
            raise LookupError
        variables = function.__globals__
        for name in names_in(function.__code__).globals:
            value = variables.get(name, _ABSENT)
            if type(value) is FunctionType and not is_importable(value):
                self._others.append((variables, name, weakref.ref(value), _own_parts(value)))
                if value not in seen:
                    seen.add(value)
                    self._add(value, seen)
                continue
            self._names.append((variables, name, value))
            if value is _ABSENT or type(value) in PLAIN:
                continue
            if not _is_fixed(value):
                raise LookupError
            self._fixed.append(value)

    def are_of(self, function: FunctionType, token: str) -> bool:
        """Return whether they are what makes the function still."""
        return (
            all(map(operator.is_, self._own, _own_parts(function)))
            and all(variables.get(name, _ABSENT) is it for variables, name, it in self._names)
            and all(
                (value := variables.get(name)) is one()
                and value is not None
                and all(map(operator.is_, own, _own_parts(value)))
                for variables, name, one, own in self._others
            )
            and self._token == token
            and self._modules == last_import()  # submodules that are used by dotted names
            and all(map(_is_fixed, self._fixed))
        )


def _own_parts(function: FunctionType) -> tuple[Any, ...]:
    own = function.__code__, function.__name__, function.__qualname__, function.__defaults__
    is_more, notes = bool(function.__dict__ or function.__kwdefaults__), annotations_of(function)
    about = function.__module__, function.__doc__, is_more, len(notes)
    return *own, *about, *notes, *notes.values()


def _is_fixed(value: object) -> bool:
    """Return whether a value is sent as a name."""
    if isinstance(value, ModuleType):
        return not program.is_by_value(value)
    return isinstance(value, type | FunctionType | BuiltinFunctionType) and is_importable(value)


def parts_of(function: FunctionType, token: str) -> list[Any] | None:
    """Return all that makes a function what it is; ``None`` if that may change from within."""
    if function.__closure__ or function.__dict__ or function.__kwdefaults__:
        return None
    defaults, names = function.__defaults__ or (), names_in(function.__code__)
    if not all(type(value) in PLAIN for value in defaults) or names.reach_all:
        return None
    used = globals_of(function)
    imports = map(sys.intern, imports_of(function, used.values()))
    return [*_own_parts(function), *map(sys.intern, used), *imports, token]


def globals_of(function: FunctionType) -> dict[str, Any]:
    """Return the global variables that a function names."""
    found = function.__globals__
    return {name: found[name] for name in names_in(function.__code__).globals if name in found}


def imports_of(function: FunctionType, used: Iterable[Any]) -> list[str]:
    """Return the submodules that a function uses by their dotted names."""
    values = [*used, *byvalue.contents(function.__closure__ or ())]
    return sorted(set(byvalue.submodules(values, names_in(function.__code__).all)))

"""What functions consist of: to look whether that has changed is quicker than to pickle them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from ostap_parallel.objects import byvalue, program
from ostap_parallel.objects.byvalue import names_in
from ostap_parallel.objects.places import is_importable

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def are_same(before: list[Any], now: list[Any]) -> bool:
    """Return whether all parts are the very same objects."""
    return len(before) == len(now) and all(map(operator.is_, before, now))


def parts_of_all(function: FunctionType, token: str, seen: set[Any]) -> list[Any] | None:
    """Return all that makes a function, and those that it uses, what they are."""
    parts = parts_of(function, token)
    if parts is None:
        return None
    seen.add(function)
    for value in globals_of(function).values():
        parts.append(value)
        if type(value) in PLAIN or _is_fixed(value):
            continue
        if not isinstance(value, FunctionType):
            return None
        if value not in seen:
            inner = parts_of_all(value, token, seen)
            if inner is None:
                return None
            parts += inner
    return parts


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
    own = function.__code__, function.__name__, function.__qualname__
    return [*own, *defaults, *map(sys.intern, used), *imports, token]


def globals_of(function: FunctionType) -> dict[str, Any]:
    """Return the global variables that a function names."""
    found = function.__globals__
    return {name: found[name] for name in names_in(function.__code__).globals if name in found}


def imports_of(function: FunctionType, used: Iterable[Any]) -> list[str]:
    """Return the submodules that a function uses by their dotted names."""
    values = [*used, *byvalue.contents(function.__closure__ or ())]
    return sorted(set(byvalue.submodules(values, names_in(function.__code__).all)))

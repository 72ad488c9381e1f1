"""What a function carries along that is large: it travels to each worker, or with each chunk."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ostap_parallel.errors import see
from ostap_parallel.logs import logger_of

logger = logger_of(__name__)

# Bytes of a function, as it is sent, from which on it is worth a warning.
MUCH = 10 << 20

_DEPTH = 4  # of functions that functions refer to, and of what containers hold


def warn_of(function: Callable[..., Any], size: int) -> None:
    """Warn once of what makes a function `size` bytes long, if that is much."""
    if size < MUCH:
        return
    parts = sorted(_parts(function, set()), key=lambda part: -part[2])
    heavy = [part for part in parts if part[2] >= MUCH] or parts[:1]
    names = ", ".join(
        f"{name!r} (a {kind}, {bytes_ / 1e6:.0f} MB)" for name, kind, bytes_ in heavy
    )
    _warn(getattr(function, "__qualname__", type(function).__name__), names, size // 1_000_000)


@functools.lru_cache(maxsize=256)
def _warn(function: str, names: str, size: int) -> None:
    logger.warning(
        "the function %s carries %s: %d MB travel to each worker; what is given as shared= "
        "travels once per host%s",
        function,
        names or "much",
        size,
        see("large"),
    )


def _parts(function: Any, seen: set[int], depth: int = 0) -> Iterator[tuple[str, str, int]]:
    """Yield name, type and bytes, about, of what a function refers to."""
    if id(function) in seen or depth > _DEPTH:
        return
    seen.add(id(function))
    for name, value in references(function):
        if isinstance(value, types.ModuleType | type) or _is_named(value):
            continue
        if callable(value) and not hasattr(value, "nbytes"):
            yield from _parts(value, seen, depth + 1)
        else:
            yield name, type(value).__name__, _size(value)


def _is_named(value: Any) -> bool:
    """Return whether something travels as a name, so that nothing of it does."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or module == "__main__" or not isinstance(name, str):
        return False
    return getattr(sys.modules.get(module), name, None) is value


def references(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function refers to, and what that is to it."""
    if isinstance(function, functools.partial):
        yield from ((f"argument {n}", value) for n, value in enumerate(function.args, 1))
        yield from function.keywords.items()
        yield "function", function.func
    elif isinstance(function, types.MethodType):
        yield from _attributes(function.__self__)
        yield "function", function.__func__
    elif isinstance(function, types.FunctionType):
        for name in _names(function.__code__):
            if name in function.__globals__:
                yield name, function.__globals__[name]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            try:
                yield name, cell.cell_contents
            except ValueError:  # not set as yet
                continue
        yield from ((f"default {n}", v) for n, v in enumerate(function.__defaults__ or (), 1))
    else:
        yield from _attributes(function)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(value, "__dict__", {})
    if isinstance(attributes, dict):
        yield from ((f"self.{name}", one) for name, one in attributes.items())


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals, also of functions within a function."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _size(value: Any, depth: int = 0) -> int:
    """Return about how many bytes a value has, at a glance."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    size = sys.getsizeof(value, 0)
    if depth > _DEPTH:
        return size
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = [*value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [*value]
    else:
        inner = [*getattr(value, "__dict__", {}).values()]
    step = max(1, len(inner) // 100)  # of many, some stand for all
    return size + step * sum(_size(one, depth + 1) for one in inner[::step])

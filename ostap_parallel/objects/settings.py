"""What a script sets for its whole process: workers have it, too."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

from ostap_parallel import libraries
from ostap_parallel.objects import program

# Begins the keys of what the program has told a library.
_LIBRARY = "library "

# What was seen last, and what that became.
_last: tuple[Any, bytes] = (None, b"")
_read = functools.lru_cache(maxsize=8)(pickle.loads)


def pack() -> bytes:
    """Return the settings of this thread in this process."""
    global _last
    seen, data = _last
    now = _look()
    if now != seen:
        data = pickle.dumps(_find())
        _last = now, data
    return data


class Packed:
    """Stands for settings that were packed; read, it is them, and they are applied there."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> Any:
        return _apply, (self._data,)


class Here:
    """Whether this process is a worker of ours, which takes all settings over; and which hold."""

    is_ours = False
    data = b""
    settings: ClassVar[dict[str, Any]] = {}
    at_first: ClassVar[dict[str, Any]] = {}  # what this process had before


def in_force() -> bytes:
    """Return the settings that were taken over last; nothing in a process that takes none."""
    return Here.data


def hold(data: bytes) -> bool:
    """Have settings be in force; return whether others were."""
    if not data or data == Here.data:
        return False
    if not Here.is_ours:
        for key, value in _read(data)[2].items():
            if key.startswith(_LIBRARY):
                _set(key, value)
        return False
    old, new = Here.settings, _read(data)[2]
    for key in old.keys() - new.keys():
        _set(key, Here.at_first[key])
    for key, value in new.items():
        if key not in Here.at_first:
            Here.at_first[key] = _find_one(key)
        if key not in old or old[key] != value:
            _set(key, value)
    Here.data, Here.settings = data, new
    return True


def _set(key: str, value: Any) -> None:
    if key.startswith(_LIBRARY):  # what goes wrong is an error of all items
        libraries.support_for(key.removeprefix(_LIBRARY)).take(value)
        return
    with contextlib.suppress(Exception):  # a locale may be missing on this host
        _SETTERS[key](value)


def _apply(data: bytes) -> bytes:
    if not data:
        return data
    token, names, _ = _read(data)
    owner = program.program_of(token)
    if owner is None:
        return data
    main = owner.module("__main__")
    vars(main).update(names)
    # So named, processes that a task spawns do not run the script: it need not be there, and
    # may do anything.
    main.__spec__ = ModuleSpec(
        ".".join(filter(None, [names.get("__package__"), "__main__"])), None
    )
    hold(data)
    return data


def _look() -> tuple[Any, ...]:
    """Return what tells whether anything has changed: to find all of it takes longer."""
    main, modules = sys.modules["__main__"], sys.modules
    names = vars(main)
    seen = [program.token_of(main), names.get("__file__"), names.get("__package__")]
    if (decimal := modules.get("decimal")) is not None:
        context = decimal.getcontext()
        seen += _of_decimal(context), context.traps.copy()
    if (locale := modules.get("locale")) is not None:
        seen.append(locale.setlocale(locale.LC_ALL))
    if (process := modules.get("multiprocessing.process")) is not None:
        seen.append(process.current_process().authkey)
    seen += [support.state() for support in libraries.present().values()]
    return (*seen, list(sys.argv), list(warnings.filters), sys.getrecursionlimit())


def _find() -> tuple[str, dict[str, Any], dict[str, Any]]:
    main = vars(sys.modules["__main__"])
    names: dict[str, Any] = {
        name: main[name] for name in ("__file__", "__package__") if name in main
    }
    settings: dict[str, Any] = {key: find() for key, find in _OF_ALL.items()}
    for key, (module, find) in _FINDERS.items():
        if module in sys.modules:  # otherwise nobody has set anything
            settings[key] = find(sys.modules[module])
    for library, support in libraries.present().items():
        if state := support.state():
            settings[f"{_LIBRARY}{library}"] = state
    return program.token_of(sys.modules["__main__"]), names, settings


def _find_one(key: str) -> Any:
    if key.startswith(_LIBRARY):
        return ()  # what is declared stays
    if key in _OF_ALL:
        return _OF_ALL[key]()
    module, find = _FINDERS[key]
    return find(importlib.import_module(module))


def _find_filters() -> list[tuple[Any, ...]]:
    return [
        (action, _text_of(message), category, _text_of(module), line)
        for action, message, category, module, line in warnings.filters
        if category.__module__ in sys.stdlib_module_names  # others need not be there, or take long
    ]


def _text_of(pattern: Any) -> tuple[str, int] | str | None:
    return (pattern.pattern, pattern.flags) if isinstance(pattern, re.Pattern) else pattern


def _pattern_of(text: tuple[str, int] | str | None) -> Any:
    return re.compile(*text) if isinstance(text, tuple) else text


def _find_decimal(decimal: ModuleType) -> dict[str, Any]:
    context = decimal.getcontext()
    found = dict(zip(_OF_DECIMAL, _of_decimal(context), strict=True))
    traps = [signal.__name__ for signal, is_set in context.traps.items() if is_set]
    return {**found, "traps": traps}


_OF_DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")
_of_decimal = operator.attrgetter(*_OF_DECIMAL)

_OF_ALL: dict[str, Callable[[], Any]] = {
    "argv": lambda: list(map(str, sys.argv)),
    "warnings": _find_filters,
    "recursion": sys.getrecursionlimit,
}

_FINDERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "decimal": ("decimal", _find_decimal),
    "locale": ("locale", lambda locale: locale.setlocale(locale.LC_ALL)),
    # what processes of a multiprocessing.Manager want to see
    "key": ("multiprocessing.process", lambda process: bytes(process.current_process().authkey)),
}


def _set_argv(argv: list[str]) -> None:
    sys.argv[:] = argv


def _set_filters(filters: list[tuple[Any, ...]]) -> None:
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        warnings.simplefilter(action, category, line)
        texts = _pattern_of(message), category, _pattern_of(module)
        warnings.filters[0] = (action, *texts, line)  # type: ignore[index]


def _set_decimal(wanted: dict[str, Any]) -> None:
    import decimal

    traps = {getattr(decimal, name) for name in wanted["traps"]}
    for context in (decimal.DefaultContext, decimal.getcontext()):
        for name in _OF_DECIMAL:
            setattr(context, name, wanted[name])
        for signal in context.traps:
            context.traps[signal] = signal in traps


def _set_locale(name: str) -> None:
    import locale

    locale.setlocale(locale.LC_ALL, name)


def _set_key(key: bytes) -> None:
    import multiprocessing

    multiprocessing.current_process().authkey = key


_SETTERS: dict[str, Callable[[Any], None]] = {
    "argv": _set_argv,
    "warnings": _set_filters,
    "recursion": sys.setrecursionlimit,
    "decimal": _set_decimal,
    "locale": _set_locale,
    "key": _set_key,
}

"""What a script sets for its whole process: workers have it, too."""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ostap_parallel.objects import program

_last: list[Any] = [None, b""]  # what was packed last, and its bytes
_applied: list[bytes] = [b""]
_read = functools.lru_cache(maxsize=8)(pickle.loads)


def pack() -> bytes:
    """Return the settings of this process."""
    found = _find()
    if found != _last[0]:
        _last[:] = found, pickle.dumps(found)
    data: bytes = _last[1]
    return data


class Present:
    """Stands for the settings of the process that pickles it; read, they are applied there."""

    def __reduce__(self) -> Any:
        return _apply, (pack(),)


class Here:
    """Whether this process is a worker of ours, which takes all settings over."""

    is_ours = False


def _apply(data: bytes) -> None:
    token, names, settings = _read(data)
    owner = program.program_of(token)
    if owner is None:
        return
    main = owner.module("__main__")
    vars(main).update(names)
    # So named, processes that a task spawns do not run the script: it need not be there, and
    # may do anything.
    main.__spec__ = ModuleSpec(
        ".".join(filter(None, [names.get("__package__"), "__main__"])), None
    )
    if Here.is_ours and data != _applied[0]:
        for key, value in settings.items():
            with contextlib.suppress(Exception):  # a locale may be missing on this host
                _SETTERS[key](value)
        _applied[0] = data


def _find() -> tuple[str, dict[str, Any], dict[str, Any]]:
    main = vars(sys.modules["__main__"])
    names: dict[str, Any] = {
        name: main[name] for name in ("__file__", "__package__") if name in main
    }
    settings: dict[str, Any] = {
        "argv": list(map(str, sys.argv)),
        "warnings": _find_filters(),
        "recursion": sys.getrecursionlimit(),
    }
    for key, (module, find) in _FINDERS.items():
        if module in sys.modules:  # otherwise nobody has set anything
            settings[key] = find(sys.modules[module])
    return program.token_of(sys.modules["__main__"]), names, settings


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
    found = {name: getattr(context, name) for name in _OF_DECIMAL}
    traps = [signal.__name__ for signal, is_set in context.traps.items() if is_set]
    return {**found, "traps": traps}


_OF_DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")

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

"""What a script sets for its whole process: workers have it, too."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, NamedTuple

from ostap_parallel import libraries
from ostap_parallel.lending import borrower
from ostap_parallel.objects import levels, options, program, reloads

# Begins the keys of what the program has told a library.
_LIBRARY = "library "

# What was seen last, and what that became.
_last: tuple[Any, bytes] = (None, b"")


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


class Held(NamedTuple):
    """What is in force in a worker.

    Attributes
    ----------
    data, sent
        What the caller has, packed and by name.
    seen, values
        What is so here: as `_look_at_process` sees it, and by name.
    """

    data: bytes = b""
    sent: Mapping[str, Any] = MappingProxyType({})
    seen: tuple[Any, ...] = ()
    values: Mapping[str, Any] = MappingProxyType({})


class Here:
    """Whether this process is a worker of ours, which takes all settings over; and which hold."""

    is_ours = False
    at_first: ClassVar[dict[str, Any]] = {}  # what this process had before
    told: ClassVar[dict[str, Any]] = {}  # to libraries: that stays
    path: ClassVar[list[str]] = []  # where the caller looks for modules, as far as it was told
    ready = Held()  # when the last run could begin: it has come, and initializers have run
    held = Held()


def in_force() -> bytes:
    """Return the settings that were taken over last; nothing in a process that takes none."""
    return Here.held.data


def be_worker(is_ours: bool) -> None:
    """Note whether this process is a worker of ours, and what it is like at first."""
    Here.is_ours = is_ours
    if is_ours and not Here.at_first:
        for module, _ in _FINDERS.values():
            importlib.import_module(module)
        Here.at_first = _find_here()


def begin(data: bytes) -> None:
    """Have settings be in force for a run that begins, whatever those before have changed."""
    if not Here.is_ours:
        _tell_libraries(_unpack(data)[2])
        return
    if data == Here.ready.data:
        give_back(Here.ready)
        return
    sent = _unpack(data)[2]
    _set_all(_find_here(), {**Here.at_first, **sent})
    Here.held = Held(data, sent)


def be_ready(is_new: bool) -> None:
    """Note what is in force as what each run begins with until others are sent.

    Unless `is_new` nobody has changed anything since `begin`.
    """
    if is_new or Here.held is not Here.ready:
        keep()
    else:
        Here.held = Here.held._replace()  # of this run
    Here.ready = Here.held


def hold(data: bytes) -> None:
    """Have in force what the caller has changed since: what was set here otherwise stays."""
    held = Here.held
    if Here.is_ours and data and data != held.data:
        sent = _unpack(data)[2]
        _set_all({**Here.at_first, **held.sent}, {**Here.at_first, **sent})
        Here.held = Held(data, sent)


def keep() -> Held:
    """Return what is in force now, whoever has set it, for `give_back`."""
    if Here.is_ours:
        seen = _look_at_process()
        known = next((one for one in (Here.held, Here.ready) if one.seen == seen), None)
        values = known.values if known else _find_here()
        Here.held = Here.held._replace(seen=seen, values=values)
    return Here.held


def give_back(held: Held) -> None:
    """Have in force what `keep` has returned, if something else is since."""
    if _look_at_process() != held.seen:
        _set_all(_find_here(), held.values)
    Here.held = held


class Change(NamedTuple):
    """What has become of a setting, and what the caller's was then."""

    sent: Any
    value: Any


@contextlib.contextmanager
def changing() -> Iterator[dict[str, Change]]:
    """Note what the body changes, for `change`."""
    changes: dict[str, Change] = {}
    before = _find_here() if Here.is_ours else {}
    yield changes
    if Here.is_ours:
        sent = Here.held.sent
        for key, value in _find_here().items():
            if value != before[key]:
                changes[key] = Change(sent.get(key), value)


def change(changes: Mapping[str, Change]) -> None:
    """Repeat changes, but for what the caller has set since."""
    sent = Here.held.sent
    values = {key: value for key, (then, value) in changes.items() if sent.get(key) == then}
    if values:
        _set_all(_find_here(), values)


def _set_all(now: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if not key.startswith(_LIBRARY) and now[key] != value:
            _set(key, value)
    _tell_libraries(wanted)


def _tell_libraries(wanted: Mapping[str, Any]) -> None:
    """Tell libraries what they have not been told; what goes wrong is an error of all items."""
    for key, value in wanted.items():
        if key.startswith(_LIBRARY) and Here.told.get(key) != value:
            libraries.support_for(key.removeprefix(_LIBRARY)).take(value)
            Here.told[key] = value


def _set(key: str, value: Any) -> None:
    with contextlib.suppress(Exception):  # a locale may be missing on this host
        _SETTERS[key](value)


def _apply(data: bytes) -> bytes:
    if not data:
        return data
    token, names, _ = _unpack(data)
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
    begin(data)
    return data


def _look() -> tuple[Any, ...]:
    """Return what tells whether anything has changed: to find all of it takes longer."""
    main = sys.modules["__main__"]
    names = vars(main)
    return (
        *(program.token_of(main), names.get("__file__"), names.get("__package__")),
        *_look_at_process(),
        *(support.state() for support in libraries.present().values()),
    )


def _look_at_process() -> tuple[Any, ...]:
    modules = sys.modules
    seen = [list(sys.argv), list(warnings.filters), sys.getrecursionlimit()]
    if (decimal := modules.get("decimal")) is not None:
        context = decimal.getcontext()
        seen += _of_decimal(context), context.traps.copy()
    if (locale := modules.get("locale")) is not None:
        seen.append(locale.setlocale(locale.LC_ALL))
    if (process := modules.get("multiprocessing.process")) is not None:
        seen.append(process.current_process().authkey)
    if not Here.is_ours:
        seen += reloads.look(), list(sys.path), options.look(), levels.look()
    return tuple(seen)


def _find() -> tuple[str, dict[str, Any], dict[str, Any]]:
    main = vars(sys.modules["__main__"])
    names: dict[str, Any] = {
        name: main[name] for name in ("__file__", "__package__") if name in main
    }
    settings = _find_here() | {"warnings": _find_filters()}
    for library, support in libraries.present().items():
        if state := support.state():
            settings[f"{_LIBRARY}{library}"] = state
    return program.token_of(sys.modules["__main__"]), names, settings


def _find_here() -> dict[str, Any]:
    found: dict[str, Any] = {
        "argv": list(map(str, sys.argv)),
        "warnings": list(warnings.filters),
        "recursion": sys.getrecursionlimit(),
        "reloads": reloads.counts(),
        "path": Here.path if Here.is_ours else _find_path(),
        "options": options.told() if Here.is_ours else options.pack(),
        "levels": levels.told() if Here.is_ours else levels.look(),
    }
    for key, (module, find) in _FINDERS.items():
        if module in sys.modules:  # otherwise nobody has set anything
            found[key] = find(sys.modules[module])
    return found


def _find_filters() -> list[tuple[Any, ...]]:
    return [
        (action, _text_of(message), _name_of(category), _text_of(module), line)
        for action, message, category, module, line in warnings.filters
    ]


class _Named(type):
    """Makes what stands in a filter for a category of a module that need not be here, or yet."""

    place: tuple[str, str]

    def __subclasscheck__(cls, category: type) -> bool:
        return any((one.__module__, one.__qualname__) == cls.place for one in category.__mro__)


def _name_of(category: Any) -> Any:
    """Return a category as it travels: those of the standard library are everywhere."""
    if isinstance(category, _Named):
        return category.place
    is_here = category.__module__ in sys.stdlib_module_names
    return category if is_here else (category.__module__, category.__qualname__)


@functools.cache
def _category_of(name: Any) -> Any:
    return _Named("category", (Warning,), {"place": name}) if isinstance(name, tuple) else name


@functools.lru_cache(maxsize=8)
def _unpack(data: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    token, names, settings = pickle.loads(data)
    settings["warnings"] = [
        (action, _pattern_of(message), _category_of(category), _pattern_of(module), line)
        for action, message, category, module, line in settings["warnings"]
    ]
    return token, names, settings


def _text_of(pattern: Any) -> tuple[str, int] | str | None:
    return (pattern.pattern, pattern.flags) if isinstance(pattern, re.Pattern) else pattern


def _pattern_of(text: tuple[str, int] | str | None) -> Any:
    return re.compile(*text) if isinstance(text, tuple) else text


def _find_path() -> list[str]:
    entries = [entry for entry in sys.path if isinstance(entry, str | bytes | os.PathLike)]
    with contextlib.suppress(OSError):  # the working directory was removed
        return [os.path.abspath(os.fsdecode(entry)) for entry in entries]  # noqa: PTH100
    return []


def _set_path(wanted: list[str]) -> None:
    """Look for modules where the caller does by now; elsewhere are others' directories."""
    Here.path = wanted
    if not borrower.Here.is_near:
        return
    own = {os.path.abspath(entry): entry for entry in sys.path}  # noqa: PTH100
    if not own.keys() >= set(wanted):
        more = [entry for place, entry in own.items() if place not in wanted]
        sys.path[:] = [*(own.get(place, place) for place in wanted), *more]
        importlib.invalidate_caches()


def _set_argv(argv: list[str]) -> None:
    sys.argv[:] = argv


def _set_filters(filters: list[tuple[Any, ...]]) -> None:
    warnings.resetwarnings()
    warnings.filters[:] = filters  # type: ignore[index]


def _set_locale(name: str) -> None:
    import locale

    locale.setlocale(locale.LC_ALL, name)


def _set_key(key: bytes) -> None:
    import multiprocessing

    multiprocessing.current_process().authkey = key


# A field of the decimal context is a setting by itself: an initializer may have set another one.
_OF_DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")
_of_decimal = operator.attrgetter(*_OF_DECIMAL)


def _find_field(name: str, decimal: ModuleType) -> Any:
    return getattr(decimal.getcontext(), name)


def _set_field(name: str, value: Any) -> None:
    import decimal

    for context in (decimal.DefaultContext, decimal.getcontext()):
        setattr(context, name, value)


def _find_traps(decimal: ModuleType) -> list[str]:
    traps = decimal.getcontext().traps
    return [signal.__name__ for signal, is_set in traps.items() if is_set]


def _set_traps(names: list[str]) -> None:
    import decimal

    for context in (decimal.DefaultContext, decimal.getcontext()):
        for signal in context.traps:
            context.traps[signal] = signal.__name__ in names


_FINDERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{name: ("decimal", functools.partial(_find_field, name)) for name in _OF_DECIMAL},
    "traps": ("decimal", _find_traps),
    "locale": ("locale", lambda locale: locale.setlocale(locale.LC_ALL)),
    # what processes of a multiprocessing.Manager want to see
    "key": ("multiprocessing.process", lambda process: bytes(process.current_process().authkey)),
}

_SETTERS: dict[str, Callable[[Any], None]] = {
    "argv": _set_argv,
    "path": _set_path,
    "options": options.take,
    "levels": levels.take,
    "warnings": _set_filters,
    "recursion": sys.setrecursionlimit,
    "reloads": reloads.take,
    **{name: functools.partial(_set_field, name) for name in _OF_DECIMAL},
    "traps": _set_traps,
    "locale": _set_locale,
    "key": _set_key,
}

"""Modules of the user's that the caller has loaded anew: workers that have them do so, too."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import CellType, FunctionType, ModuleType
from typing import Any, ClassVar
from weakref import WeakSet

from ostap_parallel.objects.kinds import is_of_installed, names_of
from ostap_parallel.objects.places import last_import

_OURS = {"__main__", "__mp_main__", "ostap_parallel"}


class _Known:
    """What is known of modules; a worker has only been told."""

    names: ClassVar[list[str]] = []  # the user's, of so many and this as the last
    of: ClassVar[tuple[int, str]] = 0, ""
    states: ClassVar[dict[str, Any]] = {}  # of each: its specification, which a load makes anew
    counts: ClassVar[dict[str, int]] = {}  # of reloads, by name
    # what they were when somebody looked last
    seen: ClassVar[list[tuple[str, ModuleType, Mapping[str, Any], Any]] | None] = None
    # What modules have had by their names, and somebody may still hold.
    held: ClassVar[dict[tuple[str, str], WeakSet[Any]]] = {}


def look() -> int:
    """Return how many reloads there have been in this process, as far as anybody has looked."""
    of = last_import()
    if of != _Known.of:
        _Known.of = of
        _Known.names = [name for name, one in list(sys.modules.items()) if _is_of_user(name, one)]
        _Known.seen = None
    follows_files = "IPython.extensions.autoreload" in sys.modules  # it changes what is there
    seen = _Known.seen
    if follows_files or seen is None or not all(_is_known(*one) for one in seen):
        _Known.seen = [one for name in _Known.names if (one := _see(name, follows_files))]
    return sum(_Known.counts.values())


def _is_known(name: str, module: ModuleType, names: Mapping[str, Any], spec: Any) -> bool:
    return sys.modules.get(name) is module and names.get("__spec__") is spec


def _see(name: str, follows_file: bool) -> tuple[str, ModuleType, Mapping[str, Any], Any] | None:
    """Count a module that has been loaded anew; return what it is now, if it is there."""
    module = sys.modules.get(name)  # maybe another, where it was removed and imported again
    if module is None or not issubclass(type(module), ModuleType):
        return None
    names = names_of(module)
    spec = names.get("__spec__")
    changed = _modified(str(names.get("__file__"))) if follows_file else 0
    before = _Known.states.get(name, (spec, changed))
    _Known.states[name] = spec, changed
    if before[0] is not spec or before[1] != changed:
        _Known.counts[name] = _Known.counts.get(name, 0) + 1
    return name, module, names, spec


def _modified(file: str) -> int:
    with contextlib.suppress(OSError):
        return Path(file).stat().st_mtime_ns
    return 0


def _is_of_user(key: str, module: Any) -> bool:
    if not issubclass(type(module), ModuleType):
        return False
    names = names_of(module)
    name, file = names.get("__name__"), names.get("__file__")
    if not isinstance(name, str) or not isinstance(file, str) or names.get("__spec__") is None:
        return False
    return key == name and name.partition(".")[0] not in _OURS and not is_of_installed(name, file)


def counts() -> dict[str, int]:
    """Return how often modules were loaded anew, those that were."""
    return dict(_Known.counts)


def take(wanted: Mapping[str, int]) -> None:
    """Load anew what the caller has, where this process has it: in place, as it was there."""
    for name, count in wanted.items():
        if count <= _Known.counts.get(name, 0):
            continue
        _Known.counts[name] = count
        if (module := sys.modules.get(name)) is not None:
            before = dict(vars(module))
            with contextlib.suppress(Exception):  # the caller's attempt has failed, too
                importlib.reload(module)
            for key, old in before.items():
                if isinstance(old, FunctionType | type) and old.__module__ == name:
                    held = _Known.held.setdefault((name, key), WeakSet())
                    held.add(old)
                    for one in list(held):
                        _renew(one, vars(module).get(key), name)


def _renew(old: Any, new: Any, module: str) -> bool:
    """Have what others hold be like what there is now, as IPython's autoreload does, if it can."""
    if old is new or getattr(old, "__module__", None) != module:
        return False
    if isinstance(old, FunctionType) and isinstance(new, FunctionType):
        names = new.__code__.co_freevars
        if old.__code__.co_freevars != names:  # a function keeps its cells
            return False
        for name, cell, now in zip(
            names, old.__closure__ or (), new.__closure__ or (), strict=True
        ):
            if name != _CLASS:
                with contextlib.suppress(ValueError):  # not yet filled
                    cell.cell_contents = now.cell_contents
        old.__code__ = new.__code__
        old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    elif isinstance(old, type) and isinstance(new, type):
        for key, value in list(vars(new).items()):
            if key not in ("__dict__", "__weakref__") and not _renew(
                vars(old).get(key), value, module
            ):
                with contextlib.suppress(AttributeError, TypeError):
                    setattr(old, key, _of_class(value, old))
    else:
        return False
    return True


_CLASS = "__class__"  # the cell by which super() finds the class


def _of_class(value: Any, cls: type) -> Any:
    """Return an attribute of a class as one of another class: super() in it is about that."""
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_of_class(value.__func__, cls))
    if isinstance(value, property):
        get, put, delete = (_of_class(part, cls) for part in (value.fget, value.fset, value.fdel))
        return property(get, put, delete, value.__doc__)
    if not isinstance(value, FunctionType) or _CLASS not in value.__code__.co_freevars:
        return value
    names = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    cells = tuple(CellType(cls) if name == _CLASS else cell for name, cell in names)
    made = FunctionType(value.__code__, value.__globals__, closure=cells)
    made.__defaults__, made.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
    return functools.update_wrapper(made, value)

"""Kinds of objects that pickle refuses, or takes for what they are not, and how they travel."""

from __future__ import annotations

import copyreg
import ctypes
import enum
import functools
import io
import operator
import pickle
import random
import sys
import threading
import typing
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from ostap_parallel import libraries
from ostap_parallel.lending import lender
from ostap_parallel.objects import byvalue
from ostap_parallel.objects.byvalue import Place
from ostap_parallel.objects.places import is_importable, place_of
from ostap_parallel.objects.plain import PROTOCOL as PROTOCOL
from ostap_parallel.objects.program import is_by_value

# Takes the pickler, and the object.
Way = Callable[[Any, Any], Any]


def way_of(kind: type, in_table: bool) -> Way | None:
    """Return how objects of a type are reduced; ``None`` if pickle, or its table, knows."""
    for one, way in (*stand_ins.items(), *_WAYS.items()):
        if issubclass(kind, one):
            return way
    if in_table:
        return None
    if type(kind) in _METAS:
        return lender.shared_memory
    if (lent := lender.way_of(kind)) is not None:
        return lent
    managers: Any = sys.modules.get("multiprocessing.managers")
    if managers is not None and issubclass(kind, managers.BaseProxy):
        return _proxy
    if str(kind.__module__).partition(".")[0] in sys.stdlib_module_names:
        return None
    own = [getattr(kind, name, None) for name in ("__reduce__", "__reduce_ex__")]
    return _by_itself if any(isinstance(one, FunctionType) for one in own) else None


# What stays where it is, by type: objects of these are sent as what stands for them.
stand_ins: dict[type, Way] = {}


def _method(pickler: Any, method: MethodType) -> Any:
    if any(isinstance(method.__self__, one) for one in stand_ins):
        return getattr, (method.__self__, method.__name__)
    return NotImplemented


def _by_itself(pickler: Any, obj: Any) -> Any:
    """Have an object reduce itself; the name that it may give is one in its module."""
    reduced = obj.__reduce_ex__(PROTOCOL)
    if not isinstance(reduced, str):
        return reduced
    # where it is defined it comes itself
    content = (copyreg.__newobj__, (type(obj),), getattr(obj, "__dict__", None) or None)  # type: ignore[attr-defined]
    if place_of(obj, reduced) is None:
        return reduced
    return pickler.reduce_named(obj, reduced, lambda: content)


def _lock(pickler: Any, lock: Any) -> Any:
    """Reduce a lock to one of its kind that nobody holds."""
    return (threading.Lock if isinstance(lock, _LOCK) else threading.RLock), ()


_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())


def _local(pickler: Any, local: threading.local) -> Any:
    """Reduce what each thread has of its own to what this thread has."""
    return copyreg.__newobj__, (type(local),), dict(vars(local)) or None  # type: ignore[attr-defined]


def _context_variable(pickler: Any, variable: ContextVar[Any]) -> Any:
    """Reduce a context variable to its value, unless it is one of a module that is there, too."""
    for module in list(sys.modules.values()):
        if names_of(module).get(variable.name) is variable and not is_by_value(module):
            return getattr, (module, variable.name)
    with suppress(LookupError):
        return functools.partial(ContextVar, variable.name, default=variable.get()), ()
    return ContextVar, (variable.name,)


def _of_system(pickler: Any, facts: Any) -> Any:
    """Reduce what Python tells of itself to what it is called: it is another one's there."""
    name = type(facts).__name__
    return (getattr, (sys, name)) if getattr(sys, name, None) is facts else NotImplemented


def _file(pickler: Any, file: Any) -> Any:
    """Refuse what is open for writing: to open it once more would harm what is there."""
    for name in ("stdin", "stdout", "stderr"):
        if file in (getattr(sys, name), getattr(sys, f"__{name}__")):
            return getattr, (sys, name)
    name = getattr(file, "name", "?")
    if not file.closed and file.writable():
        raise pickle.PicklingError(f"the file {name} is open for writing: open it in the task")
    if not isinstance(file, io.TextIOWrapper):
        raise pickle.PicklingError(f"the file {name} is open: open it in the task")
    return NotImplemented


def _cell(pickler: Any, cell: CellType) -> Any:
    held = dict(enumerate(byvalue.contents([cell])))
    content = tuple(pickler.with_names(held).values()) or None
    return byvalue.make_cell, (), content, None, None, byvalue.fill_cell


def _reference(pickler: Any, reference: Any) -> Any:
    target = reference()
    return (_dead, ()) if target is None else (weakref.ref, (target,))


def _dead() -> Any:
    return weakref.ref(type("Gone", (), {})())


def _weak_mapping(pickler: Any, mapping: Any) -> Any:
    return type(mapping), (), None, None, iter(list(mapping.items()))


_CACHED = type(functools.lru_cache(len))


def _cached(pickler: Any, function: Any) -> Any:
    content = make_cached, (function.__wrapped__, function.cache_parameters())
    if place_of(function) is None and is_importable(function):
        return NotImplemented
    return pickler.reduce_named(function, function.__qualname__, lambda: content)


def make_cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    """Make a function with a cache of its own."""
    return functools.lru_cache(**parameters)(function)


def _member(pickler: Any, member: Any) -> Any:
    """Reduce a member to its name: its value may not be the same there."""
    cls = type(member)
    if cls.__members__.get(member._name_) is not member or is_importable(cls):
        return NotImplemented
    return getattr, (cls, member._name_)


def _typing(pickler: Any, obj: Any) -> Any:
    name = getattr(obj, "__qualname__", obj.__name__)
    return pickler.reduce_named(obj, name, lambda: _typing_by_value(pickler, obj))


def _typing_by_value(pickler: Any, obj: Any) -> Any:
    kind: Any = type(obj)
    owner = sys.modules.get(obj.__module__)
    is_named = getattr(owner, obj.__name__, None) is obj
    if is_named and place_of(obj, obj.__name__) is None:
        return obj.__name__
    if kind is typing.NewType:
        return kind, (obj.__name__, obj.__supertype__), {"__module__": obj.__module__}
    if kind is typing.ParamSpec:
        return kind, (obj.__name__,), {"__module__": obj.__module__}
    if kind.__name__ == "TypeVarTuple":
        return type(obj), (obj.__name__,)
    if kind.__name__ == "TypeAliasType" and obj.__type_params__:
        parameters = obj.__type_params__
        return functools.partial(kind, obj.__name__, obj.__value__, type_params=parameters), ()
    if kind.__name__ == "TypeAliasType":  # it may name itself
        return _make_alias, (obj.__name__, obj.__module__), (obj.__value__,), None, None, _fill
    return NotImplemented


_values: dict[int, list[Any]] = {}  # of aliases that are being read


def _make_alias(name: str, module: str) -> Any:
    value: list[Any] = []
    variables: dict[str, Any] = {"__name__": module, "value": lambda: value[0]}
    exec(f"type {name} = value()", variables)  # is asked for when somebody wants to know
    _values[id(variables[name])] = value
    return variables[name]


def _fill(alias: Any, content: tuple[Any]) -> None:
    _values.pop(id(alias)).extend(content)


def _proxy(pickler: Any, proxy: Any) -> Any:
    make, args = proxy.__reduce__()
    return rebuild_proxy, (make, args)


def rebuild_proxy(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Make a proxy of an object in the process of a ``multiprocessing.Manager``."""
    try:
        return make(*args)
    except (OSError, EOFError) as exc:
        reason = "the multiprocessing.Manager of this proxy cannot be reached from this host"
        raise RuntimeError(f"{reason}: {type(exc).__name__}: {exc}") from exc


_C_FUNCTION: Any = ctypes.CFUNCTYPE(None).__base__  # what all pointers to functions derive from
_USE_ERRNO = 8  # flag of those that keep the number of an error


def _library(pickler: Any, library: ctypes.CDLL) -> Any:
    """Reduce a library of C to its name, and to what its functions are said to take and give."""
    functions = {name: one for name, one in vars(library).items() if isinstance(one, _C_FUNCTION)}
    declared = {name: _declared(one) for name, one in functions.items()}
    how = {"use_errno": True} if library._FuncPtr._flags_ & _USE_ERRNO else {}
    load = functools.partial(type(library), library._name, **how)
    return load, (), declared, None, None, _declare


def _declared(function: Any) -> dict[str, Any]:
    names = "restype", "argtypes", "errcheck"
    found = {name: getattr(function, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None or name == "restype"}


def _declare(library: ctypes.CDLL, declared: dict[str, dict[str, Any]]) -> None:
    for name, attributes in declared.items():
        byvalue.set_each(getattr(library, name), attributes)


def _c_function(pickler: Any, function: Any) -> Any:
    kept = (function._objects or {}).values()
    library = next((one for one in kept if isinstance(one, ctypes.CDLL)), None)
    if library is None:
        raise pickle.PicklingError("it is a pointer to a function here: make it in the task")
    where = library, function.__name__
    return operator.getitem, where, _declared(function), None, None, byvalue.set_each


_FILES = io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO
_SYSTEM = sys.flags, sys.version_info, sys.float_info, sys.int_info, sys.hash_info, sys.thread_info
_TYPING = typing.TypeVar, typing.ParamSpec, typing.NewType
_TYPING += tuple(
    getattr(typing, name) for name in ("TypeVarTuple", "TypeAliasType") if hasattr(typing, name)
)

_WAYS: dict[type, Way] = {
    _LOCK: _lock,
    _RLOCK: _lock,
    **dict.fromkeys(_FILES, _file),
    CellType: _cell,
    MethodType: _method,
    weakref.ReferenceType: _reference,
    weakref.WeakKeyDictionary: _weak_mapping,
    weakref.WeakValueDictionary: _weak_mapping,
    _CACHED: _cached,
    enum.Enum: _member,
    threading.local: _local,
    ContextVar: _context_variable,
    random.SystemRandom: lambda pickler, generator: (type(generator), ()),
    **dict.fromkeys([type(one) for one in _SYSTEM], _of_system),
    ctypes.CDLL: _library,
    _C_FUNCTION: _c_function,
    **dict.fromkeys(_TYPING, _typing),
}


# Classes of ctypes: what they consist of is known to their metaclasses only.

_STRUCTURES = type(ctypes.Structure), type(ctypes.Union)
_ARRAY, _POINTER = type(ctypes.Array), type(ctypes.POINTER(ctypes.c_int))
_KNOWN: Any = (ctypes.Structure, ctypes.Union, ctypes.Array, ctypes.c_int)
_METAS: dict[type, Any] = {type(one): one for one in _KNOWN}
_LAYOUT = ("_pack_", "_anonymous_", "_align_", "_layout_", "_swappedbytes_")


def reduce_ctypes(cls: Any, place: Place | None) -> Any:
    """Reduce a class of ctypes, or one of its metaclasses; ``None`` for other classes."""
    if cls in _METAS:
        return type, (_METAS[cls],)
    if isinstance(cls, _POINTER) and ctypes.POINTER(cls._type_) is cls:
        return ctypes.POINTER, (cls._type_,)
    if isinstance(cls, _ARRAY) and operator.mul(*(parts := (cls._type_, cls._length_))) is cls:
        return operator.mul, parts
    if not isinstance(cls, _STRUCTURES):
        return None
    own = dict(vars(cls))
    fields = {name for name, *_ in own.get("_fields_", ())}
    namespace = {name: own.pop(name) for name in _LAYOUT if name in own}
    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    skipped = fields | {"__dict__", "__weakref__", "__module__"}
    state = {name: value for name, value in own.items() if name not in skipped}
    return byvalue.reduce_made(
        cls, place, (type(cls), cls.__name__, cls.__bases__, namespace, False), state
    )


# Results that run code of the user's when they are read

_READERS = (
    "__new__",
    "__reduce__",
    "__reduce_ex__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__setstate__",
    "__setattr__",
    "__setitem__",
    "append",
    "extend",
)

_have_reader: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def has_reader(cls: type) -> bool:
    """Whether unpickling instances of `cls` runs Python code that is not of the library's own."""
    if cls not in _have_reader and libraries.support_of(cls) is not None:
        _have_reader[cls] = False  # to look for what a class of C++ does not have takes long
    if cls not in _have_reader:
        names = (*_READERS, "__init__") if issubclass(cls, BaseException) else _READERS
        found = [getattr(cls, name, None) for name in names] + [copyreg.dispatch_table.get(cls)]
        functions = [one for one in found if isinstance(one, FunctionType)]
        _have_reader[cls] = not all(map(_is_standard, functions))
    return _have_reader[cls]


def _is_standard(function: FunctionType) -> bool:
    module = str(function.__module__)
    # named tuples have a constructor of their own making
    return module.startswith("namedtuple_") or module.split(".")[0] in sys.stdlib_module_names


def names_of(module: Any) -> Mapping[str, Any]:
    """Return what a module has; to ask one that is lazy for anything would load it."""
    try:
        names: Mapping[str, Any] = object.__getattribute__(module, "__dict__")
    except AttributeError:  # programs put all sorts of things there
        return {}
    return names


def is_installed(module: ModuleType) -> bool:
    """Return whether a module is part of Python, or of a package that was installed."""
    return is_of_installed(module.__name__, getattr(module, "__file__", None) or "")


def is_of_installed(name: str, file: str) -> bool:
    """Return whether a module of that name and file is part of Python, or was installed."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)

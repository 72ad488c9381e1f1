"""What makes two functions, or two items, the same in different processes.

Digests are taken of structure: of code, constants and values. Addresses, line numbers, names of
files and of prompts, and the order of sets, which differ from process to process, have no part.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import enum
import functools
import hashlib
import pickle
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.objects import serialize
from ostap_parallel.runs.task import Task
from ostap_parallel.worker.execute import Call

# What an object consists of: its kind, parts in order, and parts whose order means nothing.
Parts = tuple[str, Iterable[Any], Iterable[Any]]

_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), type(Ellipsis)})
_INSTALLED = {"site-packages", "dist-packages"}
_FOREIGN = {*sys.stdlib_module_names, "ostap_parallel", "ROOT", "cppyy"}

# Merging is done anew whenever a run goes on, so that it may change.
_MERGING = {"merge_results", "results", "finalize", "_merger", "_collector", "_initializer"}
_MERGED = {"_output", "_nmerged"}
# How often what is beside objects in a graph is looked at, to tell them apart.
_ROUNDS = 100

_INCIDENTAL = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl"),
    # what is found out about a class when it is first asked for
    *("__slotnames__", "__protocol_attrs__", "__non_callable_proto_members__"),
    *("__annotations_cache__", "__annotate_func__", "__annotate__"),
}
# Of enumerations: what is made from their members, and grows with combinations of flags.
_OF_ENUM = {
    *("_value2member_map_", "_hashable_values_", "_unhashable_values_"),
    "_unhashable_values_map_",
}


def identity_of(call: Call) -> dict[str, str]:
    """Return digests of all that the results of a call depend on, by name."""
    walk = _Walk()
    parts = {
        "version of Python": platform.python_version_tuple()[:2],
        "jobid": call.with_index,
        "seed": call.seed,
        **dict(_parts_of(call.function)),
        **_shared_parts(call),
    }
    digests = {name: walk.start(part) for name, part in parts.items()}
    return {name: data.hex() for name, data in {**digests, **walk.follow()}.items()}


class Digester:
    """Takes digests of 16 bytes that are the same for equal objects, in any process.

    Objects are taken apart as pickle does. Of what cannot be taken apart (locks, generators,
    open files) only the class counts. Functions and classes must not change meanwhile.
    """

    def __init__(self) -> None:
        self._followed: dict[str, bytes] = {}

    def digest(self, obj: object) -> bytes:
        """Return the digest of an object, with the functions and classes of the user in it."""
        if type(obj) in _PLAIN:
            return _hash_plain(obj)
        walk = _Walk()
        own = walk.start(obj)
        return _hash_plain((own, [self._follow(*pair) for pair in sorted(walk.named.items())]))

    def _follow(self, name: str, obj: Any) -> bytes:
        if name not in self._followed:
            walk = _Walk()
            walk.named[name] = obj
            self._followed[name] = _hash_plain(sorted(walk.follow().items()))
        return self._followed[name]


def name_of(function: Any) -> str:
    """Return the name of a function, of a task, or of what a partial or a task of ours calls."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    owner = getattr(function, "__self__", None)
    if isinstance(owner, Task):
        processor = vars(owner).get("_processor")
        return type(owner).__name__ if processor is None else name_of(processor)
    return str(getattr(function, "__qualname__", type(function).__name__))


def _parts_of(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        yield from _parts_of(function.func)
        arguments = [*enumerate(function.args), *function.keywords.items()]
        yield from ((f"argument {name}", value) for name, value in arguments)
    elif isinstance(getattr(function, "__self__", None), Task):
        yield from _parts_of_task(function.__self__)
    elif isinstance(function, FunctionType) and _is_own(function.__module__):
        yield "code", function.__code__
        yield "defaults", (function.__defaults__, function.__kwdefaults__)
        closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        yield from ((f"variable {name}", cell) for name, cell in closure)
        yield from ((f"attribute {name}", value) for name, value in vars(function).items())
        yield from ((f"global {name}", value) for name, value in _globals_of(function))
    else:
        yield f"object {name_of(function)}", function


def _shared_parts(call: Call) -> dict[str, Any]:
    if call.with_keywords:
        return {f"argument {name}": value for name, value in call.shared.items()}
    return {} if call.shared is None else {"shared object": call.shared}


def _parts_of_task(task: Task) -> Iterator[tuple[str, Any]]:
    yield f"class {type(task).__name__}", type(task)
    for name, value in vars(task).items():
        if name == "_processor":
            yield from _parts_of(value)
        elif name not in _MERGING | _MERGED:
            yield f"attribute {name}", value


class _Walk:
    """Goes through objects that may share parts, or contain themselves.

    Functions and classes that have a name in a module of the user's are collected on the way: the
    digest of what refers to them has their names, as there is no end to how deep they may go.
    """

    def __init__(self) -> None:
        self.named: dict[str, Any] = {}
        self._path: dict[int, int] = {}  # depths of the objects that contain the one at hand
        self._sets = 0  # how many of those are sets
        self._is_tangled = False  # objects in sets form a circle
        self._known: dict[int, tuple[Any, bytes]] = {}  # holds them: an id must not come again

    def start(self, obj: Any) -> bytes:
        """Return the digest of an object."""
        return self._as_deep_as_possible(self._digest, obj)

    def _straight(self, digest: Callable[[Any], bytes], obj: Any) -> bytes:
        """Return a digest; of what is tangled, one that does not depend on the order of sets."""
        known, self._is_tangled = set(self._known), False
        found = digest(obj)
        if not self._is_tangled:
            return found
        for key in self._known.keys() - known:  # each depends on where the walk began
            del self._known[key]
        return self._refine(obj)

    def _refine(self, obj: Any) -> bytes:
        """Return a digest of a graph: what its objects are tells them apart, then who is beside
        them, then who is beside those, until that tells no more of them apart.
        """
        graph = self._graph_of(obj)
        labels = {key: _hash_plain(kind) for key, (_, kind, _, _) in graph.items()}
        count = 0
        for _ in range(_ROUNDS):
            if count == (count := len(set(labels.values()))):
                break
            labels = {
                key: _hash_plain(
                    (labels[key], [labels[n] for n in ordered], sorted(labels[n] for n in others))
                )
                for key, (_, _, ordered, others) in graph.items()
            }
        return _hash_plain((labels[id(obj)], sorted(labels.values())))

    def _graph_of(self, obj: Any) -> dict[int, tuple[Any, Any, list[int], list[int]]]:
        """Return, by id, each object below one, its kind, and the ids of its parts."""
        graph: dict[int, tuple[Any, Any, list[int], list[int]]] = {}
        waiting = [obj]
        while waiting:
            one = waiting.pop()
            if id(one) in graph:
                continue
            name = None if one is obj else _name_in_module(one)
            if type(one) in _PLAIN or name is not None:
                kind: Any = one if name is None else name
                if name is not None:
                    self.named[name] = one
                graph[id(one)] = one, (type(one).__name__, _hash_plain(kind)), [], []
                continue
            kind, *parts = _take_apart(one)
            ordered, others = map(list, parts)
            graph[id(one)] = one, kind, [*map(id, ordered)], [*map(id, others)]
            waiting += ordered + others
        return graph

    def _as_deep_as_possible(self, digest: Callable[[Any], bytes], obj: Any) -> bytes:
        try:
            return self._straight(digest, obj)
        except RecursionError:
            self._path.clear()
            self._sets = 0
            with contextlib.suppress(Exception):  # pickle can go deeper
                return _hash_plain(pickle.dumps(obj, serialize.PROTOCOL))
            return _hash_plain(type(obj).__qualname__)

    def follow(self) -> dict[str, bytes]:
        """Return digests of all that was collected, and of what that leads to, by name."""
        digests: dict[str, bytes] = {}
        while waiting := [name for name in self.named if name not in digests]:
            for name in waiting:
                obj = self.named[name]
                digests[name] = self._as_deep_as_possible(self._digest_parts, obj)
        return digests

    def _digest(self, obj: Any) -> bytes:
        if type(obj) in _PLAIN:
            return _hash_plain(obj)
        if id(obj) in self._path:
            self._is_tangled = self._is_tangled or self._sets > 0
            return _hash_plain(f"that of depth {self._path[id(obj)]}")
        if id(obj) not in self._known:
            self._path[id(obj)] = len(self._path)
            self._known[id(obj)] = obj, self._digest_named(obj)
            del self._path[id(obj)]
        return self._known[id(obj)][1]

    def _digest_named(self, obj: Any) -> bytes:
        name = _name_in_module(obj)
        if name is None:
            return self._digest_parts(obj)
        self.named[name] = obj
        return _hash_plain(name)

    def _digest_parts(self, obj: Any) -> bytes:
        if type(obj) in (list, tuple) and _PLAIN.issuperset(map(type, obj)):
            return _hash_plain(obj)  # much quicker, and large items are like this
        kind, ordered, unordered = _take_apart(obj)
        self._sets += kind == "set"
        hashed = hashlib.blake2b(kind.encode(), digest_size=16)
        for part in ordered:
            hashed.update(self._digest(part))
        hashed.update(b"|")
        for data in sorted(self._digest(part) for part in unordered):
            hashed.update(data)
        self._sets -= kind == "set"
        return hashed.digest()


def _hash_plain(obj: object) -> bytes:
    hashed = hashlib.blake2b(f"{type(obj).__name__} ".encode(), digest_size=16)
    # Arrays consist of bytes, whose text would be several times as large.
    hashed.update(obj if isinstance(obj, bytes) else _text_of(obj).encode())
    return hashed.digest()


def _text_of(obj: Any) -> str:
    try:
        return repr(obj)
    except ValueError:  # an integer with more digits than Python turns into text
        parts = [hex(obj)] if isinstance(obj, int) else map(_text_of, obj)
        return f"({', '.join(parts)})"


def _take_apart(obj: Any) -> Parts:
    kind = type(obj)
    if kind in _WAYS:
        return kind.__name__, *_WAYS[kind](obj)
    if isinstance(obj, type):
        return _take_class_apart(obj)
    if (support := libraries.support_of(kind)) is not None:
        with contextlib.suppress(Exception):
            return "foreign", support.parts_of(obj), ()
    if isinstance(obj, (set, frozenset)):
        return "set", [kind], obj
    try:
        if _is_wrapper(obj):
            return "wrapper", [kind, obj.__wrapped__], ()
        reduce = copyreg.dispatch_table.get(kind)
        reduced: Any = obj.__reduce_ex__(4) if reduce is None else reduce(obj)
    except Exception:
        return "opaque", [kind], ()
    if isinstance(reduced, str):
        return "global", [kind, reduced], ()
    make, args, state, entries, pairs = (*reduced, None, None, None)[:5]
    return "object", [make, args, state, list(entries or ())], list(pairs or ())


_WAYS: dict[type, Callable[[Any], tuple[Iterable[Any], Iterable[Any]]]] = {
    list: lambda obj: (obj, ()),
    tuple: lambda obj: (obj, ()),
    dict: lambda obj: ((), obj.items()),
    MappingProxyType: lambda obj: ((), obj.items()),
    memoryview: lambda obj: ([obj.tobytes(), obj.format, obj.shape], ()),
    CodeType: lambda obj: (_take_code_apart(obj), ()),
    FunctionType: lambda obj: _take_function_apart(obj),
    CellType: lambda obj: (_contents_of(obj), ()),
    MethodType: lambda obj: ([obj.__self__, obj.__func__], ()),
    BuiltinFunctionType: lambda obj: ([_owner_of(obj), obj.__name__], ()),
    ModuleType: lambda obj: ([obj.__name__], ()),
    staticmethod: lambda obj: ([obj.__func__], ()),
    classmethod: lambda obj: ([obj.__func__], ()),
    property: lambda obj: ([obj.fget, obj.fset, obj.fdel], ()),
    functools.partial: lambda obj: ([obj.func, obj.args, obj.keywords], ()),
}


def _take_code_apart(code: CodeType) -> Iterator[Any]:
    yield from (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    yield from (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    yield getattr(code, "co_exceptiontable", b"")  # from Python 3.11 on
    line = code.co_firstlineno if "__firstlineno__" in code.co_names else None  # 3.13
    yield [None if constant is line else constant for constant in code.co_consts]


def _take_function_apart(function: FunctionType) -> tuple[Iterable[Any], Iterable[Any]]:
    if not _is_own(function.__module__):
        return [function.__module__, function.__qualname__], ()
    closure = function.__closure__ or ()
    own = [function.__code__, function.__defaults__, function.__kwdefaults__, *closure]
    return own, [*_globals_of(function), *vars(function).items()]


def _take_class_apart(cls: type) -> Parts:
    # those that are derived from C++ say by themselves that they are from there
    module = vars(cls).get("__module__")
    if not _is_own(module if isinstance(module, str) else cls.__module__):
        return "class", [cls.__module__, cls.__qualname__], ()
    skipped = _INCIDENTAL | _MERGING if issubclass(cls, Task) else _INCIDENTAL
    if issubclass(cls, enum.Enum):
        skipped = skipped | _OF_ENUM
    return (
        "class",
        [type(cls), *cls.__bases__],
        [(k, v) for k, v in vars(cls).items() if k not in skipped],
    )


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the globals that a function itself names; of the user's modules, what it uses."""
    for name, attributes in _global_names(function.__code__).items():
        if name in function.__globals__:
            yield from _with_attributes(name, function.__globals__[name], attributes, set())


def _with_attributes(
    name: str, value: Any, attributes: set[str], seen: set[str]
) -> Iterator[tuple[str, Any]]:
    """Yield what a name stands for and, of modules of the user's below it, their attributes."""
    yield name, value
    if isinstance(value, ModuleType) and _is_own(value.__name__) and value.__name__ not in seen:
        seen.add(value.__name__)
        for attribute in sorted(attributes & vars(value).keys()):
            part = vars(value)[attribute]
            yield from _with_attributes(f"{name}.{attribute}", part, attributes, seen)


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> dict[str, set[str]]:
    """Return the names of globals, each with all the names that may be its attributes."""
    found: dict[str, set[str]] = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.setdefault(instruction.argval, set()).update(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for name, attributes in _global_names(constant).items():
                found.setdefault(name, set()).update(attributes)
    return found


def _is_wrapper(obj: Any) -> bool:
    """Whether this is what a decorator such as ``lru_cache`` has made of a function."""
    return callable(obj) and callable(getattr(obj, "__wrapped__", None))


def _name_in_module(obj: Any) -> str | None:
    """Return the name that leads to a function or a class in a module of the user's."""
    try:
        if not isinstance(obj, FunctionType | type) and not _is_wrapper(obj):
            return None
        module, found = obj.__module__, sys.modules.get(obj.__module__)
        if found is None or not _is_own(module):
            return None
        for part in obj.__qualname__.split("."):
            found = getattr(found, part)
    except Exception:  # not what it looks like
        return None
    return f"{module}.{obj.__qualname__}" if found is obj else None


def _contents_of(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not yet filled
        return []


def _owner_of(function: Any) -> Any:
    """Return the name of a built-in function's module, or the object that it is a method of."""
    owner = function.__self__
    return function.__module__ if owner is None or isinstance(owner, ModuleType) else owner


@functools.lru_cache(maxsize=1024)
def _is_own(module: str | None) -> bool:
    """Whether a module is the user's: not Python's, not installed as a package, not ours."""
    if module in ("__main__", "__mp_main__", None):
        return True
    if module.partition(".")[0] in _FOREIGN:
        return False
    found = sys.modules.get(module)
    # a directory without __init__.py has a path only
    places = [getattr(found, "__file__", None), *getattr(found, "__path__", ())]
    place = next(filter(None, places), None)
    return place is not None and _INSTALLED.isdisjoint(Path(place).parts)

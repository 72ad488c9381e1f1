"""The picklers: what is sent, and each part of it that goes by value as a pickle of its own."""

from __future__ import annotations

import enum
import io
import operator
import pickle
import re
import sys
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import cloudpickle

from ostap_parallel import libraries
from ostap_parallel.objects import aside, byvalue, kinds, program
from ostap_parallel.objects.byvalue import Place, names_in
from ostap_parallel.objects.kinds import PROTOCOL
from ostap_parallel.objects.program import Definition, Key

_SINGLETONS = (type(None), type(Ellipsis), type(NotImplemented))
_PLAIN = (type(None), bool, int, float, complex, str, bytes)

# Names that code uses: by key, what uses each, or nothing if it may do without.
_Needs = dict[Key, str]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """What pickles both what is sent and, on its own, each part that goes by value."""

    def __init__(
        self,
        file: io.BytesIO,
        back: bool,
        buffers: list[pickle.PickleBuffer] | None = None,
        depth: int = 0,
    ) -> None:
        super().__init__(file, PROTOCOL, None if buffers is None else buffers.append)
        self.back = back
        self.needs: _Needs = {}
        self.types: set[type] = set()
        self._depth = depth
        self._variables: dict[int, Any] = {}
        self._aside = aside.taking.get()

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        self.types.add(kind)
        if self._aside is not None and (reduced := self._aside.reduce(obj)) is not None:
            return reduced
        try:
            how = _ways[kind]
        except KeyError:
            how = _ways[kind] = _way_of(kind)
        return NotImplemented if how is None else how(self, obj)

    def by_name(self, place: Place) -> Any:
        """Reduce to what a program has by a name."""
        raise NotImplementedError

    def by_value(self, obj: Any, place: Place | None) -> Any:
        """Reduce to a function or a class itself."""
        raise NotImplementedError

    def is_entry(self, place: Place) -> bool:
        """Return whether this is, or is within, what is defined by this pickle."""
        return False

    def need(self, module: ModuleType, names: Iterable[str], who: str) -> None:
        """Note that names are used."""
        key = program.key_of(module)
        for name in names:
            if self.needs.get((key, name), "") == "":
                self.needs[key, name] = who

    def need_all(self, module: ModuleType) -> None:
        """Note that any name may be used."""
        self.need(module, (name for name in vars(module) if not name.startswith("__")), "")

    def reduce_class(self, cls: Any) -> Any:
        """Reduce a class."""
        if cls in _SINGLETONS:
            return NotImplemented
        place = _place_of(cls)
        way = self.dispatch_table.get(type(cls))
        if way is None and place is None and _is_importable(cls):
            return NotImplemented
        if self.back and cls in byvalue.received:
            return byvalue.class_of, (byvalue.token_of(cls),)
        if way is not None:  # of a metaclass of the user's
            reduced = way(cls)
            if isinstance(reduced, str):
                return reduced
            make, args = reduced[:2]
            return byvalue.make_by, (byvalue.token_of(cls), make, args)
        if place is not None and not self.is_entry(place) and self._is_known(place):
            return self.by_name(place)
        return self.by_value(cls, place)

    def reduce_function(self, function: FunctionType) -> Any:
        """Reduce a function."""
        place = _place_of(function)
        if place is None and _is_importable(function):
            return NotImplemented
        if place is not None and not self.is_entry(place) and self._is_known(place):
            return self.by_name(place)
        return self.by_value(function, place)

    def reduce_named(self, obj: Any, name: str, or_else: Callable[[], Any]) -> Any:
        """Reduce what has a name of its own, as type variables have."""
        place = _place_of(obj, name)
        if place is None or self.is_entry(place) or not self._is_known(place):
            return or_else()
        return self.by_name(place)

    def reduce_module(self, module: ModuleType) -> Any:
        """Reduce a module."""
        if not program.is_by_value(module):
            return NotImplemented
        self.need_all(module)
        return self.by_name((program.token_of(module), program.key_of(module), ""))

    def place_of(self, obj: Any, name: str | None = None) -> Place | None:
        """Return where an object is in a module that is sent by value."""
        return _place_of(obj, name)

    def is_importable(self, obj: Any) -> bool:
        """Return whether the other side can import an object."""
        return _is_importable(obj)

    def _is_known(self, place: Place) -> bool:
        """Return whether the other side has, or gets, this by its name."""
        token, module, name = place
        if not self.back or token == program.home():
            return True
        first = name.partition(".")[0]
        placed = program.space_now().placed.get((module, first), self)
        return placed is self or placed is vars(program.module_by(module)).get(first)

    def class_by_value(self, cls: Any, place: Place | None) -> Any:
        """Reduce a class to its content."""
        self._need_annotations(cls, sys.modules.get(cls.__module__))
        if issubclass(cls, enum.Enum):
            return byvalue.reduce_enum(cls, place)
        if (reduced := kinds.reduce_ctypes(cls, place)) is not None:
            return reduced
        if (support := libraries.support_of(cls)) is not None:
            return support.reduce_class(cls)
        reduced = super().reducer_override(cls)
        if reduced is NotImplemented:  # cloudpickle takes its module for one to be imported
            cloudpickle.register_pickle_by_value(sys.modules[cls.__module__])
            reduced = super().reducer_override(cls)
        if len(reduced) < 6:  # cloudpickle finds it somewhere else
            return reduced
        return byvalue.reduce_class(cls, place, reduced[2])

    def function_by_value(self, function: FunctionType, place: Place | None) -> Any:
        """Reduce a function to its content."""
        names, used = names_in(function.__code__), _globals_of(function)
        module = program.module_with(function.__globals__)
        self._need_annotations(function, module)
        imports = _imports_of(function, used.values())
        for name in names.imports:
            if name not in program.MAIN and program.is_by_value(sys.modules.get(name)):
                self.need_all(sys.modules[name])
        if module is None:
            variables = self._shared(function, lambda: byvalue.LooseVariables(_module(function)))
            return byvalue.reduce_function(function, variables, place, imports, used)
        if program.is_by_value(module):
            own = program.token_of(module), program.key_of(module)
            self.need(module, used, function.__qualname__)
            if names.reach_all:
                self.need_all(module)
            variables = self._shared(function, lambda: byvalue.OwnVariables(*own))
        elif used:
            values = self._copies_of(module, used)
            variables = byvalue.BorrowedVariables(module.__name__, values)
        else:  # no reason to import it
            variables = byvalue.LooseVariables(module.__name__)
        return byvalue.reduce_function(function, variables, place, imports, {})

    def _shared(self, function: FunctionType, make: Callable[[], Any]) -> Any:
        return self._variables.setdefault(id(function.__globals__), make())

    def _copies_of(self, module: ModuleType, used: dict[str, Any]) -> dict[str, bytes]:
        """Return what can be sent of global variables, for hosts without their module."""
        values: dict[str, bytes] = {}
        if self.back or self._depth > 1 or kinds.is_installed(module):
            return values
        for name, value in used.items():
            buffer = io.BytesIO()
            try:
                Outer(buffer, False, None, None, self._depth + 1).dump(value)
            except Exception:  # it is not needed where the module can be imported
                continue
            values[name] = buffer.getvalue()
        return values

    def _need_annotations(self, obj: Any, module: ModuleType | None) -> None:
        """Note the names in annotations that are text: somebody may evaluate them."""
        if module is None or not program.is_by_value(module):
            return
        for text in vars(obj).get("__annotations__", getattr(obj, "__annotations__", {})).values():
            if isinstance(text, str):
                names = set(re.findall(r"[^\W\d]\w*", text))
                self.need(module, names & vars(module).keys(), "")


class _Inner(_Pickler):
    """Pickles a definition, or another part that goes by value."""

    def __init__(self, file: io.BytesIO, back: bool, entry: Place | None, depth: int) -> None:
        super().__init__(file, back, depth=depth)
        self._entry = entry

    def is_entry(self, place: Place) -> bool:
        return (
            self._entry is not None
            and place[:2] == self._entry[:2]
            and (place[2].partition(".")[0] == self._entry[2])
        )

    def by_name(self, place: Place) -> Any:
        token, module, name = place
        if not name:
            return program.find_module, (token, module)
        self.need(program.module_by(module), [name.partition(".")[0]], name)
        return program.find, (token, module, name)

    def by_value(self, obj: Any, place: Place | None) -> Any:
        here = place if place == self._entry else None
        if isinstance(obj, type):
            return self.class_by_value(obj, here)
        return self.function_by_value(obj, here)


class Outer(_Pickler):
    """Pickles what is sent; what goes by value is in there as bytes of its own."""

    def __init__(
        self,
        file: io.BytesIO,
        back: bool,
        cache: dict[Any, Any] | None,
        buffers: list[pickle.PickleBuffer] | None,
        depth: int = 0,
    ) -> None:
        super().__init__(file, back, buffers, depth)
        self._cache = {} if cache is None else cache
        self._sent: set[Key] = set()

    def reduce_class(self, cls: Any) -> Any:
        found = self._cache.get(cls)
        if found is None:
            found = super().reduce_class(cls)
            if found is not NotImplemented:
                self._cache[cls] = found
        return found

    def forget(self) -> None:
        """Have what was sent already sent again: it may have been lost."""
        self._sent.clear()

    def by_name(self, place: Place) -> Any:
        token, module, name = place
        if name:
            first = name.partition(".")[0]
            definitions = self._definitions_for(module, first)
            return program.find, (token, module, name, definitions)
        needs, self.needs = self.needs, {}
        return program.find_module, (token, module, program.pack(self._definitions(needs)))

    def by_value(self, obj: Any, place: Place | None) -> Any:
        data, needs = _dump(obj, self.back, None, self._depth)
        definitions = program.pack(self._definitions(needs))
        module = sys.modules.get(str(_module(obj)))
        token = program.token_of(module) if isinstance(module, ModuleType) else program.home()
        name = byvalue.token_of(obj) if isinstance(obj, type) else None
        return byvalue.load_by_value, (name, data, token, definitions)

    def _definitions_for(self, module: str, name: str) -> bytes:
        """Return the definitions that a name needs; most functions and what they use stay."""
        needs, value = {(module, name): name}, None
        if not (self._sent or self.back):
            value = vars(program.module_by(module)).get(name)
        if not isinstance(value, FunctionType):
            return program.pack(self._definitions(needs))
        parts = _parts_of_all(value, program.home(), set())
        before, keys, packed = _known_with_all.get(value, ([], [], b""))
        if parts is None or not _are_same(parts, before):
            definitions = self._definitions(needs)
            keys, packed = [one[:2] for one in definitions], program.pack(definitions)
            if parts is not None:
                _known_with_all[value] = parts, keys, packed
        self._sent.update(keys)
        return packed

    def _definitions(self, needs: _Needs) -> tuple[Definition, ...]:
        """Return what is needed that this pickle has not yet, with all that this needs itself."""
        found: list[Definition] = []
        waiting = {} if self.back else dict(needs)
        while waiting:
            key, who = waiting.popitem()
            if key in self._sent:
                continue
            try:
                data, more = self._define(key, who)
            except Exception:
                if who:
                    raise
                continue
            self._sent.add(key)
            found.append((*key, data, not who))
            for one, user in more.items():
                waiting[one] = waiting.get(one) or (who and user)
        return tuple(sorted(found, key=_rank))

    def _define(self, key: Key, who: str) -> tuple[bytes, _Needs]:
        if key in self._cache:
            known: tuple[bytes, _Needs] = self._cache[key]
            return known
        module, name = key
        owner = program.module_by(module)
        value = vars(owner)[name]
        if type(value) in _PLAIN:
            return pickle.dumps(value, PROTOCOL), {}
        place = program.token_of(owner), module, name
        try:
            self._cache[key] = defined = _dump_entry(value, place)
        except Exception as exc:
            if who == name or str(exc).startswith(_BLAME):
                raise
            text = f"{_BLAME} {name} of {who}: {type(exc).__name__}: {exc}"
            raise pickle.PicklingError(text) from exc
        return defined


_BLAME = "the global variable"


def _rank(definition: Definition) -> int:
    """Return when to read a definition: what may run code comes after the code."""
    module, name, *_ = definition
    value = vars(program.module_by(module))[name]
    if isinstance(value, type) and type(value) not in _Pickler.dispatch_table:
        return 1
    return 0 if isinstance(value, (*_PLAIN, FunctionType, ModuleType)) else 2


def _dump(obj: object, back: bool, entry: Place | None, depth: int = 0) -> tuple[bytes, _Needs]:
    """Pickle a part that goes by value; return its bytes and the names that it uses."""
    buffer = io.BytesIO()
    pickler = _Inner(buffer, back, entry, depth)
    pickler.dump(obj)
    return buffer.getvalue(), pickler.needs


# What functions became, and what they were made of: to pickle one takes longer than to call it.
_known: WeakKeyDictionary[FunctionType, tuple[list[Any], bytes, _Needs]] = WeakKeyDictionary()


def _dump_entry(value: Any, place: Place) -> tuple[bytes, _Needs]:
    parts = _parts_of(value, place[0]) if isinstance(value, FunctionType) else None
    if parts is None:
        return _dump(value, False, place)
    before, data, needs = _known.get(value, ([], b"", {}))
    if not _are_same(before, parts):
        data, needs = _dump(value, False, place)
        _known[value] = parts, data, needs
    return data, needs


def _are_same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))


# The same for functions with all that they use.
_known_with_all: WeakKeyDictionary[FunctionType, tuple[list[Any], list[Key], bytes]]
_known_with_all = WeakKeyDictionary()


def _parts_of_all(function: FunctionType, token: str, seen: set[Any]) -> list[Any] | None:
    """Return all that makes a function, and those that it uses, what they are."""
    parts = _parts_of(function, token)
    if parts is None:
        return None
    seen.add(function)
    for value in _globals_of(function).values():
        parts.append(value)
        if type(value) in _PLAIN or _is_fixed(value):
            continue
        if not isinstance(value, FunctionType):
            return None
        if value not in seen:
            inner = _parts_of_all(value, token, seen)
            if inner is None:
                return None
            parts += inner
    return parts


def _is_fixed(value: object) -> bool:
    """Return whether a value is sent as a name."""
    if isinstance(value, ModuleType):
        return not program.is_by_value(value)
    return isinstance(value, type | FunctionType | BuiltinFunctionType) and _is_importable(value)


def _parts_of(function: FunctionType, token: str) -> list[Any] | None:
    """Return all that makes a function what it is; ``None`` if that may change from within."""
    if function.__closure__ or function.__dict__ or function.__kwdefaults__:
        return None
    defaults, names = function.__defaults__ or (), names_in(function.__code__)
    if not all(type(value) in _PLAIN for value in defaults) or names.reach_all:
        return None
    used = _globals_of(function)
    imports = map(sys.intern, _imports_of(function, used.values()))
    own = function.__code__, function.__name__, function.__qualname__
    return [*own, *defaults, *map(sys.intern, used), *imports, token]


def _globals_of(function: FunctionType) -> dict[str, Any]:
    found = function.__globals__
    return {name: found[name] for name in names_in(function.__code__).globals if name in found}


def _imports_of(function: FunctionType, used: Iterable[Any]) -> list[str]:
    values = [*used, *byvalue.contents(function.__closure__ or ())]
    return sorted(set(byvalue.submodules(values, names_in(function.__code__).all)))


def _module(obj: Any) -> str | None:
    if isinstance(obj, FunctionType):
        name: str | None = obj.__globals__.get("__name__")
        return name
    return getattr(obj, "__module__", None)


def _follow(module: ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _place_of(obj: Any, name: str | None = None) -> Place | None:
    """Return where an object is in a module that is sent by value."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or not program.is_by_value(module):
        return None
    name = name or obj.__qualname__
    if _follow(module, name) is not obj:
        return None
    return program.token_of(module), program.key_of(module), name


def _is_importable(obj: Any) -> bool:
    """Whether importing `obj`'s module and following its qualified name gives `obj` again."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or program.is_by_value(module):
        return False
    return _follow(module, obj.__qualname__) is obj


# What to do about objects of each type, if pickle itself does not know.
_ways: WeakKeyDictionary[type, Callable[[_Pickler, Any], Any] | None] = WeakKeyDictionary()


def _reduce_class(pickler: _Pickler, cls: type) -> Any:
    return pickler.reduce_class(cls)  # that of its own class


def _way_of(kind: type) -> Callable[[_Pickler, Any], Any] | None:
    if (support := libraries.support_of(kind)) is not None:
        return support.way_of(kind)
    if issubclass(kind, type):
        return _reduce_class
    if kind is FunctionType:
        return _Pickler.reduce_function
    if issubclass(kind, ModuleType):
        return _Pickler.reduce_module
    return kinds.way_of(kind, in_table=kind in _Pickler.dispatch_table)

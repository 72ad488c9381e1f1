"""The picklers: what is sent, and each part of it that goes by value as a pickle of its own."""

from __future__ import annotations

import enum
import io
import pickle
import re
import sys
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import cloudpickle

from ostap_parallel import libraries
from ostap_parallel.objects import aside, byvalue, kinds, plain, program, sharing
from ostap_parallel.objects.byvalue import Place, names_in
from ostap_parallel.objects.kinds import PROTOCOL
from ostap_parallel.objects.parts import PLAIN, Parts, are_same, globals_of, imports_of, parts_of
from ostap_parallel.objects.places import is_importable, module_of, place_of
from ostap_parallel.objects.program import Content, Definition, Key

_SINGLETONS = (type(None), type(Ellipsis), type(NotImplemented))

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
        self._named: dict[int, Place] = {}
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
        place = place_of(cls)
        way = self.dispatch_table.get(type(cls))
        if way is None and place is None and is_importable(cls):
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
        place = place_of(function)
        if place is None and is_importable(function):
            return NotImplemented
        if place is not None and not self.is_entry(place) and self._is_known(place):
            return self.by_name(place)
        return self.by_value(function, place)

    def reduce_named(self, obj: Any, name: str, or_else: Callable[[], Any]) -> Any:
        """Reduce what has a name of its own, as type variables have."""
        place = place_of(obj, name)
        if place is None or self.is_entry(place) or not self._is_known(place):
            return or_else()
        return self.by_name(place)

    def reduce_module(self, module: ModuleType) -> Any:
        """Reduce a module."""
        if not program.is_by_value(module):
            return NotImplemented
        self.need_all(module)
        return self.by_name((program.token_of(module), program.key_of(module), ""))

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
            module = sys.modules[cls.__module__]
            cloudpickle.register_pickle_by_value(module)
            reduced = super().reducer_override(cls)
            cloudpickle.unregister_pickle_by_value(module)
        if len(reduced) < 6:  # cloudpickle finds it somewhere else
            return reduced
        return byvalue.reduce_class(cls, place, self.with_names(reduced[2][0]))

    def with_names(self, held: dict[Any, Any]) -> dict[Any, Any]:
        """Return what something holds, global variables by their names."""
        if self.back or not any(map(_is_value, held.values())):
            return held
        names = self.named()
        return {
            name: sharing.Named(names[id(value)]) if id(value) in names else value
            for name, value in held.items()
        }

    def named(self) -> dict[int, Place]:
        """Return where the values are that are global variables, by their ids."""
        main = sys.modules["__main__"]
        self._named = self._named or {
            id(value): (program.token_of(main), program.key_of(main), name)
            for name, value in vars(main).items()
            if _is_value(value) and not name.startswith("__")
        }
        return self._named

    def function_by_value(self, function: FunctionType, place: Place | None) -> Any:
        """Reduce a function to its content."""
        names, used = names_in(function.__code__), globals_of(function)
        module = program.module_with(function.__globals__)
        self._need_annotations(function, module)
        imports = imports_of(function, used.values())
        for name in names.imports:
            if name not in program.MAIN and program.is_by_value(sys.modules.get(name)):
                self.need_all(sys.modules[name])
        if module is None:
            variables = self._shared(
                function, lambda: byvalue.LooseVariables(function.__globals__)
            )
            return byvalue.reduce_function(
                function, variables, place, imports, used, self.with_names
            )
        if program.is_by_value(module):
            own = program.token_of(module), program.key_of(module)
            self.need(module, used, function.__qualname__)
            if names.reach_all:
                self.need_all(module)
            variables = self._shared(function, lambda: byvalue.OwnVariables(*own))
        elif used:
            values = self._copies_of(module, used)
            variables = byvalue.BorrowedVariables(module, values)
        else:  # no reason to import it
            variables = byvalue.LooseVariables(function.__globals__)
        return byvalue.reduce_function(function, variables, place, imports, {}, self.with_names)

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
        for text in byvalue.annotations_of(obj).values():
            if isinstance(text, str):
                names = set(re.findall(r"[^\W\d]\w*", text))
                self.need(module, names & vars(module).keys(), "")


class _Inner(_Pickler):
    """Pickles a definition, or another part that goes by value."""

    def __init__(self, file: io.BytesIO, back: bool, entry: Place | None, depth: int) -> None:
        super().__init__(file, back, depth=depth)
        self._entry = entry
        self.is_code = False

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        is_name = reduced is not NotImplemented and reduced[0] in (program.find, getattr)
        if is_name or not (self.is_code and _is_value(obj) and id(obj) in self.named()):
            return reduced
        return self.by_name(self._named[id(obj)])

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


class _Finder(_Inner):
    """Finds out which of some objects, by their ids, another one holds."""

    def __init__(self, wanted: dict[int, Key], entry: Place) -> None:
        super().__init__(io.BytesIO(), False, entry, 0)
        self.found: set[Key] = set()
        self._wanted = wanted

    def persistent_id(self, obj: Any) -> None:
        """Look at what pickle takes apart by itself."""
        if type(obj) in sharing.NATIVE:
            self._look_at(obj)

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented or reduced[0] not in (program.find, getattr):
            self._look_at(obj)  # what is sent as a name is the same thing anyway
        return reduced

    def _look_at(self, obj: Any) -> None:
        if (key := self._wanted.get(id(obj))) is not None:
            self.found.add(key)


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
        module = sys.modules.get(str(module_of(obj)))
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
        keys, packed = plain.known_definitions(value) or ([], None)
        if packed is None:
            try:
                parts = Parts(value, program.home())
            except LookupError:
                parts = None
            definitions = self._definitions(needs)
            keys, packed = [one[:2] for one in definitions], program.pack(definitions)
            if parts is not None:
                plain.known[value] = parts, keys, packed
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
        found.sort(key=_rank)
        return tuple(self._join(found))

    def _join(self, found: list[Definition]) -> list[Definition]:
        """Have values that hold one another be read together."""
        values = {}
        for module, name, data, _ in found:
            names = vars(program.module_by(module))
            if isinstance(data, bytes) and _is_value(names[name]):
                values[module, name] = names, names[name]
        wanted = sharing.held_by_others(values) if len(values) > 1 else {}
        if not wanted:
            return found

        def find(key: Key) -> set[Key]:
            finder = _Finder(wanted, (program.home(), *key))
            finder.dump(values[key][1])
            return finder.found - {key}

        joint: dict[Key, tuple[bytes]] = {}
        for keys in sharing.group(values, find):
            data, needs = _dump({key: values[key][1] for key in keys}, False, None)
            joint.update(dict.fromkeys(keys, (data,)))
            self._cache.update(dict.fromkeys(keys, ((data,), needs)))
        return [(*one[:2], joint.get(one[:2], one[2]), one[3]) for one in found]

    def _define(self, key: Key, who: str) -> tuple[Content, _Needs]:
        if key in self._cache:
            known: tuple[Content, _Needs] = self._cache[key]
            return known
        module, name = key
        owner = program.module_by(module)
        value = vars(owner)[name]
        if type(value) in PLAIN:
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
    if isinstance(value, type):
        return 2 if type(value) in _Pickler.dispatch_table else 1
    return 2 if _is_value(value) else 0


def _is_value(value: object) -> bool:
    """Return whether this is neither code nor something plain."""
    return not isinstance(value, (*PLAIN, FunctionType, ModuleType, type))


def _dump(obj: object, back: bool, entry: Place | None, depth: int = 0) -> tuple[bytes, _Needs]:
    """Pickle a part that goes by value; return its bytes and the names that it uses."""
    buffer = io.BytesIO()
    pickler = _Inner(buffer, back, entry, depth)
    pickler.is_code = isinstance(obj, type | FunctionType) and not back
    pickler.dump(obj)
    return buffer.getvalue(), pickler.needs


# What functions became, and what they were made of: to pickle one takes longer than to call it.
_known: WeakKeyDictionary[FunctionType, tuple[list[Any], bytes, _Needs]] = WeakKeyDictionary()


def _dump_entry(value: Any, place: Place) -> tuple[bytes, _Needs]:
    parts = parts_of(value, place[0]) if isinstance(value, FunctionType) else None
    if parts is None:
        return _dump(value, False, place)
    before, data, needs = _known.get(value, ([], b"", {}))
    if not are_same(before, parts):
        data, needs = _dump(value, False, place)
        _known[value] = parts, data, needs
    return data, needs


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
    if kind is sharing.Named:
        return lambda pickler, named: pickler.by_name(named.place)
    return kinds.way_of(kind, in_table=kind in _Pickler.dispatch_table)

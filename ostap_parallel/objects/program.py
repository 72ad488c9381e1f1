"""The caller's program on a worker: its modules that cannot be imported, above all ``__main__``.

What travels by name lives in them under its name, as it does at the caller's: functions see each
other, and what tasks set. The content is that of a *space*: each run has one of its own, and the
calls of a pool share one. The module is the same for all of them, so that functions and classes
keep their global variables; where spaces take turns, their contents do.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import os
import pickle
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import is_
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import cloudpickle

from ostap_parallel.objects.attributes import MISSING, give, give_content

MAIN = ("__main__", "__mp_main__")

# Programs that are remembered, in a process that serves many callers.
MANY_PROGRAMS = 16

Key = tuple[str, str]  # of a module, and of what it has by that name
# What to read: a value; or several by their keys, that hold one another or the same objects.
Content = bytes | tuple[bytes]
# A key, its content, and whether it may be done without.
Definition = tuple[str, str, Content, bool]

_home = [uuid.uuid4().hex]
_programs: dict[str, Program] = {}
_tokens: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()  # of programs from elsewhere
_by_value: WeakKeyDictionary[ModuleType, bool] = WeakKeyDictionary()
_loose: WeakValueDictionary[str, ModuleType] = WeakValueDictionary()  # not in sys.modules
_now: ContextVar[Space | None] = ContextVar("space", default=None)


def home() -> str:
    """Return what names the program of this process; a fork is another one."""
    return _home[0]


def _renew() -> None:
    _home[0] = uuid.uuid4().hex


os.register_at_fork(after_in_child=_renew)


class Space:
    """The content that a program's modules have for one run, or for the calls of a pool.

    Parameters
    ----------
    is_fixed
        What has come by a name stays, as for a run; otherwise another definition counts more.
    """

    def __init__(self, is_fixed: bool = False) -> None:
        self.is_fixed = is_fixed
        self.token = ""  # of its program, when that is known
        self.program: Program | None = None
        self.known: dict[Key, Content] = {}  # what was read last
        self.local: dict[str, bytes] = {}  # the same for classes that have no name there
        self.done: set[bytes] = set()  # packed definitions that were read
        self.placed: dict[Key, Any] = {}  # the functions and classes, as they were read
        self.kept: set[Key] = set()  # set by an initializer
        self.contents: dict[str, dict[str, Any]] = {}  # while another one is in use
        self.classes: dict[type, dict[str, Any]] = {}  # the same of classes
        self.begun: list[Kept] = []  # what initializers have left, once it is in here
        self.lent: WeakSet[type] = WeakSet()  # filled as an initializer has left them

    def is_new(self, token: str, cls: type, data: bytes) -> bool:
        """Return whether a class must be filled anew."""
        if token not in self.local or filled_by.get(cls) is not self:
            return True
        return not self.is_fixed and self.local[token] != data

    def note(self, token: str, data: bytes) -> None:
        """Note what a local class was read from; only the last ones count."""
        self.local.pop(token, None)
        self.local[token] = data
        if len(self.local) > _MANY:
            del self.local[next(iter(self.local))]


class Program:
    """A program of another process, as it exists in this one."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.modules: dict[str, ModuleType] = {}
        self.space = self.pool = Space()
        self._pending: dict[Key, tuple[Content, bool]] = {}
        self._reading: dict[Key, Content] = {}
        self._lock = threading.RLock()
        self.module("__main__")

    def module(self, name: str) -> ModuleType:
        """Return a module of the program, which is empty at first."""
        if name not in self.modules:
            module = self.modules[name] = ModuleType(name.partition("#")[0])
            vars(module)["__builtins__"] = builtins
            _tokens[module], _by_value[module] = self.token, True
            if "#" in name:
                _loose[name] = module
            elif (space := _now.get()) is not None and space.token == self.token:
                sys.modules[name] = module
        return self.modules[name]

    def use(self, space: Space) -> None:
        """Give the modules the content of a space."""
        with self._lock:
            if space is self.space:
                return
            self._use_classes(space)
            for name, module in self.modules.items():
                content = vars(module)
                self.space.contents[name] = content.copy()
                bare = {key: content[key] for key in _BARE if key in content}
                content.clear()
                content.update(space.contents.pop(name, bare))
            self.space = space
            space.done.clear()

    def _use_classes(self, space: Space) -> None:
        """Give the classes the content of a space: those that it has filled."""
        old = self.space
        old.classes = {cls: dict(vars(cls)) for cls, one in filled_by.items() if one is old}
        for cls, content in space.classes.items():
            give_content(cls, content)
            filled_by[cls] = space
        space.classes = {}

    def define(self, packed: bytes) -> None:
        """Read what is new, and leave the rest as tasks may have changed it."""
        if packed:
            _count[0] += 1
        space = self.space
        if not packed or packed in space.done:
            return
        with self._lock:
            sender, definitions = pickle.loads(packed)
            is_own = sender == home()
            for module, name, data, is_optional in definitions:
                key = module, name
                if is_own and name in vars(self.module(module)):
                    continue
                old = space.known.get(key)
                if old is None and key in space.kept:
                    space.known[key] = data
                elif old is None or _is_other(space, key, old, data):
                    self._pending[key] = data, is_optional
            if self._pending and not space.is_fixed:
                space.done.clear()  # what they have read is not what is there now
            while self._pending and not self._reading:
                self._read(next(iter(self._pending)))
            space.done.add(packed)

    def find(self, module: str, name: str) -> Any:
        """Return what a module has by a dotted name, which may have to be read first."""
        first, *rest = name.split(".")
        key, names = (module, first), vars(self.module(module))
        if key in self._pending:
            self._read(key)
        elif first not in names and key in self._reading:
            self._load(key)  # what it is made of needs it, so it must come first
        found = names[first]
        for part in rest:
            found = getattr(found, part)
        return found

    def place(self, module: str, name: str, value: Any) -> None:
        """Let a function or a class be found before it is complete, as it may name itself."""
        vars(self.module(module))[name] = self.space.placed[module, name] = value

    def _read(self, key: Key) -> None:
        data, is_optional = self._pending[key]
        keys = [key]
        if isinstance(data, tuple):
            keys = [one for one, (content, _) in self._pending.items() if content == data]
        for one in keys:
            del self._pending[one]
            self.space.known[one] = self._reading[one] = data
        try:
            self._load(key)
        except BaseException as exc:
            if is_optional and isinstance(exc, Exception):
                return
            self._pending.clear()
            self.space.done.clear()
            for one in keys:
                self.space.known.pop(one, None)
            raise
        finally:
            for one in keys:
                self._reading.pop(one, None)

    def _load(self, key: Key) -> None:
        """Load what is being read, unless that has been done while it was."""
        data = self._reading[key]
        if isinstance(data, tuple):
            keys = [one for one, content in self._reading.items() if content is data]
            values = pickle.loads(data[0])
        else:
            keys, values = [key], {key: pickle.loads(data)}
        for one in keys:
            if self._reading.pop(one, None) is not None:
                vars(self.module(one[0]))[one[1]] = values[one]


_count = [0]


def count_definitions() -> int:
    """Return how often something was read here that brings definitions."""
    return _count[0]


_BARE = (
    *("__name__", "__doc__", "__loader__", "__spec__", "__builtins__"),
    *("__package__", "__file__"),  # see `settings`
)

# The space whose version of a class is the present one.
filled_by: WeakKeyDictionary[type, Space] = WeakKeyDictionary()


def _is_other(space: Space, key: Key, old: Content, data: Content) -> bool:
    placed = space.placed.get(key)
    if isinstance(placed, type) and filled_by.get(placed, space) is not space:
        return True  # another run has had another version
    return not space.is_fixed and old != data


@dataclass(eq=False)
class Kept:
    """What an initializer has left in a program.

    Attributes
    ----------
    contents, names
        All that modules have, and the names that it has set.
    classes, attributes
        The same of classes; of each attribute that it has set, also what that was before.
    """

    contents: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: set[Key] = field(default_factory=set)
    classes: dict[type, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[type, dict[str, tuple[Any, Any]]] = field(default_factory=dict)

    def restore(self) -> None:
        """Have the present space begin with it."""
        program = present()
        if program is None or self in program.space.begun:
            return
        space = program.space
        space.begun.append(self)
        space.kept |= self.names
        for module, content in self.contents.items():
            names = vars(program.module(module))
            for name, value in content.items():
                if (module, name) in self.names or name not in names:
                    names[name] = value
        for cls, content in self.classes.items():
            if filled_by.get(cls) is space:
                self.complete(cls, space.is_fixed)
            else:
                give_content(cls, content)
                filled_by[cls] = space
                space.lent.add(cls)

    def complete(self, cls: type, is_fixed: bool) -> None:
        """Give a class that was filled just now what the initializer has set.

        Unless `is_fixed`, what was sent counts more if it is not what it was then.
        """
        for name, (before, after) in self.attributes.get(cls, {}).items():
            if is_fixed or _is_alike(vars(cls).get(name, MISSING), before):
                give(cls, name, after)


def _is_alike(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except Exception:  # user code
        return False


def filled(cls: type, space: Space) -> None:
    """Note that a class has been filled for a space; what initializers have set stays."""
    filled_by[cls] = space
    space.lent.discard(cls)
    for kept in space.begun:
        kept.complete(cls, space.is_fixed)


@contextlib.contextmanager
def keeping() -> Iterator[Kept]:
    """Note what the body changes in the program."""
    kept, program = Kept(), present()
    if program is None:
        yield kept
        return
    before = {
        (name, key): (value, _look_into(value))
        for name, module in program.modules.items()
        for key, value in vars(module).items()
    }
    classes = {cls: _copy(cls) for cls, one in filled_by.items() if one is program.space}
    yield kept
    for name, module in program.modules.items():
        kept.contents[name] = {key: v for key, v in vars(module).items() if key not in _BARE}
        for key, value in kept.contents[name].items():
            old, inside = before.get((name, key), (kept, []))
            now = _look_into(value)
            if old is not value or len(inside) != len(now) or not all(map(is_, inside, now)):
                kept.names.add((name, key))
    for cls, one in list(filled_by.items()):
        if one is program.space:
            kept.classes[cls] = dict(vars(cls))
            kept.attributes[cls] = _differences(classes.get(cls, vars(cls)), cls)


def _copy(cls: type) -> dict[str, Any]:
    """Return what a class has, with copies of what an initializer may fill."""
    return {
        name: value.copy() if type(value) in (dict, list, set) else value
        for name, value in vars(cls).items()
    }


def _differences(before: Mapping[str, Any], cls: type) -> dict[str, tuple[Any, Any]]:
    """Return the attributes that have changed: as they were, and as they are."""
    found, now = {}, vars(cls)
    for name in [*now, *(before.keys() - now.keys())]:
        old, new = before.get(name, MISSING), now.get(name, MISSING)
        if old is not new and not (type(new) in (dict, list, set) and _has_same(old, new)):
            found[name] = old, new
    return found


def _has_same(old: Any, new: Any) -> bool:
    if type(old) is not type(new) or len(old) != len(new):
        return False
    return type(new) is set or all(map(is_, _look_into(old), _look_into(new)))


def _look_into(value: Any) -> list[Any]:
    """Return what an object holds, to find out whether that changes."""
    if isinstance(value, type):  # see `Kept.attributes`
        return []
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list | set):
        return list(value)
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def program_of(token: str) -> Program | None:
    """Return a program of elsewhere; ``None`` if it is that of this process."""
    if token == home():
        return None
    program = _programs.get(token)
    if program is None:
        program = _remember(token)
    space = _now.get()
    if space is POOL:
        _enter(program, program.pool)
    elif space is not None and not space.token:
        space.token, space.program = token, program
        _enter(program, space)
    return program


_remembering = threading.Lock()


def _remember(token: str, program: Program | None = None) -> Program:
    """Have a program be the last that is forgotten; those before it may have no caller any more.

    It is made unless it is given.
    """
    with _remembering:
        program = program or _programs.get(token) or Program(token)
        _programs.pop(token, None)
        _programs[token] = program
        if len(_programs) > MANY_PROGRAMS:
            now = present()
            del _programs[next(key for key, one in _programs.items() if one is not now)]
    return program


def present() -> Program | None:
    """Return the program that is in use, if it is one from elsewhere."""
    return _programs.get(_tokens.get(sys.modules["__main__"], ""))


def space_now() -> Space:
    """Return the space of what is read now."""
    program = present()
    return _default if program is None else program.space


_default = Space()

_MANY = 64

POOL = Space()  # stands for the one that all calls of a program's pool share


class inside:
    """Have a space's program be this process', until another one is, or while the body runs."""

    def __init__(self, space: Space, stays: bool) -> None:
        self._space, self._stays = space, stays

    def __enter__(self) -> None:
        self._before = sys.modules.get("__main__")
        if self._space.program is not None:
            _enter(self._space.program, self._space)
        self._mark = _now.set(self._space)

    def __exit__(self, *error: object) -> None:
        _now.reset(self._mark)
        if not self._stays and sys.modules.get("__main__") is not self._before:
            _leave(self._space, self._before)


def _leave(space: Space, before: ModuleType | None) -> None:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and _tokens.get(module) == space.token:
            del sys.modules[name]
    if before is not None:
        sys.modules["__main__"] = before


def _enter(program: Program, space: Space) -> None:
    program.use(space)
    if sys.modules.get("__main__") is not program.modules["__main__"]:
        _remember(program.token, program)
        if (other := present()) is not None:
            for name, module in other.modules.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
        for name, module in program.modules.items():
            if "#" not in name:
                sys.modules[name] = module


def pack(definitions: Iterable[Definition]) -> bytes:
    """Return what `find` reads: definitions, and whose they are."""
    found = tuple(definitions)
    return pickle.dumps((home(), found)) if found else b""


def find(token: str, module: str, name: str, definitions: bytes = b"") -> Any:
    """Return what a program has by a name; it may be defined by that."""
    program = program_of(token)
    if program is not None:
        program.define(definitions)
        return program.find(module, name)
    found: Any = module_by(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def find_module(token: str, name: str, definitions: bytes = b"") -> ModuleType:
    """Return a program's module that cannot be imported."""
    program = program_of(token)
    if program is None:
        return module_by(name)
    program.define(definitions)
    return program.module(name)


def module_by(key: str) -> ModuleType:
    """Return the module that `key_of` has named."""
    return _loose[key] if "#" in key else sys.modules[key]


def module_with(variables: dict[str, Any]) -> ModuleType | None:
    """Return the module that has these global variables."""
    module = sys.modules.get(variables.get("__name__", ""))
    for one in (module, *_loose.values()):
        if isinstance(one, ModuleType) and vars(one) is variables:
            return one
    return None


def namespace(token: str, module: str) -> dict[str, Any]:
    """Return the global variables of a program's module."""
    return vars(find_module(token, module))


def key_of(module: ModuleType) -> str:
    """Return what names a module that is sent by value."""
    name = module.__name__
    if sys.modules.get(name) is module:
        return name
    for key, known in _loose.items():
        if known is module:
            return key
    key = f"{name}#{uuid.uuid4().hex}"
    _loose[key] = module
    return key


def token_of(module: ModuleType) -> str:
    """Return what names a module's program."""
    return _tokens.get(module) or home()


def is_by_value(module: Any) -> bool:
    """Return whether others cannot import a module: ``__main__``, and what was made by hand."""
    if type(module) is not ModuleType:
        return False
    if module.__name__ in MAIN:
        return True
    known = _by_value.get(module)
    if known is None:
        known = _by_value[module] = not _can_be_found(module)
    return known


def _can_be_found(module: ModuleType) -> bool:
    name = module.__name__
    if any(
        f"{name}.".startswith(f"{one}.") for one in cloudpickle.list_registry_pickle_by_value()
    ):
        return False  # the user has said so
    if sys.modules.get(name) is not module:  # another one, or an alias
        return any(module is other for other in list(sys.modules.values()))
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    for finder in sys.meta_path:
        with contextlib.suppress(Exception):
            spec = finder.find_spec(top, None, None)
            if spec is not None:
                return top != name or _is_from(spec, module)
    return False


def _is_from(spec: importlib.machinery.ModuleSpec, module: ModuleType) -> bool:
    file: str | None = getattr(module, "__file__", None)
    if file is None or spec.origin is None or not spec.has_location:
        return True
    return os.path.realpath(spec.origin) == os.path.realpath(file)

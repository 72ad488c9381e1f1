"""Functions and classes that the other side cannot import: what is sent of them, and their making.

A class that travels keeps its identity. It gets a token; every process makes it once, and a
worker that sends an instance back names the token, so that the caller receives an instance of its
own class.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import enum
import functools
import importlib
import marshal
import pickle
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from ostap_parallel.errors import ByteCodeError
from ostap_parallel.objects.attributes import give, take
from ostap_parallel.objects.program import (
    filled,
    filled_by,
    is_by_value,
    namespace,
    program_of,
    space_now,
)

Place = tuple[str, str, str]  # the token of a program, a module of it, a name there

_tokens: WeakKeyDictionary[type, str] = WeakKeyDictionary()
_classes: WeakValueDictionary[str, type] = WeakValueDictionary()
received: WeakSet[type] = WeakSet()
_made: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()  # what they had at first


class Names(NamedTuple):
    """What code names: global variables, all of which it may ask an object for, and modules."""

    globals: tuple[str, ...]
    all: frozenset[str]
    imports: frozenset[str]

    @property
    def reach_all(self) -> bool:
        """Whether it may use global variables that it does not name."""
        return not self.all.isdisjoint(_REACHING)


_REACHING = {"globals", "exec", "eval", "__main__", "vars", "dir"}


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> Names:
    """Return what code and the code in it names."""
    names: dict[str, None] = {}
    every, imports = set(code.co_names), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names[instruction.argval] = None
        elif instruction.opname == "IMPORT_NAME":
            imports.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_in(constant)
            names.update(dict.fromkeys(inner.globals))
            every |= inner.all
            imports |= inner.imports
    return Names(tuple(names), frozenset(every), frozenset(imports))


def submodules(values: Iterable[Any], names: frozenset[str]) -> Iterator[str]:
    """Yield the modules that are there because some import has put them into their package."""
    for value in values:
        if isinstance(value, ModuleType) and hasattr(value, "__path__"):
            found = [f"{value.__name__}.{name}" for name in names]
            inner = [sys.modules[name] for name in found if name in sys.modules]
            yield from (module.__name__ for module in inner if isinstance(module, ModuleType))
            yield from submodules(inner, names)


def contents(cells: Iterable[CellType]) -> Iterator[Any]:
    """Yield what is in the cells of a closure."""
    for cell in cells:
        with contextlib.suppress(ValueError):  # not yet filled
            yield cell.cell_contents


# Functions


def reduce_function(
    function: FunctionType,
    variables: Any,
    place: Place | None,
    imports: Iterable[str],
    loose: dict[str, Any],
    with_names: Callable[[dict[Any, Any]], dict[Any, Any]],
) -> Any:
    """Return how pickle makes a function.

    Parameters
    ----------
    variables
        Becomes the dictionary of its global variables, see `OwnVariables`.
    imports
        Modules that must be there.
    loose
        The global variables that it brings along.
    with_names
        Has values that are global variables be sent as these.
    """
    state = {name: getattr(function, name) for name in _FUNCTION if hasattr(function, name)}
    state["__annotations__"] = annotations_of(function)
    if function.__defaults__:
        state["__defaults__"] = tuple(with_names(dict(enumerate(function.__defaults__))).values())
    if function.__kwdefaults__:
        state["__kwdefaults__"] = with_names(function.__kwdefaults__)
    code = function.__code__
    packed = _dump_code(code, code.co_filename, code.co_linetable)
    args = (variables, packed, function.__closure__, place, imports)
    return make_function, args, (state, function.__dict__, loose), None, None, fill_function


_FUNCTION = (
    *("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__"),
    "__type_params__",
)


def annotations_of(obj: Any) -> dict[str, Any]:
    """Return the annotations of a function or class, if they can be had.

    From Python 3.14 on they are computed when they are asked for: what they name may be imported
    for type checkers only.
    """
    try:
        return getattr(obj, "__annotations__", {})
    except Exception:  # code of the user's
        return {}


_VERSION = b"%d.%d" % sys.version_info[:2]


@functools.lru_cache(maxsize=1024)
def _dump_code(code: CodeType, *where: object) -> bytes:
    """Return the byte code, behind the version that it is of and the function's name.

    It may be equal to that of another file or line, which `where` tells apart.
    """
    return b"\0".join([_VERSION, code.co_name.encode(), marshal.dumps(code)])


@functools.lru_cache(maxsize=1024)
def _load_code(data: bytes) -> CodeType:
    """Undo `_dump_code`; raises `ByteCodeError` for another version's.

    It might run, and compute something else.
    """
    version, name, packed = data.split(b"\0", 2)
    if version != _VERSION:
        here = f"which Python {_VERSION.decode()} at {sys.executable} is not"
        reason = f"it travels as byte code of Python {version.decode()}, {here}: give that host "
        reason += "another interpreter with python=, or have it import the function from a module "
        reason += "(sync=)"
        raise ByteCodeError(f"the function {name.decode()}", reason)
    code: CodeType = marshal.loads(packed)
    return code


def make_function(
    variables: dict[str, Any],
    code: bytes,
    closure: tuple[CellType, ...] | None,
    place: Place | None,
    imports: Iterable[str],
) -> FunctionType:
    """Make a function that `fill_function` completes."""
    for name in imports:
        with contextlib.suppress(ImportError):  # it may be the name of something else
            importlib.import_module(name)
    function = FunctionType(_load_code(code), variables, closure=closure)
    _put(place, function)
    return function


def fill_function(function: FunctionType, state: tuple[dict[str, Any], ...]) -> None:
    """Complete a function."""
    attributes, own, loose = state
    function.__globals__.update(loose)
    for name, value in attributes.items():
        setattr(function, name, value)
    function.__dict__.update(own)


def _put(place: Place | None, value: Any) -> None:
    if place is not None and (program := program_of(place[0])) is not None:
        program.place(*place[1:], value)


def make_cell() -> CellType:
    """Make a cell that `fill_cell` fills: what is in it may refer to it."""
    return CellType()


def fill_cell(cell: CellType, content: tuple[Any]) -> None:
    """Fill a cell."""
    (cell.cell_contents,) = content


class OwnVariables:
    """Stands for the global variables of a module that is sent by value."""

    def __init__(self, token: str, module: str) -> None:
        self._where = token, module

    def __reduce__(self) -> Any:
        return namespace, self._where


class LooseVariables:
    """Stands for global variables that are in no module; functions bring those that they use."""

    def __init__(self, variables: dict[str, Any]) -> None:
        self._names = variables.get("__name__"), variables.get("__package__")

    def __reduce__(self) -> Any:
        return _make_variables, self._names


def _make_variables(name: str | None, package: str | None) -> dict[str, Any]:
    # by the package relative imports are understood; what is written in C asks for the built-in
    # names when it imports something
    return {"__name__": name, "__package__": package, "__builtins__": __builtins__}


class BorrowedVariables:
    """Stands for the global variables of a module that can be imported, but maybe not there."""

    def __init__(self, module: ModuleType, values: dict[str, bytes]) -> None:
        self._content = module.__name__, module.__package__, values

    def __reduce__(self) -> Any:
        return borrow, self._content


def borrow(module: str, package: str | None, values: dict[str, bytes]) -> dict[str, Any]:
    """Return a module's global variables; copies of some if it cannot be imported here."""
    try:
        return vars(importlib.import_module(module))
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        found = {key: pickle.loads(data) for key, data in values.items()}
        return _make_variables(module, package) | found


# Classes


def token_of(cls: type) -> str:
    """Return what names a class in all processes."""
    if cls not in _tokens:
        _know(cls, uuid.uuid4().hex)
    return _tokens[cls]


def _know(cls: type, token: str) -> None:
    _tokens[cls] = token
    _classes[token] = cls


def class_of(token: str) -> type:
    """Return the class with a token."""
    try:
        return _classes[token]
    except KeyError:
        raise pickle.UnpicklingError("the class of a result no longer exists here") from None


def make_by(token: str, make: Callable[..., type], args: tuple[Any, ...]) -> type:
    """Make a class as its metaclass wants it, once."""
    return _make(token, None, make, args)


def reduce_class(cls: Any, place: Place | None, attributes: dict[str, Any]) -> Any:
    """Return how pickle makes a class with these attributes, as cloudpickle has them."""
    own = vars(cls)
    attributes.pop("__slotnames__", None)  # what pickle has found out about it
    kept = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    kept |= {name: own[name] for name in ("__slots__", "__orig_bases__") if name in own}
    hook = getattr(super(cls, cls).__init_subclass__, "__func__", None)
    owner = sys.modules.get(getattr(hook, "__module__", ""))
    has_hook = hook is not None and _is_of_user(owner)
    args = (type(cls), cls.__name__, cls.__bases__, kept, has_hook)
    filling = _fill_class, (attributes, copyreg.dispatch_table.get(cls))
    return _make, (token_of(cls), place, _make_class, args), filling, None, None, _fill


def _fill_class(cls: Any, state: tuple[dict[str, Any], Any]) -> None:
    """Give a class its attributes, past its metaclass: the sender's has seen to them."""
    attributes, reducer = state
    for name, value in attributes.items():
        if name == "_abc_impl":
            for subclass in filter(None, value or ()):
                cls.register(subclass)
        else:
            give(cls, name, value)
    if "__firstlineno__" in attributes:  # Python forgets it when a class gets its `__module__`
        give(cls, "__firstlineno__", attributes["__firstlineno__"])
    if reducer is not None:
        copyreg.pickle(cls, reducer)


def _make(token: str, place: Place | None, make: Callable[..., type], args: Any) -> type:
    cls = _classes.get(token)
    if cls is None:
        cls = make(*args)
        _know(cls, token)
        received.add(cls)
        _made[cls] = frozenset(vars(cls))
    _put(place, cls)
    return cls


def _fill(cls: type, state: tuple[Callable[..., None], Any]) -> None:
    # Never the caller's own. The sender may have changed its class since the last run; what the
    # run itself has changed here, as in worker_init, stays.
    space = space_now()
    is_here = filled_by.get(cls) is space and cls not in space.lent
    if cls not in received or (space.is_fixed and is_here):
        return
    fill, attributes = state
    own = attributes[0] if isinstance(attributes, tuple) else attributes
    take(cls, vars(cls).keys() - own.keys() - _made[cls])  # what the sender has no more
    fill(cls, attributes)
    _made[cls] |= vars(cls).keys() - own.keys()  # as the fields of a structure
    filled(cls, space)


_hiding = threading.RLock()


@contextlib.contextmanager
def _hiding_hooks(bases: Iterable[type]) -> Iterator[None]:
    """Hide what bases of the user's do with a new class: that was done by the sender."""
    every = dict.fromkeys(one for base in bases for one in base.__mro__)
    with _hiding:
        hooks = [
            (one, vars(one)["__init_subclass__"])
            for one in every
            if "__init_subclass__" in vars(one) and _is_of_user(sys.modules.get(one.__module__))
        ]
        try:
            for one, _ in hooks:
                type.__setattr__(one, "__init_subclass__", classmethod(_ignore))
            yield
        finally:
            for one, hook in hooks:
                type.__setattr__(one, "__init_subclass__", hook)


def _is_of_user(module: ModuleType | None) -> bool:
    return module is None or is_by_value(module)


def _ignore(cls: type, /, **keywords: Any) -> None:
    pass


def _make_class(
    meta: Any, name: str, bases: tuple[Any, ...], kept: dict[str, Any], has_hook: bool
) -> type:
    maker = next(one for one in meta.__mro__ if not is_by_value(sys.modules.get(one.__module__)))
    if not has_hook:
        with contextlib.suppress(Exception):  # it may want what is not there yet
            make = meta if maker is meta else functools.partial(maker.__new__, meta)
            return make(name, bases, dict(kept))  # type: ignore[no-any-return]
    with _hiding_hooks(bases):
        try:
            cls: type = maker.__new__(meta, name, bases, dict(kept))
        except Exception:
            cls = type.__new__(meta, name, bases, dict(kept))
    return cls


def reduce_made(cls: type, place: Place | None, args: tuple[Any, ...], state: Any) -> Any:
    """Return how pickle makes a class by `_make_class`, and sets the attributes in `state`."""
    return _make, (token_of(cls), place, _make_class, args), (set_each, state), None, None, _fill


def set_each(cls: type, attributes: dict[str, Any]) -> None:
    """Set attributes, all but those that may not be."""
    for name, value in attributes.items():
        with contextlib.suppress(AttributeError, TypeError):
            setattr(cls, name, value)


def load_by_value(name: str | None, data: bytes, token: str, definitions: bytes) -> Any:
    """Read a function or, by its token, a class; the same content of a class is read once."""
    if definitions and (owner := program_of(token)) is not None:
        owner.define(definitions)
    if name is None:
        return pickle.loads(data)
    cls, space = _classes.get(name), space_now()
    if cls is not None and (cls not in received or not space.is_new(name, cls, data)):
        return cls
    space.note(name, data)
    return pickle.loads(data)


# Enumerations


class _Member:
    """Stands for the value of a member until that is made, without the class' own makers."""

    def __init__(self, value: Any, base: type, args: Any) -> None:
        self.value, self.base, self.args = value, base, args


def _new_member(cls: Any, made: _Member) -> Any:
    member = made.base.__new__(cls, *made.args)
    member._value_ = made.value
    return member


def _init_member(self: Any, *args: Any) -> None:
    pass


_MAKERS = ("_new_member_", "__new_member__")
_OF_MEMBERS = {"_value_", "_name_", "__objclass__", "_sort_order_"}


def reduce_enum(cls: Any, place: Place | None) -> Any:
    """Return how pickle makes an enumeration: with its members, which are made by the sender."""
    meta, bases = type(cls), cls.__bases__
    base = next(one for one in cls.__mro__ if "__new__" in vars(one) and _is_builtin(one))
    members = []
    for name, member in cls.__members__.items():
        args = base.__getnewargs__(member) if hasattr(base, "__getnewargs__") else ()
        members.append((name, member._value_, args))
    plain = vars(enum.EnumMeta.__new__(meta, "_", bases, enum.EnumMeta.__prepare__("_", bases)))
    own = {
        name: value
        for name, value in vars(cls).items()
        if name not in cls.__members__
        and (name not in plain or getattr(value, "__module__", None) == cls.__module__)
    }
    own |= {name: vars(cls)[name] for name in _MAKERS if name in vars(cls)}
    more = {
        name: {key: value for key, value in vars(member).items() if key not in _OF_MEMBERS}
        for name, member in cls.__members__.items()
    }
    args = (meta, cls.__name__, bases, cls.__module__, cls.__qualname__, base, members)
    state = own, {name: one for name, one in more.items() if one}
    return (
        _make,
        (token_of(cls), place, _make_enum, args),
        (_fill_enum, state),
        None,
        None,
        _fill,
    )


def _is_builtin(cls: type) -> bool:
    return not isinstance(vars(cls)["__new__"], staticmethod | FunctionType)


def _make_enum(
    meta: Any,
    name: str,
    bases: tuple[type, ...],
    module: str,
    qualname: str,
    base: type,
    members: list[tuple[str, Any, tuple[Any, ...]]],
) -> type:
    namespace: Any = enum.EnumMeta.__prepare__(name, bases)
    names = {"__module__": module, "__qualname__": qualname}
    makers = {"__new__": _new_member, "__init__": _init_member}
    values = {entry: _Member(value, base, args) for entry, value, args in members}
    for entry, value in [*names.items(), *makers.items(), *values.items()]:
        namespace[entry] = value
    cls: type = enum.EnumMeta.__new__(meta, name, bases, namespace)
    return cls


def _fill_enum(cls: Any, state: tuple[dict[str, Any], dict[str, dict[str, Any]]]) -> None:
    own, more = state
    if vars(cls).get("__init__") is _init_member:
        del cls.__init__
    set_each(cls, own)
    for name, attributes in more.items():
        vars(cls.__members__[name]).update(attributes)

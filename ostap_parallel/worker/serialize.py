"""Objects to bytes and back, between processes of the same Python version.

C pickle (protocol 5) carries the data; dill carries, by value, only what the other side cannot
import: functions and classes of ``__main__``, lambdas, closures and local classes. What C pickle
refuses altogether is tried with dill as a whole.

A class that travels by value keeps its identity. It gets a token; every process makes it once,
and a worker that sends an instance back names the token, so that the caller receives an instance
of its own class.
"""

from __future__ import annotations

import contextlib
import copyreg
import enum
import functools
import importlib
import io
import operator
import pickle
import sys
import threading
import uuid
from collections import namedtuple
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import dill
from dill import _dill, detect

from ostap_parallel.errors import SerializeError

PROTOCOL = 5

_MAIN = ("__main__", "__mp_main__", None)
_SINGLETONS = (type(None), type(Ellipsis), type(NotImplemented))
_MAKERS = (_dill._create_type, _dill._create_namedtuple, _dill.new_class)

_tokens: WeakKeyDictionary[type, str] = WeakKeyDictionary()
_classes: WeakValueDictionary[str, type] = WeakValueDictionary()
_received: WeakSet[type] = WeakSet()
_current: WeakSet[type] = WeakSet()  # those received that are as they were sent for this run


def dumps(
    obj: object,
    *,
    back: bool = False,
    cache: dict[type, bytes] | None = None,
    buffers: list[pickle.PickleBuffer] | None = None,
) -> bytes:
    """Serialise an object.

    Parameters
    ----------
    back
        The bytes return to the process that sent this one its classes: those need no content.
        What runs code of the user's when it is unpickled is unpickled once here: if that fails,
        or never ends, this process is where it must.
    cache
        Keeps what classes became, for callers that serialise many of their instances; valid
        as long as the classes do not change.
    buffers
        Takes buffers that are not copied into the bytes, see PEP 574.

    Raises
    ------
    Exception
        Whatever pickle, dill or the object's own ``__reduce__`` raise; see `pack`.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, back, cache, buffers)
    try:
        pickler.dump(obj)
        data, has_reader = buffer.getvalue(), any(map(_has_reader, pickler.types))
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as refusal:
        if buffers is not None:
            buffers.clear()
        try:
            data, has_reader = pickle.dumps(_ByValue(_dump_by_value(obj, back)), PROTOCOL), True
        except Exception:
            raise refusal from None
    if back and has_reader:
        loads(data)
    return data


def pack(obj: object, what: str, **how: Any) -> bytes:
    """Serialise as `dumps` does; whatever goes wrong becomes a `SerializeError` about `what`."""
    try:
        return dumps(obj, **how)
    except Exception as exc:
        raise SerializeError(what, name_and_text(exc)) from exc


def name_and_text(exc: BaseException) -> str:
    """Return an exception's name and text, also where the text cannot be had."""
    return f"{type(exc).__name__}: {text_of(exc)}"


def text_of(exc: BaseException) -> str:
    """Return an exception's text; its class may raise in place of telling."""
    try:
        return str(exc)
    except KeyboardInterrupt:
        raise
    except BaseException as failure:
        return f"(its text is not to be had: {type(failure).__name__})"


loads: Callable[[bytes], Any] = pickle.loads
Unpickler = pickle.Unpickler  # of a `Stream`


class _ByValue:
    """Bytes written by dill; unpickling this gives what they hold."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return _load_by_value, (self.data,)


class _Pickler(pickle.Pickler):
    def __init__(
        self,
        file: io.BytesIO,
        back: bool,
        cache: dict[type, bytes] | None,
        buffers: list[pickle.PickleBuffer] | None,
    ) -> None:
        super().__init__(
            file, PROTOCOL, buffer_callback=None if buffers is None else buffers.append
        )
        self._back = back
        self._cache = cache
        self.types: set[type] = set()

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            return self._reduce_class(obj)
        self.types.add(type(obj))
        if isinstance(obj, FunctionType) and not _is_importable(obj):
            return _load_by_value, (_dump_by_value(obj, self._back),)
        return _reduce_object(obj)

    def _reduce_class(self, cls: type) -> Any:
        if cls in _SINGLETONS or _is_importable(cls):
            return NotImplemented
        if self._back and cls in _received:
            return _class_of, (_tokens[cls],)
        cache = {} if self._cache is None else self._cache
        if cls not in cache:
            cache[cls] = _dump_by_value(cls, self._back)
        return _load_class, (_token(cls), cache[cls])


class Stream:
    """Objects that are written one after another, and what they share once.

    They are read, in their order, by one `Unpickler`. Where C pickle refuses one, it raises; what
    is written afterwards may refer to what was lost then.
    """

    def __init__(self, cache: dict[type, bytes] | None) -> None:
        self.size = 0  # bytes
        self._buffer = io.BytesIO()
        self._pickler = _Pickler(self._buffer, False, cache, None)

    def add(self, obj: object) -> None:
        """Write an object, or raise as `dumps` does."""
        try:
            self._pickler.dump(obj)
        except BaseException:
            self._buffer.seek(self.size)
            self._buffer.truncate()
            raise
        self.size = self._buffer.tell()

    def getvalue(self) -> bytes:
        """Return all that was written."""
        return self._buffer.getvalue()


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


def _has_reader(cls: type) -> bool:
    """Whether unpickling instances of `cls` runs Python code that is not of the library's own."""
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


_dumping = threading.RLock()


class _DillPickler(dill.Pickler):  # type: ignore[misc]
    """dill's pickler, with our classes' tokens."""

    def __init__(self, file: io.BytesIO, back: bool) -> None:
        super().__init__(file, PROTOCOL, byref=False, recurse=True)
        self._back = back

    def dump(self, obj: Any) -> None:
        """Pickle an object."""
        with _dumping:
            dills, detect.globalvars = detect.globalvars, _globals_of
            try:
                super().dump(obj)
            finally:
                detect.globalvars = dills

    def save_reduce(self, func: Any, args: Any, *rest: Any, obj: Any = None, **named: Any) -> None:
        if isinstance(obj, type) and func in _MAKERS:
            func, args = _make_class, (_token(obj), func, args)
        super().save_reduce(func, args, *rest, obj=obj, **named)

    def reducer_override(self, obj: Any) -> Any:
        if self._back and isinstance(obj, type) and obj in _received:
            return _class_of, (_tokens[obj],)
        if isinstance(obj, enum.EnumMeta) and not _is_importable(obj):
            return _reduce_enum(obj)
        if isinstance(obj, type) and _is_named_tuple(obj) and not _is_importable(obj):
            return _reduce_named_tuple(obj)
        return _reduce_object(obj)


# What functions became that stand for themselves, and what they were made of: dill takes a
# thousand times as long for a small one as to call it.
_known: WeakKeyDictionary[FunctionType, tuple[list[Any], bytes]] = WeakKeyDictionary()


def _dump_by_value(obj: object, back: bool) -> bytes:
    if not isinstance(obj, FunctionType) or (parts := _parts_of(obj)) is None:
        return _dump_by_dill(obj, back)
    before, data = _known.get(obj, ([], b""))
    if not _are_same(before, parts):
        data = _dump_by_dill(obj, back)
        _known[obj] = parts, data
    return data


def _are_same(before: list[Any], now: list[Any] | None) -> bool:
    return now is not None and len(before) == len(now) and all(map(operator.is_, before, now))


def _dump_by_dill(obj: object, back: bool) -> bytes:
    buffer = io.BytesIO()
    _DillPickler(buffer, back).dump(obj)
    return buffer.getvalue()


def _parts_of(function: FunctionType, callers: tuple[FunctionType, ...] = ()) -> list[Any] | None:
    """Return all that makes a function what it is; ``None`` if that may change from within."""
    if function.__closure__ or function.__dict__ or function.__kwdefaults__:
        return None
    code, defaults = function.__code__, function.__defaults__ or ()
    if not all(type(value) in _CONSTANTS for value in defaults) or _REACHING & {*_names_in(code)}:
        return None
    parts = [code, function.__name__, function.__qualname__, *defaults]
    known = function.__globals__
    for name in _names_in(code):
        value = known.get(name, function)
        parts.append(name)
        if value is function:  # its own name, or one that it does not use as a global one
            parts.append(name in known)
            continue
        parts.append(value)
        if type(value) in _CONSTANTS or _is_fixed(value):
            continue
        if not isinstance(value, FunctionType) or value in callers:
            return None
        inner = _parts_of(value, (*callers, function))
        if inner is None:
            return None
        parts += inner
    return parts


def _is_fixed(value: object) -> bool:
    """Return whether a value is sent as a name."""
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value
    return isinstance(value, type | FunctionType | BuiltinFunctionType) and _is_importable(value)


_CONSTANTS = (type(None), bool, int, float, str, bytes)
_REACHING = {"globals", "exec", "eval"}  # what they reach is not among the names in the code


@functools.lru_cache(maxsize=1024)
def _names_in(code: CodeType) -> tuple[str, ...]:
    """Return the names that code may look up in its global variables."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return sum(map(_names_in, inner), code.co_names)


class _DillUnpickler(dill.Unpickler):  # type: ignore[misc]
    """dill's unpickler, which notes the functions that it makes."""

    def __init__(self, data: bytes) -> None:
        # ignore: dill would otherwise swap an object's class for one of the same name in __main__
        super().__init__(io.BytesIO(data), ignore=True)
        self.functions: list[FunctionType] = []

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return self._create if found is _dill._create_function else found

    def _create(self, *args: Any) -> FunctionType:
        function: FunctionType = _dill._create_function(*args)
        self.functions.append(function)
        return function


def _load_by_value(data: bytes) -> Any:
    """Read what `_dump_by_value` has written; the same small function is made once only."""
    if len(data) > LARGE:
        return _load_by_dill(data)
    last = _last_made(data)
    if not (last and _are_same(last[1], _parts_of(last[0]))):
        value = _load_by_dill(data)
        parts = _parts_of(value) if isinstance(value, FunctionType) else None
        if parts is None:
            return value
        last[:] = value, parts
        _known[value] = parts, data  # to be sent on as it is
    return last[0]


# Bytes of a function that is kept, in case that it comes again.
LARGE = 1 << 14


@functools.lru_cache(maxsize=64)
def _last_made(data: bytes) -> list[Any]:
    return []


def _load_by_dill(data: bytes) -> Any:
    unpickler = _DillUnpickler(data)
    value = unpickler.load()
    for function in unpickler.functions:
        if function.__globals__.get("__name__") == "__main__":
            function.__globals__.update(_kept)
            _of_main.add(function)
    return value


# Each function of the caller's __main__ has global variables of its own here, those that it uses,
# with the values that they have at the caller's; and the ones that are kept.
_of_main: WeakSet[FunctionType] = WeakSet()
_kept: dict[str, Any] = {}


def call_for_good(packed: bytes) -> None:
    """Do a serialised call ``(function, arguments)``; all of the caller's ``__main__`` see it.

    That is, its functions see the global variables that were set or, if containers, filled.
    """
    known = set(_of_main)
    function, args = loads(packed)
    before = [(new.__globals__, new.__globals__.copy()) for new in set(_of_main) - known]
    function(*args)
    for after, old in before:
        for name, value in after.items():
            if old.get(name, old) is not value or isinstance(value, dict | list | set):
                _kept[name] = value
    _kept.pop("__builtins__", None)
    for function in _of_main:
        function.__globals__.update(_kept)


# Every instance brings its class: most of the time the very same bytes. Only the last ones count:
# a class that was changed, and changed back, brings what it has brought before.
@functools.lru_cache(maxsize=64)
def _last_read(token: str) -> dict[bytes, Any]:
    return {}


def _load_class(token: str, data: bytes) -> Any:
    last = _last_read(token)
    found = last.get(data)
    if found is None:
        found = _load_by_value(data)
        last.clear()
        last[data] = found
    return found


def forget_classes() -> None:
    """Begin a run: its classes are to be read anew, each once.

    What refers to them may have brought other versions meanwhile.
    """
    _last_read.cache_clear()
    _current.clear()


class Anew:
    """What is read behind this may bring other versions of classes, outside of runs."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _read_anew, ()


def _read_anew() -> None:
    _current.clear()


def _is_importable(obj: Any) -> bool:
    """Whether importing `obj`'s module and following its qualified name gives `obj` again."""
    name = getattr(obj, "__module__", None)
    module = sys.modules.get(name) if name not in _MAIN else None
    if module is None:
        return False
    found: Any = module
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _token(cls: type) -> str:
    if cls not in _tokens:
        _tokens[cls] = uuid.uuid4().hex
        _classes[_tokens[cls]] = cls
    return _tokens[cls]


def _make_class(token: str, make: Callable[..., type], args: tuple[Any, ...]) -> type:
    known = _classes.get(token)
    if known is not None:
        if make is _dill._create_type:
            _fill_class(known, args[-1])
        return known
    cls = make(*args)
    _tokens[cls] = token
    _classes[token] = cls
    _received.add(cls)
    if make is _dill._create_type:  # others get the rest later
        _current.add(cls)
    return cls


def _fill_class(cls: type, attributes: dict[str, Any]) -> None:
    # Never the caller's own. The sender may have changed its class since the last run; what the
    # run itself has changed here, as in worker_init, stays.
    if cls not in _received or cls in _current:
        return
    _current.add(cls)
    for name, value in attributes.items():
        with contextlib.suppress(AttributeError, TypeError):
            setattr(cls, name, value)


def _reduce_object(obj: Any) -> Any:
    """Reduce what pickle and dill do otherwise: modules, and cached functions of ``__main__``."""
    if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj:
        # dill would send what is in a module of the user's
        return importlib.import_module, (obj.__name__,)
    if isinstance(obj, _CACHED) and not _is_importable(obj):
        return _make_cached, (obj.__wrapped__, obj.cache_parameters())
    return NotImplemented


_CACHED = type(functools.lru_cache(len))


def _make_cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _is_named_tuple(cls: type) -> bool:
    return cls.__bases__ == (tuple,) and hasattr(cls, "_fields") and hasattr(cls, "_make")


def _reduce_named_tuple(cls: Any) -> Any:
    # dill forgets the methods
    fields, defaults = cls._fields, tuple(cls._field_defaults.values())
    plain = vars(namedtuple(cls.__name__, fields))
    extras = {name: value for name, value in vars(cls).items() if name not in plain}
    if "__annotations__" in vars(cls):
        extras["__annotations__"] = cls.__annotations__
    args = (cls.__name__, fields, cls.__module__, cls.__qualname__, defaults)
    return _make_class, (_token(cls), _make_named_tuple, args), extras, None, None, _fill_class


def _make_named_tuple(
    name: str, fields: tuple[str, ...], module: str, qualname: str, defaults: tuple[Any, ...]
) -> type:
    cls: type = namedtuple(name, fields, defaults=defaults, module=module)  # type: ignore[misc]
    cls.__qualname__ = qualname
    return cls


def _reduce_enum(cls: Any) -> Any:
    # dill has no way to send an enumeration by value: its members are made while it is made
    members = [(name, entry.value) for name, entry in cls.__members__.items()]
    meta, bases = type(cls), cls.__bases__
    plain = vars(meta("_", bases, meta.__prepare__("_", bases)))
    own = {
        name: value
        for name, value in vars(cls).items()
        if name not in cls.__members__
        and (name not in plain or getattr(value, "__module__", None) == cls.__module__)
    }
    makers = {name: own.pop(name) for name in ("__init__",) if name in own}
    if "__new_member__" in own:
        makers["__new__"] = own.pop("__new_member__")
    args = (meta, bases, cls.__name__, members, cls.__module__, cls.__qualname__, makers)
    # The rest comes later, as it may name the class.
    return _make_class, (_token(cls), _make_enum, args), own, None, None, _fill_class


def _make_enum(
    meta: Any,
    bases: tuple[type, ...],
    name: str,
    members: list[tuple[str, Any]],
    module: str,
    qualname: str,
    makers: dict[str, Any],
) -> type:
    namespace = meta.__prepare__(name, bases)
    names = {"__module__": module, "__qualname__": qualname}
    for entry, value in [*names.items(), *makers.items(), *members]:
        namespace[entry] = value
    cls: type = meta(name, bases, namespace)
    return cls


@functools.lru_cache(maxsize=256)
def _global_names(code: CodeType) -> list[str]:
    """Return the names of globals in a function's code, which dill disassembles to find them."""
    names: list[str] = detect.nestedglobals(code)
    return names


def _globals_of(func: Any, recurse: bool = True, builtin: bool = False) -> dict[str, Any]:
    """Return the global objects that a function itself names; others travel with what needs them.

    dill's own collects those of all functions that are called too, which never ends when two
    functions call each other.
    """
    names = _global_names(func.__code__)
    found = func.__globals__
    return {name: found[name] for name in names if name in found}


def _class_of(token: str) -> type:
    try:
        return _classes[token]
    except KeyError:
        raise pickle.UnpicklingError("the class of a result no longer exists here") from None

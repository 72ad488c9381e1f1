"""A fresh copy of an object for each item, at little cost: whatever the last one was changed to.

Functions, classes and modules are the same in all copies, as they are for `copy.deepcopy`.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import IO, Any

_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range})
_NAMED = (type, FunctionType, ModuleType)

# Text that is longer is not worth being copied; a reference to it costs more than a short one.
_LONG = 200

# Bytes of an array from which on copies map it: of its pages, those that are written to are
# copied, when they are. Mapping a small one costs more than to copy it.
_LARGE = 1 << 18


def copier_of(obj: Any, kept: Collection[Any] = ()) -> Callable[[], Any]:
    """Return a function that returns a copy of `obj` as it is now.

    Parameters
    ----------
    kept
        Objects within it that are not copied: all copies have the same ones. So it is with
        members that cannot be copied, as open files, and with an object that cannot at all.
    """
    if _is_flat(obj, kept):
        return _FlatCopier(obj, kept)
    try:
        return _try(_Copier(obj, kept))
    except Exception:  # user code
        pass
    members = vars(obj).values() if hasattr(obj, "__dict__") else ()
    stuck = [one for one in members if one is not obj and not _is_copyable(one, obj)]
    try:
        return _try(_Copier(obj, [*kept, *stuck]))
    except Exception:
        return lambda: obj


def _try(copier: _Copier) -> _Copier:
    copier()  # many objects pickle well and fail in unpickling
    return copier


def _is_copyable(member: Any, owner: Any) -> bool:
    try:
        _try(_Copier(member, [owner]))
    except Exception:
        return False
    return True


# What decides how objects of a class are pickled.
_WAYS = "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__"
_WAYS_TO_MAKE = "__getnewargs__", "__getnewargs_ex__"


def _is_flat(obj: Any, kept: Iterable[Any]) -> bool:
    """Whether a copy is a new dictionary, with new containers: nothing deeper can change."""
    cls = type(obj)
    usual = all(getattr(cls, name, None) is getattr(_Plain, name, None) for name in _WAYS)
    usual = usual and not any(hasattr(cls, name) for name in _WAYS_TO_MAKE)
    usual = usual and cls.__basicsize__ == _Plain.__basicsize__  # no slots, no built-in base
    if not usual or not hasattr(obj, "__dict__"):
        return False
    same = set(map(id, kept))
    others = [one for one in vars(obj).values() if id(one) not in same and not _is_atom(one)]
    return all(map(_is_shallow, others)) and len(set(map(id, others))) == len(others)


class _Plain:
    """An object with a dictionary and nothing else."""


def _is_atom(value: Any) -> bool:
    if type(value) in (tuple, frozenset):
        return all(map(_is_atom, value))
    return type(value) in _ATOMS or _is_named(value)


def _is_shallow(value: Any) -> bool:
    """Whether this is a container of what cannot change."""
    if type(value) is dict:
        return all(map(_is_atom, value)) and all(map(_is_atom, value.values()))
    return type(value) in (list, set) and all(map(_is_atom, value))


def _is_named(value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType):  # else a method of some object
        return value.__self__ is None or isinstance(value.__self__, ModuleType)
    return isinstance(value, _NAMED)


class _FlatCopier:
    def __init__(self, obj: Any, kept: Iterable[Any]) -> None:
        same = set(map(id, kept))
        self._cls, self._members = type(obj), dict(vars(obj))
        self._containers = [
            (name, value.copy())  # others may know this one, and change it
            for name, value in self._members.items()
            if id(value) not in same and not _is_atom(value)
        ]

    def __call__(self) -> Any:
        obj = object.__new__(self._cls)
        members = obj.__dict__
        members.update(self._members)
        for name, container in self._containers:
            members[name] = container.copy()
        return obj


class _Copier:
    """Keeps an object pickled, but for what all copies share."""

    def __init__(self, obj: Any, kept: Iterable[Any] = ()) -> None:
        buffer = io.BytesIO()
        buffers: list[pickle.PickleBuffer] = []
        pickler = _Pickler(buffer, kept, buffers)
        pickler.dump(obj)
        self._data, self._shared = buffer.getvalue(), pickler.shared
        self._store = _Store(buffers) if buffers else None

    def __call__(self) -> Any:
        buffers = () if self._store is None else self._store.map()
        unpickler = pickle.Unpickler(io.BytesIO(self._data), buffers=buffers)
        unpickler.persistent_load = self._shared.__getitem__  # type: ignore[method-assign]
        return unpickler.load()


class _Pickler(pickle.Pickler):
    def __init__(
        self, file: IO[bytes], kept: Iterable[Any], buffers: list[pickle.PickleBuffer]
    ) -> None:
        def take(buffer: pickle.PickleBuffer) -> bool:
            if buffer.raw().nbytes < _LARGE:
                return True  # it stays with the other bytes
            buffers.append(buffer)
            return False

        super().__init__(file, pickle.HIGHEST_PROTOCOL, buffer_callback=take)
        self.shared: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._kept = set(map(id, kept))

    def persistent_id(self, obj: Any) -> int | None:
        """Return the number of what all copies share; ``None`` for what is copied."""
        if not (
            id(obj) in self._kept
            or _is_named(obj)
            or (type(obj) in (str, bytes) and len(obj) > _LONG)
        ):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.shared)
            self.shared.append(obj)
        return self._numbers[id(obj)]


class _Store:
    """The contents of large arrays, in a file in memory that copies map privately."""

    def __init__(self, buffers: Sequence[pickle.PickleBuffer]) -> None:
        self._file: IO[bytes]
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("task"), "w+b")
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as this
        self._places: list[tuple[int, int]] = []
        for buffer in buffers:
            with buffer.raw() as content:
                self._places.append((self._file.tell(), content.nbytes))
                self._file.write(content)
            end = self._file.tell()
            self._file.seek(end + -end % mmap.ALLOCATIONGRANULARITY)
        self._file.truncate()
        self._file.flush()

    def map(self) -> list[mmap.mmap]:
        """Return the contents, each of which can be written to without any effect elsewhere."""
        number, private = self._file.fileno(), mmap.MAP_PRIVATE
        return [
            mmap.mmap(number, size, private, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
            for offset, size in self._places
        ]

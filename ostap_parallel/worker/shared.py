"""An object that all items of a run share: one copy on each host, mapped by its workers.

A small one travels within the function. A large one is a *blob*: a file without a name, so that
nothing remains of it however its owner ends. The owner is a server, whose workers open the file
by its descriptor in /proc. Pickle's out-of-band buffers, such as the content of numpy's arrays,
are used where they are mapped; all workers share those pages.
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import mmap
import os
import pickle
import struct
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

from ostap_parallel.objects import aside, program, serialize

# Bytes up to which an object travels within the function.
SMALL = 1 << 16

# Objects that nobody uses any more and that are kept all the same, as the next run may need them.
KEPT = 4

# A buffer begins at a multiple of this, as vector instructions like it best.
_ALIGNMENT = 64
_DIGEST_SIZE = 32  # characters

_NOTHING = object()
_current: contextvars.ContextVar[Any] = contextvars.ContextVar("shared", default=_NOTHING)


def shared(name: str | None = None) -> Any:
    """Return what the run was given as ``shared=``, or the entry of it that has this name.

    To be called on a worker by what a run calls, in the same thread. Arrays in it are read-only.

    Raises
    ------
    LookupError
        There is no such object, or no such entry.
    """
    value = _current.get()
    if value is _NOTHING:
        raise LookupError("nothing is shared here: call shared() in what a run with shared= calls")
    return value if name is None else value[name]


@dataclass(frozen=True)
class Inline:
    """A shared object that travels within the function."""

    data: bytes

    @functools.cached_property
    def value(self) -> Any:
        """The object."""
        return _unpack(memoryview(self.data))

    def load(self, location: str) -> Any:
        """Return the object."""
        return self.value


@dataclass(frozen=True)
class Stored:
    """A shared object in a blob, which the server of each host has somewhere else."""

    digest: str

    def load(self, location: str) -> Any:
        """Return the object."""
        # What it needs of the program goes with each space of that.
        space = program.space_now() if self.digest in _defining else None
        return _load(self.digest, location.partition("\n")[0], space)


def use(where: Inline | Stored | None, location: str) -> Any:
    """Make an object the one that `shared` returns in this thread; return it."""
    value = _NOTHING if where is None else where.load(location)
    _current.set(value)
    return value


class Packed:
    """A serialised object: what `Inline` and `Blob` hold; raises `SerializeError`.

    Its parts are views of the object's own memory: use it before that changes.
    """

    def __init__(self, obj: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        data = serialize.pack(obj, "the shared object", buffers=buffers)
        views = [buffer.raw() for buffer in buffers]
        sizes = [len(data), *map(len, views)]
        head = struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes)
        self._parts: Sequence[bytes | memoryview] = [head, data, *views]
        self.size = sum(map(_padded, map(len, self._parts)))

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for part in self._parts:
            yield part
            yield bytes(_padded(len(part)) - len(part))

    def digest(self) -> str:
        """Return what names this content."""
        digest = hashlib.blake2b(digest_size=_DIGEST_SIZE // 2)
        for part in self:
            digest.update(part)
        return digest.hexdigest()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _unpack(view: memoryview) -> Any:
    (count,) = struct.unpack_from("<Q", view)
    sizes = struct.unpack_from(f"<{count}Q", view, 8)
    start, parts = _padded(8 + 8 * count), []
    for size in sizes:
        parts.append(view[start : start + size])
        start += _padded(size)
    return pickle.loads(parts[0], buffers=parts[1:])


@dataclass(frozen=True)
class Laden:
    """Something serialised whose large arrays are in a blob; it is read as if they were in it."""

    digest: str
    data: bytes

    def __reduce__(self) -> Any:
        return _load_laden, (self.digest, self.data)


# Where the blobs are of what is unpickled: that of large arrays comes last.
location: contextvars.ContextVar[str] = contextvars.ContextVar("location", default="")


def _load_laden(digest: str, data: bytes) -> Any:
    # The pages are those of all workers until one is written to, which gives that worker its own:
    # the arrays are no other ones than if they had come along.
    place = location.get().rpartition("\n")[2]
    with aside.give(_unpack(_map(digest, place, is_private=True))):
        return serialize.loads(data)


def forget() -> None:
    """Load what is shared anew when it is used next: its classes may have changed."""
    _load.cache_clear()


# Those of runs that take turns; what is mapped stays on the disk.
@functools.lru_cache(maxsize=KEPT)
def _load(digest: str, location: str, space: program.Space | None) -> Any:
    before = program.count_definitions()
    value = _unpack(_map(digest, location))
    if program.count_definitions() != before:
        _defining.add(digest)
    return value


def _map(digest: str, location: str, is_private: bool = False) -> memoryview:
    """Return the content of a blob, read-only, or such that changes stay in this process."""
    kind, prot = mmap.MAP_SHARED, mmap.PROT_READ
    if is_private:
        kind, prot = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
    with Path(location).open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, kind, prot))
    if mapped[:_DIGEST_SIZE] != digest.encode():
        raise RuntimeError(f"{location} is not the shared object {digest}")
    return mapped[_padded(_DIGEST_SIZE) :]


_defining: set[str] = set()  # digests of objects with definitions for the program


class Blob:
    """A file without a name that holds a packed object; it goes with this object.

    Parameters
    ----------
    size
        Bytes of content. The room for them is taken at once.
    directory
        Where that room is; the temporary directory by default.

    Attributes
    ----------
    kind
        Tells a host what to do with it.
    location
        Where workers, and whoever sends it on, open the file.

    Raises
    ------
    OSError
        There is no room.
    """

    kind = "shared"

    def __init__(self, digest: str, size: int, directory: str | None) -> None:
        self.digest, self.size = digest, size
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        weakref.finalize(self, file.close)
        # our number there, which in a name space of processes need not be os.getpid()
        own = Path("/proc/self").readlink()
        self.location = f"/proc/{own}/fd/{file.fileno()}"
        os.posix_fallocate(file.fileno(), 0, _padded(_DIGEST_SIZE) + size)

    def open(self) -> IO[bytes]:
        """Return the file, open to write the content to."""
        file = Path(self.location).open("r+b")  # noqa: SIM115
        file.write(self.digest.encode().ljust(_padded(_DIGEST_SIZE), b"\0"))
        return file

    def fill(self, parts: Iterable[bytes | memoryview]) -> None:
        """Write the content."""
        with self.open() as file:
            file.writelines(parts)

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield the content, so many bytes at a time."""
        with Path(self.location).open("rb") as file:
            file.seek(_padded(_DIGEST_SIZE))
            while piece := file.read(size):
                yield piece


class Store:
    """The blobs of a server: all that are in use, and the last few that were.

    Parameters
    ----------
    directory
        Where they are, see `Blob`.
    """

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._blobs: WeakValueDictionary[str, Blob] = WeakValueDictionary()
        self._kept: deque[Blob] = deque(maxlen=KEPT)

    def find(self, digest: str) -> Blob | None:
        """Return the blob with a content."""
        blob = self._blobs.get(digest)
        if blob is not None:
            self._keep(blob)
        return blob

    def make_room(self, digest: str, size: int) -> Blob:
        """Return an empty blob, also at the cost of those that are not in use.

        Raises OSError, which tells where there is no room.
        """
        try:
            return Blob(digest, size, self._directory)
        except OSError:
            self.clear()
        try:
            return Blob(digest, size, self._directory)
        except OSError as exc:
            directory = self._directory or tempfile.gettempdir()
            reason = f"{exc.strerror}: {size} bytes for a shared object in {directory}"
            raise OSError(exc.errno, reason) from exc

    def fill(self, blob: Blob, parts: Iterable[bytes | memoryview]) -> None:
        """Write a blob's content, and have others find it from now on."""
        blob.fill(parts)
        self.publish(blob)

    def publish(self, blob: Blob) -> None:
        """Have others find a blob that has its content."""
        self._blobs[blob.digest] = blob
        self._keep(blob)

    def add(self, packed: Packed) -> Blob:
        """Return the blob with this content, a new one if there is none."""
        digest = packed.digest()
        blob = self.find(digest)
        if blob is None:
            blob = self.make_room(digest, packed.size)
            self.fill(blob, packed)
        return blob

    def clear(self) -> None:
        """Drop what is not in use."""
        with self._lock:
            self._kept.clear()

    def _keep(self, blob: Blob) -> None:
        with self._lock:
            if blob in self._kept:
                self._kept.remove(blob)
            self._kept.append(blob)

"""The user's own modules as the caller has them: what belongs to them, and when they change."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import os
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ostap_parallel.errors import ConfigError, see
from ostap_parallel.logs import logger_of
from ostap_parallel.worker.modules import File, describe, pack_archive
from ostap_parallel.worker.shared import Blob

logger = logger_of(__name__)

# More than this is not modules but data, or the wrong directory.
MAX_BYTES = 64 << 20
MAX_FILES = 20_000

# Directories that hold no modules, unless they are packages; and files by which others show that.
_LEFT_OUT = {"__pycache__", "build", "dist", "node_modules"}
_MARKS = "pyvenv.cfg", "conda-meta", "CMakeCache.txt", "CACHEDIR.TAG"

# Nanoseconds within which a file may change twice without another time of modification.
_COARSE = 2_000_000_000


@dataclass(frozen=True)
class Source:
    """Modules of the user's: a file or a directory, and where imports look for it."""

    path: Path
    root: Path


Sync = str | os.PathLike[str] | ModuleType | Source
"""Names modules of the user's: a path, or a module that has been imported."""


def find_sources(sync: Sync | Iterable[Sync]) -> tuple[Source, ...]:
    """Return what `sync` names; raises `ConfigError` for what is not there.

    A directory that is no package stands for all modules in it, and a part of a package for the
    whole of it, unless ``sys.path`` leads to that part.
    """
    if sync == "":
        return ()
    alone = isinstance(sync, str | os.PathLike | ModuleType | Source)
    if not alone and (isinstance(sync, bytes) or not isinstance(sync, Iterable)):
        raise ConfigError(f"sync: neither paths nor modules: {sync!r}")
    named: Iterable[Sync] = [sync] if alone else sync  # type: ignore[assignment, list-item]
    return tuple(dict.fromkeys(source for one in named for source in _sources_of(one)))


def _sources_of(one: Sync) -> Iterator[Source]:
    if isinstance(one, Source):
        yield one
        return
    if isinstance(one, ModuleType):
        top = sys.modules.get(one.__name__.partition(".")[0], one)
        paths = list(getattr(top, "__path__", ())) or [getattr(top, "__file__", None)]
        if not all(path and Path(path).exists() for path in paths):
            raise ConfigError(f"sync: the module {one.__name__} has no file of its own to be sent")
        yield from (Source(Path(path), Path(path).parent) for path in paths)
        return
    if not isinstance(one, str | os.PathLike):
        raise ConfigError(f"sync: neither a path nor a module: {one!r}")
    path = Path(one).expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"sync: no such file or directory: {path}")
    if path.is_dir() and not (path / "__init__.py").is_file():
        yield Source(path, path)
        return
    while (path.parent / "__init__.py").is_file() and str(path.parent) not in sys.path:
        path = path.parent
    yield Source(path, path.parent)


class Archive(Blob):
    """Modules as they are sent to hosts.

    Attributes
    ----------
    local
        Where workers on this machine find them, see `modules.use`.
    """

    kind = "modules"

    def __init__(self, digest: str, files: Iterable[File], roots: list[str]) -> None:
        data = pack_archive(files)
        super().__init__(digest, len(data), None)
        self.fill([data])
        self.count = len(roots)
        self.local = describe(digest, last=roots)


@dataclass(frozen=True)
class _Found:
    """A file, and what tells whether it has changed."""

    root: int
    name: str
    path: Path
    mode: int
    size: int
    modified: int  # nanoseconds, as below
    changed: int
    inode: int

    @classmethod
    def of(cls, root: int, name: str, path: Path, about: os.stat_result) -> _Found:
        times = about.st_mtime_ns, about.st_ctime_ns
        return cls(root, name, path, about.st_mode, about.st_size, *times, about.st_ino)

    def read(self) -> File | None:
        """Return the file with its content; ``None`` if it is gone or must not be read."""
        try:
            data = self.path.read_bytes()
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError):
                _warn(self.path, exc.strerror)
            return None
        mode = 0o700 if self.mode & stat.S_IXUSR else 0o600
        return File(self.root, self.name, mode, self.modified / 1e9, data)


class Modules:
    """The user's modules, from look to look.

    Attributes
    ----------
    archive
        What was there at the last look.

    Raises
    ------
    ConfigError
        They are too large, or gone; `look` raises it, too.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = tuple(sources)
        self._lock = threading.Lock()
        self._found: set[_Found] | None = None
        self._looked = time.time_ns()
        self.archive: Archive | None = None
        self.look()

    def __bool__(self) -> bool:
        return bool(self._sources)

    def look(self) -> Archive | None:
        """Return what is there now, the same object as long as nothing has changed."""
        if self:
            with self._lock:
                begin = time.time_ns()
                found = list(self._find())
                # what was new at the last look may have changed since without showing it
                new = {one for one in found if one.changed > self._looked - _COARSE}
                if new or self._found != set(found):
                    _forget_bytecode(new | ({*found} - (self._found or {*found})))
                    self._read(found)
                self._found, self._looked = set(found), begin
        return self.archive

    def _find(self) -> Iterator[_Found]:
        """Yield all files; raises ConfigError if that is too much."""
        for number, source in enumerate(self._sources):
            if not source.path.exists():
                raise ConfigError(f"sync: no such file or directory any more: {source.path}")
            files = dict(itertools.islice(_files(source.path), MAX_FILES + 1))
            _check_size(source.path, files)
            for path, about in files.items():
                yield _Found.of(number, path.relative_to(source.root).as_posix(), path, about)

    def _read(self, found: list[_Found]) -> None:
        """Make another archive if the content has changed."""
        files = [file for file in map(_Found.read, found) if file is not None]
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            about = file.root, file.name, file.mode, len(file.data)
            digest.update(repr(about).encode())
            digest.update(file.data)
        if self.archive is None or self.archive.digest != digest.hexdigest():
            roots = [str(source.root) for source in self._sources]
            try:
                self.archive = Archive(digest.hexdigest(), files, roots)
            except OSError as exc:
                raise ConfigError(f"sync: no room for a copy here: {exc}; set TMPDIR") from exc


def _files(path: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files at or below a path that may belong to modules; links are followed."""
    try:
        about = path.stat()
        if stat.S_ISREG(about.st_mode):
            yield path, about
        if not stat.S_ISDIR(about.st_mode) or (above and _is_left_out(path)):
            return
        here, names = path.resolve(), sorted(os.listdir(path))  # noqa: PTH208
    except PermissionError as exc:
        _warn(path, exc.strerror)
        return
    except OSError:  # it has just vanished, or a link leads nowhere
        return
    for name in names if here not in above else ():  # else a link leads back
        if not name.startswith("."):
            yield from _files(path / name, (*above, here))


@functools.cache  # once for each
def _warn(path: Path, reason: str | None) -> None:
    logger.warning("sync: %s is left out: %s", path, reason)


def _is_left_out(directory: Path) -> bool:
    if any((directory / mark).exists() for mark in _MARKS):
        return True
    named = directory.name in _LEFT_OUT or directory.suffix in (".egg-info", ".dist-info")
    return named and not (directory / "__init__.py").exists()


def _check_size(top: Path, files: dict[Path, os.stat_result]) -> None:
    total = sum(about.st_size for about in files.values())
    if len(files) <= MAX_FILES and total <= MAX_BYTES:
        return
    sizes: Counter[str] = Counter()
    for path, about in files.items():
        sizes[next(iter(path.relative_to(top).parts), "")] += about.st_size
    largest = ", ".join(f"{name} ({_megabytes(size)})" for name, size in sizes.most_common(5))
    count = f"more than {MAX_FILES} files" if len(files) > MAX_FILES else _megabytes(total)
    raise ConfigError(
        f"sync: {top} holds {count}, of which at most {MAX_FILES} files and "
        f"{_megabytes(MAX_BYTES)} are sent; the largest in it are {largest}: name the packages "
        "and files that tasks import, and leave data where the hosts can read it" + see("modules")
    )


def _megabytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def _forget_bytecode(changed: Iterable[_Found]) -> None:
    """Remove what Python would take for bytecode of what is there now, as it compares seconds."""
    for one in changed:
        if one.path.suffix == ".py":
            with contextlib.suppress(OSError, NotImplementedError):
                Path(importlib.util.cache_from_source(one.path)).unlink()

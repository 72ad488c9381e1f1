"""The user's own modules on a worker: where imports find them, and how old ones are forgotten.

A host gets them as an *archive*, once for each content, and unpacks it into the private directory
of its server. Local workers use the user's own directories.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import os
import shutil
import sys
import tarfile
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from ostap_parallel import libraries
from ostap_parallel.errors import see

# Never forgotten, wherever they are.
_OURS = {"__main__", "ostap_parallel", "cloudpickle", "dill", "ppft"}


@dataclass(frozen=True)
class File:
    """A file of an archive.

    Attributes
    ----------
    root
        Number of the directory of modules that it belongs to.
    name
        Its path below that.
    """

    root: int
    name: str
    mode: int
    mtime: float
    data: bytes


def pack_archive(files: Iterable[File]) -> bytes:
    """Return an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, encoding="utf-8") as archive:
        for file in files:
            # a zip file is a root itself
            about = tarfile.TarInfo(os.path.normpath(f"{file.root}/{file.name}"))
            about.size, about.mode, about.mtime = len(file.data), file.mode, file.mtime
            archive.addfile(about, io.BytesIO(file.data))
    return buffer.getvalue()


class Unpacked:
    """An unpacked archive; its files go with this object.

    Raises OSError if there is no room.
    """

    def __init__(self, data: bytes, directory: str | None) -> None:
        self.location = tempfile.mkdtemp(prefix="sync-", dir=directory)
        weakref.finalize(self, shutil.rmtree, self.location, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as archive:
            # It comes from who runs code here anyway; Python 3.14 would refuse some names.
            archive.extraction_filter = lambda member, path: member
            archive.extractall(self.location)


def describe(digest: str, first: Sequence[str] = (), last: Sequence[str] = ()) -> bytes:
    """Return what `use` reads.

    Parameters
    ----------
    digest
        Names the content, so that `use` notices another one in the same place.
    first, last
        Directories of modules, where other ones do, or do not, count more.
    """
    return json.dumps([digest, *map(list, (first, last))]).encode()


class _Used:
    """What `use` was given last, and what it has added to ``sys.path`` for that."""

    places = b""
    added: ClassVar[list[str]] = []


def use(places: bytes) -> bool:
    """Have imports find the modules in these places, and forget those that were used before.

    Nothing stands for no places. Returns whether there was anything to do.
    """
    if places == _Used.places:
        return False
    (old_first, old_last), (first, last) = _read(_Used.places), _read(places)
    _forget({os.path.realpath(root) for root in (*old_first, *old_last, *last)})
    rest = [entry for entry in sys.path if entry not in _Used.added]
    _Used.added = [*first, *(root for root in last if root not in rest)]
    sys.path[:] = [*first, *rest, *_Used.added[len(first) :]]
    importlib.invalidate_caches()
    _Used.places = places
    return True


def _read(places: bytes) -> tuple[list[str], list[str]]:
    if not places:
        return [], []
    _, first, last = json.loads(places)
    return first, last


def _forget(roots: set[str]) -> None:
    """Forget the modules that were imported from these directories."""
    top = {name.partition(".")[0] for name in list(sys.modules)} - _OURS
    gone = {name for name in top if not roots.isdisjoint(_directories(sys.modules.get(name)))}
    for name in list(sys.modules):
        if name.partition(".")[0] in gone:
            del sys.modules[name]


def _directories(module: ModuleType | None) -> set[str]:
    """Return where a top-level module was found."""
    paths = getattr(module, "__path__", None) or [getattr(module, "__file__", None)]
    return {os.path.realpath(os.path.dirname(path)) for path in paths if path}  # noqa: PTH120


def advise(error: BaseException) -> None:
    """Add a note to the error of a task if the caller has the module that the task lacked."""
    notes = [support.advise(error) for support in libraries.present().values()]
    if isinstance(error, ModuleNotFoundError) and error.name:
        notes.append(_advise_on(error.name.partition(".")[0]))
    for note in filter(None, notes):
        if sys.version_info >= (3, 11):
            error.add_note(note)
        else:
            first, *rest = error.args or ("",)
            error.args = (f"{first} ({note})", *rest)
            if isinstance(error, ImportError):
                error.msg = error.args[0]


def _advise_on(name: str) -> str:
    """Return what to do about a module that a task lacked, if the caller has it."""
    with contextlib.suppress(ImportError, ValueError):
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            note = f"{name} is here, but not where the task ran"
            if not _is_compiled(name):
                note += ": if it is yours, name it in sync=, else install it there"
                return note + see("modules")
            way = "an interpreter that has it (python=), or what makes it found (profile=, or "
            way += "environment= with PYTHONPATH and LD_LIBRARY_PATH)"
            return f"{note}: it is compiled, and not sent by sync=; give the host {way}"
    return ""


# Files of a package that are looked at, to find out whether it is compiled.
_LOOKED_AT = 2000


def _is_compiled(name: str) -> bool:
    """Return whether a module, or a part of its package, is not Python."""
    if libraries.is_known(name):
        return True
    spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
    if spec is None:
        return False
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    if spec.origin == "built-in" or str(spec.origin).endswith(suffixes):
        return True
    below = (Path(place).rglob("*") for place in spec.submodule_search_locations or ())
    files = itertools.islice(itertools.chain.from_iterable(below), _LOOKED_AT)
    return any(file.name.endswith(suffixes) for file in files)

"""Libraries that want more than to be imported, and who of ours knows what each of them wants.

That module is imported where its library is met, and nowhere else: who does without the library
pays nothing for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import PurePath
from types import FrameType, ModuleType
from typing import Any, Protocol

# By the name of the library.
_SUPPORTS = {"ROOT": "ostap_parallel.root.support"}

# By the suffix of files, which `preload` may name as modules.
_FILES = dict.fromkeys(
    (".C", ".cc", ".cpp", ".cxx", ".h", ".hh", ".hpp", ".hxx", ".so", ".dylib"), "ROOT"
)

# The libraries that types belong to, by the top-level package of these.
_OWNERS = {"cppyy": "ROOT"}
# Those that say that they are Python's own, or are: what stands for the present directory or pad.
_FOREIGN = {
    ("builtins", "nullptr_t"): "ROOT",
    ("ROOT._facade", "LiveProxy"): "ROOT",
    ("ROOT._facade", "TDirectoryPythonAdapter"): "ROOT",
}


class Support(Protocol):
    """What a module offers that knows a library."""

    def way_of(self, kind: type) -> Callable[[Any, Any], Any] | None:
        """Return what reduces objects of a type for pickle; ``None`` if pickle knows."""

    def reduce_class(self, cls: type) -> tuple[Any, ...]:
        """Return how pickle makes a class, or a metaclass."""

    def parts_of(self, obj: Any) -> Any:
        """Return what an object holds, the same in all processes; raise TypeError if unknown."""

    def arrive(self) -> None:
        """Make a worker of a process that has just imported the library."""

    def seed(self, digest: bytes | None) -> None:
        """Seed what the library draws random numbers from; ``None``: from nothing that recurs."""

    def session(self) -> Any:
        """Return what this process has of the library, for workers to be; JSON can hold it."""

    def read_files(self, names: Iterable[str]) -> Any:
        """Return a part of a session: files that are the library's business."""

    def prepare(self, session: Any) -> list[tuple[str, str]]:
        """Have in the template of workers what `session` has returned; return what failed, why."""

    def state(self) -> tuple[Any, ...]:
        """Return what the program has told the library, and workers must know, too."""

    def take(self, state: tuple[Any, ...]) -> None:
        """Tell the library here what `state` has returned there."""

    def advise(self, error: BaseException) -> str:
        """Return what to do about an error of a task; nothing if that is not known."""


@functools.cache
def _support(name: str) -> Support:
    support: Support = importlib.import_module(_SUPPORTS[name])
    return support


def support_of(kind: type) -> Support | None:
    """Return who knows objects of a type."""
    module = str(kind.__module__)
    name = _OWNERS.get(module.partition(".")[0]) or _FOREIGN.get((module, kind.__name__))
    return None if name is None else _support(name)


def support_for(name: str) -> Support:
    """Return who knows a library, by its name."""
    return _support(name)


def present() -> dict[str, Support]:
    """Return who knows the libraries that this process has imported, by their names."""
    return {name: _support(name) for name in _SUPPORTS if name in sys.modules}


def is_known(name: str) -> bool:
    """Return whether a name is that of such a library."""
    return name in _SUPPORTS


def owner_of(file: str) -> str | None:
    """Return the library whose business a file is, by the file's name."""
    return _FILES.get(PurePath(file.rstrip("+gO")).suffix)


def sessions(preload: Iterable[str] = ()) -> dict[str, Any]:
    """Return what workers are to have of each library.

    That is what this process has of those that it has imported, and what is in `preload`.
    """
    found = {name: support.session() for name, support in present().items()}
    files: dict[str, list[str]] = {}
    for entry in preload:
        if (owner := owner_of(entry)) is not None:
            files.setdefault(owner, []).append(entry)
        elif entry in _SUPPORTS:
            found.setdefault(entry, {})
    for name, entries in files.items():
        session = found.setdefault(name, {})
        for key, more in _support(name).read_files(entries).items():
            session[key] = [*session.get(key, ()), *more]
    return found


class _Watcher(MetaPathFinder):
    """Calls a function with the name of one of the libraries that has been imported."""

    def __init__(
        self, names: Collection[str], then: Callable[[str], object], quietly: bool
    ) -> None:
        self.names = names
        self._then, self._quietly = then, quietly
        self._looking: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.names or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with warnings.catch_warnings() if self._quietly else contextlib.nullcontext():
                if self._quietly:
                    warnings.simplefilter("ignore")
                execute(module)
            self._then(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch_for(
    names: Collection[str], then: Callable[[str], object], quietly: bool = False
) -> None:
    """Have a function called with the name whenever this process imports one of these modules.

    What an import done `quietly` warns of is not shown: the caller has seen that.
    """
    for finder in sys.meta_path:
        if isinstance(finder, _Watcher) and finder.names is names:
            return
    sys.meta_path.insert(0, _Watcher(names, then, quietly))


def watch(then: Callable[[Support], object]) -> None:
    """Have a function called whenever this process imports one of the libraries."""
    watch_for(_SUPPORTS, lambda name: then(_support(name)), quietly=True)


def is_importing(frame: FrameType | None) -> bool:
    """Return whether code runs as a module is imported."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None

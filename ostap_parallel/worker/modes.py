"""Modes of ROOT, and temporary files of Ostap's, that tasks ask for while an item runs.

ROOT is imported where a task asks for a mode of it, but for those with ``if_loaded``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_CLEANING = "ostap.utils.cleanup"


@contextlib.contextmanager
def modes_of(wanted: Mapping[str, Any]) -> Iterator[None]:
    """Hold the modes in `wanted` while the body runs; what was before comes back afterwards.

    Parameters
    ----------
    wanted
        ``directory``: where to go if it is there. ``cleanup``: remove the temporary files that
        Ostap, if it is loaded, has made for this process. ``batch``: whether ROOT draws nothing;
        ``"if_loaded"``: it does not, if it is there. ``implicit_mt``: whether ROOT uses threads
        of its own, or how many. ``build``: where ROOT compiles; in place of one that is not
        there or cannot be written to, a temporary directory.
    """
    directory = os.path.expandvars(wanted.get("directory") or "")
    if directory and Path(directory).is_dir():
        os.chdir(directory)  # who holds the surroundings goes back
    with contextlib.ExitStack() as leaving:
        for name, enter in _MODES.items():
            if name in wanted:
                leaving.enter_context(enter(wanted[name]))
        yield


@contextlib.contextmanager
def _cleanup(wanted: bool) -> Iterator[None]:
    yield
    module = sys.modules.get(_CLEANING)  # now: the task may have loaded it
    if wanted and module is not None:
        folder = getattr(module, "base_tmp_pid_dirs", {}).pop(os.getpid(), None)
        if folder is not None:
            module.CleanUp.remove_dir(folder)


def _root() -> Any:
    return importlib.import_module("ROOT")


@contextlib.contextmanager
def _batch(wanted: bool | str) -> Iterator[None]:
    if wanted == "if_loaded" and "ROOT" not in sys.modules:
        yield
        return
    root = _root().gROOT
    before = root.IsBatch()
    root.SetBatch(bool(wanted))
    try:
        yield
    finally:
        root.SetBatch(before)


@contextlib.contextmanager
def _implicit_mt(wanted: bool | int) -> Iterator[None]:
    root = _root().ROOT
    before = root.GetThreadPoolSize() if root.IsImplicitMTEnabled() else False
    _use_threads(root, wanted)
    try:
        yield
    finally:
        _use_threads(root, before)


def _use_threads(root: Any, wanted: bool | int) -> None:
    """Have ROOT use as many threads as it likes (``True``), none, or a number of them."""
    count = 0 if wanted is True else int(wanted)
    if root.IsImplicitMTEnabled():
        if wanted is not False and root.GetThreadPoolSize() == count:
            return
        root.DisableImplicitMT()
    if wanted is not False and wanted != 0:
        root.EnableImplicitMT(count)


@contextlib.contextmanager
def _build(wanted: str | None) -> Iterator[None]:
    system = _root().gSystem
    before = str(system.GetBuildDir())
    with contextlib.ExitStack() as leaving:
        directory = os.path.expandvars(wanted or "")
        if not (Path(directory).is_dir() and os.access(directory, os.W_OK)):
            temporary = tempfile.TemporaryDirectory(prefix="build-", ignore_cleanup_errors=True)
            directory = leaving.enter_context(temporary)
        system.SetBuildDir(directory)
        try:
            yield
        finally:
            system.SetBuildDir(before)


# in the order in which they begin
_MODES: dict[str, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    "cleanup": _cleanup,
    "implicit_mt": _implicit_mt,
    "build": _build,
    "batch": _batch,
}

"""Directories that nobody else can look into, and that go with the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DIRECTORY_PREFIX = "ostap-parallel-"


@contextmanager
def private_directory(prefix: str, parent: str | Path) -> Iterator[Path]:
    """Make a directory for us alone and remove it at the end, which is not that of a fork."""
    owner, path = os.getpid(), Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield path
    finally:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def owned_directory(parent: str | Path) -> Iterator[Path]:
    """Make a private directory; remove it, and before those of dead processes."""
    _remove_stale(Path(parent))
    mine = f"{_DIRECTORY_PREFIX}{os.getpid()}-"
    with private_directory(mine, parent) as path, _opened(path) as directory:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(directory, fcntl.LOCK_SH)
        yield path


@contextmanager
def control_directory() -> Iterator[Path]:
    """Make a private directory for control sockets; see `owned_directory`."""
    # A socket's path may have some 100 bytes, and ssh adds 17 of its own while it binds. In it
    # ssh gives a meaning to %, $, quotes and white space.
    parent = tempfile.gettempdir()
    if len(parent) > 40 or not re.fullmatch("[A-Za-z0-9_./+-]*", parent):
        parent = "/tmp"
    with owned_directory(parent) as path:
        yield path


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f"{_DIRECTORY_PREFIX}*-*"):
        pid = path.name.removeprefix(_DIRECTORY_PREFIX).split("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdigit() and path.lstat().st_uid == os.getuid():
                try:
                    os.kill(int(pid), 0)
                except ProcessLookupError:
                    # A container that shares this directory has other processes: one that
                    # lives there holds its lock.
                    with _opened(path) as directory:
                        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _opened(directory: str | Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

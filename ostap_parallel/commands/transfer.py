"""Files that go to the host of a command before it, and come back after it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostap_parallel.worker import files

Steps = Generator[tuple[Callable[[Any], Any], Any], Any, Any]


class StepFailed(Exception):
    """A command cannot go on, for a reason that is none of its own."""


@dataclass(frozen=True)
class Transfer:
    """What a command needs on its host, and what it makes there; on this machine it means nothing.

    A relative path leads from the current directory here, and there from the directory of the
    command, which is made, or from the home directory. Of a path with ``/./`` in it, only what is
    behind that counts there.

    Attributes
    ----------
    send
        Files and directories that go there before the command.
    fetch
        Those that come back after it, to the same paths.
    cleanup
        Whether all of these are removed there at the end, with directories that get empty by that.
    base
        Files that go there unless they are there already, and that stay.
    is_temporary
        Whether the directory of the command is removed at the end, too.
    """

    send: tuple[str, ...] = ()
    fetch: tuple[str, ...] = ()
    cleanup: bool = False
    base: tuple[str, ...] = ()
    is_temporary: bool = False


def prepare(directory: str) -> Steps:
    """Make the directory of a command; the steps return it."""
    with _telling(directory, "made"):
        home: Path = yield files.expand, directory
        yield files.make, (home, [files.DIRECTORY])
    return home


def send(transfer: Transfer, home: Path) -> Steps:
    """Send what the command needs."""
    for path in (*transfer.base, *transfer.send):
        with _telling(path, "sent"):
            source, target = Path(path), _there(path, home)
            entries = files.survey(source)
            if path in transfer.base and (yield files.is_there, (target, entries)):
                continue
            is_file = entries[0].kind == "file"
            # Others may be sending the same file: each is whole when it gets its name.
            name = f".{target.name}.{secrets.token_hex(4)}"
            top = target.with_name(name) if is_file else target
            yield files.make, (top, entries)
            for pieces in files.batches(entries):
                yield files.write, (top, files.read((source, pieces)))
            yield files.finish, (top, entries)
            if is_file:
                yield files.rename, (top, target)


def fetch(transfer: Transfer, home: Path) -> Steps:
    """Fetch what the command has made."""
    for path in transfer.fetch:
        with _telling(path, "fetched"):
            source, target = _there(path, home), Path(path)
            entries: list[files.Entry] = yield files.survey, source
            files.make((target, entries))
            for pieces in files.batches(entries):
                files.write((target, (yield files.read, (source, pieces))))
            files.finish((target, entries))


def clean(transfer: Transfer, home: Path) -> Steps:
    """Remove what is to be; never the directory of the command with all else that is in it."""
    paths = (*transfer.send, *transfer.fetch) if transfer.cleanup else ()
    targets = [target for path in paths if not _holds(target := _there(path, home), home)]
    if transfer.is_temporary:
        targets.append(home)
    if targets:
        with _telling(str(targets[0]), "removed"):
            yield files.remove, (home, targets)


def _there(path: str, home: Path) -> Path:
    """Return a path on the host."""
    marked = path.partition("/./")[2]
    return home / os.path.normpath(marked or path)


def _holds(path: Path, home: Path) -> bool:
    """Return whether a directory is another one, or above it: ``.`` may be the user's home."""
    outer, inner = Path(os.path.normpath(path)), Path(os.path.normpath(home))
    return outer == inner or outer in inner.parents


@contextmanager
def _telling(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as exc:
        raise StepFailed(f"{path} cannot be {what}: {exc}") from exc

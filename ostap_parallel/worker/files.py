"""Files on their way to a worker's machine and back, in batches of pieces."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# Bytes of a batch, and how many files and directories it may be about.
BATCH = 4 << 20
MANY = 1000

PART = ".part"


@dataclass(frozen=True)
class Entry:
    """A file, a directory, or a symbolic link below the top of a tree.

    Attributes
    ----------
    path
        From the top on; empty for the top itself.
    kind
        ``"file"``, ``"directory"`` or ``"link"``.
    target
        Where a link leads.
    """

    path: str
    kind: str
    mode: int = 0
    size: int = 0
    time: int = 0
    target: str = ""


# The top of a tree that nothing is in.
DIRECTORY = Entry("", "directory")


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file: from where on, and how many, or which."""

    path: str
    begin: int
    size: int
    data: bytes = b""


def expand(path: Path | str) -> Path:
    """Return a path with ``~`` expanded; in text ``$NAME``, too."""
    return Path(path if isinstance(path, Path) else os.path.expandvars(path)).expanduser()


def place_for(wanted: tuple[str, str]) -> str:
    """Return the path for a copy: within a directory, or what ends in ``/``, by its own name."""
    text, name = wanted
    path = expand(text)
    return str(path / name if text.endswith("/") or path.is_dir() else path)


def survey(top: Path | str) -> list[Entry]:
    """Return what is at a path and below, directories first; raises OSError if nothing is.

    What is neither file nor directory nor link is left out. Text is expanded, a path is not.
    """
    root = top if isinstance(top, Path) else expand(top)
    if not root.is_dir():
        return [_entry(root, "", root.stat())]
    entries = [_entry(root, "", root.stat())]
    for folder, directories, files in os.walk(root, onerror=_complain):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = Path(folder, name)
            found = path.lstat()
            if stat.S_IFMT(found.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                entries.append(_entry(path, str(path.relative_to(root)), found))
    return entries


def _complain(error: OSError) -> None:
    raise error


def _entry(path: Path, name: str, found: os.stat_result) -> Entry:
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISDIR(found.st_mode):
        return Entry(name, "directory", mode)
    if stat.S_ISLNK(found.st_mode):
        return Entry(name, "link", target=str(path.readlink()))
    return Entry(name, "file", mode, found.st_size, found.st_mtime_ns)


def make(wanted: tuple[Path | str, list[Entry]]) -> None:
    """Make directories and links below a path, and empty files for the pieces."""
    top, entries = wanted
    Path(top).parent.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        path = _below(top, entry.path)
        if entry.kind == "directory":
            path.mkdir(exist_ok=True, parents=not entry.path)
        elif entry.kind == "link":
            path.unlink(missing_ok=True)
            path.symlink_to(entry.target)
        else:
            part = _part(path)
            part.touch(mode=0o600)
            os.truncate(part, 0)


def write(wanted: tuple[Path | str, list[Piece]]) -> None:
    """Write pieces of files below a path."""
    top, pieces = wanted
    for piece in pieces:
        with _part(_below(top, piece.path)).open("rb+") as file:
            file.seek(piece.begin)
            file.write(piece.data)


def read(wanted: tuple[Path | str, list[Piece]]) -> list[Piece]:
    """Return the pieces with their bytes; those of files that have got shorter have fewer."""
    top, pieces = wanted
    root = top if isinstance(top, Path) else expand(top)
    found = []
    for piece in pieces:
        with _below(root, piece.path).open("rb") as file:
            file.seek(piece.begin)
            data = file.read(piece.size)
        found.append(Piece(piece.path, piece.begin, piece.size, data))
    return found


def finish(wanted: tuple[Path | str, list[Entry]]) -> None:
    """Give files their names, and files and directories their modes and times."""
    top, entries = wanted
    for entry in reversed(entries):
        path = _below(top, entry.path)
        if entry.kind == "file":
            part = _part(path)
            part.chmod(entry.mode)
            os.utime(part, ns=(entry.time, entry.time))
            part.replace(path)
        elif entry.kind == "directory":
            path.chmod(entry.mode)


def is_there(wanted: tuple[Path, list[Entry]]) -> bool:
    """Return whether files of these sizes and times are at a path already."""
    top, entries = wanted
    try:
        found = survey(top)
    except OSError:
        return False
    return all(entry in found for entry in entries if entry.kind == "file")


def rename(wanted: tuple[Path, Path]) -> None:
    """Give a file its name, whatever had it."""
    old, new = wanted
    old.replace(new)


def remove(wanted: tuple[Path, list[Path]]) -> None:
    """Remove files and directories, and those above up to `home` that get empty by that."""
    home, paths = wanted
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        for parent in path.parents:
            if home not in parent.parents:
                break
            try:
                parent.rmdir()
            except OSError:
                break


def batches(entries: list[Entry]) -> list[list[Piece]]:
    """Return the pieces of all files, in batches that travel together."""
    found: list[list[Piece]] = [[]]
    size = 0
    for entry in entries:
        begin = 0
        while entry.kind == "file" and begin < entry.size:
            if size >= BATCH or len(found[-1]) >= MANY:
                found.append([])
                size = 0
            count = min(BATCH - size, entry.size - begin)
            found[-1].append(Piece(entry.path, begin, count))
            begin, size = begin + count, size + count
    return [batch for batch in found if batch]


def _below(top: Path | str, path: str) -> Path:
    """Return a path below another one; raises ValueError if it is not."""
    parts = Path(path).parts
    if ".." in parts or Path(path).is_absolute():
        raise ValueError(f"{path} leads elsewhere")
    return Path(top, *parts)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}{PART}")


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write all of some bytes to a file that, without a buffer, may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]

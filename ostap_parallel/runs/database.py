"""The data base of a checkpoint: its tables, the seal of each row, and what is whole of a file.

Disks and copies flip bits now and then, which sqlite notices in few places only. So each row has a
seal, a checksum of all that is in it: what does not have the right one is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ostap_parallel.errors import CheckpointError, see

_APPLICATION, _VERSION = 0x6F737470, 2  # what sqlite stores in the head of the file
_SCHEMA = (
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
    # total: the number of items, if it is known; seal: of the identity
    "CREATE TABLE run (name TEXT, identity TEXT, seal BLOB, total INTEGER)",
    # the identity once more, as it tells what the results are of
    "CREATE TABLE session (started REAL, seconds REAL, submitted INTEGER, identity TEXT,"
    " seal BLOB)",
    # value: the pickled result, or NULL: then error and traceback tell of a failure
    "CREATE TABLE outcome (item INTEGER PRIMARY KEY, digest BLOB, value BLOB, error TEXT,"
    " traceback TEXT, host TEXT, seconds REAL, seal BLOB)",
)
# When each item ran, in parts as they came. Files that have been begun before do not have it.
TIMELINE = "CREATE TABLE IF NOT EXISTS timeline (session INTEGER, data BLOB, seal BLOB)"
# What ran when it was written last, a line for each item. The same holds for that.
RUNNING = "CREATE TABLE IF NOT EXISTS running (noted REAL, line TEXT)"
_INSERT = "INSERT OR REPLACE INTO outcome VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_COLUMNS = "item, digest, value, error, traceback, host, seconds, seal"

_SIBLINGS = ("-wal", "-shm", "-journal")

# How many parts of a damaged file are looked into that cannot be read from either end.
_LOOKS = 1000

REMEDY = (
    "checkpoint=Checkpoint(file, salvage=True) keeps what is whole and computes the rest again; "
    "without the file, if you remove it, all of it is"
)

# What reading a damaged file may raise; sqlite's text need not be text any more.
Unreadable = (sqlite3.Error, UnicodeError, OverflowError)


class Damaged(CheckpointError):
    """A checkpoint, or a part of it, is not as it was written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)


def damaged(path: Path, lost: str) -> Damaged:
    """Return the error for a file of which something is lost."""
    return Damaged(str(path), f"it is damaged: {lost}; {REMEDY}{see('damaged')}")


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Raise `CheckpointError` for what sqlite says of a file."""
    try:
        yield
    except sqlite3.NotSupportedError as exc:
        raise CheckpointError(str(path), str(exc)) from exc
    except (sqlite3.OperationalError, sqlite3.InterfaceError) as exc:
        if "decode" in str(exc):
            raise damaged(path, f"some of it cannot be read ({exc})") from exc
        hint = " (is its directory there and writable?)" if "unable to open" in str(exc) else ""
        raise CheckpointError(str(path), f"{exc}{hint}") from exc
    except Unreadable as exc:
        if "not a database" in str(exc):
            hint = "if it was a checkpoint, nothing of it can be had any more: remove it"
            raise CheckpointError(str(path), f"{exc}; {hint}") from exc
        raise damaged(path, f"some of it, perhaps all, cannot be read ({exc})") from exc


def seal_of(values: Sequence[Any]) -> bytes:
    """Return a checksum of values as sqlite stores them."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, str):
            value = value.encode(errors="surrogatepass")
            found.update(b"text")
        elif not isinstance(value, bytes):
            value = repr(value).encode()
            found.update(b"other")
        found.update(len(value).to_bytes(8, "big"))
        found.update(value)
    return found.digest()


def is_whole(row: Sequence[Any]) -> bool:
    """Return whether a row of outcomes is as it was written."""
    return len(row) == 8 and row[-1] == seal_of(row[:-1])


def insert(database: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert outcomes, which get their seals now."""
    database.executemany(_INSERT, ((*row, seal_of(row)) for row in rows))


def connect(path: Path) -> sqlite3.Connection:
    """Open a data base."""
    # without isolation level: transactions are begun by us alone
    return sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)


@contextlib.contextmanager
def transaction(database: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[Any]:
    """Hold a transaction during the block; yield what executes statements."""
    with database:
        database.execute(f"BEGIN {kind}")
        yield database.execute


def prepare(path: Path, database: sqlite3.Connection) -> None:
    """Make the tables of a new file; check those of an old one."""
    with transaction(database, "EXCLUSIVE") as execute:
        if execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            for statement in _SCHEMA:
                execute(statement)
        else:
            check_kind(path, database)
    # Readers do not wait for the writer, nor it for them; "FULL": each write is on the disk.
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")


def check_kind(path: Path, database: sqlite3.Connection) -> None:
    """Raise `CheckpointError` if a data base is no checkpoint of this version."""
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise CheckpointError(str(path), "this file is no checkpoint")
    if version != _VERSION:
        text = f"it has version {version}, and this version of ostap_parallel reads {_VERSION}"
        raise CheckpointError(str(path), text)


def read_identity(path: Path, found: Sequence[Any]) -> dict[str, Any]:
    """Return what an identity and its seal say."""
    text, seal = found
    with contextlib.suppress(ValueError, TypeError):
        if seal == seal_of([text]) and isinstance(identity := json.loads(text), dict):
            return identity
    raise damaged(path, "what function its results are of cannot be told")


class Salvage(NamedTuple):
    """What is left of a damaged file.

    Attributes
    ----------
    kept, lost
        Numbers of outcomes that are whole, and that are there and are not.
    aside
        Where the damaged file is now.
    """

    kept: int
    lost: int
    aside: Path


def salvage(path: Path, keep_unknown: bool) -> Salvage | None:
    """Put a file with what is whole in the place of a damaged one; ``None``: it is whole.

    `keep_unknown`: outcomes are kept also if it cannot be told what function they are of.
    """
    if not path.exists() or not path.stat().st_size:
        return None
    with contextlib.closing(connect(path)) as database:
        if _is_all_whole(path, database):
            return None
        head, rows, lost = _read_all(database)
        if head is None and not (keep_unknown and rows):
            text = "nothing of it can be kept, as what function its results are of is lost"
            if rows:
                text += f" (on_change='keep' keeps its {len(rows)} results all the same)"
            raise CheckpointError(str(path), f"it is damaged, and {text}; remove the file")
    aside = Path(f"{path}.damaged")
    fresh = _write(path, head, rows)
    for suffix in ("", *_SIBLINGS):  # sqlite would take these for those of the new file
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").replace(f"{aside}{suffix}")
    fresh.replace(path)
    return Salvage(len(rows), lost, aside)


def _is_all_whole(path: Path, database: sqlite3.Connection) -> bool:
    try:
        if database.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
            return False
        if database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            return True
        check_kind(path, database)
        for found in database.execute("SELECT identity, seal FROM run"):
            read_identity(path, found)
        return all(map(is_whole, database.execute(f"SELECT {_COLUMNS} FROM outcome")))
    except (*Unreadable, CheckpointError):
        return False


def _read_all(database: sqlite3.Connection) -> tuple[Any, list[tuple[Any, ...]], int]:
    """Return name, identity and its seal, the outcomes that are whole, and how many are not."""
    database.text_factory = lambda data: data.decode(errors="surrogateescape")
    head = None
    for query in (
        "SELECT '', identity, seal FROM session ORDER BY rowid",
        "SELECT name, identity, seal FROM run",
    ):
        with contextlib.suppress(*Unreadable):
            for found in database.execute(query):
                if found[2] == seal_of([found[1]]):
                    head = found
    rows, lost = [], set()
    for row in _readable(database):
        if is_whole(row):
            rows.append(row)
        else:
            lost.add(row[0])
    return head, rows, len(lost - {row[0] for row in rows})


def _readable(database: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Yield the outcomes that can be read: from both ends, and some from between."""
    low, high = -1, 1 << 62
    for order in "", " DESC":
        query = f"SELECT {_COLUMNS} FROM outcome WHERE item > ? AND item < ? ORDER BY item{order}"
        try:
            for row in database.execute(query, [low, high]):
                low, high = (row[0], high) if not order else (low, row[0])
                yield row
        except Unreadable:
            continue
        return
    gaps, looks = [(low, high)], 0
    while gaps and looks < _LOOKS:
        looks += 1
        low, high = gaps.pop(0)
        query = f"SELECT {_COLUMNS} FROM outcome WHERE item > ? AND item < ? ORDER BY item"
        try:
            yield from database.execute(query, [low, high]).fetchall()
        except Unreadable:
            middle = (low + high) // 2
            gaps += [(low, middle + 1), (middle, high)] if high - low > 2 else []


def _write(path: Path, head: Any, rows: Sequence[tuple[Any, ...]]) -> Path:
    """Write a new file beside another one."""
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        with contextlib.closing(connect(fresh)) as database:
            prepare(fresh, database)
            with transaction(database) as execute:
                if head is not None:
                    execute("INSERT INTO run VALUES (?, ?, ?, NULL)", head)
                database.executemany(_INSERT, rows)
            database.execute("PRAGMA journal_mode = DELETE")
    except BaseException:
        for suffix in ("", *_SIBLINGS):
            Path(f"{fresh}{suffix}").unlink(missing_ok=True)
        raise
    return fresh

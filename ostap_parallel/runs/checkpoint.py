"""Checkpoints: outcomes are kept in a file as they come, and a later run goes on from there.

The file is a data base of sqlite with one row per item. A run writes what has come at most half a
second later, and every write is on the disk when it ends: neither a killed process nor a power
failure costs more than that half second, and none of them spoils the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args

from ostap_parallel.config.files import find_danger
from ostap_parallel.errors import CheckpointError, SerializeError, see
from ostap_parallel.logs import logger_of
from ostap_parallel.objects import serialize
from ostap_parallel.runs.database import (
    RUNNING,
    TIMELINE,
    check_kind,
    damaged,
    insert,
    is_whole,
    read_identity,
    refusing,
    salvage,
    seal_of,
    transaction,
)
from ostap_parallel.runs.database import connect as _connect
from ostap_parallel.runs.database import prepare as _prepare
from ostap_parallel.runs.identity import Digester, identity_of, name_of
from ostap_parallel.runs.outcome import Outcome
from ostap_parallel.runs.report import Failure, StatMerger, describe
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.views.words import duration
from ostap_parallel.worker.execute import Call

logger = logger_of(__name__)

OnChange = Literal["refuse", "rerun", "keep"]

# How the names of values begin in the identity of a function.
_VALUES = "argument", "attribute", "global", "object", "shared", "variable"

COMMIT_SECONDS = 0.5
COMMIT_BYTES = 1 << 24  # that wait to be written; with more, the run waits for the disk
# Seconds between notes of what runs, of so many items at most.
NOTE_SECONDS = 2.0
NOTED = 20
MAX_BYTES = 999_000_000  # of a result: sqlite's limit for a row is a little higher


@dataclass(frozen=True)
class Checkpoint:
    """A file that keeps the outcomes of a run, so that it can go on where it was stopped.

    Parameters
    ----------
    path
        The file; it is made if it is not there.
    on_change
        What to do when the function or an item is not the one that a stored result is of:
        ``"refuse"`` to go on, with `CheckpointError`; ``"rerun"``: what has changed is computed
        again; ``"keep"``: stored results count all the same.
    salvage
        If the file is damaged, go on with what is whole of it; the damaged one is kept, with
        ``.damaged`` behind its name. All of the file is read first.
    """

    path: str | os.PathLike[str]
    on_change: OnChange = "refuse"
    salvage: bool = False

    def __post_init__(self) -> None:
        Path(self.path)  # raises TypeError
        if self.on_change not in get_args(OnChange):
            raise ValueError(f"on_change must be one of {get_args(OnChange)}: {self.on_change!r}")

    @contextlib.contextmanager
    def open(self, call: Call, total: int | None) -> Iterator[Journal]:
        """Open the journal of runs of `call` on `total` items.

        Raises
        ------
        CheckpointError
            The file cannot be used, others can write it, another run uses it, or the function
            has changed.
        """
        try:
            path = Path(self.path).expanduser().resolve()
        except FileNotFoundError as exc:  # of the current directory
            reason = (
                "the working directory has been deleted: go to another one, or name a full path"
            )
            raise CheckpointError(str(self.path), reason) from exc
        except (OSError, RuntimeError, ValueError) as exc:  # a loop, no such user, a NUL
            raise CheckpointError(str(self.path), str(exc)) from exc
        with contextlib.ExitStack() as leaving:
            with refusing(path):
                leaving.enter_context(_only_writer(path))
                _check_trusted(path)
                if self.salvage:
                    self._salvage(path)
                database = leaving.enter_context(contextlib.closing(_connect(path)))
                _prepare(path, database)
                _check_trusted(path)  # those that were missing have been made: by us?
                journal = Journal(path, self.on_change, database)
                leaving.callback(journal.close)
                journal.begin(call, total)
            yield journal
            journal.finish()

    def _salvage(self, path: Path) -> None:
        if done := salvage(path, keep_unknown=self.on_change == "keep"):
            text = "checkpoint %s was damaged: %d results are kept, %d or more are lost; see %s"
            logger.warning(text, path, done.kept, done.lost, done.aside)


class Journal:
    """The outcomes of one run and of those before it, in an open data base."""

    def __init__(self, path: Path, on_change: OnChange, database: sqlite3.Connection) -> None:
        self._path, self._on_change, self._database = path, on_change, database
        self._process = os.getpid()
        self._stored = -1  # the last item that an earlier run has stored
        self._read = 0  # number of items that were read
        self._digester = Digester()
        self._digests: dict[int, bytes] = {}  # of items that are under way
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._bytes = 0  # about as many wait to be written
        self._using = threading.Lock()  # held while the data base is used
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._failure: CheckpointError | None = None
        self.timeline: Timeline | None = None
        self.look: Callable[[], Sequence[object]] = tuple
        self._noted, self._has_noted = time.monotonic(), False

    def begin(self, call: Call, total: int | None) -> None:
        """Check that stored results are those of `call`, and note that a run begins."""
        self._start = time.monotonic()
        with transaction(self._database) as execute:
            execute(TIMELINE)
            execute(RUNNING)
            identity = identity_of(call)
            self._check_identity(execute, identity)
            about = name_of(call.function), total
            execute("UPDATE run SET name = ?, total = ?", about)
            values = time.time(), *_sealed(identity)
            begun = execute("INSERT INTO session VALUES (?, 0, 0, ?, ?)", values)
            self._session = begun.lastrowid
        (last,) = self._database.execute("SELECT max(item) FROM outcome").fetchone()
        if not isinstance(last, int | None):
            raise damaged(self._path, "which items have results cannot be told")
        self._stored = -1 if last is None else last
        self._writer.start()

    def _check_identity(self, execute: Any, new: dict[str, str]) -> None:
        found = execute("SELECT identity, seal FROM run").fetchone()
        if found is None:
            execute("INSERT INTO run (identity, seal) VALUES (?, ?)", _sealed(new))
            return
        old = read_identity(self._path, found)
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if changed and self._on_change == "refuse":
            raise self._refusal(
                f"the function is not the one that it was: {', '.join(changed)}",
                any(name.startswith(_VALUES) for name in changed),
            )
        if changed and self._on_change == "rerun":
            execute("DELETE FROM outcome")
            execute("DELETE FROM session")
            execute("DELETE FROM timeline")
        execute("UPDATE run SET identity = ?, seal = ?", _sealed(new))

    def _refusal(self, reason: str, are_values: bool = False) -> CheckpointError:
        remedy = (
            "remove the file, or choose checkpoint=Checkpoint(file, on_change='rerun') to compute "
            "again what has changed, or on_change='keep' to keep what is stored"
        )
        if are_values:
            remedy += "; a value that is another one each time is left out where the function, or "
            remedy += "worker_init=, makes it"
        return CheckpointError(str(self._path), f"{reason}; {remedy}{see('changed')}")

    def find(self, index: int, item: Any) -> Outcome | None:
        """Return the stored result of an item, if there is one."""
        self._read = index + 1
        self._digests[index] = found = self._digester.digest(item)
        if index > self._stored:
            return None
        with self._using, refusing(self._path):
            query = "SELECT * FROM outcome WHERE item = ? AND value IS NOT NULL"
            row = self._database.execute(query, [index]).fetchone()
        if row is None:
            return None
        if not is_whole(row):
            raise damaged(self._path, f"the result of item {index} is not as it was written")
        if row[1] != found:
            if self._on_change == "refuse":
                raise self._refusal(f"item {index}, {describe(item)}, is not the one that it was")
            if self._on_change == "rerun":
                return None
            self._put((index, found, *row[2:-1]))
        del self._digests[index]
        return Outcome(index, item, self._unpack(index, row[2]))

    def _unpack(self, index: int, value: bytes) -> Any:
        try:
            return serialize.loads(value)
        except Exception as exc:
            reason = f"{type(exc).__name__}: {exc}"
            text = f"the result of item {index} cannot be read ({reason}): define its class first"
            raise CheckpointError(str(self._path), text) from exc

    def keep(self, outcome: Outcome) -> None:
        """Keep an outcome, unless it is one that `find` has returned."""
        if outcome.index in self._digests:
            self._keep(outcome, self._digests.pop(outcome.index))

    def _keep(self, outcome: Outcome, of_item: bytes) -> None:
        value = error = None
        if outcome.error is None:
            try:
                value = pack_value(outcome.value, what := f"the result of item {outcome.index}")
                if len(value) > MAX_BYTES:
                    raise SerializeError(what, f"it has more than {MAX_BYTES} bytes")
            except SerializeError as exc:
                logger.warning("not in checkpoint %s: %s", self._path, exc)
                return
        else:
            error = str(Failure.of(outcome))
        text = outcome.traceback.encode(errors="backslashreplace").decode()  # file names in it
        rest = (text, outcome.host, outcome.seconds)
        self._put((outcome.index, of_item, value, error, *rest))

    def _put(self, row: tuple[Any, ...]) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiting.append(row)
        self._bytes += len(row[2] or row[4]) + 200
        if self._bytes > COMMIT_BYTES:
            self._commit()

    def _write(self) -> None:
        """Write what waits, now and then."""
        try:
            while not self._closing.wait(COMMIT_SECONDS):
                if self._waiting:
                    self._commit()
                if time.monotonic() - self._noted > NOTE_SECONDS:
                    self._note([str(one) for one in self.look()])
        except CheckpointError as exc:
            self._failure = exc  # the run learns of it with the next outcome

    def _commit(self) -> None:
        with self._using, refusing(self._path):
            rows = list(self._waiting)
            with transaction(self._database) as execute:
                insert(self._database, rows)
                passed = time.monotonic() - self._start, self._read, self._session
                execute("UPDATE session SET seconds = ?, submitted = ? WHERE rowid = ?", passed)
                if self.timeline is not None and (news := self.timeline.news()):
                    row = self._session, news
                    execute("INSERT INTO timeline VALUES (?, ?, ?)", (*row, seal_of(row)))
            for _ in rows:  # not before they are written: what an interrupt stops is done again
                self._waiting.popleft()
            self._bytes = 0

    def _note(self, running: list[str]) -> None:
        """Note what runs now, for who asks how far the run is."""
        now = time.time()
        with self._using, refusing(self._path), transaction(self._database) as execute:
            execute("DELETE FROM running")
            for line in running[:NOTED]:
                execute("INSERT INTO running VALUES (?, ?)", (now, line))
        self._noted, self._has_noted = time.monotonic(), bool(running)

    def finish(self) -> None:
        """Write what waits, at the end of a run that was not stopped."""
        self._stop_writer()
        self._commit()
        with refusing(self._path):
            self._database.execute("UPDATE run SET total = ?", [self._read])

    def close(self) -> None:
        """Write what waits, if that is possible, and leave one file."""
        if os.getpid() != self._process:  # a fork that leaves: all of it is another's
            return
        self._stop_writer()
        try:
            if self._waiting:
                self._commit()
            if self._has_noted:
                self._note([])
        except CheckpointError as exc:  # what has stopped the run must not be hidden
            logger.warning("%s", exc)
        with contextlib.suppress(sqlite3.Error):  # somebody may be reading it
            self._database.execute("PRAGMA busy_timeout = 0")
            self._database.execute("PRAGMA journal_mode = DELETE")

    def _stop_writer(self) -> None:
        self._closing.set()
        if self._writer.is_alive():
            self._writer.join()


def _sealed(identity: dict[str, str]) -> tuple[str, bytes]:
    text = json.dumps(identity)
    return text, seal_of([text])


@dataclass(frozen=True)
class Summary:
    """What a checkpoint tells of its runs.

    Attributes
    ----------
    name
        The function.
    sessions
        When each run has started, and the seconds that it took.
    submitted, done, failed
        Numbers of items that were read, that have a result, and that have failed.
    total
        Number of all items; ``None`` while it is not known.
    stats
        Jobs and times by host.
    failures
        For each item that has failed, a line about it and its traceback.
    running
        For each item that ran when that was noted last, the time of that, and a line about it.
    """

    name: str
    sessions: list[tuple[float, float]]
    submitted: int
    done: int
    failed: int
    total: int | None
    stats: StatMerger = field(default_factory=StatMerger)
    failures: list[tuple[str, str]] = field(default_factory=list)
    running: list[tuple[float, str]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every item has a result or has failed."""
        return self.done + self.failed == self.total

    def __str__(self) -> str:
        if not self.sessions:
            return "no run has begun"
        first = f"{self.name}, first started {_local(self.sessions[0][0])}"
        if len(self.sessions) > 1:
            first += f", {len(self.sessions)} runs, the last {_local(self.sessions[-1][0])}"
        first += f", {duration(sum(seconds for _, seconds in self.sessions))}"
        lines = [first, self._counts()]
        if self.stats:
            lines.append(self.stats.table())
        lines += [f"running at {_local(noted)[-8:]}: {line}" for noted, line in self.running]
        for line, traceback in self.failures:
            lines += [line, *(f"    {text}" for text in traceback.rstrip().splitlines()[-4:])]
        if more := self.failed - len(self.failures):
            lines.append(f"... and {more} more failures")
        return "\n".join(lines)

    def _counts(self) -> str:
        text = f"{self.submitted} submitted = {self.done} done + {self.failed} failed"
        if unfinished := self.submitted - self.done - self.failed:
            text += f" + {unfinished} unfinished"
        if self.total is None:
            return f"{text}, of an unknown number"
        return f"{text}, {self.total - self.done - self.failed} of {self.total} remain"


def _local(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # no longer as it was written
        return "?"


def read_summary(path: str | os.PathLike[str], failures: int = 10) -> Summary:
    """Read what a checkpoint tells of its runs, also while one is going on.

    Parameters
    ----------
    failures
        How many of them to read.

    Raises
    ------
    CheckpointError
        There is no such file, or it is no checkpoint.
    """
    path = Path(path)
    try:
        path.stat()  # sqlite would make it
    except (OSError, ValueError) as exc:
        missing = isinstance(exc, FileNotFoundError)
        raise CheckpointError(str(path), "there is no such file" if missing else str(exc)) from exc
    with (
        refusing(path),
        contextlib.closing(_connect(path)) as database,
        transaction(database, "DEFERRED") as execute,
    ):
        check_kind(path, database)
        return _summary(path, execute, failures)


def _summary(path: Path, execute: Any, failures: int) -> Summary:
    name, total = execute("SELECT name, total FROM run").fetchone() or ("", None)
    sessions = execute("SELECT started, seconds FROM session ORDER BY rowid").fetchall()
    (submitted,) = execute("SELECT coalesce(max(submitted), 0) FROM session").fetchone()
    # Items that the input no longer has do not count.
    known = "FROM outcome WHERE item < coalesce((SELECT total FROM run), 1 << 62)"
    done, failed = execute(f"SELECT count(value), count(error) {known}").fetchone()
    query = f"SELECT error, traceback {known} AND value IS NULL ORDER BY item LIMIT ?"
    listed = execute(query, [failures]).fetchall()
    stats = StatMerger()
    query = f"SELECT host, sum(seconds), count(*) {known} AND seconds > 0 GROUP BY host"
    for host, seconds, count in execute(query):
        stats.add(str(host), float(seconds), count)
    times = [stat.time for _, stat in stats]
    numbers = [value for session in sessions for value in session]
    counts = [value for value in (submitted, total) if value is not None]
    are_texts = all(isinstance(text, str) for pair in listed for text in pair)
    if not (
        are_texts and isinstance(name or "", str) and all(map(_is_real, numbers + times + counts))
    ):
        raise damaged(path, "what it tells of its runs is not as it was written")
    submitted = max(submitted, done + failed)
    running = _running(execute)
    return Summary(name, sessions, submitted, done, failed, total, stats, listed, running)


def _running(execute: Any) -> list[tuple[float, str]]:
    """Return what ran when that was noted last; nothing of a file without such notes."""
    if not execute("SELECT count(*) FROM sqlite_master WHERE name = 'running'").fetchone()[0]:
        return []
    notes = execute("SELECT noted, line FROM running ORDER BY rowid").fetchall()
    return [(noted, line) for noted, line in notes if _is_real(noted) and isinstance(line, str)]


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e12


def pack_value(value: Any, what: str) -> bytes:
    """Serialise for another process that runs the same program.

    Unlike what travels to a worker, this names classes of ``__main__``: that process has its own.

    Raises
    ------
    SerializeError
        It cannot be done; the text names `what`.
    """
    try:
        return pickle.dumps(value, serialize.PROTOCOL)
    except (Exception, RecursionError):
        return serialize.pack(value, what)


def _check_trusted(path: Path) -> None:
    """Refuse a file that others can write: unpickling a result could run their commands."""
    for suffix in ("", "-wal", "-shm", "-journal"):  # sqlite takes from these what is in the file
        with contextlib.suppress(OSError):  # not there; else sqlite tells what is wrong
            if danger := find_danger(os.lstat(f"{path}{suffix}")):
                reason = f"it is not used, for it could run commands: {danger}"
                raise CheckpointError(f"{path}{suffix}", reason)


# Of this process, and of the one that it is a fork of.
_writers: dict[tuple[int, Path], object] = {}


@contextlib.contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Hold the right to write a checkpoint.

    Locks of this kind end with the process that holds them, forked processes do not inherit them,
    and runs of one process they do not keep apart. The data base's own ones will not do: they must
    be free between two writes.
    """
    lock, run = Path(f"{path}-lock"), (os.getpid(), path)
    this = object()
    if _writers.setdefault(run, this) is not this:
        raise CheckpointError(str(path), "another run is using it")
    try:
        with _locked(path, lock):
            try:
                yield
            finally:
                if os.getpid() == run[0]:  # not in a fork that leaves
                    lock.unlink(missing_ok=True)
    finally:
        del _writers[run]


def _locked(path: Path, lock: Path) -> IO[bytes]:
    """Return the file `lock`, open and locked."""
    while True:
        with contextlib.ExitStack() as closing:
            try:
                file = closing.enter_context(open(lock, "ab", opener=_open_own))
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise CheckpointError(str(path), "another run is using it") from exc
            except OSError as exc:
                hint = "is its directory there and writable?"
                reason = f"unable to open or lock {lock}: {exc.strerror} ({hint})"
                raise CheckpointError(str(path), reason) from exc
            found = os.fstat(file.fileno())
            if found.st_size:
                raise CheckpointError(str(path), f"{lock} is not empty: it is another program's")
            # The run that had it may just have removed it: then it keeps nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(found, os.lstat(lock)):
                    closing.pop_all()
                    return file


def _open_own(path: str, flags: int) -> int:
    # Without O_NONBLOCK a named pipe would hang here; a link would lead to another file.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)

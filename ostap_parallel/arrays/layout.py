"""The directory of a run: what is where, and how it is written and read.

Several hosts share it, maybe by NFS: a file gets its name when it is whole and on disk, and none
is changed afterwards. There are a few for each chunk, and at most `SHARD` in a directory.

    settings        of the run, as JSON
    start.py        what a job runs
    calls/N         what is called
    items/S/N       a chunk: what it is, and its items
    results/S/N     what became of chunk N; while it is being written: N.JOB.part
    jobs/A.sh, .list, .id   an array: its script; the chunks of its elements, one a line; its id
    logs/A.I        what a job of an array prints by itself, if it does; I: its index
    cancelled       is there when nothing is to be begun any more
    clock           is touched to know the time of the file system, by which files are dated
    hint            where to tell that something has ended
    lock            of who looks after the run
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD = 1000  # entries of a directory

# Where runs are kept, below the working directory, if nobody tells; it goes with the last of them.
DIRECTORY = ".ostap_parallel_jobs"

_ROOMS = ("calls", "items", "results", "jobs", "logs")


@dataclass(frozen=True)
class Header:
    """What a chunk is.

    Attributes
    ----------
    call
        Number of what its items are given to.
    indices
        Of its items in the input.
    attempt
        How often these items will have been begun in jobs, from 1.
    blameless
        How often jobs that had not begun them, nor any other, have ended.
    of
        The chunk whose items these were; -1: none.
    """

    call: int
    indices: Sequence[int]
    attempt: int = 1
    blameless: int = 0
    of: int = -1


class Layout:
    """The files of a run.

    Attributes
    ----------
    root
        The directory, as an absolute path.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    def create(self) -> None:
        """Make the directory, for its owner only; raises FileExistsError if there is a run."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(self.root.iterdir()):
            raise FileExistsError(f"{self.root}: there is something in this directory already")
        self.root.chmod(0o700)
        for room in _ROOMS:
            (self.root / room).mkdir()

    def exists(self) -> bool:
        """Return whether there is a run here."""
        return (self.root / "settings").exists()

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Have what is raised because the directory is gone say so."""
        try:
            yield
        except FileNotFoundError as exc:
            if self.exists():
                raise
            text = "the directory of the run was removed before its end"
            raise FileNotFoundError(errno.ENOENT, text, str(self.root)) from exc

    def check(self) -> None:
        """Raise PermissionError if others may have written here: what is read is run."""
        about = self.root.stat()
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            text = "others may write there, and what is read from a run is run"
            raise PermissionError(f"{self.root} is not yours alone: {text}")

    def remove(self) -> None:
        """Remove all; what another host still writes at the same time is removed, too."""
        for _ in range(3):
            shutil.rmtree(self.root, ignore_errors=True)
            if not self.root.exists():
                return

    # -- single files

    def write(self, name: str, data: bytes) -> None:
        """Write a file aside, have it on disk, and give it its name."""
        path = self.root / name
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException as exc:
            if isinstance(exc, OSError) and exc.filename is None:  # which of the disks is full?
                exc.filename = str(path)
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of JSON."""
        self.write(name, json.dumps(value, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """Read a file of JSON; raises FileNotFoundError."""
        return json.loads((self.root / name).read_bytes())

    def read(self, name: str) -> bytes:
        """Read a file; raises FileNotFoundError."""
        return (self.root / name).read_bytes()

    def now(self) -> float:
        """Return the time of the file system, as that of this machine may be another one."""
        path = self.root / "clock"
        try:
            path.touch()
            return path.stat().st_mtime
        except OSError:  # the disk is full, or the directory is gone
            return time.time()

    # -- chunks

    def write_chunk(self, number: int, header: Header, items: Any) -> None:
        """Write a chunk: the packed items one by one, or the message for all of them."""
        self._shard("items", number).mkdir(exist_ok=True)
        data = pickle.dumps(header) + pickle.dumps(items)
        self.write(self.name("items", number), data)

    def read_header(self, number: int) -> Header:
        """Return what a chunk is."""
        with (self.root / self.name("items", number)).open("rb") as file:
            header: Header = pickle.load(file)
            return header

    def read_chunk(self, number: int) -> tuple[Header, Any]:
        """Return what a chunk is, and its items."""
        with (self.root / self.name("items", number)).open("rb") as file:
            return pickle.load(file), pickle.load(file)

    def chunks(self) -> list[int]:
        """Return the numbers of all chunks, in order."""
        return sorted(self._numbers("items"))

    def results(self, chunks: Iterable[int]) -> set[int]:
        """Return which of some chunks have a result, by a look at directories, not at files.

        That a file is not there may be remembered for long.
        """
        wanted = set(chunks)
        shards = {number // SHARD for number in wanted}
        return wanted & set(self._numbers("results", shards))

    def parts(self, number: int) -> list[Path]:
        """Return the files of results that were being written for a chunk."""
        shard = self._shard("results", number)
        with contextlib.suppress(FileNotFoundError):
            names = sorted(entry.name for entry in os.scandir(shard))
            start = f"{number}."
            return [shard / name for name in names if name.startswith(start)]
        return []

    def all_parts(self) -> dict[int, list[Path]]:
        """Return the files of results that were being written, by chunk, by one look at each."""
        found: dict[int, list[Path]] = {}
        for shard in sorted((self.root / "results").iterdir()):
            for entry in sorted(entry.name for entry in os.scandir(shard)):
                number, dot, _ = entry.partition(".")
                if dot and number.isdigit() and entry.endswith(".part"):
                    found.setdefault(int(number), []).append(shard / entry)
        return found

    def name(self, room: str, number: int) -> str:
        """Return the name of a chunk's file below the root."""
        return f"{room}/{number // SHARD}/{number}"

    def _shard(self, room: str, number: int) -> Path:
        return self.root / room / str(number // SHARD)

    def make_shards(self, numbers: Iterable[int]) -> None:
        """Make the directories for results."""
        for shard in {number // SHARD for number in numbers}:
            (self.root / "results" / str(shard)).mkdir(exist_ok=True)

    def _numbers(self, room: str, shards: Iterable[int] | None = None) -> Iterator[int]:
        if shards is None:
            names: Iterable[str] = [entry.name for entry in os.scandir(self.root / room)]
        else:
            names = map(str, shards)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(self.root / room / name):
                    if entry.name.isdigit():
                        yield int(entry.name)

    # -- arrays

    def arrays(self) -> list[int]:
        """Return the numbers of the arrays, in order."""
        names = (Path(entry.name) for entry in os.scandir(self.root / "jobs"))
        return sorted(int(name.stem) for name in names if name.suffix == ".list")

    def elements(self, array: int) -> list[int]:
        """Return the chunks of the elements of an array."""
        return [int(line) for line in self.read(f"jobs/{array}.list").split()]

    def job_id(self, array: int) -> str:
        """Return the id of an array, or nothing if it is not known to have been submitted."""
        with contextlib.suppress(FileNotFoundError):
            return self.read(f"jobs/{array}.id").decode().strip()
        return ""

    def log(self, array: int, index: str) -> Path:
        """Return the file of what a job of an array prints by itself."""
        return self.root / f"logs/{array}.{index}"

    def said(self, array: int, index: str, lines: int = 20) -> str:
        """Return the last lines of that."""
        with contextlib.suppress(OSError), self.log(array, index).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            text = file.read().decode(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

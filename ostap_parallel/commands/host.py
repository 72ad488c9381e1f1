"""One host, as a place to run commands and functions, and to copy files to and from.

from ostap_parallel.hosts import Host

with Host("user@lxplus701") as host:
    host.put("data.root", "/tmp/")
    print(host.run(["ls", "-l", "/tmp"]).check().text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostap_parallel.commands.command import Command, Done
from ostap_parallel.commands.running import run
from ostap_parallel.errors import ConfigError, HostError
from ostap_parallel.faces.executor import Executor, Settings
from ostap_parallel.runs.progress import open_progress
from ostap_parallel.supply.ways import LOOPBACK
from ostap_parallel.worker import files

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Command", "Done", "Host"]

# Batches of files that are on their way at once.
AHEAD = 4

# Workers, unless the server is given with a number of them.
WORKERS = 4


class Host:
    """A host that is reached by one ssh connection, with the settings that all servers have.

    Parameters
    ----------
    server
        ``[user@]host[:port][*workers]``.
    settings
        As of `Executor`.

    Raises
    ------
    ConfigError
        A setting is wrong, or this is not one server.
    HostError
        It cannot be had.
    """

    def __init__(self, server: str, **settings: Unpack[Settings]) -> None:
        settings.setdefault("ncpus_per_host", WORKERS)
        settings.setdefault("python_mismatch", "allow")  # commands and files do not mind
        self._executor = Executor(0, server, **settings)
        try:
            if len(self._executor.hosts) != 1:
                raise ConfigError(f"one server is wanted, not {server!r}")
            (self._status,) = self._executor.hosts
            self._executor.wait_for_hosts()
            if self._status.state != "up":
                raise self._status.error or HostError(self.name, "start", "it is not up")
        except BaseException:
            self._executor.close()
            raise

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Host({self.name!r})"

    @property
    def name(self) -> str:
        """The host as messages name it."""
        return self._status.name

    @property
    def executor(self) -> Executor:
        """What runs functions there."""
        return self._executor

    @property
    def is_up(self) -> bool:
        """Whether it can be used."""
        return self._status.state == "up"

    def close(self) -> None:
        """End the connection and all that runs there."""
        self._executor.close()

    def run(self, argv: Sequence[str], **settings: Any) -> Done:
        """Run a program and return what became of it; `settings` are those of `Command`.

        What it prints is also logged by line, see `run_as_completed`.
        """
        (done,) = run([Command(argv, **settings)], executor=self._executor)
        return done

    def shell(self, text: str, **settings: Any) -> Done:
        """Run text by bash; see `run`."""
        return self.run(text, **settings)

    def python(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function there and return what it returns; raises what it raises."""
        return self._executor.submit(function, *args, **kwargs).result()

    def tunnel(self, port: int, to: str = LOOPBACK) -> int:
        """Return a port here that leads to a port of the host's own loopback.

        With `to` it leads to that machine, as the host sees it.
        """
        return self._executor.backend.forward(self.name, port, to)

    def close_tunnel(self, port: int) -> None:
        """Have a port here lead nowhere that `tunnel` has returned."""
        self._executor.backend.withdraw(self.name, port)

    def reverse_tunnel(self, port: int) -> int:
        """Return a port of the host's loopback that leads to a port here."""
        return self._executor.backend.backward(self.name, port)

    def put(self, local: Path | str, remote: Path | str, progress: bool = False) -> str:
        """Copy a file or a directory to the host; return its path there.

        As with ``cp -r``, `remote` names the copy, unless it is a directory or ends in ``/``: then
        the copy goes into it. ``~`` and ``$NAME`` are expanded,
        the latter in text only, not in a path object. A file appears when it is whole.

        Raises
        ------
        OSError
            Something cannot be read here or written there.
        """
        source = files.expand(local).absolute()
        entries = files.survey(source)
        top: str = self.python(files.place_for, (str(remote), source.name))
        self._in_parts(files.make, top, entries)
        sending = (files.read((source, pieces)) for pieces in files.batches(entries))
        items = ((top, pieces) for pieces in sending)
        title = f"to {self.name}"
        for _ in self._transfer(files.write, items, _count(entries), title, progress):
            pass
        self._in_parts(files.finish, top, entries)
        return top

    def get(self, remote: Path | str, local: Path | str, progress: bool = False) -> Path:
        """Copy a file or a directory from the host, as `put` does to it; return its path here."""
        entries: list[files.Entry] = self.python(files.survey, str(remote))
        top = files.place_for((str(local), Path(remote).name))
        files.make((top, entries))
        items = ((str(remote), pieces) for pieces in files.batches(entries))
        title = f"from {self.name}"
        for pieces in self._transfer(files.read, items, _count(entries), title, progress):
            files.write((top, pieces))
        files.finish((top, entries))
        return Path(top)

    def _in_parts(
        self,
        function: Callable[[tuple[str, list[files.Entry]]], None],
        top: str,
        entries: list[files.Entry],
    ) -> None:
        """Have something done there about each entry."""
        starts = range(0, len(entries), files.MANY)
        parts = [entries[start : start + files.MANY] for start in starts]
        # What is in a directory comes behind it: at the end, before it.
        for part in parts[::-1] if function is files.finish else parts:
            self.python(function, (top, part))

    def _transfer(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        total: int,
        title: str,
        progress: bool,
    ) -> Iterator[Any]:
        """Call a function there for each item, for some at once; yield what it returns."""
        pending: deque[Any] = deque()
        with open_progress(progress, total, title, dict) as reporter:
            try:
                for item in items:
                    pending.append(self._executor.submit(function, item))
                    if len(pending) >= AHEAD:
                        yield pending.popleft().result()
                        reporter.advance(1)
                while pending:
                    yield pending.popleft().result()
                    reporter.advance(1)
            finally:
                self._executor.interrupt(list(pending))


def _count(entries: Iterable[files.Entry]) -> int:
    """Return how many batches there are, about."""
    return -(-sum(entry.size for entry in entries) // files.BATCH)

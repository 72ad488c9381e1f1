"""Commands, and what becomes of them."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ostap_parallel.commands.joblog import Entry
from ostap_parallel.commands.template import Filled
from ostap_parallel.commands.transfer import Transfer
from ostap_parallel.engine.core import LOCAL
from ostap_parallel.errors import CommandFailed
from ostap_parallel.worker.command import Spec

# Exit statuses in a job log of what had none: GNU parallel's for what took too long, and ssh's for
# a host that was out of reach.
TIMED_OUT, NOT_RUN = -1, 255

SHELL = "bash"

# Text in which a shell would do nothing but split words and take quotes away. It takes longer to
# start than most programs: it is left out there, unless the first word is one of its own.
_PLAIN = re.compile(
    r"""(?!time |\S*=)([A-Za-z0-9_@%+:,./=-]|'[^']*')+( +([A-Za-z0-9_@%+:,./=-]|'[^']*')+)* *"""
)

LAST_LINES = 10

# Bytes of input of commands that are read ahead, and sent, several at a time.
LITTLE = 1 << 14


def _text(value: object) -> str:
    """Return what a variable is, as programs get it: `os.environb` has bytes."""
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class Command:
    """A command to be run somewhere.

    Attributes
    ----------
    command
        Program and arguments, which no shell sees; or text for bash.
    host, hosts
        Where it must run, or one of those; by default anywhere. ``"local"`` is this machine.
    environment
        Variables that are added; ``$NAME`` in their values is expanded where it runs.
    directory
        Where it begins; ``~`` and ``$NAME`` are expanded there.
    stdin
        What it reads: bytes, text, or the path of a file here.
    timeout
        Seconds after which it is ended.
    retries
        How often it is run again if it fails, elsewhere if that is possible.
    cores
        How many of its host's slots it takes.
    name
        Of its log records; default: the name of the program.
    variables
        More variables; what is in them is not expanded.
    nice
        How much its priority is lowered.
    transfer
        Files that go to its host before it, and come back after it.
    arguments
        For a node script, packed; see `worker.node`.
    """

    command: Sequence[str] | str | Filled
    host: str | None = None
    hosts: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str | PurePath = ""
    stdin: bytes | str | PurePath | None = None
    timeout: float | None = None
    retries: int = 0
    cores: int = 1
    name: str = ""
    variables: Mapping[str, str | Filled] = field(default_factory=dict)
    nice: int = 0
    transfer: Transfer | None = None
    arguments: bytes | None = None

    def __post_init__(self) -> None:
        if not self.command or not isinstance(self.command, str | Filled | Sequence):
            raise ValueError(f"a command is text or a list of words, not {self.command!r}")
        words = [self.command] if isinstance(self.command, str | Filled) else self.command
        for word in words:
            if not isinstance(word, str | Filled | PurePath):
                raise TypeError(f"a command is made of text, not of {word!r}")
            if "\0" in str(word):
                raise ValueError(f"no command can have a null byte in it: {word!r}")
        if "\0" in str(self.directory):
            raise ValueError(f"no directory can have a null byte in it: {self.directory!r}")
        if not isinstance(self.stdin, bytes | bytearray | memoryview | str | PurePath | None):
            text = "stdin is bytes, text, or the path of a file"
            raise TypeError(f"{text}, not {self.stdin!r}")
        for name, value in (*self.environment.items(), *self.variables.items()):
            if not isinstance(name, str | bytes):
                raise TypeError(f"the name of a variable is text, not {name!r}")
            if not name or "=" in _text(name) or "\0" in _text(name) + _text(value):
                raise ValueError(f"no command can have a variable {name!r} with {value!r} in it")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {self.timeout!r}")
        if self.cores < 1 or self.retries < 0:
            raise ValueError("cores must be at least 1, and retries at least 0")

    def __str__(self) -> str:
        if isinstance(self.command, str | Filled):
            return str(self.command)
        return shlex.join(map(str, self.command))

    @property
    def pinned(self) -> frozenset[str]:
        """The hosts that it must run on; empty: any."""
        return frozenset([*self.hosts, *([self.host] if self.host else [])])

    @property
    def is_light(self) -> bool:
        """Whether it reads little, and no file."""
        return not isinstance(self.stdin, PurePath) and len(self.stdin or "") <= LITTLE

    @property
    def label(self) -> str:
        """The name of its records."""
        if self.name:
            return self.name
        words = (
            str(self).split(None, 1) if isinstance(self.command, str | Filled) else self.command
        )
        return PurePath(str(words[0])).name if words else "command"

    def input(self) -> bytes:
        """Return what it reads; raises OSError if the file cannot be read."""
        if isinstance(self.stdin, PurePath):
            return Path(self.stdin).read_bytes()
        if isinstance(self.stdin, str):
            return self.stdin.encode("utf-8", "surrogateescape")
        return bytes(self.stdin or b"")

    def argv(self, host: str, slot: int = 1) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return program and arguments for a host, and those to take if that is no program."""
        nice = ("nice", "-n", str(self.nice)) if self.nice else ()
        if not isinstance(self.command, str | Filled):
            return (*nice, *map(str, self.command)), ()
        text = self.command
        if isinstance(text, Filled):
            text = text.on(host, slot)
        shell = (*nice, SHELL, "-c", text)
        if _PLAIN.fullmatch(text) and not nice:
            return tuple(shlex.split(text) if "'" in text else text.split()), shell
        return shell, ()

    def spec(
        self,
        host: str,
        stdin: bytes,
        levels: tuple[int | None, int | None],
        keep: int,
        spool: bool,
        slot: int = 1,
    ) -> Spec:
        """Return what a worker of a host is told."""
        argv, otherwise = self.argv(host, slot)
        variables = {
            _text(name): value.on(host, slot, quote=str)
            if isinstance(value, Filled)
            else _text(value)
            for name, value in self.variables.items()
        }
        return Spec(
            argv=argv,
            otherwise=otherwise,
            name=self.label,
            stdin=stdin,
            environment={_text(name): _text(value) for name, value in self.environment.items()},
            variables=variables,
            directory=str(self.directory),
            timeout=self.timeout,
            levels=levels,
            keep=keep,
            spool=spool,
            arguments=self.arguments,
        )


@dataclass
class Done:
    """What became of a command.

    Attributes
    ----------
    command
        The command.
    number
        Its position among those of its run, from 1 on.
    host
        Where it ran last; empty if it did not.
    status, signal
        Its exit status, or the signal that ended it; neither if it could not be run.
    start, seconds
        When it began, in seconds of the epoch, and how long it took.
    sizes
        How many bytes it printed to standard output and to standard error.
    files
        Where that is, with ``results=``.
    error
        Why it could not be run, or did not come to its end by itself.
    timed_out
        It took too long.
    attempts
        How often it ran.
    memory
        The most bytes that one of its processes had in memory; it is counted from what a worker
        takes on.
    user, system
        Seconds of CPU time.
    read, written
        Bytes that its processes have read and written, from and to whatever.
    is_skipped
        It has not run now: this is what the job log tells.
    answer
        What a node script has answered, packed.
    """

    command: Command
    number: int = 1
    host: str = ""
    status: int | None = None
    signal: int | None = None
    start: float = 0.0
    seconds: float = 0.0
    sizes: tuple[int, int] = (0, 0)
    files: tuple[Path, Path] | None = None
    error: str = ""
    timed_out: bool = False
    attempts: int = 0
    memory: int = 0
    user: float = 0.0
    system: float = 0.0
    read: int = 0
    written: int = 0
    is_skipped: bool = False
    answer: bytes = field(default=b"", repr=False)
    data: tuple[bytes, bytes] = field(default=(b"", b""), repr=False)

    @property
    def stdout(self) -> bytes:
        """What it printed; the middle is left out of what is longer than a run keeps."""
        return self.files[0].read_bytes() if self.files else self.data[0]

    @property
    def stderr(self) -> bytes:
        """What it printed to standard error."""
        return self.files[1].read_bytes() if self.files else self.data[1]

    @property
    def text(self) -> str:
        """What it printed, as text; bytes that are no UTF-8 are escaped as file names are."""
        return self.stdout.decode("utf-8", "surrogateescape")

    @property
    def succeeded(self) -> bool:
        """Whether it has ended with exit status 0, by itself."""
        return self.status == 0 and not self.error and not self.timed_out

    def reason(self) -> str:
        """Return in a few words how it has failed; empty if it has not."""
        if self.succeeded:
            return ""
        if self.timed_out:
            return f"not done after {self.command.timeout or self.seconds:g} s"
        if self.error:
            return self.error
        if self.signal is not None:
            names = {number.value: number.name for number in signal.Signals}
            return f"killed by {names.get(self.signal, f'signal {self.signal}')}"
        return f"exit status {self.status}"

    def check(self) -> Done:
        """Return this; raises CommandFailed, with the last lines, if it has not ended well."""
        if self.succeeded:
            return self
        lines = (self.stderr or self.stdout).decode("utf-8", "backslashreplace").splitlines()
        last = "\n".join(lines[-LAST_LINES:])
        raise CommandFailed(str(self.command), self.host, self.reason(), last)

    def entry(self) -> Entry:
        """Return its line in a job log."""
        status = self.status if self.status is not None else 0 if self.signal else NOT_RUN
        return Entry(
            self.number,
            ":" if self.host == LOCAL else self.host,  # as GNU parallel calls this machine
            self.start,
            self.seconds,
            len(self.command.stdin) if isinstance(self.command.stdin, bytes | str) else 0,
            sum(self.sizes),
            TIMED_OUT if self.timed_out else status if not self.error or status else NOT_RUN,
            self.signal or 0,
            str(self.command),
        )

    @classmethod
    def of_entry(cls, command: Command, entry: Entry) -> Done:
        """Return what a job log tells."""
        host = LOCAL if entry.host == ":" else entry.host
        done = cls(command, entry.number, host, entry.status, entry.signal or None)
        done.start, done.seconds, done.is_skipped = entry.start, entry.seconds, True
        if entry.signal or entry.status < 0:
            done.status = None
            done.timed_out = entry.status == TIMED_OUT
        return done

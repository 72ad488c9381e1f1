"""Starting helper processes that the terminal's signals never reach, and that forks let go of."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from ostap_parallel.worker.processes import (
    TERMINAL_SIGNALS,
    forking,
    holding_signals,
    keep_from_forks,
    let_forks_keep,
)


@dataclass(frozen=True)
class Done:
    """A process that has ended; `status` is ``None`` where it cannot be known."""

    status: int | None
    output: bytes
    errors: bytes

    @property
    def words(self) -> str:
        """What it wrote to standard error, as text."""
        return "\n".join(lines_of(self.errors))


def lines_of(raw: bytes) -> list[str]:
    """Return the lines that a program wrote for people; ssh ends some of its own by CR and LF."""
    lines = re.split(r"[\r\n]+", raw.decode("utf-8", "backslashreplace"))
    return [line.rstrip() for line in lines if line.strip()]


def start_apart(
    argv: Sequence[str], *, restore: bool = False, **popen: Any
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own; no signal of the terminal reaches it.

    Between fork and setsid it is still in our group, with the default handlers. So it is born
    with these signals blocked, and they stay so: nobody but a terminal sends them. Pipes are to
    be closed by `close_apart`.

    Parameters
    ----------
    restore
        Have the program begin with none of them blocked or ignored that are not ignored here: ssh
        ends a ProxyCommand by SIGHUP, and what runs Python needs SIGINT.
    """
    wanted = [number for number in TERMINAL_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    if restore and wanted:
        if shutil.which(argv[0]) is None:
            raise FileNotFoundError(f"{argv[0]}: command not found")
        prefix = _restoring(tuple(number.name.removeprefix("SIG") for number in wanted))
        argv = [*prefix, *argv]
        if not prefix:  # rather a moment without protection than a proxy that stays for ever
            wanted = [number for number in wanted if number != signal.SIGHUP]
    with forking:
        with holding_signals(wanted):
            process = subprocess.Popen(argv, start_new_session=True, **popen)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                keep_from_forks(stream.fileno())
    return process


def run_apart(
    argv: Sequence[str],
    data: bytes = b"",
    timeout: float | None = None,
    environ: Mapping[str, str] | None = None,
    end: Callable[[subprocess.Popen[bytes]], object] = subprocess.Popen.kill,
) -> Done:
    """Run a program like `start_apart` until it ends; raises subprocess.TimeoutExpired.

    Its input and output are files: a fork that holds the end of a pipe would keep it waiting.
    One that takes too long is ended by `end`.
    """
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(data)
        stdin.seek(0)
        process = start_apart(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=environ)
        try:
            process.wait(timeout)
        except BaseException:
            end(process)
            process.wait()
            raise
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
        return Done(exit_status(process), *texts)


def exit_status(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status of a process; ``None`` if it runs or that cannot be known.

    Where SIGCHLD is ignored the system keeps none, and `subprocess` makes 0 of that.
    """
    status = process.poll()
    return None if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN else status


def close_apart(stream: IO[bytes]) -> None:
    """Close a pipe of a process from `start_apart`."""
    with forking:
        if not stream.closed:
            let_forks_keep(stream.fileno())
        with contextlib.suppress(OSError):  # what is still to be written has no reader
            stream.close()


@functools.cache
def _restoring(names: tuple[str, ...]) -> list[str]:
    """Return a command that drops what waits of these signals and lets later ones through.

    Only GNU's env knows how; empty without it.
    """
    signals = ",".join(names)
    prefix = ["env", f"--ignore-signal={signals}", "env", f"--default-signal={signals}"]
    try:
        done = run_apart([*prefix, "true"])
    except OSError:
        return []
    return [] if done.status or done.errors else prefix

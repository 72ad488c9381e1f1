"""Where a batch system's commands are: on this machine; see `login` for another one."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ostap_parallel.errors import SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import Done
from ostap_parallel.supply.here import clean, run_here
from ostap_parallel.supply.processes import close_apart, start_apart

_QDEL = "qdel \"$1\" 2>&1 | grep -q 'does not exist\\|registered\\|deleted\\|deletion'"

PATIENCE = 60.0  # seconds until a guard that is far away knows what it is told

# How jobs of a name are cancelled, see guard.bash. That there are none is no failure. Nobody else
# has such names; and who we are at a login host, we do not know.
_CANCEL = {
    "slurm": ["scancel", "--verbose", "--name=@NAME@"],
    "sge": ["sh", "-c", _QDEL, "sh", "@NAME@"],
}

# In a session of its own: what leads to a login host ends all that it has started there soon after
# the connection is lost, but the batch system may be away for longer. Who started it waits for it.
_APART = """\
exec 3<&0
op_text=$1
shift
if type -P setsid >/dev/null; then
    setsid bash -p -c "$op_text" guard "$@" <&3 3<&- &
else
    bash -p -c "$op_text" guard "$@" <&3 3<&- &
fi
exec 3<&-
wait "$!"
"""


class Site(Protocol):
    """Where commands of a batch system are."""

    def run(self, argv: Sequence[str], data: str = "", timeout: float = 60.0) -> Done:
        """Run one of them; a `Runner`."""

    def program(self, argv: Sequence[str]) -> list[str]:
        """Return what runs one of them with our standard input and output."""

    def guard(self, kind: str) -> Guard:
        """Return what cancels jobs when we are gone."""

    def close(self) -> None:
        """End what leads there; the next command may start it again."""


class Here:
    """This machine."""

    def run(self, argv: Sequence[str], data: str = "", timeout: float = 60.0) -> Done:
        """Run a command."""
        return run_here(argv, data, timeout)

    def program(self, argv: Sequence[str]) -> list[str]:
        """Return the command without what the job has set in which this may be."""
        gone = sorted(os.environ.keys() - clean(os.environ).keys())
        return [*(["env", *(f"--unset={name}" for name in gone)] if gone else []), *argv]

    def guard(self, kind: str) -> Guard:
        """Return a process that outlives us."""
        return Guard(["bash", "-p"], kind, clean(os.environ))

    def close(self) -> None:
        """Do nothing."""


class Guard:
    """Cancels jobs when we are gone, or need them no more; see `guard.bash`.

    Parameters
    ----------
    bash
        Leads to a bash.
    is_far
        What it is told may get lost on its way, if this process is cut off just then.
    """

    def __init__(
        self,
        bash: Sequence[str],
        kind: str,
        environ: Mapping[str, str] | None = None,
        is_far: bool = False,
    ) -> None:
        self._is_far, self._said = is_far, b""
        text = Path(__file__).with_name("guard.bash").read_text()
        argv = [*bash, "-c", _APART, "guard", text, *_CANCEL[kind]]
        self._process = start_apart(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if is_far else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environ,
        )

    def expect(self, name: str) -> None:
        """Have jobs of this name cancelled, too, also if they appear only then."""
        self.add(f"?{name}")

    def add(self, name: str) -> None:
        """Have jobs of this name cancelled, too, which are there if they ever will be.

        Raises SchedulerUnavailable if it is not sure that it knows.
        """
        assert self._process.stdin is not None
        line = f"{name}\n".encode()
        with contextlib.suppress(OSError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        if self._is_far:
            self._await(line)

    def _await(self, line: bytes) -> None:
        """Wait until it has said a line again."""
        assert self._process.stdout is not None
        descriptor, end = self._process.stdout.fileno(), time.monotonic() + PATIENCE
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while line not in self._said.splitlines(keepends=True):
            if not poll.poll(max(0.0, 1000 * (end - time.monotonic()))):
                raise SchedulerUnavailable("guard", f"no answer in {PATIENCE:g} s")
            data = os.read(descriptor, 4096)
            if not data:
                raise SchedulerUnavailable("guard", "the connection was lost")
            self._said += data
        self._said = b""

    def is_there(self) -> bool:
        """Return whether it does its duty."""
        return self._process.poll() is None

    def dismiss(self, patience: float = 3.0) -> None:
        """Have the jobs cancelled now; wait for that for a while."""
        assert self._process.stdin is not None
        close_apart(self._process.stdin)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        if self._process.stdout is not None:
            close_apart(self._process.stdout)

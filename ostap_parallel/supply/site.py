"""Where a batch system's commands are: on this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ostap_parallel.schedulers.scheduler import Runner
from ostap_parallel.supply.here import clean, run_here
from ostap_parallel.supply.processes import close_apart, start_apart

# How jobs of a name are cancelled, see guard.bash. That there are none is no failure.
_CANCEL = {
    "slurm": ["scancel", "--quiet", f"--user={os.getuid()}", "--name=@NAME@"],
    "sge": ["qdel", "@NAME@"],
}


class Site(Protocol):
    """Where commands of a batch system are.

    Attributes
    ----------
    run
        Runs one of them.
    """

    run: Runner

    def program(self, argv: Sequence[str]) -> list[str]:
        """Return what runs one of them with our standard input and output."""

    def guard(self, kind: str) -> Guard:
        """Return what cancels jobs when we are gone."""


class Here:
    """This machine."""

    run: Runner = staticmethod(run_here)

    def program(self, argv: Sequence[str]) -> list[str]:
        """Return the command without what the job has set in which this may be."""
        gone = sorted(os.environ.keys() - clean(os.environ).keys())
        return [*(["env", *(f"--unset={name}" for name in gone)] if gone else []), *argv]

    def guard(self, kind: str) -> Guard:
        """Return a process that outlives us."""
        return Guard(["bash", "-p", "-s"], kind, clean(os.environ))


class Guard:
    """Cancels jobs when we are gone, or need them no more; see `guard.bash`.

    Parameters
    ----------
    bash
        Leads to a bash that reads its commands from standard input.
    """

    def __init__(self, bash: Sequence[str], kind: str, environ: Mapping[str, str]) -> None:
        text = Path(__file__).with_name("guard.bash").read_text()
        argv = [*bash[:-1], "-c", text, "guard", *_CANCEL[kind]]
        self._process = start_apart(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environ,
        )

    def add(self, name: str) -> None:
        """Have jobs of this name cancelled, too."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{name}\n".encode())
            self._process.stdin.flush()

    def dismiss(self, patience: float = 3.0) -> None:
        """Have the jobs cancelled now; wait for that for a while."""
        assert self._process.stdin is not None
        close_apart(self._process.stdin)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)

"""The commands of a scheduler on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from ostap_parallel.errors import SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import Done
from ostap_parallel.supply.processes import run_apart

# What SLURM sets in a job describes that one, and would go for the jobs that are submitted there;
# and what changes the answers that are read here. What users set for sbatch stays.
_FOREIGN = ("SLURM_", "SQUEUE_", "SACCT_", "SCANCEL_")
_KEPT = {"SLURM_CONF"}


def run_here(argv: Sequence[str], data: str = "", timeout: float = 60.0) -> Done:
    """Run a command of a scheduler; a `Runner`.

    Ctrl-C does not reach it: a submission is not left half done.
    """
    try:
        done = run_apart(argv, data.encode(), timeout, clean(os.environ), _end)
    except subprocess.TimeoutExpired:
        raise SchedulerUnavailable(argv[0], f"no answer in {timeout:g} s") from None
    except OSError as exc:
        raise SchedulerUnavailable(argv[0], f"{exc.strerror}: is it on PATH?") from None
    return Done(done.status or 0, done.output.decode(errors="replace"), done.words)


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what a job has set in it."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not name.startswith(_FOREIGN)
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End all of its session: a wrapper of the site's may have started the command itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

"""Steps of a batch job in place of ssh: srun to the nodes of a SLURM job, qrsh to those of SGE."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

from ostap_parallel.config import HostConfig
from ostap_parallel.config.hostlist import granted_cpus
from ostap_parallel.errors import HostError, SchedulerUnavailable
from ostap_parallel.supply.here import run_here
from ostap_parallel.supply.relay import Relay, open_relay
from ostap_parallel.supply.site import Here
from ostap_parallel.supply.ways import Verdict

# What srun or qrsh says where the controller or the node cannot be reached just now.
_PASSING = re.compile(
    "Unable to contact slurm controller|Socket timed out|timed? ?out|[Cc]onnection refused"
    "|unable to (contact|send)|commlib error|got no response|temporarily|not responding"
    "|Communication connection failure|Requested nodes are busy"
)

# What it says while it waits.
_WAITING = re.compile("queued and waiting|retrying|Waiting for resources")


def open_srun(host: HostConfig) -> AbstractContextManager[Relay]:
    """Make a way to a node of the SLURM job that this is part of."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        reason = "way = srun leads to the nodes of a SLURM job, and this is none: no SLURM_JOB_ID"
        raise HostError(host.label, "connect", reason)
    cpus = granted_cpus(os.environ).get(host.name)
    return open_step(host, Here().program(step_argv(job, host.name, cpus)))


def open_step(
    host: HostConfig, argv: Iterable[str], tag: str = ""
) -> AbstractContextManager[Relay]:
    """Make a way to where a step of srun runs bash, known there by a word in its command line."""
    return open_relay(
        host.label,
        [*argv, "bash", "-s"],
        keepalive=host.keepalive,
        python=host.python,
        tag=tag,
        judge=_judge,
        queued=lambda line: line.removeprefix("srun: ") if _WAITING.search(line) else "",
    )


def step_argv(job: str, node: str, cpus: int | None) -> list[str]:
    """Return srun with its options for one process on a node, beside what runs there already.

    What the job was asked for must not stand in its environment, as that contradicts this in part.
    Without `-u` srun holds back what is no whole line.
    """
    argv = ["srun", "-u", "--overlap", f"--jobid={job}", f"--nodelist={node}", "-N1", "-n1"]
    return [*argv, f"-c{cpus}"] if cpus else argv


def _judge(words: str) -> Verdict:
    return "passing" if _PASSING.search(words) else "failed"


def open_qrsh(host: HostConfig) -> AbstractContextManager[Relay]:
    """Make a way to a node of the SGE job that this is part of."""
    if "PE_HOSTFILE" not in os.environ:
        reason = "way = qrsh leads to the nodes of an SGE job with a parallel environment, and "
        reason += "this is none: no PE_HOSTFILE"
        raise HostError(host.label, "connect", reason)
    argv = ["qrsh", "-inherit", host.name, "bash", "-s"]
    return open_relay(host.label, argv, keepalive=host.keepalive, python=host.python, judge=_judge)


def open_session(host: HostConfig, argv: Iterable[str]) -> AbstractContextManager[Relay]:
    """Make a way into a job of SGE that is a session of qrsh."""
    python, keepalive = host.python, host.keepalive
    return open_relay(host.label, list(argv), keepalive=keepalive, python=python, judge=_judge)


def way_within(environ: Mapping[str, str]) -> str:
    """Return by what the nodes of the job that this is part of are reached best."""
    if environ.get("SLURM_JOB_ID") and shutil.which("srun"):
        return "srun"
    return "qrsh" if _takes_qrsh(environ) else "ssh"


def _takes_qrsh(environ: Mapping[str, str]) -> bool:
    """Return whether the parallel environment of an SGE job lets us start tasks on its nodes."""
    name = environ.get("PE")
    if not name or "PE_HOSTFILE" not in environ or not shutil.which("qrsh"):
        return False
    with contextlib.suppress(SchedulerUnavailable):
        found = run_here(["qconf", "-sp", name], timeout=10).output
        return bool(re.search(r"^control_slaves\s+TRUE", found, re.MULTILINE))
    return False

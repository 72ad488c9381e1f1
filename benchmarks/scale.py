"""How far one caller goes: what each host, worker and task costs it, and what ends first.

    python -m benchmarks.scale

Writes scale.md. Tasks sleep: all hosts are on this machine.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from sshd import HostOptions, descendants

from benchmarks import harness
from benchmarks.__main__ import machine
from benchmarks.harness import Benchmark, Case, Figures, Results, figure
from benchmarks.local import own_cpu, status_of
from benchmarks.remote import cpu_of, memory_of, open_manager
from benchmarks.tasks import nap

COUNTS = (1, 4, 16, 64)
REST = 16.0  # seconds for which the caller has nothing to do: servers are asked every 15
NAP = 0.5  # seconds that a task sleeps
TASKS = 8  # for each worker

START = "CPU s to start"
RESTING = "CPU s per s at rest"
TASK = "CPU ms per chunk"
THREADS = "threads"
FILES = "descriptors"
PROCESSES = "processes"
OWN = "MB"
ALL = "MB with ssh"

HEADER = """\
# How far one caller goes

Written by `python -m benchmarks.scale`. What the caller, which is this package in the user's
process with its ssh clients, uses for hosts and workers that run tasks of {nap:g} s, one in a
chunk. Tasks sleep and all hosts are on this machine; their own processes are not counted.

"""


def cost(hosts: int, workers: int, ssh_config: str) -> Figures:
    """Return what the caller uses for so many hosts with so many workers each."""
    import ostap_parallel.faces.manager  # noqa: F401

    names = [f"h{number + 1}" for number in range(hosts)]
    before = own_cpu()
    with open_manager(names, ssh_config, workers) as manager:
        assert manager.wait_for_hosts(), manager.executor.hosts
        ssh = descendants(os.getpid())
        start = own_cpu() - before + sum(cpu_of(pid, with_ended=True) for pid in ssh)
        before = own_cpu()
        time.sleep(REST)
        resting = (own_cpu() - before) / REST
        before, threads, files = own_cpu(), 0, 0
        count = TASKS * hosts * workers
        for number, _ in enumerate(manager.iexecute(nap, [NAP] * count, chunk_size=1)):
            if number % (hosts * workers) == 0:
                threads = max(threads, status_of("Threads"))
                files = max(files, len(list(Path("/proc/self/fd").iterdir())))
        return {
            START: start,
            RESTING: resting,
            TASK: (own_cpu() - before) / count * 1000,
            THREADS: threads,
            FILES: files,
            PROCESSES: len(ssh),
            OWN: memory_of(os.getpid()),
            ALL: sum(map(memory_of, [os.getpid(), *ssh])),
        }


HOSTS = Benchmark(
    "Hosts",
    "Hosts with one worker each.",
    [Case(f"{n} hosts", cost, {"hosts": n, "workers": 1}) for n in COUNTS],
    rounds=1,
    hosts=[HostOptions()] * max(COUNTS),
)
WORKERS = Benchmark(
    "Workers",
    "One host with many workers.",
    [Case(f"{n} workers", cost, {"hosts": 1, "workers": n}) for n in COUNTS],
    rounds=1,
    hosts=[HostOptions()] * 2,
)


def slope(results: Results, column: str) -> float:
    """Return by how much a figure grows with each host or worker: a line by least squares."""
    points = [(int(name.split()[0]), results.median(name, column)) for name in results.rounds]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def fits(hosts: Results, workers: Results) -> str:
    """Return the table of slopes."""
    rows = ["| grows by | for each host with a worker | for each further worker |"]
    rows.append("|---|---:|---:|")
    for column in hosts.columns():
        both = slope(hosts, column), slope(workers, column)
        rows.append(f"| {column} | {figure(both[0])} | {figure(both[1])} |")
    return "".join(f"{row}\n" for row in rows)


def limits(results: Results) -> dict[str, float]:
    """Return how many hosts or workers each resource is enough for."""
    first, *_, last = results.rounds

    def room(column: str, limit: float) -> float:
        """Return what there is room for beside what one takes."""
        grows = slope(results, column)
        return 1 + (limit - results.median(first, column)) / grows if grows > 0 else float("inf")

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = int(Path("/proc/sys/kernel/threads-max").read_text())
    # A core does so many chunks in the time that a worker takes for one of the usual length.
    from ostap_parallel.runs.chunking import CHUNK_SECONDS

    return {
        "1024 descriptors, the usual soft limit": room(FILES, 1024),
        f"{soft} descriptors, the soft limit here": room(FILES, soft),
        f"{most} threads, the limit of the system": room(THREADS, most),
        f"{figure(memory)} MB, the memory of this machine": room(ALL, memory),
        f"a core, for chunks of {CHUNK_SECONDS} s": CHUNK_SECONDS
        / (results.median(last, TASK) / 1000),
        "a core at rest": room(RESTING, 1.0),
    }


def ends(hosts: Results, workers: Results) -> str:
    """Return the table of what is enough for how many."""
    rows = ["| resource | hosts with one worker | workers of one host |", "|---|---:|---:|"]
    for (name, one), other in zip(limits(hosts).items(), limits(workers).values(), strict=True):
        rows.append(f"| {name} | {rounded(one)} | {rounded(other)} |")
    return "".join(f"{row}\n" for row in rows)


def rounded(number: float) -> str:
    """Return a number with two digits that count: it is a forecast."""
    return "any number" if number > 1e6 else f"{float(f'{number:.2g}'):.0f}"


def main(benchmarks: Sequence[Benchmark] = (HOSTS, WORKERS)) -> None:
    """Measure, fit, and write the file."""
    found = [harness.run(benchmark) for benchmark in benchmarks]
    text = HEADER.format(nap=NAP)
    for benchmark, results in zip(benchmarks, found, strict=True):
        text += f"## {benchmark.title}\n\n{harness.table(benchmark, results)}\n"
    text += f"## Growth\n\nStraight lines by least squares.\n\n{fits(*found)}\n"
    text += f"## What ends first\n\nWhat each resource is enough for.\n\n{ends(*found)}\n"
    file = Path(__file__).with_suffix(".md")
    old = file.read_text() if file.exists() else ""
    kept = old[old.find(DESIGN) :] if DESIGN in old else f"{DESIGN}\n"
    file.write_text(f"{text}{machine()}\n\n{kept}")


# What is written by hand stands at the end of the file, and stays.
DESIGN = "## What the design does about it\n"


if __name__ == "__main__":
    from benchmarks import scale  # by this name a case's own process finds it

    scale.main()

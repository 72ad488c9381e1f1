"""How fast: this package beside its peers.

    pip install -e ".[bench]"
    python -m benchmarks [NAME ...]

Writes results.md, in which the sections that were not asked for stay as they were, and plots.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import batch, commands, engine, harness, local, remote, views
from benchmarks.harness import Benchmark
from benchmarks.peers import PEERS

BENCHMARKS: dict[str, Benchmark] = {
    "trivial": local.TRIVIAL,
    "one": local.ONE_AT_A_TIME,
    "uneven": local.UNEVEN_TASKS,
    "uneven-hosts": remote.UNEVEN_HOSTS,
    "stalling": remote.STALLING,
    "far": remote.FAR_HOST,
    "start": remote.START,
    "shared": remote.SHARED,
    "results": local.LARGE_RESULTS,
    "far-results": remote.FAR_RESULTS,
    "commands": commands.COMMANDS,
    "commands-hosts": commands.COMMANDS_ON_HOSTS,
    "batch": batch.BATCH,
    "memory": local.MEMORY,
    "idle": local.IDLE,
    "timeline": views.TIMELINE,
    "page": views.PAGE,
    **engine.BENCHMARKS,
}

FILE = Path(__file__).with_name("results.md")

HEADER = """\
# Speed

Written by `python -m benchmarks`. Each measurement is a process of its own; the rows of a table
do the same work, in turn, several times. Given are medians and, in brackets, ranges. Hosts are
real ssh servers, on the same machine: what they compute shares its cores. Where tasks sleep, they
do so to leave the cores to what is measured. What is measured beside what is wanted is the median
of the ratios of each round. The load is that of the last five minutes, at the end of a benchmark.\
"""


def main() -> None:
    """Run the benchmarks that the command line names, all without one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, help="in place of those of each benchmark")
    parser.add_argument("--case", action="append", default=[], help="only rows of this name")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what has been started is ended then
    for name in options.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        results = harness.run(benchmark, options.case, options.rounds)
        section = harness.table(benchmark, results)
        print(f"## {benchmark.title}\n\n{section}")
        if not options.dry:
            write(benchmark.title, f"{section}\n{occasion()}\n")
            if benchmark.plot:
                benchmark.plot(results, FILE.parent)


def write(title: str, section: str) -> None:
    """Put a section into the file, in the order of the benchmarks, and sum all up at its top."""
    text = FILE.read_text() if FILE.exists() else ""
    sections = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n)*)", text, re.MULTILINE))
    sections[title] = section
    titles = [one.title for one in BENCHMARKS.values() if one.title in sections]
    rows = ["| | wanted | measured |", "|---|---|---|"]
    for one in titles:
        found = re.search(r"^Wanted: (.*)\. Measured: (.*)\.$", sections[one], re.MULTILINE)
        rows += [f"| {one} | {found.group(1)} | {found.group(2)} |"] if found else []
    parts = [HEADER, machine(), "\n".join(rows)]
    parts += [f"## {one}\n\n{sections[one].strip()}" for one in titles]
    FILE.write_text("\n\n".join(parts) + "\n")


def machine() -> str:
    """Return one sentence on where this runs, with which versions."""
    needs = sorted({peer.needs for peer in PEERS.values()} | {"pathos", "ppft", "dill", "numpy"})
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    where = f"{os.cpu_count()} x {cpu.group(1) if cpu else platform.machine()}"
    packages = ", ".join(f"{name} {installed(name)}" for name in needs)
    return f"{where}, Linux {platform.release()}, Python {platform.python_version()}; {packages}."


def occasion() -> str:
    """Return when this was, and how busy the machine is: one's own processes are part of that."""
    return f"*{time.strftime('%Y-%m-%d')}, load {os.getloadavg()[1]:.1f}.*"


def installed(package: str) -> str:
    """Return a package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()

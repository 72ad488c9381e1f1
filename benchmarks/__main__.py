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
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import harness, local, remote
from benchmarks.harness import Benchmark
from benchmarks.peers import PEERS

BENCHMARKS: dict[str, Benchmark] = {
    "trivial": local.TRIVIAL,
    "one": local.ONE_AT_A_TIME,
    "uneven": local.UNEVEN_TASKS,
    "uneven-hosts": remote.UNEVEN_HOSTS,
    "far": remote.FAR_HOST,
    "start": remote.START,
    "shared": remote.SHARED,
    "results": local.LARGE_RESULTS,
    "far-results": remote.FAR_RESULTS,
    "memory": local.MEMORY,
    "idle": local.IDLE,
}

FILE = Path(__file__).with_name("results.md")

HEADER = """\
# Speed

Written by `python -m benchmarks`. Each measurement is a process of its own; the rows of a table
do the same work, in turn, several times. Given are medians and, in brackets, ranges. Hosts are
real ssh servers, on the same machine: what they compute shares its cores. Where tasks sleep, they
do so to leave the cores to what is measured.
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
    for name in options.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        results = harness.run(benchmark, options.case, options.rounds)
        section = harness.table(benchmark, results)
        print(f"## {benchmark.title}\n\n{section}")
        if not options.dry:
            write(benchmark.title, f"{section}\n{machine()}\n")
            if benchmark.plot:
                benchmark.plot(results, FILE.parent)


def write(title: str, section: str) -> None:
    """Put a section into the file, in the order of the benchmarks."""
    text = FILE.read_text() if FILE.exists() else ""
    sections = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n)*)", text, re.MULTILINE))
    sections[title] = section
    titles = [one.title for one in BENCHMARKS.values() if one.title in sections]
    FILE.write_text(HEADER + "".join(f"\n## {one}\n\n{sections[one].strip()}\n" for one in titles))


def machine() -> str:
    """Return one sentence on where and when this ran, with which versions."""
    needs = sorted({peer.needs for peer in PEERS.values()} | {"pathos", "ppft", "dill", "numpy"})
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    where = f"{os.cpu_count()} x {cpu.group(1) if cpu else platform.machine()}"
    load, day = os.getloadavg()[2], time.strftime("%Y-%m-%d")
    packages = ", ".join(f"{name} {installed(name)}" for name in needs)
    return (
        f"{day}, {where}, load of the last 15 minutes {load:.1f}, Linux {platform.release()}, "
        f"Python {platform.python_version()}; {packages}."
    )


def installed(package: str) -> str:
    """Return a package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()

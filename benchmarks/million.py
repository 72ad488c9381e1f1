"""A million brief items by `SlurmPool` and `SgePool`, in as many jobs as these choose.

    python -m benchmarks.million [--items 1000000] [--chunks N] [slurm] [sge]

Each batch system has four slots on this machine, and is brought up before. Printed are the seconds
of `map`, the jobs, and the most memory that the caller has had in use, of which the items and the
results themselves are a part.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

from clusters import open_sge, open_slurm

from benchmarks.tasks import square

OPENERS = {"slurm": lambda: open_slurm(accounts=False), "sge": open_sge}


def measure(kind: str, items: int, chunks: int | None) -> None:
    """Map by a pool, compare what comes, and print what it took."""
    from ostap_parallel.arrays import run
    from ostap_parallel.batch import SgePool, SlurmPool

    made: list[int] = []
    create = run.create

    def creating(*args, **kwargs):
        made.append((found := create(*args, **kwargs)).settings.chunks)
        return found

    run.create = creating
    with {"slurm": SlurmPool, "sge": SgePool}[kind](chunks=chunks) as pool:
        start = time.perf_counter()
        results = pool.map(square, range(items))
        seconds = time.perf_counter() - start
    assert len(results) == items
    assert all(value == n * n for n, value in enumerate(results))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{kind}: {items} items, {made[0]} jobs, {seconds:.1f} s, {memory:.0f} MB", flush=True)


def main() -> None:
    """Measure what the command line names, each in a process of its own; all without one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(OPENERS))
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.kinds) - OPENERS.keys():
        parser.error(f"no batch system {', '.join(unknown)}; there are {', '.join(OPENERS)}")
    for kind in options.kinds or OPENERS:
        if options.inside:
            measure(kind, options.items, options.chunks)
            continue
        with OPENERS[kind]() as cluster, tempfile.TemporaryDirectory(dir=cluster.directory) as at:
            argv = [sys.executable, *sys.orig_argv[1:]]
            path = os.pathsep.join(filter(None, sys.path))
            environ = {**os.environ, **cluster.environ, "PYTHONPATH": path}
            argv = [sys.executable, "-m", "benchmarks.million", "--inside", kind]
            argv += ["--items", str(options.items)]
            argv += ["--chunks", str(options.chunks)] if options.chunks else []
            subprocess.run(argv, cwd=at, env=environ, check=True)


if __name__ == "__main__":
    main()

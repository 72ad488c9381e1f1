"""Standard deviations of many samples, by any pool: only the line that makes it differs.

python deviations.py [multiprocessing | hosts | slurm | sge]
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy

import ostap_parallel
from ostap_parallel import batch

POOLS = {
    "multiprocessing": lambda: multiprocessing.Pool(3),
    "hosts": lambda: ostap_parallel.Pool(0, servers="auto"),
    "slurm": lambda: batch.SlurmPool(),
    "sge": lambda: batch.SgePool(),
}

JOBS = [[3, 4, 56, 7], [22, 5, 4, 5, 7], [11, 2, 545, 235, 6, 3], [22, 45, 6, 4]]


def count_events(run):
    """Count what is above a threshold in a file; a job may be a reference to what is large."""
    values = [int(line) for line in run["lines"] if int(line) not in run["broken"]]
    return sum(value > run["threshold"] for value in values)


def make_runs():
    """Return what a telescope may have seen in some nights."""
    with tempfile.TemporaryDirectory() as name:
        for night in range(6):
            Path(name, f"{night:06}.txt").write_text("\n".join(map(str, range(night, 100, 7))))
        files = sorted(Path(name).iterdir())
        return [
            {"lines": file.read_text().split(), "broken": [54, 85, 14], "threshold": 10}
            for file in files
        ]


def main(pool):
    results = pool.map(numpy.std, JOBS)
    assert results == [numpy.std(job) for job in JOBS]
    runs = make_runs()
    counts = pool.map(count_events, runs)
    assert counts == [count_events(run) for run in runs]
    return f"{results[0]:.2f}, {sum(counts)} events"


if __name__ == "__main__":
    with POOLS[sys.argv[1] if sys.argv[1:] else "multiprocessing"]() as pool:
        print(main(pool))

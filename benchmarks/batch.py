"""Benchmarks of pools and allocations on batch systems, which are brought up for each of them."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from clusters import Cluster, open_sge, open_slurm

from benchmarks import tasks
from benchmarks.harness import ROOT, Benchmark, Case, Figures, Results

SLOTS = 4
NAPS, NAP = 64, 0.05
TRIVIAL, FEW = 2000, 64
LONG = 30.0  # seconds of a nap during which its driver is killed
LOOKS = 1, 24  # seconds after that
PATIENCE = 60.0
OURS, PARTY = "SlurmPool, 4 jobs", "pypoolparty slurm.Pool, 4 chunks"
ALLOCATIONS = "WorkManager on Slurm(4, cpus=2)"

Map = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]


# -- what is measured: how each is made, and maps


@contextmanager
def pool(kind: str) -> Iterator[Map]:
    """Make our pool of array jobs."""
    from ostap_parallel.batch import SgePool, SlurmPool

    with (SgePool if kind == "sge" else SlurmPool)(chunks=SLOTS, keep=False) as made:
        yield made.imap_unordered


@contextmanager
def allocations(kind: str) -> Iterator[Map]:
    """Have jobs as hosts."""
    from ostap_parallel import Sge, Slurm

    make = Sge if kind == "sge" else Slurm
    # SGE hands on no environment
    given = {"python": sys.executable, "environment": f"export PYTHONPATH={ROOT}"}
    with workers([make(SLOTS, cpus=2, walltime="10m", **given)]) as made:
        yield made


@contextmanager
def within(kind: str) -> Iterator[Map]:
    """Have the nodes of the job as hosts in which this is."""
    argv = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    nodes = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    with workers([f"{node}*2" for node in nodes], way="srun", python=sys.executable) as made:
        yield made


@contextmanager
def workers(servers: list[Any], **given: Any) -> Iterator[Map]:
    from ostap_parallel import WorkManager

    with WorkManager(0, servers, config=(), silent=True, **given) as manager:
        yield manager.iexecute


@contextmanager
def party(kind: str) -> Iterator[Map]:
    """Make pypoolparty's pool, which looks every half second."""
    import pypoolparty

    make = pypoolparty.sun_grid_engine.Pool if kind == "sge" else pypoolparty.slurm.Pool
    given = {"polling_interval": 0.5, "python_path": sys.executable}
    yield make(num_chunks=SLOTS, **given).map


@contextmanager
def party_array(kind: str) -> Iterator[Map]:
    """Make pypoolparty's other pool."""
    import pypoolparty

    yield pypoolparty.slurm.array.Pool(polling_interval=0.5, python_path=sys.executable).map


@contextmanager
def submitit(kind: str) -> Iterator[Map]:
    """Make submitit's executor, with a job for each item."""
    from submitit import AutoExecutor

    executor = AutoExecutor(folder="log", cluster="slurm")
    executor.update_parameters(timeout_min=5, slurm_array_parallelism=SLOTS)
    yield lambda function, items: (job.result() for job in executor.map_array(function, items))


@contextmanager
def dask(kind: str) -> Iterator[Map]:
    """Make dask-jobqueue's cluster."""
    from dask.distributed import Client, as_completed
    from dask_jobqueue import SGECluster, SLURMCluster

    given = {"cores": 1, "memory": "200MB", "walltime": "00:10:00", "processes": 1}
    if kind == "sge":
        given["resource_spec"] = "h_rt=600"
    with (SGECluster if kind == "sge" else SLURMCluster)(**given) as cluster:
        cluster.scale(SLOTS)
        with Client(cluster) as client:

            def run(function: Callable[[Any], Any], items: list[Any]) -> Iterable[Any]:
                futures = client.map(function, items, pure=False)
                if len(items) <= NAPS:
                    return (future.result() for future in as_completed(futures))
                return client.gather(futures)

            yield run


MAKERS: dict[str, Callable[[str], AbstractContextManager[Map]]] = {
    one.__name__: one for one in (pool, allocations, within, party, party_array, submitit, dask)
}

# What each imports, which is no part of its time.
MODULES = {
    "pool": "ostap_parallel.batch.pool",
    "allocations": "ostap_parallel.faces.manager ostap_parallel.supply.entries",
    "within": "ostap_parallel.faces.manager",
    "party": "pypoolparty",
    "party_array": "pypoolparty",
    "submitit": "submitit",
    "dask": "dask.distributed dask_jobqueue",
}

# Those that have a job for each item: 2000 would take minutes. And those that stay up.
SINGLE, LASTING = {"party_array", "submitit"}, {"allocations", "within", "dask"}


# -- what is done with them, by a process of its own


def load(maker: str) -> None:
    for name in MODULES[maker].split():
        importlib.import_module(name)


def times(maker: str, kind: str) -> Figures:
    """Return the seconds of maps, each from nothing or by what stays up."""
    load(maker)
    figures = {}
    start = time.perf_counter()
    with MAKERS[maker](kind) as run:
        results = iter(run(tasks.nap, [NAP] * NAPS))
        values = [next(results)]
        figures["64 x 50 ms: first"] = time.perf_counter() - start
        values += results
        figures["all"] = time.perf_counter() - start
        assert values == [1] * NAPS, f"{values.count(None)} of {NAPS} results are None"
    count = FEW if maker in SINGLE else TRIVIAL
    start = time.perf_counter()
    with MAKERS[maker](kind) as run:
        for name in "2000 trivial", "again":
            squares = sorted(run(tasks.square, [*range(count)]))
            assert squares == [x * x for x in range(count)], squares
            figures[name] = (time.perf_counter() - start) * TRIVIAL / count
            if maker not in LASTING:
                break
            start = time.perf_counter()
    return figures


def loss(maker: str, kind: str) -> dict[str, str]:
    """Return what comes of an item that kills its worker, and after how many seconds."""
    load(maker)
    start = time.perf_counter()
    with MAKERS[maker](kind) as run:
        try:
            came = f"returns {[*run(tasks.end_worker, [0])]}"
        except Exception as exc:
            came = type(exc).__name__
        return {"item killed": f"{came}, {time.perf_counter() - start:.2g} s"}


def drive(maker: str, kind: str) -> Figures:
    """Have long work done, and never come to its end."""
    Path("driver").write_text(str(os.getpid()))
    with MAKERS[maker](kind) as run:
        print([*run(tasks.nap, [LONG] * 2 * SLOTS)])
    return {}


# -- one case


@contextmanager
def on(kind: str) -> Iterator[Cluster]:
    """Bring up a batch system of four slots, and be in a directory that its jobs see."""
    opening = open_slurm(accounts=kind == "accounts") if kind != "sge" else open_sge(SLOTS)
    with opening as cluster, tempfile.TemporaryDirectory(dir=cluster.directory) as folder:
        os.environ |= cluster.environ
        os.chdir(folder)
        yield cluster


def case(maker: str, kind: str, prefix: Sequence[str] = ()) -> Figures:
    """Measure one of the makers, in a process of its own for each of what is done."""
    with on(kind) as cluster:
        figures = begun("times", maker, kind, prefix).get(4 * PATIENCE)
        cluster.cancel_all()
        try:
            figures |= begun("loss", maker, kind, prefix).get(PATIENCE)
        except subprocess.TimeoutExpired:
            figures["item killed"] = f"nothing in {PATIENCE:g} s"
        cluster.cancel_all()
        with begun("drive", maker, kind, prefix) as driving:
            await_work(cluster, maker, driving)
            os.kill(int(Path("driver").read_text()), signal.SIGKILL)
            killed = time.monotonic()
            left = []
            for seconds in LOOKS:
                time.sleep(max(0.0, killed + seconds - time.monotonic()))
                left.append(str(len(elements(cluster))))
        figures["driver killed: jobs after 1 s, 24 s"] = ", ".join(left)
        cluster.cancel_all()
        return figures


class begun:
    """One of what is done, begun in a process of its own."""

    def __init__(self, what: str, maker: str, kind: str, prefix: Sequence[str]) -> None:
        self.answer = Path("answer").absolute()
        self.answer.unlink(missing_ok=True)
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115
        words = [f"benchmarks.batch:{what}", json.dumps({"maker": maker, "kind": kind})]
        argv = [*prefix, sys.executable, "-m", "benchmarks.case", *words, str(self.answer)]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=self.words)

    def get(self, timeout: float) -> Any:
        """Return what it gives; raises subprocess.TimeoutExpired."""
        with self:
            self.process.wait(timeout)
            self.words.seek(0)
            last = self.words.read().strip().splitlines()[-1:] or ["no word"]
            assert self.answer.exists(), last[0][:200]
            return json.loads(self.answer.read_text())

    def __enter__(self) -> begun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self.words.close()


def await_work(cluster: Cluster, maker: str, driving: begun) -> None:
    """Wait until all slots are in use, and for those who are not told of their jobs a second."""
    deadline = time.monotonic() + PATIENCE
    mark = "RUNNING" if cluster.name == "slurm" else " r "
    least = {"within": 1, "allocations": SLOTS // 2}.get(maker, SLOTS)
    while sum(mark in line for line in elements(cluster)) < least:
        assert driving.process.poll() is None, "the driver has ended"
        assert time.monotonic() < deadline, elements(cluster)
        time.sleep(0.1)
    time.sleep(2.0)


def elements(cluster: Cluster) -> list[str]:
    """Return a line for each job, also of those that wait in arrays."""
    if cluster.name == "slurm":
        return cluster.try_("squeue", "-h", "-r", "-o", "%i %T").splitlines()
    return cluster.try_("qstat", "-g", "d", "-u", "*").splitlines()[2:]


# -- what the batch system itself takes


BARE = """\
#!/bin/bash
sleep {nap}
date +%s.%N >first.$RANDOM$RANDOM
for n in {{2..{count}}}; do sleep {nap}; done
date +%s.%N >last.$RANDOM$RANDOM
"""


def floor(kind: str) -> Figures:
    """Measure jobs without Python that do the naps, and tell themselves when that was."""
    figures: Figures = {}
    with on(kind) as cluster:
        works = (NAPS // SLOTS, ["64 x 50 ms: first", "all"]), (1, ["", "2000 trivial"])
        for count, names in works:
            nap = NAP if count > 1 else 0
            start = time.time()
            bare(cluster, BARE.format(nap=nap, count=count))
            for pattern, name in zip(("first.*", "last.*"), names, strict=True):
                found = [float(path.read_text() or 0) for path in Path().glob(pattern)]
                if name:
                    figures[name] = (min if pattern == "first.*" else max)(found) - start
                for path in Path().glob(pattern):
                    path.unlink()
    return figures


def bare(cluster: Cluster, script: str) -> None:
    """Run a job on each slot, and wait until all have ended."""
    if cluster.name == "slurm":
        cluster.run("sbatch", f"--array=1-{SLOTS}", "-o", "/dev/null", data=script)
    else:
        options = ["-t", f"1-{SLOTS}", "-o", "/dev/null", "-j", "y", "-S", "/bin/bash", "-cwd"]
        cluster.run("qsub", *options, data=script)
    deadline = time.monotonic() + PATIENCE
    while len([*Path().glob("last.*")]) < SLOTS:
        assert time.monotonic() < deadline, cluster.jobs()
        time.sleep(0.1)


def judge(results: Results) -> str:
    """Return ours beside the fastest peer's."""
    pools = results.ratio("all", OURS, PARTY)
    hosts = results.ratio("all", ALLOCATIONS, "dask-jobqueue SLURMCluster")
    text = f"{pools:.2f} times the seconds of pypoolparty in as many chunks; allocations"
    return f"{text} {hosts:.2f} times those of dask-jobqueue"


INSIDE = ["salloc", "--quiet", "-N2", "--ntasks-per-node=2"]


def row(name: str, maker: str, kind: str, needs: str = "ostap_parallel", **given: Any) -> Case:
    return Case(name, case, {"maker": maker, "kind": kind, **given}, needs)


BATCH = Benchmark(
    "Batch systems",
    "64 naps of 50 ms, and 2000 trivial items, on 4 slots of a SLURM or an SGE on this machine "
    "that is brought up before; seconds from nothing, a pool or cluster made anew for each, and "
    "*again* by one that is up. Of those with a job for each item, the time of 2000 is made from "
    "that of 64. Then what comes of an item that kills its worker, and after how long, from "
    "nothing; and how many jobs there are some time after the process has been killed by -9 "
    "that has begun 8 naps of 30 s: arrays are to outlive it, and allocations are not. The first "
    "rows are what the batch system takes by itself: an array of four jobs of bash that sleep.",
    [
        Case("sbatch alone", floor, {"kind": "slurm"}),
        Case("qsub alone", floor, {"kind": "sge"}),
        row(ALLOCATIONS, "allocations", "slurm"),
        row("WorkManager on Sge(4, cpus=2)", "allocations", "sge"),
        row("WorkManager within a job", "within", "slurm", prefix=INSIDE),
        row(OURS, "pool", "slurm"),
        row("SgePool, 4 jobs", "pool", "sge"),
        row(PARTY, "party", "slurm", "pypoolparty"),
        row("pypoolparty slurm.array.Pool", "party_array", "slurm", "pypoolparty"),
        row("pypoolparty sun_grid_engine.Pool, 4 chunks", "party", "sge", "pypoolparty"),
        row("submitit map_array", "submitit", "accounts", "submitit"),
        row("dask-jobqueue SLURMCluster", "dask", "slurm", "dask_jobqueue"),
        row("dask-jobqueue SGECluster", "dask", "sge", "dask_jobqueue"),
    ],
    "no more seconds than any of these",
    judge,
    rounds=1,
)

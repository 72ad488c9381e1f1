"""Benchmarks on private ssh hosts."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sshd import HostOptions, descendants, stat_of, wait_for

from benchmarks.harness import Benchmark, Case, Figures, Results
from benchmarks.local import IN_TURN, uneven_in_turn, uneven_loops
from benchmarks.plots import plot_start
from benchmarks.tasks import burn_unevenly, look_up, make_bytes, nap, square, stall, who_and_where

SITE = "export PYTHONPATH=~/site"


@contextlib.contextmanager
def open_manager(names: Sequence[str], ssh_config: str, workers: int = 1) -> Iterator[Any]:
    """Open our manager without local workers; its hosts may still be starting."""
    from ostap_parallel import WorkManager

    with WorkManager(
        0,
        names,
        ncpus_per_host=workers,
        environment=SITE,
        ssh_config=ssh_config,
        config=(),
        silent=True,
    ) as manager:
        yield manager


# -- uneven hosts, far hosts -----------------------------------------------------------------


def uneven_hosts(ssh_config: str, seed: int) -> Figures:
    """Return how long uneven tasks take on uneven hosts, beside what they must."""
    loops = uneven_loops(seed)
    with open_manager(["h1", "h2"], ssh_config) as manager:
        manager.wait_for_hosts()
        list(manager.iexecute(burn_unevenly, [1000] * 100))
        begin = time.perf_counter()
        taken = list(manager.iexecute(burn_unevenly, loops))
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "of the bound": seconds / max(sum(taken) / 1.25, *taken)}


UNEVEN_HOSTS = Benchmark(
    "Uneven hosts",
    "The same tasks on two hosts with one worker each, of which one runs every loop four times. "
    "The bound counts its speed as a quarter.",
    [Case("ostap_parallel", uneven_hosts), Case(IN_TURN, uneven_in_turn, {"speeds": [1.0, 0.25]})],
    "1.10 of the bound",
    lambda results: f"{results.median('ostap_parallel', 'of the bound'):.3f}",
    rounds=5,
    hosts=[HostOptions()] * 2,
)


def stalling(ssh_config: str, seed: int, speculate: bool) -> Figures:
    """Return how long tasks take on two hosts, one of which stalls on the way."""
    times = [0.02 + 0.06 * ((7919 * (n + seed)) % 100) / 100 for n in range(200)]
    with open_manager(["h1", "h2"], ssh_config, workers=2) as manager:
        manager.wait_for_hosts()
        list(manager.iexecute(nap, [0.01] * 20))
        begin = time.time()
        after = sum(times) / 4 / 2  # in the middle of what they would take together
        items = [(one, begin + after) for one in times]
        assert sorted(manager.process(stall, items, speculate=speculate)) == sorted(times)
        seconds = time.time() - begin
    bound = after + (sum(times) - 4 * after) / 2
    return {"seconds": seconds, "of the bound": seconds / bound}


STALLING = Benchmark(
    "A host that stalls",
    "200 tasks of 20 to 80 ms on two hosts with two workers each, one of which stalls for 15 s in "
    "the middle. The bound is what the other one needs for what is left then.",
    [
        Case("speculate=True", stalling, {"speculate": True}),
        Case("without", stalling, {"speculate": False}),
    ],
    "1.15 of the bound, where without it is 3 or more",
    lambda results: (
        f"{results.median('speculate=True', 'of the bound'):.2f} of the bound, "
        f"{results.median('without', 'of the bound'):.1f} without"
    ),
    hosts=[HostOptions(env={"STALLS": "1"}), HostOptions()],
)


def far(host: str, ssh_config: str, count: int = 10_000) -> Figures:
    """Return how many tasks of 1 ms two workers of a host do in a second."""
    with open_manager([host], ssh_config, workers=2) as manager:
        manager.wait_for_hosts()
        list(manager.iexecute(nap, [0.001] * 100))
        begin = time.perf_counter()
        assert sum(manager.iexecute(nap, [0.001] * count)) == count
        return {"tasks per second": count / (time.perf_counter() - begin)}


NEAR, FAR = "at the end of a cable", "with a round trip of 20 ms"

FAR_HOST = Benchmark(
    "A far host",
    "10 000 tasks that sleep 1 ms on two workers of one host with a network of its own.",
    [Case(NEAR, far, {"host": "h1"}), Case(FAR, far, {"host": "h2"})],
    "0.95 of what it is without delay",
    lambda results: f"{results.ratio('tasks per second', FAR, NEAR):.3f}",
    hosts=[HostOptions(network=True), HostOptions(delay=0.010)],
)


# -- starting --------------------------------------------------------------------------------

STARTS = (1, 4, 16, 32)
CORES = os.cpu_count() or 1


def start(count: int, ssh_config: str) -> Figures:
    """Return the seconds until each host has given a result, and what the processor needs."""
    import ostap_parallel.faces.manager  # noqa: F401  (what is measured is the start of hosts)

    names = [f"h{number + 1}" for number in range(count)]
    begin = time.perf_counter()
    with open_manager(names, ssh_config) as manager:
        answers = manager.iexecute(who_and_where, itertools.repeat(0.05), chunk_size=1)
        workers = meet(answers, count)
        seconds = time.perf_counter() - begin
        interpreters = interpreters_of(workers)
        every = {*descendants(os.getpid()), os.getpid(), *sessions(workers)}
        return {
            "seconds": seconds,
            "interpreters' CPU time / cores": sum(map(cpu_of, interpreters)) / CORES,
            "all CPU time / cores": sum(cpu_of(pid, with_ended=True) for pid in every) / CORES,
        }


def meet(results: Iterator[tuple[str, int]], count: int) -> list[int]:
    """Read results until they have come from `count` hosts; return their workers' processes."""
    seen: dict[str, int] = {}
    for host, worker in results:
        seen[host] = worker
        if len(seen) == count:
            break
    return list(seen.values())


def interpreters_of(workers: Iterable[int]) -> set[int]:
    """Return workers, and the server and the template that they are of."""
    programs = {pid: Path(f"/proc/{pid}/exe").readlink().name for pid in sessions(workers)}
    return {pid for pid, name in programs.items() if name.startswith("python")}


def cpu_of(pid: int, with_ended: bool = False) -> float:
    """Return the processor time of a process, and of its children that have ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if with_ended else 13])) / os.sysconf("SC_CLK_TCK")


def sessions(pids: Iterable[int]) -> set[int]:
    """Return processes with their ancestors on their hosts, the listening sshd left out."""
    found: set[int] = set()
    for pid in pids:
        while (parent := (stat_of(pid) or (1,))[0]) not in (0, 1, os.getppid()):
            found.add(pid)
            pid = parent
    return found


def start_ssh(count: int, ssh_config: str) -> Figures:
    """Return the seconds that plain ssh takes, started for all hosts at once."""
    begin = time.perf_counter()
    argv = ["ssh", "-F", ssh_config]
    running = [subprocess.Popen([*argv, f"h{n + 1}", "true"]) for n in range(count)]
    assert not any(process.wait() for process in running)
    return {"seconds": time.perf_counter() - begin}


def start_pathos(count: int, ssh_config: str) -> Figures:
    """Return the seconds until ppft's servers, started and reached by pathos, give a result."""
    import ppft
    from pathos.secure import Pipe, Tunnel

    with pathos_ssh(ssh_config):
        begin = time.perf_counter()
        tunnels: list[Any] = []
        ports: list[int] = []
        for name in (f"h{number + 1}" for number in range(count)):
            port = 20_000 + os.getpid() % 20_000 + len(tunnels)  # they share one loopback
            pipe = Pipe(name, verbose=False)
            command = (
                f"{SITE}; exec python3 -m ppft.server -i 127.0.0.1 -p {port} -w 1 -s secret -t 99"
            )
            pipe(host=name, command=command, background=True)
            pipe.launch()
            tunnel = Tunnel(name)
            tunnels.append(tunnel)
            ports.append(tunnel.connect("127.0.0.1", port, through=name))
        wait_for(lambda: all(map(answers, ports)), "all ppft servers answer", 60)
        servers = tuple(f"127.0.0.1:{port}" for port in ports)
        server = ppft.Server(0, ppservers=servers, secret="secret")
        try:
            meet(endless(server, 4 * count), count)
            return {"seconds": time.perf_counter() - begin}
        finally:
            server.destroy()


def answers(port: int) -> bool:
    """Return whether a server has a word for us; a tunnel without one hangs up."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        return bool(connection.recv(1))


def endless(server: Any, width: int) -> Iterator[tuple[str, int]]:
    """Yield where tasks ran, for ever, with `width` of them under way."""
    while True:
        jobs = [server.submit(who_and_where, (0.05,)) for _ in range(width)]
        yield from (job() for job in jobs)


@contextlib.contextmanager
def pathos_ssh(ssh_config: str) -> Iterator[None]:
    """Put an ssh that reads our configuration first on PATH: a tunnel has no room for options."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "ssh"
        script.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {ssh_config} "$@"\n')
        script.chmod(0o755)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        yield


def judge_start(results: Results) -> str:
    seconds = results.median("ostap_parallel, 16 hosts", "seconds")
    floor = results.median("ostap_parallel, 16 hosts", "interpreters' CPU time / cores")
    pathos = results.median("pathos, one by one, 16 hosts", "seconds")
    return f"{seconds / floor:.2f} times the floor, {pathos / seconds:.1f} times below pathos"


START = Benchmark(
    "Start of hosts",
    "Until each of several hosts with one worker has given a result. The floor is the processor "
    "time that the interpreters of hosts, a server, its template and a worker each, have used by "
    "then, divided by the cores of this machine, which all hosts share; all is that with the "
    "caller, ssh, sshd and what they have run.",
    [
        *(Case(f"ostap_parallel, {n} hosts", start, {"count": n}) for n in STARTS),
        *(Case(f"plain `ssh HOST true`, {n} hosts", start_ssh, {"count": n}) for n in STARTS),
        *(
            Case(f"pathos, one by one, {n} hosts", start_pathos, {"count": n}, rounds=1)
            for n in STARTS[:3]
        ),
    ],
    "16 hosts within 2 times the floor, and 10 times below pathos",
    judge_start,
    hosts=[HostOptions()] * max(STARTS),
    plot=plot_start,
)


# -- data ------------------------------------------------------------------------------------

MEGABYTES = 100


def shared(ssh_config: str) -> Figures:
    """Return what sharing an array with tasks on two hosts costs."""
    import numpy

    array = numpy.random.default_rng(1).random(MEGABYTES * 125_000)
    names = ["h1", "h2"]
    with open_manager(names, ssh_config, workers=2) as manager:
        manager.wait_for_hosts()
        list(manager.iexecute(square, range(100)))
        before = [written_to(name) for name in names]
        begin, workers = time.perf_counter(), set()
        results = manager.iexecute(look_up, range(1000), shared={"table": array}, ordered=True)
        for index, (value, worker) in enumerate(results):
            assert value == array[index::1000].sum()
            workers.add(worker)
        seconds = time.perf_counter() - begin
        sent = [written_to(name) - was for name, was in zip(names, before, strict=True)]
        return {
            "MB over each connection": max(sent) / 1e6,
            "MB of memory per host": sum(map(memory_of, interpreters_of(workers))) / len(names),
            "workers that took part": len(workers),
            "seconds": seconds,
        }


def written_to(host: str) -> int:
    """Return how many bytes our ssh connection to a host has written."""
    for pid in descendants(os.getpid()):
        found = stat_of(pid)
        if found and found[1].startswith("ssh ") and f"-- {host} " in found[1]:
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            return int(lines[1].removeprefix("wchar: "))
    raise LookupError(f"no ssh connection to {host}")


def memory_of(pid: int) -> float:
    """Return a process' memory in MB; what it shares with others counts in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def judge_shared(results: Results) -> str:
    sent = results.median("ostap_parallel", "MB over each connection") / MEGABYTES
    held = results.median("ostap_parallel", "MB of memory per host") / MEGABYTES
    return f"{sent:.2f} times over a connection, {held:.1f} times in memory with the interpreters"


SHARED = Benchmark(
    "A shared array",
    f"1000 tasks on two hosts with two workers each read a numpy array of {MEGABYTES} MB, given by"
    " `shared=`, each a thousandth from all over it. The bytes are those that ssh has written; the"
    " memory is that of server and workers afterwards, what they share counted once.",
    [Case("ostap_parallel", shared, needs="numpy")],
    "once per host over its connection, and in the memory of each host",
    judge_shared,
    hosts=[HostOptions()] * 2,
)


def far_results(ssh_config: str, count: int = 200, size: int = 10_000_000) -> Figures:
    """Return how fast large results arrive from a host."""
    with open_manager(["h1"], ssh_config, workers=2) as manager:
        manager.wait_for_hosts()
        list(manager.iexecute(square, range(100)))
        begin = time.perf_counter()
        total = sum(map(len, manager.iexecute(make_bytes, [size] * count)))
        assert total == count * size
        return {"MB/s": total / (time.perf_counter() - begin) / 1e6}


def cat(ssh_config: str, size: int = 2_000_000_000) -> Figures:
    """Return how fast ssh brings a file."""
    ssh = ["ssh", "-F", ssh_config, "h1"]
    subprocess.run([*ssh, f"truncate -s {size} ~/zeros"], check=True)
    begin, total = time.perf_counter(), 0
    with subprocess.Popen([*ssh, "cat ~/zeros"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while data := process.stdout.read(1 << 20):
            total += len(data)
    assert total == size
    return {"MB/s": total / (time.perf_counter() - begin) / 1e6}


FAR_RESULTS = Benchmark(
    "Large results through ssh",
    "200 results of 10 MB of bytes from two workers of a host, beside a file of 2 GB.",
    [Case("ostap_parallel", far_results), Case("`ssh HOST cat FILE`", cat)],
    "0.7 of plain ssh",
    lambda results: f"{results.ratio('MB/s', 'ostap_parallel', '`ssh HOST cat FILE`'):.2f} of it",
    hosts=[HostOptions()] * 2,
)

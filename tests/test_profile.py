"""Profiles by pathos' names: of this process, and of workers here and on hosts."""

from __future__ import annotations

import os
import pstats
import subprocess
import sys
from pathlib import Path

import pytest

from ostap_parallel import Executor
from ostap_parallel import profile as pr
from ostap_parallel.pools import ParallelPool, stats


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    pr.disable_profiling()
    pr.clear_worker_stats()


def work(item):
    return sum(map(abs, range(item)))


def calls(stats, name):
    return sum(row[0] for (_, _, known), row in stats.stats.items() if known == name)


def test_in_this_process(capsys):
    decorated = pr.profiled(gen=pr.process_id)(work)
    assert decorated(3) == 3
    assert not list(Path().iterdir())
    pr.enable_profiling()
    assert [decorated(n) for n in range(3)] == [0, 0, 1]
    assert calls(pstats.Stats(f"id-{os.getpid()}.prof"), "work") == 3
    assert any("work" in str(entry.code) for entry in pr.get_stats())
    pr.print_stats()
    assert "function calls" in capsys.readouterr().out
    pr.clear_stats()
    assert pr.get_stats() == []
    pr.dump_stats(prefix="all-")
    assert Path(f"all-{os.getpid()}.prof").exists()
    pr.disable_profiling()
    assert pr.get_stats() is None
    assert decorated.__name__ == "work"
    assert pr.not_profiled(decorated) is work


def test_everything_in_this_process():
    pr.start_profiling()
    work(3)
    pr.stop_profiling()
    assert any("work" in str(entry.code) for entry in pr.get_stats())


@pytest.mark.slow
def test_on_workers(own_hosts):
    pr.enable_profiling()
    decorated = pr.profiled(prefix="p-")(work)
    with Executor(1, "h1*1", ssh_config=own_hosts.ssh_config, config=()) as executor:
        executor.wait_for_hosts()
        assert list(executor.map(decorated, range(40))) == [work(n) for n in range(40)]
        executor.backend.flush()
    assert calls(pr.total_stats(), "work") == 40
    assert sum(calls(one, "work") for one in pr.worker_stats().values()) == 40
    assert {name.split("-")[0] for name in pr.worker_stats()} <= {"local", "h1"}
    files = list(Path().glob("p-*.prof"))
    assert len(files) == len(pr.worker_stats())
    assert sum(calls(pstats.Stats(str(file)), "work") for file in files) == 40


def test_nothing_comes_while_it_is_off():
    with Executor(1) as executor:
        assert list(executor.map(pr.profiled()(work), range(3))) == [0, 0, 1]
        executor.backend.flush()
    assert pr.total_stats() is None


@pytest.mark.slow
def test_what_raises_is_profiled():
    pr.enable_profiling()
    with Executor(1) as executor:
        future = executor.submit(pr.profiled()(work), "x")
        with pytest.raises(TypeError):
            future.result()
        executor.backend.flush()
    assert calls(pr.total_stats(), "work") == 1


def test_by_the_pipe_of_a_pool(capfd):
    pool = ParallelPool(1)
    assert pr.profile("cumulative", pipe=pool.pipe)(work, 5) == 10
    assert pr.profile(pipe=pool.pipe, prefix="q-")(work, 5) == 10
    pool.close()
    pool.join()
    pool.clear()
    assert "Ordered by: cumulative time" in capfd.readouterr().out
    assert calls(pr.total_stats(), "work") == 1
    assert len(list(Path().glob("q-*.prof"))) == 1
    assert pr.profile(prefix="r-")(work, 5) == 10
    assert len(list(Path().glob("r-*.prof"))) == 1


@pytest.mark.slow
def test_a_program_for_pathos(tmp_path):
    """Its imports are changed, and its sleeps are shorter."""
    program = tmp_path / "program.py"
    program.write_text("""
from ostap_parallel.profile import *
from ostap_parallel.pools import ParallelPool, stats
import time

if __name__ == "__main__":
    config = dict(gen=process_id)

    def _work(i):
        time.sleep(0.001)
        return (i, 0.001)

    work = profiled(**config)(_work)
    enable_profiling()
    for i in map(not_profiled(work), range(-30, -28)):
        print(i)

    def import_abc(*args):
        import abc

    pool = ParallelPool(1)
    profile("cumulative", pipe=pool.pipe)(import_abc)
    pool.close()
    pool.join()
    pool.clear()
""")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(-30, 0.001)\n(-29, 0.001)\n")
    assert "import_abc" in done.stdout


@pytest.mark.slow
def test_statistics_of_pools(own_hosts):
    """In the form of `pathos.parallel.stats`."""
    pool = ParallelPool(
        0, servers="h1*1", ssh_config=own_hosts.ssh_config, config=(), id="statistics"
    )
    try:
        assert pool.map(abs, range(10)) == list(range(10))
        assert sorted(pool.uimap(abs, range(5))) == list(range(5))
        assert pool.pipe(abs, 3) == 3
        with pytest.raises(TypeError):
            pool.pipe(abs, "x")
        head, columns, row, elapsed, active, *_ = stats(pool).splitlines()
        assert head == "Job execution statistics:"
        assert columns.split(" | ")[0] == " job count"
        assert [cell.strip() for cell in row.split("|")][::4] == ["17", "h1"]
        assert float(elapsed.rpartition(" ")[2]) > 0
        assert active == "0 active tasks, 1 cores"
        rows = [[cell.strip() for cell in line.split("|")] for line in stats().splitlines()]
        assert ["17", "h1"] in [cells[::4] for cells in rows]  # of all pools that there are
    finally:
        pool.clear()
    assert len(stats(pool).splitlines()) == 5

"""Runs in arrays of jobs, on real SLURM and SGE."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import operator
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path

import pytest
from functions import PATIENCE, Refusal, Unsendable, refuse, script_environ, wait_for
from helpers import processes_of, wait_until

from ostap_parallel import SerializeError, Slurm, TaskMerger, WorkerLost, WorkManager
from ostap_parallel.arrays import watching
from ostap_parallel.arrays.records import Record, Writer, read_on
from ostap_parallel.batch import JobRefused, Run, SgePool, SlurmPool
from ostap_parallel.batch import slurm as party_slurm
from ostap_parallel.batch import sun_grid_engine as party_sge
from ostap_parallel.cli import main

POOLS = {"slurm": SlurmPool, "sge": SgePool}

# The file system is a local one: what is not seen is not there.
QUICK = {"polling": 0.5, "grace": 3.0}


@pytest.fixture
def pool_of(cluster, tmp_path):
    """A function that makes pools of the batch system, with a directory of the test's."""
    with contextlib.ExitStack() as stack:

        def make(**given):
            settings = {"directory": tmp_path / "runs", **QUICK, **given}
            return stack.enter_context(POOLS[cluster.name](**settings))

        yield make


@pytest.fixture
def pool(pool_of):
    return pool_of(chunks=2)


@pytest.fixture
def slurm_pool(slurm, tmp_path, monkeypatch):
    """A function that makes pools of SLURM."""
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:

        def make(**given):
            settings = {"directory": tmp_path / "runs", **QUICK, **given}
            return stack.enter_context(SlurmPool(**settings))

        yield make


def square(x):
    return x * x


def die(how):
    if how == "exit":
        print("about to end", file=sys.stderr, flush=True)
        os._exit(3)
    if how == "segv":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return how


def runs_in(pool):
    return list(pool.directory.iterdir()) if pool.directory.exists() else []


class TestAsMultiprocessing:
    def test_all_ways_to_call(self, pool):
        offset = 5
        assert pool.map(lambda x: x + offset, range(20)) == list(range(5, 25))
        assert pool.starmap(pow, [(2, 3), (3, 2)]) == [8, 9]
        assert list(pool.imap(square, iter(range(6)))) == [0, 1, 4, 9, 16, 25]
        assert sorted(pool.imap_unordered(square, range(6))) == [0, 1, 4, 9, 16, 25]
        found = []
        result = pool.map_async(square, range(3), callback=found.append)
        single = pool.apply_async(pow, (2,), {"exp": 5}, callback=found.append)
        assert (result.get(PATIENCE), single.get(PATIENCE)) == ([0, 1, 4], 32)
        assert sorted(found, key=str) == [32, [0, 1, 4]]
        assert pool.apply(int, ("101",), {"base": 2}) == 5
        assert pool.map(square, []) == []
        assert runs_in(pool) == []  # nothing is left of what went well
        pool.close()
        pool.join()
        with pytest.raises(ValueError, match="not running"):
            pool.map(square, [1])

    def test_errors_are_themselves(self, pool):
        with pytest.raises(Refusal) as caught:
            pool.map(refuse, [1, 2, 3])
        assert (caught.value.item, caught.value.reason) == (3, "divisible")
        assert "in refuse" in str(caught.value.__cause__)
        (kept,) = runs_in(pool)
        assert Run(kept).results(return_exceptions=True)[:2] == [1, 2]
        with pytest.raises(SerializeError):
            pool.map(square, [1, Unsendable()])
        held = Unsendable()
        with pytest.raises(SerializeError):
            pool.map(lambda x: held, [1])
        assert runs_in(pool) == [kept]  # what cannot be sent has left nothing
        result = pool.map_async(refuse, [3], error_callback=(found := []).append)
        with pytest.raises(Refusal):
            result.get(PATIENCE)
        assert [error.item for error in found] == [3]

    def test_what_ends_its_worker_fails_alone(self, pool):
        run = pool.submit(die, ["a", "exit", "b", "segv", "c", "kill", "d"])
        values = run.results(return_exceptions=True)
        assert [v for v in values if isinstance(v, str)] == ["a", "b", "c", "d"]
        errors = run.errors()
        assert {type(error) for error in errors.values()} == {WorkerLost}
        assert "exit status 3" in errors[1].reason
        assert "about to end" in errors[1].reason
        assert "SIGSEGV" in errors[3].reason
        assert "SIGKILL" in errors[5].reason
        run.remove()

    def test_brief_items_fail_alone(self, pool):
        """They are run together, until one of them ends its worker."""
        run = pool.submit(die, [*map(str, range(300)), "exit", *map(str, range(300))])
        values = run.results(return_exceptions=True)
        assert values[:300] + values[301:] == [*map(str, range(300))] * 2
        assert "exit status 3" in run.errors()[300].reason
        run.remove()


class TestEarly:
    """What a job has told of items while it is still at others."""

    @pytest.mark.parametrize("hears", [True, False])
    def test_items_come_before_their_chunk_ends(self, slurm_pool, tmp_path, monkeypatch, hears):
        if not hears:  # as where jobs cannot reach this machine
            monkeypatch.setattr(watching, "SURVEY", 0.2)
            monkeypatch.setattr(watching.Hint, "address", lambda *_: None)

        def work(item):
            if item == 3:
                wait_for(tmp_path / "go")
            return item

        arriving = slurm_pool(chunks=1).imap_unordered(work, range(4))
        assert [arriving.next(PATIENCE) for _ in range(3)] == [0, 1, 2]
        (tmp_path / "go").touch()
        assert list(arriving) == [3]

    def test_what_is_not_whole_does_not_count(self, tmp_path):
        """Of what another host writes, pages may be missing in the middle."""
        part, seen = tmp_path / "0.part", tmp_path / "seen"
        writer = Writer(part, tmp_path / "0", "1_0", "host")
        writer.add("records", [Record(0, ok=True, answer=b"x")])
        first = part.stat().st_size
        writer.add("records", [Record(1, ok=True, answer=b"y" * 10000)])
        whole = part.read_bytes()
        writer.close("done")
        holes = whole[: first + 5000] + bytes(1000) + whole[first + 6000 :]
        for data in whole[: first + 5000], whole[:-1], whole[: first + 50] + bytes(9000), holes:
            seen.write_bytes(data)
            records, place = read_on(seen, 0)
            assert ([record.index for record in records], place) == ([0], first)
        seen.write_bytes(whole)
        records, place = read_on(seen, first)
        assert ([record.index for record in records], place) == ([1], len(whole))
        assert read_on(seen, place) == ([], place)
        assert read_on(tmp_path / "nothing", 0) == ([], 0)


class TestRecords:
    def test_each_item_has_its_own(self, pool):
        def work(item):
            print(f"out {item}")
            print(f"err {item}", file=sys.stderr)
            logging.getLogger("mine").warning("logged %d", item)
            return len(bytearray(item << 20))

        before = time.time()
        run = pool.submit(work, [1, 60, 2])
        assert run.results() == [1 << 20, 60 << 20, 2 << 20]
        records = {record.index: record for record in run.records()}
        assert sorted(records) == [0, 1, 2]
        for index, item in enumerate([1, 60, 2]):
            record = records[index]
            assert record.stdout == f"out {item}\n"
            assert f"err {item}\n" in record.stderr
            assert f"WARNING:mine:logged {item}\n" in record.stderr
            assert record.host
            assert before < record.start < time.time()
            assert 0 < record.seconds < PATIENCE
            assert record.attempt == 1
        assert records[1].memory - records[2].memory > 40 << 20
        run.remove()

    def test_the_directory_is_private_and_has_few_files(self, pool, cluster, monkeypatch):
        monkeypatch.setenv("MY_TOKEN", "s3cr3t-in-the-environment")
        run = pool.submit(square, range(500))
        run.wait()
        wait_until(lambda: not cluster.jobs(), PATIENCE, "each has seen to its output")
        assert stat.S_IMODE(run.directory.stat().st_mode) == 0o700
        files = [path for path in run.directory.rglob("*") if path.is_file()]
        assert len(files) < 20
        assert not any(b"s3cr3t" in path.read_bytes() for path in files)
        assert not list(run.directory.rglob("*.tmp"))
        run.remove()
        assert not run.directory.exists()

    def test_cores_of_a_job_do_several_items(self, pool_of, tmp_path):
        def meet(name):
            (tmp_path / f"{name}").touch()
            for other in ("a", "b"):
                wait_for(tmp_path / other)
            return os.getpid()

        pool = pool_of(cpus=2, chunks=1)
        assert len(set(pool.map(meet, ["a", "b"]))) == 2


class TestAttaching:
    SCRIPT = """
        import os, sys, time
        from pathlib import Path
        from ostap_parallel.batch import SlurmPool, SgePool

        def slow(item):
            if item % 2:
                while not Path(sys.argv[2]).exists():
                    time.sleep(0.02)
            return item * os_factor

        os_factor = 7
        if __name__ == "__main__":
            pool = {"slurm": SlurmPool, "sge": SgePool}[sys.argv[1]](sys.argv[3], chunks=4)
            sys.argv[2] = os.path.abspath(sys.argv[2])
            pool.map_async(slow, range(8))
            time.sleep(300)
    """

    def test_a_run_outlives_its_driver(self, cluster, tmp_path):
        """Killed by -9, half of its jobs, too; another process gets all."""
        script, go = tmp_path / "script.py", tmp_path / "go"
        script.write_text(textwrap.dedent(self.SCRIPT))
        runs = tmp_path / "runs"
        environ = script_environ(**cluster.environ)
        argv = [sys.executable, str(script), cluster.name, str(go), str(runs)]
        with subprocess.Popen(argv, cwd=tmp_path, env=environ) as driver:
            try:
                wait_until(lambda: list(runs.glob("*/jobs/*.id")), PATIENCE, "it is submitted")
                (root,) = runs.iterdir()
                begun = lambda: len(list(root.glob("results/0/*")))  # noqa: E731
                wait_until(lambda: begun() == 4, PATIENCE, "all have begun")
            finally:
                driver.kill()
        run = Run(root, **QUICK)
        assert not run.wait(1)
        for pid in processes_of(root)[:2]:  # as from outside: the scheduler finds out
            os.kill(pid, signal.SIGKILL)
        go.touch()
        assert Run(runs, **QUICK).results() == [item * 7 for item in range(8)]
        again = Run(root)  # which finds all done
        assert again.is_done
        assert again.results() == [item * 7 for item in range(8)]
        submitted = [len(again._layout.elements(array)) for array in again._layout.arrays()]
        assert submitted[0] == 4
        assert sum(submitted[1:]) <= 2
        again.remove()

    def test_cancel_and_resubmit(self, pool, tmp_path):
        def work(item):
            if item == 1 and not (tmp_path / "go").exists():
                wait_for(tmp_path / "never", 100)
            return item

        run = pool.submit(work, range(2))
        wait_until(lambda: run.wait(0.3) or run.ended == 1, PATIENCE, "one is done")
        other = Run(run.directory, **QUICK)
        other.cancel()
        with pytest.raises(CancelledError):
            run.results()
        assert run.results(return_exceptions=True)[0] == 0
        (tmp_path / "go").touch()
        assert other.resubmit() == 1
        assert other.results() == [0, 1]
        assert other.resubmit() == 0
        other.remove()

    def test_two_may_wait(self, pool):
        run = pool.submit(square, range(4))
        results = multiprocessing.pool.ThreadPool(3).map(
            lambda _: Run(run.directory, **QUICK).results(), range(3)
        )
        assert results == [[0, 1, 4, 9]] * 3
        run.remove()

    def test_terminate_cancels_the_jobs_of_a_map(self, cluster, pool_of, tmp_path):
        pool = pool_of(chunks=2)
        result = pool.map_async(time.sleep, [300, 300])
        wait_until(lambda: len(cluster.jobs()) >= 1, PATIENCE, "they are there")
        pool.terminate()
        with pytest.raises(CancelledError):
            result.get(PATIENCE)
        wait_until(lambda: not cluster.jobs(), PATIENCE, "they are gone")

    @pytest.mark.parametrize(
        ("call", "moment"),
        [
            ("pool.map", "items/*/*"),
            ("pool.map", "jobs/*.sh"),
            ("pool.map", "jobs/*.id"),
            ("WorkManager(executor=pool).process", "jobs/*.id"),
            ("WorkManager(executor=pool).process", "results/*/*"),
        ],
    )
    def test_ctrl_c_cancels_the_jobs(self, cluster, tmp_path, call, moment):
        """While it is written, submitted, waits and runs."""
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, time\nfrom ostap_parallel import WorkManager\n"
            "from ostap_parallel.batch import SgePool, SlurmPool\n"
            "pools = {'slurm': SlurmPool, 'sge': SgePool}\n"
            f"with pools[sys.argv[1]](chunks=1) as pool:\n    {call}(time.sleep, [300])\n"
        )
        environ = script_environ(**cluster.environ)
        argv = [sys.executable, str(script), cluster.name]
        with subprocess.Popen(
            argv, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True
        ) as driver:
            wait_until(lambda: list(tmp_path.glob(f".ostap*/*/{moment}")), PATIENCE, moment)
            driver.send_signal(signal.SIGINT)
            assert "KeyboardInterrupt" in driver.communicate(timeout=PATIENCE)[1]
        wait_until(lambda: not cluster.jobs(), PATIENCE, "they are gone")
        assert list(tmp_path.iterdir()) == [script]

    def test_not_of_others(self, pool):
        run = pool.submit(square, [1])
        assert run.results() == [1]
        run.directory.chmod(0o770)
        with pytest.raises(PermissionError, match="not yours alone"):
            Run(run.directory)
        run.remove()

    def test_no_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no run"):
            Run(tmp_path)


NAMES = ["it's #1", 'a "b" c', "back\\slash and\ttab", "a,b:c", "a$HOME b `id` %j", "ünï *?"]


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_of_directories(self, cluster, tmp_path, name, monkeypatch):
        """The working directory of the jobs is this one, and their own output is in it."""
        here = tmp_path / name
        here.mkdir()
        monkeypatch.chdir(here)
        with POOLS[cluster.name](**QUICK, keep=True, environment="echo from the job") as pool:
            assert pool.map(_directory, [1]) == [str(here)]
            (run,) = map(Run, runs_in(pool))
            index = str(run.settings.scheduler().first)
            assert run._layout.said(0, index) == "from the job"
            run.remove()
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize("kind", POOLS)
    def test_what_no_directive_can_have_is_refused_at_once(self, kind, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="must be one line"):
            POOLS[kind](tmp_path / "a\nb")
        (tmp_path / "a\nb").mkdir()
        monkeypatch.chdir(tmp_path / "a\nb")
        with pytest.raises(ValueError, match="must be one line"):
            POOLS[kind](tmp_path)

    def test_of_jobs(self, cluster, pool_of):
        """A name of the user's begins those of the jobs, by which they are found again."""
        option = {"slurm": "--job-name", "sge": "-N"}[cluster.name]
        run = pool_of(options=f"{option} 'my toys'").submit(time.sleep, [300])
        name = run.settings.job_name(0)
        assert name.startswith("my_toys-op-")
        assert run.settings.scheduler().find(name) == run.jobs()
        (run.directory / "jobs" / "0.id").unlink()
        run.remove()
        wait_until(lambda: not cluster.jobs(), PATIENCE, "it is gone")


def _directory(_):
    return os.getcwd()  # noqa: PTH109


class TestBackend:
    def test_other_faces_run_on_it(self, pool):
        offset = 3
        with WorkManager(executor=pool, silent=True) as wm:
            assert wm.process(lambda x: x + offset, range(10)) == list(range(3, 13))
            merger = TaskMerger(operator.add)
            assert wm.process(square, range(5), merger=merger, chunk_size=5) == 30
            found = wm.process(die, ["a", "exit"], on_error="collect", chunk_size=1)
            assert found[0] == "a"
            assert isinstance(wm.report.failures[0].error, WorkerLost)
        assert len(runs_in(pool)) == 1
        pool.terminate()
        assert runs_in(pool) == []

    def test_giving_up_cancels_jobs(self, pool, cluster):
        pool.map(square, [1])
        future = pool.backend.call(time.sleep, (300,))
        wait_until(cluster.jobs, PATIENCE, "it is there")
        wait_until(future.running, PATIENCE, "it runs")
        pool.backend.give_up([future])
        with pytest.raises(CancelledError):
            future.result(PATIENCE)
        wait_until(lambda: not cluster.jobs(), PATIENCE, "it is gone")


class TestPypoolparty:
    def test_its_tutorial(self, cluster, tmp_path):
        numpy = pytest.importorskip("numpy")
        jobs = [[3, 4, 56, 7], [22, 5, 4, 5, 7], [11, 2, 545, 235, 6, 3], [22, 45, 6, 4]]
        kinds = {"slurm": [party_slurm.array.Pool, party_slurm.Pool], "sge": [party_sge.Pool]}
        for kind in kinds[cluster.name]:
            work_dir = str(tmp_path / "work")
            pool = kind(polling_interval=0.5, work_dir=work_dir, verbose=True)
            assert pool.map(numpy.std, jobs) == [numpy.std(job) for job in jobs]
            assert not Path(work_dir).exists() or not os.listdir(work_dir)  # noqa: PTH208
            pool.terminate()

    def test_its_parameters(self, cluster, tmp_path, capsys):
        common = {
            "python_path": sys.executable,
            "polling_interval": 0.5,
            "work_dir": str(tmp_path / "work"),
            "keep_work_dir": True,
            "verbose": True,
        }
        if cluster.name == "slurm":
            paths = {"sbatch_path": "/usr/bin/sbatch", "squeue_path": "squeue"}
            array = party_slurm.array.Pool(
                2, **common, slurm_call_timeout=60.0, max_num_resubmissions=1, **paths
            )
            chunks = party_slurm.Pool(2, **common, scancel_path="scancel", clusters=None)
            pools = [array, chunks]
        else:
            pools = [party_sge.Pool(2, **common, queue_name="all.q", error_state_indicator="E")]
        for pool in pools:
            assert pool.starmap(pow, [(2, 3), (3, 2)], chunksize=1) == [8, 9]
            assert "2 of 2 done, 0 failed" in capsys.readouterr().out
            (kept,) = runs_in(pool)
            Run(kept).remove()
            pool.terminate()


class TestCommand:
    def test_jobs(self, pool, capsys, tmp_path):
        run = pool.submit(refuse, range(1, 5))
        run.wait()
        assert main(["jobs", str(run.directory)]) == 1
        text = capsys.readouterr().out
        assert "4 items: 3 done, 1 failed, 0 left" in text
        assert "1 x Refusal in functions.py" in text
        assert main(["jobs", str(pool.directory), "--results"]) == 1
        assert capsys.readouterr().out.splitlines()[:2] == ["1", "2"]
        assert main(["jobs", str(run.directory), "--resubmit"]) == 0
        assert "1 items are submitted again" in capsys.readouterr().out
        assert main(["jobs", str(run.directory), "--wait"]) == 1
        assert main(["jobs", str(run.directory), "--cancel"]) == 0
        assert main(["jobs", str(run.directory), "--output"]) == 0
        assert main(["jobs", str(run.directory), "--remove"]) == 0
        capsys.readouterr()
        assert main(["jobs", str(tmp_path)]) == 2
        assert "there is no run" in capsys.readouterr().err


class TestRefusals:
    def test_what_can_never_run(self, cluster, pool_of):
        options = {"slurm": "--partition=nowhere", "sge": "-q nowhere"}[cluster.name]
        pool = pool_of(options=options)
        with pytest.raises(JobRefused, match=r"Invalid partition|unknown queue"):
            pool.map(square, [1])
        assert runs_in(pool) == []
        with (
            WorkManager(executor=pool, silent=True) as wm,
            pytest.raises((WorkerLost, ConnectionError), match=r"nvalid partition|unknown queue"),
        ):
            wm.process(square, range(3))

    def test_a_job_that_fails_before_it_begins(self, pool_of):
        pool = pool_of(environment="module load root || exit 9")
        with pytest.raises(WorkerLost, match="module: command not found"):
            pool.map(square, [1])

    def test_held_for_ever(self, cluster, pool_of):
        pool = pool_of(options={"slurm": "--hold", "sge": "-h"}[cluster.name], retries=0)
        with pytest.raises(WorkerLost, match="stuck"):
            pool.map(square, [1])

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            ({"cpus": 0}, ValueError),
            ({"cpus": "2"}, TypeError),
            ({"memory": "4"}, ValueError),
            ({"walltime": "90"}, ValueError),
            ({"memory": lambda attempt: "4"}, ValueError),
            ({"limit": 0}, ValueError),
            ({"retries": -1}, ValueError),
            ({"chunks": 0}, ValueError),
            ({"chunks": 2.5}, ValueError),
            ({"polling": 0}, ValueError),
            ({"options": "a\nb"}, ValueError),
            ({"partition": "a"}, TypeError),
            ({"directory": 4}, TypeError),
            ({"options": ["-p", 4]}, TypeError),
            ({"environment": 4}, TypeError),
        ],
    )
    def test_bad_settings(self, wrong, error):
        with pytest.raises(error):
            SlurmPool(**wrong)

    def test_lists_and_times_in_settings(self, tmp_path):
        lines = ["module load root", "export A='b c'"]
        given = {"options": ["-p main", "--account=a"], "environment": lines}
        with SlurmPool(tmp_path, walltime=timedelta(minutes=90), **given) as pool:
            made = pool._settings
        script = made.scheduler().script(made.spec(tmp_path, 0, 1, 1, 0))
        assert "#SBATCH -p main --account=a\n" in script
        assert "#SBATCH --time=1:30:00\n" in script
        assert "\n{}\n{}\nexec ".format(*lines) in script
        assert Slurm(2, walltime=timedelta(minutes=5), options=["-p", "a"]).script().count("\n")

    @pytest.mark.parametrize("name", ["map", "imap", "imap_unordered", "map_async", "submit"])
    def test_bad_sizes_of_chunks(self, name, tmp_path):
        with SlurmPool(tmp_path) as pool:
            call = getattr(pool, name)
            for wrong in 0, -1, 1.5:
                with pytest.raises(ValueError, match="chunksize"):
                    call(square, [1], chunksize=wrong)
            with pytest.raises(TypeError):
                call(5, [1])
        assert not list(tmp_path.iterdir())

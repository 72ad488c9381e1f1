"""What ends the jobs of a run, on real SLURM and SGE, and what becomes of its items."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from clusters import open_slurm
from conftest import cluster_or_skip
from functions import PATIENCE, attempts, note, script_environ, wait_for
from helpers import processes_of, wait_until

from ostap_parallel import WorkerLost
from ostap_parallel.arrays.layout import Layout
from ostap_parallel.batch import JobRefused, SgePool, SlurmPool
from ostap_parallel.schedulers.scheduler import End

QUICK = {"polling": 0.5, "grace": 3.0}


@pytest.fixture
def on_slurm(cluster, tmp_path):
    """A function that makes pools of SLURM."""
    if cluster.name != "slurm":
        pytest.skip("SLURM only")
    with contextlib.ExitStack() as stack:
        settings = {"directory": tmp_path / "runs", **QUICK}
        yield lambda **given: stack.enter_context(SlurmPool(**{**settings, **given}))


@pytest.fixture
def on_sge(cluster, tmp_path):
    """A function that makes pools of SGE."""
    if cluster.name != "sge":
        pytest.skip("SGE only")
    with contextlib.ExitStack() as stack:
        settings = {"directory": tmp_path / "runs", **QUICK}
        yield lambda **given: stack.enter_context(SgePool(**{**settings, **given}))


def only(name):
    """Run a test for one of the batch systems."""
    return pytest.mark.parametrize("cluster", [name], indirect=True)


def attempts_of(run):
    return {record.index: record.attempt for record in run.records() if record.ok}


def submitted(run):
    """Return the numbers of elements of the arrays of a run."""
    layout = Layout(run.directory)
    return [len(layout.elements(array)) for array in layout.arrays()]


def noting(folder, seconds=PATIENCE):
    """Return a function that counts its attempts on an item, and waits for a file ``go``."""

    def work(item):
        note(folder, item)
        wait_for(folder / "go", seconds)
        return item

    return work


def wrapper(path: Path, text: str) -> str:
    """Write a command that stands in front of a real one."""
    path.write_text(f"#!/bin/bash\n{textwrap.dedent(text)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@only("slurm")
class TestOnSlurm:
    def test_out_of_memory(self, on_slurm, cluster):
        if not cluster.has_groups:
            pytest.skip("memory is not limited here")

        def fill(size):
            return len(bytearray(size << 20))

        pool = on_slurm(memory=lambda attempt: f"{200 * attempt}M", chunks=1)
        run = pool.submit(fill, [1, 250, 2])
        assert run.results() == [1 << 20, 250 << 20, 2 << 20]
        assert attempts_of(run) == {0: 1, 1: 2, 2: 1}
        run.remove()
        pool = on_slurm(memory="200M", retries=0, keep=False)
        with pytest.raises(WorkerLost, match="no memory left"):
            pool.map(fill, [250])

    def test_what_would_not_end_in_time_is_not_begun(self, on_slurm):
        """It goes to another job, and none is cut off: as for SLURM, there would be a minute."""
        pool = on_slurm(walltime=5)
        run = pool.submit(time.sleep, [1.0] * 6, chunksize=6)
        assert run.results() == [None] * 6
        assert attempts_of(run) == dict.fromkeys(range(6), 1)
        first, *others = submitted(run)
        assert (first, set(others)) == (1, {1})
        run.remove()

    def test_preempted(self, on_slurm, cluster, tmp_path):
        run = on_slurm(options="--exclusive").submit(noting(tmp_path), [0, 1])
        wait_until(lambda: len(list(tmp_path.glob("[01]"))) == 2, PATIENCE, "both run")
        argv = ["-p", "urgent", "--exclusive", "-N2", "-n2", "-o", "/dev/null"]
        cluster.run("sbatch", *argv, data="#!/bin/bash\nsleep 0.5\n")
        wait_until(lambda: not run.wait(0.3) and attempts(tmp_path, 0) == 2, PATIENCE, "anew")
        (tmp_path / "go").touch()
        assert run.results() == [0, 1]
        run.remove()

    def test_a_node_is_lost(self, on_slurm, cluster, tmp_path):
        run = on_slurm(options="--no-requeue").submit(noting(tmp_path), [7])
        wait_until((tmp_path / "7").exists, PATIENCE, "it runs")
        (state,) = run.settings.scheduler().states(run.jobs()).values()
        node = f"nodename={state.host}"
        cluster.run("scontrol", "update", node, "state=down", "reason=test")
        try:
            wait_until(lambda: not run.wait(0.3) and attempts(tmp_path, 7) == 2, PATIENCE, "anew")
        finally:
            cluster.try_("scontrol", "update", node, "state=resume")  # unless it is back
        (tmp_path / "go").touch()
        assert run.results() == [7]
        assert submitted(run) == [1, 1]
        run.remove()

    def test_begun_anew_by_the_scheduler(self, on_slurm, cluster, tmp_path):
        def work(item):
            note(tmp_path, item)
            if item:
                wait_for(tmp_path / "go")
            return item

        run = on_slurm(chunks=1).submit(work, [0, 1])
        wait_until((tmp_path / "1").exists, PATIENCE, "it runs")
        cluster.run("scontrol", "requeue", *run.jobs())
        wait_until(lambda: not run.wait(0.3) and attempts(tmp_path, 1) == 2, PATIENCE, "anew")
        (tmp_path / "go").touch()
        assert run.results() == [0, 1]
        assert attempts(tmp_path, 0) == 1  # what was done is kept
        run.remove()

    @pytest.mark.parametrize("verb", ["requeue", "requeuehold"])
    def test_what_is_begun_anew_after_its_end_goes_with_the_run(self, on_slurm, cluster, verb):
        run = on_slurm().submit(abs, [-1, -2])
        assert run.results() == [1, 2]
        wait_until(lambda: not cluster.jobs(), PATIENCE, "they have ended")
        cluster.run("scontrol", verb, *run.jobs())
        wait_until(lambda: "PD" in "".join(cluster.jobs()), PATIENCE, "they are there again")
        run.remove()
        wait_until(lambda: not cluster.jobs(), PATIENCE, "they are gone")

    def test_suspended_ones_end_with_the_pool(self, on_slurm, cluster, tmp_path):
        pool = on_slurm()
        result = pool.map_async(noting(tmp_path), [0])
        wait_until((tmp_path / "0").exists, PATIENCE, "it runs")
        (path,) = tmp_path.glob("runs/*/jobs/*.id")
        job = path.read_text()
        cluster.run("scontrol", "suspend", job)
        (state,) = pool._settings.scheduler().states([job]).values()
        assert state.is_suspended
        pool.terminate()
        wait_until(lambda: not cluster.jobs(), PATIENCE, "it is gone")
        with pytest.raises(CancelledError):
            result.get(PATIENCE)

    def test_a_job_that_dies_has_its_own_last_words(self, on_slurm, tmp_path):
        """Those of another element of its array are not taken for them."""

        words = 'echo "words of $SLURM_ARRAY_TASK_ID"'
        run = on_slurm(retries=0, environment=words).submit(noting(tmp_path), [0, 1])
        wait_until(lambda: len(list(tmp_path.glob("[01]"))) == 2, PATIENCE, "both run")
        commands = {
            pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(run.directory)
        }
        os.kill(
            min(p for p, text in commands.items() if text.endswith(b"\x000\x00")), signal.SIGKILL
        )
        wait_until(lambda: not run.wait(0.3) and run.errors(), PATIENCE, "one has failed")
        assert "words of 0" in run.errors()[0].reason
        assert "words of 1" not in run.errors()[0].reason
        (tmp_path / "go").touch()
        assert run.results(return_exceptions=True)[1] == 1
        run.remove()

    def test_cancelled_by_hand(self, on_slurm, cluster):
        pool = on_slurm()
        run = pool.submit(time.sleep, [300])
        wait_until(cluster.jobs, PATIENCE, "it is there")
        cluster.run("scancel", *run.jobs())
        assert run.wait(PATIENCE)
        assert "CANCELLED" in run.errors()[0].reason
        assert submitted(run) == [1]
        run.remove()

    def test_an_answer_that_comes_late(self, on_slurm, cluster, tmp_path):
        """The submission is not repeated, but found by its name."""
        sbatch = wrapper(tmp_path / "late", '/usr/bin/sbatch "$@"; sleep 300')
        run = on_slurm(sbatch=sbatch, submit_timeout=1.0).submit(abs, [-1, -2])
        assert run.results() == [1, 2]
        name = run.settings.name
        jobs = cluster.run("squeue", "-h", "-t", "all", "-o", "%F %j").splitlines()
        assert len({line.split()[0] for line in jobs if name in line}) == 1
        assert submitted(run) == [2]
        run.remove()

    def test_a_submission_that_hangs_is_repeated(self, on_slurm, tmp_path, monkeypatch):
        monkeypatch.setattr("ostap_parallel.arrays.submitting.SETTLING", 0.5)
        mark = tmp_path / "mark"
        text = f'if mkdir {mark} 2>/dev/null; then sleep 300; fi; exec /usr/bin/sbatch "$@"'
        pool = on_slurm(sbatch=wrapper(tmp_path / "hangs", text), submit_timeout=1.0)
        run = pool.submit(abs, [-1])
        assert run.results() == [1]
        assert submitted(run) == [1]
        run.remove()

    def test_submitted_twice_all_the_same(self, on_slurm, cluster, tmp_path):
        """The second array, of a submission that was taken for lost, does nothing."""

        def work(item):
            note(tmp_path, item)
            return item

        run = on_slurm().submit(work, [5])
        script = (run.directory / "jobs" / "0.sh").read_text()
        assert run.results() == [5]
        (run.directory / "results" / "0" / "0").unlink()
        cluster.run("sbatch", data=script)
        wait_until(lambda: not cluster.jobs(), PATIENCE, "it has ended")
        assert attempts(tmp_path, 5) == 1
        run.remove()

    def test_the_controller_is_away(self, on_slurm, cluster, tmp_path):
        run = on_slurm().submit(wait_for, [tmp_path / "go", tmp_path / "go"])
        cluster.stop("slurmctld", signal.SIGTERM)
        assert not run.wait(2)
        (tmp_path / "go").touch()
        cluster.start("slurmctld")
        assert run.results() == [None, None]
        assert submitted(run) == [2]
        wait_until(lambda: not cluster.jobs(), PATIENCE, "the queue is empty")
        run.remove()

    def test_files_that_are_seen_late(self, on_slurm, tmp_path, monkeypatch):
        """As on NFS: a job has ended, and its file is not there yet."""
        look = Layout.results

        def late(self, chunks):
            files = {number: self.root / self.name("results", number) for number in chunks}
            found = look(self, chunks)
            return {n for n in found if time.time() - files[n].stat().st_mtime > 4}

        monkeypatch.setattr(Layout, "results", late)
        run = on_slurm(grace=20.0).submit(abs, [-1, -2])
        assert run.results() == [1, 2]
        assert submitted(run) == [2]
        run.remove()

    def test_within_a_job(self, on_slurm, cluster, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "from ostap_parallel.batch import SlurmPool\n"
            "with SlurmPool(polling=0.5, cpus=2, memory='300M') as pool:\n"
            "    print(pool.map(abs, [-1, -2, -3]))\n"
        )
        options = ["--mem-per-cpu=300M", "--cpus-per-task=1", "-o", "out.txt"]
        text = f"#!/bin/bash\nexec {sys.executable} {script}\n"
        environ = script_environ(**cluster.environ)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", environ["PYTHONPATH"])
            cluster.run("sbatch", "--chdir", str(tmp_path), *options, data=text)
        out = tmp_path / "out.txt"
        wait_until(lambda: out.exists() and out.read_text(), PATIENCE, "it has printed")
        assert out.read_text() == "[1, 2, 3]\n"


@only("sge")
class TestOnSge:
    def test_wall_time(self, on_sge, tmp_path):
        """What was done is kept; what ran has more time."""

        def work(item):
            note(tmp_path, item)
            first = attempts(tmp_path, item) == 1  # SGE may look late at how long it runs
            deadline = time.monotonic() + ((50 if first else 6) if item == 1 else 0.1)
            while time.monotonic() < deadline:
                time.sleep(0.05)
            return item

        pool = on_sge(walltime=lambda attempt: 4 if attempt == 1 else 60, chunks=1)
        run = pool.submit(work, range(3))
        assert run.results() == [0, 1, 2]
        assert attempts_of(run)[1] == 2
        assert attempts(tmp_path, 0) == attempts(tmp_path, 2) == 1
        run.remove()
        with pytest.raises(WorkerLost, match="wall time"):
            on_sge(walltime=3, retries=0, keep=False).map(time.sleep, [60])

    def test_what_takes_a_whole_wall_time_twice_fails(self, on_sge):
        """It would a third time, unless that had more of it."""
        run = on_sge(walltime=3).submit(time.sleep, [60])
        with pytest.raises(WorkerLost, match=r"all of a job's \(3\): ask for more by walltime="):
            run.results()
        assert submitted(run) == [1, 1]
        run.remove()

    def test_signals_to_all_processes_harm_none(self, on_sge, tmp_path):
        def work(item):
            note(tmp_path, item)
            wait_for(tmp_path / "go")
            return os.getpid()

        run = on_sge(cpus=2).submit(work, [0])
        wait_until((tmp_path / "0").exists, PATIENCE, "it runs")
        for pid in processes_of(run.directory):
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(pid), number)
        (tmp_path / "go").touch()
        assert run.results()
        assert attempts(tmp_path, 0) == 1
        run.remove()

    def test_begun_anew_by_the_scheduler(self, on_sge, cluster, tmp_path):
        run = on_sge(options="-r y").submit(noting(tmp_path), [3])
        wait_until((tmp_path / "3").exists, PATIENCE, "it runs")
        cluster.run("qmod", "-rj", *run.jobs())
        wait_until(lambda: not run.wait(0.3) and attempts(tmp_path, 3) >= 2, PATIENCE, "anew")
        (tmp_path / "go").touch()
        assert run.results() == [3]
        run.remove()

    def test_an_error_state_is_submitted_again(self, on_sge, cluster, tmp_path):
        """As when a directory is not there on a node, for a while."""
        run = on_sge().submit(abs, [-1])
        run.cancel()
        wait_until(lambda: not cluster.jobs(), PATIENCE, "it is gone")
        logs = run.directory / "logs"
        logs.rename(run.directory / "hidden")
        threading.Timer(4, lambda: (run.directory / "hidden").rename(logs)).start()
        assert run.resubmit() == 1
        assert run.results() == [1]
        assert len(submitted(run)) >= 3
        run.remove()


@pytest.fixture(scope="module")
def small_slurm():
    """A SLURM for arrays of six elements and ten jobs, which it soon forgets, with limits."""
    extra = "MaxArraySize=6\nMaxJobCount=10\nMinJobAge=2\nAccountingStorageEnforce=limits,qos\n"
    with cluster_or_skip(open_slurm(1, 2, extra=extra)) as cluster:
        cluster.run("sacctmgr", "-i", "add", "account", "a")
        cluster.run("sacctmgr", "-i", "add", "user", "root", "account=a")
        short = ["MaxWall=1", "MaxSubmitJobsPerUser=3", "Flags=DenyOnLimit"]
        cluster.run("sacctmgr", "-i", "add", "qos", "small", *short)
        cluster.run("sacctmgr", "-i", "modify", "user", "root", "set", "qos+=small")
        yield cluster


@pytest.mark.slow
class TestLimits:
    @pytest.fixture
    def cluster(self, small_slurm, monkeypatch):
        for name, value in small_slurm.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("ostap_parallel.arrays.submitting.SETTLING", 0.5)
        yield small_slurm
        wait_until(lambda: not small_slurm.jobs(), PATIENCE, "nothing is left in the queue")

    @pytest.fixture
    def pool_of(self, cluster, tmp_path):
        with contextlib.ExitStack() as stack:
            settings = {"directory": tmp_path / "runs", **QUICK}
            yield lambda **given: stack.enter_context(SlurmPool(**{**settings, **given}))

    def test_more_than_an_array_and_the_queue_can_have(self, pool_of):
        run = pool_of(chunks=15, limit=2, submit_timeout=1.5).submit(abs, range(-30, 0))
        assert run.results() == list(range(30, 0, -1))
        assert max(submitted(run)) <= 6
        assert sum(submitted(run)) == 15
        run.remove()

    def test_more_than_a_user_may_submit(self, pool_of):
        run = pool_of(chunks=8, options="--qos=small", walltime="1m").submit(abs, range(-8, 0))
        assert run.results() == list(range(8, 0, -1))
        assert max(submitted(run)) <= 3
        assert sum(submitted(run)) == 8
        run.remove()

    def test_what_a_limit_never_allows_is_refused(self, pool_of):
        pool = pool_of(options="--qos=small", walltime="1h")
        with pytest.raises(JobRefused, match="MaxWall"):
            pool.map(abs, [-1])

    def test_the_end_of_an_element_that_the_queue_has_forgotten(self, pool_of, cluster, tmp_path):
        """The other one runs, and the accounts tell."""

        run = pool_of(chunks=2).submit(noting(tmp_path, 4 * PATIENCE), [0, 1])
        wait_until(lambda: len(list(tmp_path.glob("[01]"))) == 2, PATIENCE, "both run")
        (job,) = run.jobs()
        cluster.run("scancel", f"{job}_0")
        argv = "squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i"
        forgotten = lambda: cluster.try_(*argv).split() == [f"{job}_1"]  # noqa: E731
        wait_until(forgotten, 3 * PATIENCE, "squeue knows of the other one only")
        states = run.settings.scheduler().states([f"{job}_0", f"{job}_1"])
        assert [states[f"{job}_{n}"].end for n in range(2)] == [End.CANCELLED, None]
        (tmp_path / "go").touch()
        assert run.results(return_exceptions=True)[1] == 1
        assert "CANCELLED" in run.errors()[0].reason
        assert submitted(run) == [2]
        run.remove()

    def test_a_controller_that_has_lost_its_state(self, pool_of, cluster, tmp_path):
        """Its jobs are none of the queue's any more: they are done, or submitted again."""
        run = pool_of(chunks=2).submit(wait_for, [tmp_path / "go", tmp_path / "go"])
        wait_until(lambda: len(list(run.directory.glob("results/0/*"))) == 2, PATIENCE, "both run")
        cluster.stop("slurmctld")
        conf = cluster.environ["SLURM_CONF"]
        cluster.start("slurmctld", "slurmctld", "-D", "-c", "-f", conf)
        wait_until(lambda: "idle" in cluster.try_("sinfo", "-h", "-o", "%t"), PATIENCE, "it is up")
        assert not run.wait(1)
        (tmp_path / "go").touch()
        assert run.results() == [None, None]
        run.remove()

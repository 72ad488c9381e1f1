"""Allocations of real batch systems as hosts."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from allocated import seen, slow, where
from helpers import processes_with, wait_until
from sshd import descendants

import ostap_parallel
from ostap_parallel import ConfigError, ServersUnavailable, Slurm, WorkerLost, WorkManager
from ostap_parallel.engine import retries
from ostap_parallel.errors import JobRefused
from ostap_parallel.runs.snapshot import Coming
from ostap_parallel.supply import allocated as allocated_
from ostap_parallel.supply import allocations, supervisor

PATIENCE = 60  # seconds; only a hang takes that long

PACKAGE_PARENT = Path(ostap_parallel.__file__).parents[1]

PROGRAM = """\
import collections, os
from ostap_parallel import futures

def where(number):
    return number * number, os.environ.get("SLURMD_NODENAME"), os.environ.get("SLURM_STEP_ID")

if __name__ == "__main__":
    from ostap_parallel.faces import scoop
    executor = scoop._executor()
    executor.wait_for_hosts()
    found = list(futures.map(where, range(500)))
    print("sum", sum(value for value, _, _ in found))
    print("workers", sorted(executor.workers.values()))
    print("nodes", len({node for _, node, _ in found}), [h.state for h in executor.hosts])
"""


@pytest.fixture
def within(slurm, tmp_path, monkeypatch):
    """A function that runs text as a job on both nodes; returns what it printed."""
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)

    def run(text, *options):
        output = tmp_path / "output"
        script = f"#!/bin/bash\nexport PYTHONPATH={PACKAGE_PARENT}\n{text}\necho over $?\n"
        slurm.run("sbatch", f"--output={output}", *options, data=script)
        try:
            wait_until(lambda: output.exists() and "over" in output.read_text(), PATIENCE, text)
        except AssertionError:
            raise AssertionError(output.read_text()) from None
        wait_until(lambda: not slurm.jobs(), PATIENCE, "the job has ended")
        return output.read_text()

    return run


def test_a_program_in_a_job_reaches_its_nodes_by_srun(within, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = f"{sys.executable} -m ostap_parallel run --python {sys.executable}"
    # what the job asks for contradicts the options of a step, in part
    options = ["-N2", "-n4", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem-per-cpu=100M"]
    said = within(f"{launch} {tmp_path}/program.py", *options)
    assert said.splitlines()[-4:-1] == [
        f"sum {sum(n * n for n in range(500))}",
        "workers [2, 2]",
        "nodes 2 ['up']",
    ], said
    assert said.endswith("over 0\n"), said


def test_a_manager_in_a_job(within, tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from ostap_parallel import WorkManager\n"
        "with WorkManager(0, sys.argv[1:], way='srun', silent=True, python=sys.executable) as m:\n"
        "    m.wait_for_hosts()\n"
        "    print([(h.name, h.state, str(h.error)) for h in m.executor.hosts])\n"
        "    print(m.process(abs, [-1]))\n"
    )
    run = f"{sys.executable} {tmp_path}/program.py"
    names = f"export names=$(scontrol show hostnames $SLURM_JOB_NODELIST); {run} $names nowhere"
    said = within(names, "-N2", "-n2")
    assert "'nowhere', 'failed', 'nowhere: connect:" in said
    assert said.count("'up'") == 2
    assert said.endswith("[1]\nover 0\n"), said


RECIPE = """\
import os, sys
from ostap_parallel.pipeline import BaseRecipe, ComputeJob, RemoteCommandRecipeMixIn

class recipe(BaseRecipe, RemoteCommandRecipeMixIn):
    def go(self):
        super().go()
        marks = os.path.abspath("marks")
        command = f"echo $SLURM_JOB_ID $SLURM_STEP_ID $SLURMD_NODENAME >> {marks}; true"
        self._schedule_jobs([ComputeJob(name, command) for name in os.environ["NODES"].split()])
        return int(self.error.is_set())

raise SystemExit(recipe().main(["-j", "x", "-v"]))
"""


def test_a_recipe_in_a_job(within, slurm, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "pipeline.cfg").write_text("[remote]\nmethod = slurm_srun\n")
    text = f"cd {tmp_path}\nexport NODES=$(scontrol show hostnames $SLURM_JOB_NODELIST)\n"
    said = within(f"{text}{sys.executable} recipe.py 2>&1; echo status $?", "-N2", "-n2")
    assert "status 0" in said, said
    found = [line.split() for line in (tmp_path / "marks").read_text().splitlines()]
    assert sorted(node for _, _, node in found) == slurm.nodes, said
    assert len({job for job, _, _ in found}) == 1
    assert all(step.isdigit() for _, step, _ in found)


@pytest.fixture
def on_slurm(slurm, monkeypatch, tmp_path):
    """SLURM for this process; after the test no job, and no process or file of one, is left."""
    folder = Path(tempfile.mkdtemp(prefix="op-"))  # short, as it is to have sockets
    monkeypatch.setenv("TMPDIR", str(folder))  # which clients and jobs get, too
    (tmp_path / "there").symlink_to(folder)
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)
    yield slurm
    try:
        wait_until(lambda: not slurm.jobs(), PATIENCE, "no job is left")
        wait_until(lambda: not processes_with(folder), PATIENCE, "no process is left")
    except AssertionError:
        raise AssertionError((slurm.jobs(), processes_with(folder))) from None
    finally:
        slurm.try_("scancel", "--quiet", f"--user={os.getuid()}")
    assert not list(folder.rglob("*"))
    folder.rmdir()


@pytest.fixture
def killed(on_slurm, tmp_path):
    """Removes what those leave that are killed without a warning, as no node does.

    A controller that was killed takes nodes out where jobs had only begun to start.
    """
    yield
    wait_until(lambda: not (on_slurm.jobs() or steps_of(on_slurm)), PATIENCE, "they have ended")
    on_slurm.resume()
    for folder in (tmp_path / "there").iterdir():
        shutil.rmtree(folder, ignore_errors=True)


def test_a_node_that_takes_no_jobs_is_told(on_slurm):
    node = on_slurm.nodes[0]
    on_slurm.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=by hand")
    try:
        wait_until(lambda: on_slurm.unfit() == [f"{node} drained by hand"], PATIENCE, "it is told")
    finally:
        on_slurm.resume()
    wait_until(lambda: not on_slurm.unfit(), PATIENCE, "it takes jobs again")


def steps_of(slurm):
    """Return the processes of jobs, by their environment."""
    needle = f"SLURM_CONF={slurm.environ['SLURM_CONF']}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (entry / "environ").read_bytes()
            if needle in text and b"SLURM_JOB_ID=" in text:
                found.append((int(entry.name), (entry / "cmdline").read_bytes()))
    return found


def processes():
    """Return the descendants of this process, with their command lines."""
    return [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in descendants(os.getpid())]


def jobs(workers=4, **given):
    settings = {"cpus": 2, "walltime": "10m", "python": sys.executable, "name": "gpu", **given}
    return Slurm(workers, **settings)


def manage(*servers, ncpus=0, **given):
    sync = [Path(__file__).with_name("allocated.py")]
    return WorkManager(ncpus, servers, **{"config": (), "silent": True, "sync": sync, **given})


SQUARES = sum(n * n for n in range(200))


@contextlib.contextmanager
def blocked(slurm):
    """All nodes are somebody else's."""
    job = slurm.run("sbatch", "--parsable", "--exclusive", "-N2", "--output=/dev/null", data=BLOCK)
    wait_until(lambda: "R" in slurm.run("squeue", "-h", "-j", job.strip(), "-o", "%t"), 60, "it")
    try:
        yield
    finally:
        slurm.run("scancel", job.strip())


BLOCK = "#!/bin/sh\nexec sleep 600\n"


def state_of(manager, number=0):
    return manager.executor.hosts[number]


class TestOnTheLoginNode:
    def test_jobs_are_hosts(self, on_slurm):
        with manage(jobs(4)) as manager:
            found = manager.process(where, range(200))
            assert sum(value for value, _, _ in found) == SQUARES
            manager.wait_for_hosts()
            assert manager.workers == {"gpu/1": 2, "gpu/2": 2}
            listed = on_slurm.run("squeue", "-h", "-o", "%T %C").split("\n")
            assert listed[:-1] == ["RUNNING 2", "RUNNING 2"]
            assert len(on_slurm.run("squeue", "-h", "-s", "-o", "%i").split()) == 4  # of 2 scripts
            numbers = set(on_slurm.run("squeue", "-h", "-o", "%A").split())
            found = manager.process(where, range(200))
            assert {number for _, number, _ in found} <= numbers
            assert {cpus for _, _, cpus in found} == {"2"}

    def test_beside_local_workers_and_with_a_rest(self, on_slurm, tmp_path):
        config = tmp_path / "rc"
        config.write_text(
            "[Parallel]\nwalltime = 5:00\n[Parallel:gpu]\nbatch = slurm\ncpus = 2\njobs = 3\n"
            f"walltime = 0:20:00\nenvironment = export SEEN=yes\npython = {sys.executable}\n"
        )
        config.chmod(0o600)
        with pytest.raises(ConfigError, match=r"\[Parallel\] walltime: walltime must be a time"):
            WorkManager(0, "gpu", config=config)
        config.write_text(config.read_text().replace("5:00", "5m", 1))
        with manage("gpu*3", ncpus=1, config=config) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            assert manager.workers == {"local": 1, "gpu/1": 2, "gpu/2": 1}
            there = manager.process(seen, range(50), where=lambda n: "gpu/2", strict=True)
            assert there == ["yes"] * 50
            limits = on_slurm.run("squeue", "-h", "-o", "%l").split()
            assert limits == ["20:00", "20:00"]

    def test_queued_is_not_failing(self, on_slurm, caplog):
        with blocked(on_slurm), manage(jobs(2)) as manager:
            status = state_of(manager)
            wait_until(lambda: status.state == "queued", PATIENCE, "it is queued")
            wait_until(lambda: "Resources" in status.reason, PATIENCE, "the reason")
            future = manager.executor.submit(abs, -1)
            wait_until(lambda: "expected to start at" in status.reason, PATIENCE, "the time")
            bar = str(Coming(manager.executor.backend))
            assert re.match(r"gpu/1 queued \(Resources, expected to start at 2[-\dT:]+\) for", bar)
            on_slurm.run("scancel", f"--user={os.getuid()}", "--name=sbatch")
            assert future.result(PATIENCE) == 1
            assert (status.state, status.reason, status.lost) == ("up", "", 0)

    def test_the_command_line_shows_it(self, on_slurm, tmp_path):
        config = tmp_path / "rc"
        shared = f"batch = slurm\npython = {sys.executable}\n"
        config.write_text(
            f"[Parallel:gpu]\n{shared}[Parallel:bad]\n{shared}options = -p nowhere\n"
        )
        config.chmod(0o600)
        argv = [sys.executable, "-m", "ostap_parallel", "hosts", "--config", config]
        environ = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
        with blocked(on_slurm):
            done = subprocess.run(
                [*argv, "gpu", "bad"], env=environ, capture_output=True, text=True
            )
        _, *rows = done.stdout.splitlines()
        assert [row.split()[:3] for row in rows[:2]] == [
            ["gpu/1", "queued", "Resources,"],
            ["bad/1", "no", "submit:"],
        ]
        assert "invalid partition" in done.stdout
        assert done.returncode == 1
        done = subprocess.run([*argv, "gpu"], env=environ, capture_output=True, text=True)
        assert (done.stdout.splitlines()[1].split()[:2], done.returncode) == (["gpu/1", "yes"], 0)

    def test_what_is_refused_fails_with_the_words_of_the_scheduler(self, on_slurm):
        with manage(jobs(4, options="--partition=nowhere")) as manager:
            assert not manager.wait_for_hosts(5)
            assert {host.state for host in manager.executor.hosts} == {"failed"}
            with pytest.raises(ServersUnavailable, match=r"gpu/1: submit: .*invalid partition"):
                manager.process(abs, [-1])

    def test_what_can_never_start_fails(self, on_slurm):
        for options, words in {"--hold": "JobHeldUser", "-p short -t 60": "TimeLimit"}.items():
            with manage(jobs(2, options=options)) as manager:
                assert not manager.wait_for_hosts(5)
                assert words in str(state_of(manager).error)

    @pytest.mark.parametrize("where", ["[0-9]*", "''"], ids=["step", "job"])
    def test_jobs_that_are_of_no_use_in_a_row(self, on_slurm, tmp_path, monkeypatch, where):
        """A start-up file of the site's that fails; its words are the error of the last job."""
        profile = tmp_path / "profile"
        profile.write_text(
            f'case "$SLURM_JOB_ID $SLURM_STEP_ID" in [0-9]*" "{where})\n'
            f"echo >> {tmp_path}/tries; echo no license today >&2; exit 1;; esac\n"
        )
        monkeypatch.setenv("BASH_ENV", str(profile))  # which bash reads in jobs
        monkeypatch.setenv("HOME", str(tmp_path))
        with manage(jobs(2)) as manager:
            status = state_of(manager)
            wait_until(lambda: status.state == "failed", PATIENCE, "it is given up")
            assert "no license today" in str(status.error)
            assert (tmp_path / "tries").read_text() == "\n" * allocations.FAILURES
        wait_until(lambda: not list(tmp_path.glob(".ostap*")), PATIENCE, "nothing is left of that")

    def test_a_script_of_the_user_that_fails(self, on_slurm):
        with manage(jobs(2, environment="module load root")) as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            assert "module: command not found" in str(state_of(manager).error)
            wait_until(lambda: not on_slurm.jobs(), PATIENCE, "its job has ended")

    def test_a_job_that_is_cancelled_is_replaced(self, on_slurm):
        with manage(jobs(4)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            first = on_slurm.run("squeue", "-h", "-r", "-o", "%i").split()[0]
            total = 0
            for number, (value, _, _) in enumerate(manager.iexecute(where, range(200))):
                total += value
                if number == 10:
                    on_slurm.run("scancel", first)
            assert total == SQUARES
            states = [host.state for host in manager.executor.hosts]
            assert manager.process(where, range(4))  # which wakes what rests
            wait_until(lambda: manager.workers == {"gpu/1": 2, "gpu/2": 2}, PATIENCE, states)
            assert first not in on_slurm.run("squeue", "-h", "-r", "-t", "running", "-o", "%i")

    def test_the_controller_goes_away_and_comes_back(self, on_slurm, monkeypatch, killed):
        monkeypatch.setattr(allocations, "UNKNOWN", 2.0)
        with manage(jobs(2)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            on_slurm.stop("slurmctld")
            try:
                assert sum(v for v, _, _ in manager.process(where, range(200))) == SQUARES
                added = manager.executor.add_hosts([jobs(2, name="more")])[0]
                wait_until(lambda: "sbatch: " in added.reason, PATIENCE, "it is told")
            finally:
                on_slurm.start("slurmctld")
            wait_until(lambda: added.state == "up", PATIENCE, "it is up")
            names = on_slurm.run("squeue", "-h", "-r", "-t", "running", "-o", "%j").split()
            assert len([name for name in names if name.startswith("more-")]) == 1


CLIENT = """\
import sys, time
from pathlib import Path
from ostap_parallel import Slurm, WorkManager

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    entry = Slurm(4, cpus=2, walltime="10m", python=sys.executable, environment=sys.argv[2])
    with WorkManager(0, [entry], config=(), silent=True) as manager:
        (folder / "made").touch()
        manager.process(time.sleep, [600] * 4)
"""


class TestMishaps:
    def test_what_killed_sessions_have_left_on_a_node_goes_with_the_next(self, on_slurm, tmp_path):
        with manage(jobs(2)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            (left,) = (tmp_path / "there").glob("ostap-parallel.*")
            killed = {pid for pid, words in steps_of(on_slurm) if b"slurm_script" not in words}
            for pid in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert manager.process(abs, [-1]) == [1]
        # The session after it may have begun before all processes of this one had ended.
        wait_until(lambda: not killed & dict(steps_of(on_slurm)).keys(), PATIENCE, "they are gone")
        with manage(jobs(2)) as manager:
            assert manager.process(abs, [-1]) == [1]
            assert not left.exists()

    def test_a_submission_that_is_answered_late_is_not_repeated(
        self, on_slurm, tmp_path, monkeypatch
    ):
        real = shutil.which("sbatch", path=on_slurm.environ["PATH"])
        late = tmp_path / "bin" / "sbatch"
        late.parent.mkdir()
        late.write_text(f'#!/bin/sh\n{real} "$@"\nexec sleep 600\n')  # whose answer is lost
        late.chmod(0o755)
        monkeypatch.setenv("PATH", f"{late.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(allocations, "SUBMISSION", 2.0)
        with manage(jobs(4)) as manager:
            wait_until(lambda: manager.workers == {"gpu/1": 2, "gpu/2": 2}, PATIENCE, "both")
            assert sum(v for v, _, _ in manager.process(where, range(200))) == SQUARES
            arrays = on_slurm.run("squeue", "-h", "-r", "-o", "%F").split()
            assert (len(arrays), len(set(arrays))) == (2, 1)

    def test_a_session_that_is_silent_is_lost_and_leaves_nothing(self, on_slurm):
        with manage(jobs(2, keepalive=3)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            status = state_of(manager)
            sruns = [pid for pid, words in processes() if words.startswith(b"srun\0")]
            before = {pid for pid, words in steps_of(on_slurm) if b"ppserver" in words}
            assert before
            for pid in sruns:  # nothing goes either way then, and nobody is told
                os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: status.lost == 1, PATIENCE, "it is lost")
            wait_until(lambda: not before & {p for p, _ in steps_of(on_slurm)}, PATIENCE, "gone")
            assert manager.process(abs, [-1]) == [1]


class TestAdapting:
    def test_jobs_come_and_go_with_the_work(self, on_slurm, monkeypatch):
        monkeypatch.setattr(supervisor, "PACE", 0.5)
        monkeypatch.setattr(supervisor, "SPARE_REST", 1.0)
        with manage(jobs(None, adapt=(0, 4), keepalive=3)) as manager:
            hosts = manager.executor.hosts
            assert [host.state for host in hosts] == ["resting", "resting"]
            assert not on_slurm.jobs()
            assert manager.process(abs, [-1]) == [1]
            assert [host.state for host in hosts] == ["up", "resting"]  # one is enough for that
            assert len(set(manager.process(slow, [0.3] * 60))) == 60
            assert [host.state for host in hosts] == ["up", "up"]
            wait_until(lambda: not on_slurm.jobs(), PATIENCE, "they have gone")
            assert [host.state for host in hosts] == ["resting", "resting"]
            assert manager.process(abs, [-2]) == [2]
            assert {host.lost for host in hosts} == {0}


# At these moments of a client's a program gets what it would wait for.
HOOKS = {
    "submitting": ("sbatch", 'sleep 1; {real} "$@"; echo > {folder}/is-submitted'),
    "granted": ("srun", "exec sleep 600"),
    "copying": ("tar", "exec sleep 600"),
}


class TestEnds:
    @pytest.mark.parametrize("moment", [*HOOKS, "pending", "in a script", "running"])
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_nothing_is_left(self, on_slurm, tmp_path, moment, number):
        script = f"echo > {tmp_path}/script.$SLURM_JOB_ID; sleep 600"
        environment = script if moment == "in a script" else ""
        (tmp_path / "client.py").write_text(CLIENT)
        argv = [sys.executable, tmp_path / "client.py", tmp_path, environment]
        environ = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
        if moment in HOOKS:
            program, text = HOOKS[moment]
            real = shutil.which(program, path=on_slurm.environ["PATH"])
            hook = tmp_path / "bin" / program
            hook.parent.mkdir()
            text = text.format(real=real, folder=tmp_path)
            hook.write_text(f"#!/bin/sh\necho > {tmp_path}/is-there\n{text}\n")
            hook.chmod(0o755)
            environ["PATH"] = f"{hook.parent}:{environ['PATH']}"
        ready = {
            **dict.fromkeys(HOOKS, lambda: (tmp_path / "is-there").exists()),
            "pending": lambda: "PENDING" in on_slurm.run("squeue", "-h", "-o", "%T"),
            "in a script": lambda: list(tmp_path.glob("script.*")),
            "running": lambda: sum(b"ppserver" in words for _, words in steps_of(on_slurm)) >= 2,
        }
        with contextlib.ExitStack() as stack:
            if moment in ("pending", "submitting"):  # else a job would end by itself, in time
                stack.enter_context(blocked(on_slurm))
            client = stack.enter_context(
                subprocess.Popen(argv, env=environ, stderr=subprocess.DEVNULL)
            )
            try:
                wait_until(ready[moment], PATIENCE, moment)
            finally:
                client.send_signal(number)
            client.wait(PATIENCE)
            if moment == "submitting":  # after its client has gone
                wait_until((tmp_path / "is-submitted").exists, PATIENCE, "it is done")
            names = "squeue", "-h", "-o", "%j"
            wait_until(lambda: "slurm-" not in on_slurm.run(*names), PATIENCE, "jobs have gone")

    def test_a_job_that_nobody_cancels_ends_by_itself(self, on_slurm):
        script = jobs(2).script()
        assert "op_nap=8 " in script  # seconds: four of these without anybody are its end
        on_slurm.run("sbatch", data=script.replace("op_nap=8 ", "op_nap=0.3 "))
        wait_until(lambda: not on_slurm.jobs(), 20, "it has ended")


class TestChaos:
    def test_sums_are_exact(self, on_slurm, killed, monkeypatch):
        monkeypatch.setattr(allocations, "UNKNOWN", 2.0)
        seed = random.randrange(1000)
        rng = random.Random(seed)

        def cancel():
            if found := on_slurm.try_("squeue", "-h", "-r", "-o", "%i").split():
                on_slurm.try_("scancel", rng.choice(found))

        def kill(word):
            pids = [pid for pid, words in steps_of(on_slurm) if word in words]
            for pid in rng.sample(pids, min(1, len(pids))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        def restart():
            on_slurm.stop("slurmctld")
            on_slurm.start("slurmctld")

        harms = [
            *(cancel, cancel, restart, lambda: kill(b"slurm_script"), lambda: kill(b"ppserver")),
            lambda: kill(b"ostap-parallel-job"),
        ]
        rng.shuffle(harms)
        with manage(jobs(4)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            values = []
            for number, (value, _, _) in enumerate(manager.iexecute(where, range(1200))):
                values.append(value)
                if number % 180 == 90 and harms:
                    harms.pop()()
            assert sorted(values) == [n * n for n in range(1200)], seed
            assert not harms


class TestEntries:
    def test_the_script(self):
        entry = Slurm(
            cpus=8, walltime="4:00:00", memory="4G", options="--partition=gpu -A abc", skip="-A"
        )
        lines = entry.script().splitlines()
        for line in ("--cpus-per-task=8", "--time=4:00:00", "--mem=4096M", "--array=0-0"):
            assert f"#SBATCH {line}" in lines
        assert "#SBATCH --partition=gpu -A abc" in lines
        assert "--mem" not in Slurm(cpus=1).script()

    def test_the_scheduler_is_asked(self, on_slurm):
        assert "to start at" in jobs(2).check()
        with pytest.raises(JobRefused, match="invalid partition"):
            jobs(2, options="--partition=nowhere").check()

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"cpu": 8}, "there is no setting 'cpu': did you mean cpus"),
            ({"cpus": 0}, "Slurm cpus: not a number of at least 1: 0"),
            ({"walltime": "90"}, "Slurm walltime: walltime must be a time such as"),
            ({"memory": "4"}, "Slurm memory: memory must be a number with its unit"),
            ({"options": "--comment='a"}, "Slurm options: No closing quotation"),
            ({"login": "a b"}, "Slurm login: server 'a b' is none of"),
            ({"login": "h*3"}, r"Slurm login: \[user@\]host\[:port\] is wanted"),
            ({"adapt": (4, 2)}, "the least and the most workers are wanted"),
            ({"adapt": "many"}, "the least and the most workers are wanted"),
            ({"name": "a/b"}, "not a host name"),
            ({"user": "me"}, "there is no setting 'user'"),
        ],
    )
    def test_what_is_wrong_is_told(self, settings, words):
        with pytest.raises(ConfigError, match=words):
            Slurm(**settings)

    @pytest.mark.parametrize(
        ("text", "servers", "words"),
        [
            ("[Parallel]\nbatch = slurm", "h1", r"batch: it belongs into a section \[Parallel:<"),
            ("[Parallel:g]\nbatch = pbs", "g", "batch: neither 'slurm' nor 'sge': 'pbs'"),
            ("[Parallel:g]\nbatch = sge\njobs = 2\ncpus = 4", "g*9", "takes 3 jobs, but jobs = 2"),
            ("[Parallel:g]\nbatch = sge", "me@g", "a user stands in its login"),
        ],
    )
    def test_what_is_wrong_in_a_file_is_told(self, tmp_path, text, servers, words):
        config = tmp_path / "rc"
        config.write_text(text)
        config.chmod(0o600)
        with pytest.raises(ConfigError, match=words):
            WorkManager(0, servers, config=config)

    def test_too_many_jobs(self):
        with pytest.raises(ConfigError, match="adapt says how many workers there are"):
            WorkManager(0, [Slurm(9, adapt=(0, 4))], config=())
        with pytest.raises(ConfigError, match="takes 3 jobs, but jobs = 2"):
            WorkManager(0, [Slurm(9, cpus=4, jobs=2)], config=())


def preempt(slurm, seconds=1):
    """Have all nodes taken by a job that comes first."""
    urgent = "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null"
    slurm.run("sbatch", *urgent, data=f"#!/bin/sh\nsleep {seconds}\n")


def give_way(slurm):
    """Have jobs of the partition ``soft`` preempted, which run on for a while."""
    preempt(slurm)


def cancel(slurm):
    """Cancel all jobs."""
    slurm.run("scancel", *slurm.run("squeue", "-h", "-r", "-o", "%i").split())


class TestTheEndIsNear:
    def test_wall_time(self, on_slurm, caplog, monkeypatch):
        """Nothing is begun any more when the end of the job is near, and another one comes."""
        caplog.set_level("INFO", "ostap_parallel")
        # a minute is the least that SLURM can give
        monkeypatch.setattr(allocated_, "MARGIN", 52.0)
        monkeypatch.setattr(allocated_, "MOST_OF_IT", 0.9)
        with manage(jobs(4, walltime="1m")) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            found = manager.process(slow, [0.5] * 120)
            assert (len(found), len(set(found))) == (120, 120)
            assert {host.lost for host in manager.executor.hosts} == {0}
            assert "the wall time of 1m" in caplog.text

    def test_what_takes_all_the_wall_time_is_to_blame(self, on_slurm, monkeypatch):
        def claim(self, claim):
            return replace(real(self, claim), ends=time.monotonic() + 8)

        real = allocations.Allocations.claim
        monkeypatch.setattr(allocations.Allocations, "claim", claim)
        monkeypatch.setattr(allocated_, "MARGIN", 0.5)
        monkeypatch.setattr(retries.Limits.__init__, "__defaults__", (0, 0, 8))
        with manage(jobs(2)) as manager:
            running = manager.executor.submit(time.sleep, 600)
            with pytest.raises(WorkerLost, match=r"the wall time of 10m of job \d+_0 is over"):
                running.result(PATIENCE)
            assert state_of(manager).lost == 0

    def test_a_warning_before_the_end(self, on_slurm):
        with manage(jobs(4)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            status = state_of(manager)
            first = on_slurm.run("squeue", "-h", "-r", "-o", "%i").split()
            for _ in manager.iexecute(where, range(40)):
                pass
            number = on_slurm.run("squeue", "-h", "-r", "-j", first[0], "-o", "%A").strip()
            running = manager.executor.submit(time.sleep, 1.0)
            wait_until(running.running, PATIENCE, "it runs")
            on_slurm.run("scancel", "--signal=USR1", number)  # as --signal=USR1@60 does
            hosts = manager.executor.hosts
            wait_until(lambda: any("SIGUSR1" in h.reason for h in hosts), PATIENCE, "it rests")
            assert running.result(PATIENCE) is None
            assert {host.lost for host in hosts} == {0}
            assert sum(v for v, _, _ in manager.process(where, range(200))) == SQUARES
            assert status.lost == 0

    def test_preemption(self, on_slurm):
        with manage(jobs(4)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            total = 0
            for number, (value, _, _) in enumerate(manager.iexecute(where, range(200))):
                total += value
                if number == 20:
                    preempt(on_slurm, seconds=3)
            assert total == SQUARES
            assert manager.wait_for_hosts(PATIENCE)


class TestWhyItDied:
    @pytest.mark.parametrize(
        ("end", "words"),
        [
            pytest.param(cancel, r"was cancelled: CANCELLED", id="cancelled"),
            pytest.param(preempt, r"was preempted by another job: PREEMPTED", id="preempted"),
            pytest.param(give_way, r"was preempted by another job: RUNNING", id="with grace"),
        ],
    )
    def test_a_job_that_is_ended(self, on_slurm, monkeypatch, end, words):
        monkeypatch.setattr(retries.Limits.__init__, "__defaults__", (0, 0, 0))
        monkeypatch.setattr(allocated_, "LAST_WORDS", PATIENCE)
        options = "--partition=soft" if end is give_way else ""
        with manage(jobs(2, options=options)) as manager:
            running = manager.executor.submit(time.sleep, 600)
            wait_until(running.running, PATIENCE, "it runs")
            end(on_slurm)
            with pytest.raises(WorkerLost, match=rf"job \d+_0 {words}"):
                running.result(2 * PATIENCE)

    def test_one_that_is_suspended(self, on_slurm, caplog, killed):  # as it has no time to tidy up
        with manage(jobs(2, keepalive=3)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            status = state_of(manager)
            on_slurm.run("scontrol", "suspend", on_slurm.run("squeue", "-h", "-o", "%A").strip())
            wait_until(lambda: status.lost == 1, PATIENCE, "it does not answer")
            wait_until(lambda: "_0 is suspended: SUSPENDED" in caplog.text, PATIENCE, "it is told")
            assert manager.process(abs, [-1]) == [1]

    def test_a_node(self, on_slurm, monkeypatch, killed):
        monkeypatch.setattr(retries.Limits.__init__, "__defaults__", (0, 0, 0))
        node = "nodename="
        with manage(jobs(2)) as manager:
            running = manager.executor.submit(time.sleep, 600)
            wait_until(running.running, PATIENCE, "it runs")
            node += on_slurm.run("squeue", "-h", "-r", "-o", "%N").strip()
            on_slurm.run("scontrol", "update", node, "state=down", "reason=test")
            try:
                with pytest.raises(WorkerLost, match=r"lost with its node|about to be ended"):
                    running.result(PATIENCE)
            finally:
                on_slurm.try_("scontrol", "update", node, "state=resume")

    def test_memory(self, on_slurm):
        if not on_slurm.has_groups:
            pytest.skip("memory is not limited here")
        with manage(jobs(2, memory="150M")) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            with pytest.raises(WorkerLost, match="out of memory"):
                manager.executor.submit(bytearray, 1 << 30).result(PATIENCE)
            assert manager.executor.submit(abs, -1).result(PATIENCE) == 1
            assert state_of(manager).lost == 0

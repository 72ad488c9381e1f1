"""Allocations of SGE, and of a SLURM that is reached through a login host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from allocated import slow, where
from cable import CableUnavailable, open_cable
from clusters import open_slurm
from conftest import cluster_or_skip
from helpers import processes_with, wait_until

import ostap_parallel
from ostap_parallel import ConfigError, HostError, Sge, Slurm, WorkManager
from ostap_parallel.errors import JobRefused
from ostap_parallel.supply import allocations, sources
from ostap_parallel.supply.allocations import holder
from ostap_parallel.supply.steps import way_within

PATIENCE = 60  # seconds; only a hang takes that long

PACKAGE_PARENT = Path(ostap_parallel.__file__).parents[1]

SQUARES = sum(n * n for n in range(200))


def manage(*servers, ncpus=0, **given):
    sync = [Path(__file__).with_name("allocated.py")]
    return WorkManager(ncpus, servers, **{"config": (), "silent": True, "sync": sync, **given})


def sge_jobs(workers=4, **given):
    settings = {"cpus": 2, "walltime": "10m", "python": sys.executable, "name": "gpu", **given}
    return Sge(workers, **settings)


@pytest.fixture
def on_sge(sge, monkeypatch):
    """SGE for this process; after the test no job of it, and no process or file, is left."""
    folder = Path(tempfile.mkdtemp(prefix="op-"))  # short, as it is to have sockets
    monkeypatch.setenv("TMPDIR", str(folder))
    for name, value in sge.environ.items():
        monkeypatch.setenv(name, value)
    yield sge
    try:
        wait_until(lambda: not sge.jobs(), PATIENCE, "no job is left")
        wait_until(lambda: not processes_with(folder), PATIENCE, "no process is left")
    except AssertionError:
        raise AssertionError((sge.jobs(), processes_with(folder))) from None
    finally:
        sge.try_("qdel", "-f", "-u", "*")
    folder.rmdir()


@contextlib.contextmanager
def blocked(sge, tmp_path):
    """All slots are somebody else's."""
    script = tmp_path / "block"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    options = "-terse", "-pe", "smp", "4", "-o", "/dev/null", "-j", "y"
    block = sge.run("qsub", *options, str(script)).strip()
    wait_until(lambda: any(" r " in line for line in sge.jobs()), PATIENCE, "it runs")
    try:
        yield
    finally:
        sge.run("qdel", block)


CLIENT = """\
import sys, time
from ostap_parallel import Sge, WorkManager

if __name__ == "__main__":
    entry = Sge(4, cpus=2, walltime="10m", python=sys.executable)
    with WorkManager(0, [entry], config=(), silent=True) as manager:
        manager.process(time.sleep, [600] * 4)
"""

PROGRAM = """\
import os, sys
from ostap_parallel import WorkManager

with WorkManager(0, [os.uname().nodename], way="qrsh", silent=True, python=sys.executable) as m:
    print(m.process(abs, [-1, 2]), [str(h.error) for h in m.executor.hosts], flush=True)
"""


class TestSge:
    def test_jobs_are_hosts(self, on_sge):
        with manage(sge_jobs(4)) as manager:
            assert sum(v for v, _, _ in manager.process(where, range(200))) == SQUARES
            assert manager.wait_for_hosts(PATIENCE)
            assert manager.workers == {"gpu/1": 2, "gpu/2": 2}
            slots = [line.split()[8] for line in on_sge.jobs()]
            assert slots == ["2", "2"]  # one job each, whatever there is to send
            big = os.urandom(4 << 20)
            assert manager.process(lambda data: data[::-1], [big] * 4) == [big[::-1]] * 4

    def test_queued_is_not_failing(self, on_sge, tmp_path):
        script = tmp_path / "block"
        script.write_text("#!/bin/sh\nexec sleep 600\n")
        options = "-terse", "-pe", "smp", "4", "-o", "/dev/null", "-j", "y"
        block = on_sge.run("qsub", *options, str(script)).strip()
        wait_until(lambda: any(" r " in line for line in on_sge.jobs()), PATIENCE, "it runs")
        with manage(sge_jobs(2)) as manager:
            status = manager.executor.hosts[0]
            wait_until(lambda: "full" in status.reason, PATIENCE, "the reason")
            assert status.state == "queued"
            on_sge.run("qdel", block)
            assert manager.process(abs, [-1]) == [1]
            assert (status.state, status.lost) == ("up", 0)

    @pytest.mark.parametrize(
        ("options", "words"),
        {"-q nowhere": "unknown queue", "-pe no 2": "no", "-l mem_free=900T": "suitable"}.items(),
    )
    def test_what_can_never_start_fails(self, on_sge, options, words):
        with manage(sge_jobs(2, options=options)) as manager:
            assert not manager.wait_for_hosts(5)
            error = manager.executor.hosts[0].error
            assert (error.step, words in str(error)) == ("submit", True)
        with pytest.raises(JobRefused, match=words):
            sge_jobs(2, options=options).check()

    def test_a_job_that_is_deleted_is_replaced(self, on_sge):
        with manage(sge_jobs(4)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            first = on_sge.jobs()[0].split()[0]
            total = 0
            for number, (value, _, _) in enumerate(manager.iexecute(where, range(200))):
                total += value
                if number == 10:
                    on_sge.run("qdel", first)
            assert total == SQUARES

    def test_signals_to_the_group_end_no_task(self, on_sge):
        """With -notify SGE sends USR2 to all of the group before it ends a job."""
        with manage(sge_jobs(2)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            status = manager.executor.hosts[0]
            running = manager.executor.submit(os.system, "sleep 2")
            wait_until(running.running, PATIENCE, "it runs")
            on_sge.run("qdel", on_sge.jobs()[0].split()[0])
            wait_until(lambda: "SIGUSR2" in status.reason, PATIENCE, "it is told")
            assert running.result(PATIENCE) == 0
            assert status.lost == 0

    @pytest.mark.parametrize("moment", ["pending", "running"])
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_nothing_is_left(self, on_sge, tmp_path, number, moment):
        (tmp_path / "client.py").write_text(CLIENT)
        argv = [sys.executable, tmp_path / "client.py"]
        environ = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
        with contextlib.ExitStack() as stack:
            if moment == "pending":
                stack.enter_context(blocked(on_sge, tmp_path))
            client = stack.enter_context(
                subprocess.Popen(argv, env=environ, stderr=subprocess.DEVNULL)
            )
            state = " qw " if moment == "pending" else " r "
            try:
                wait_until(lambda: sum(state in x for x in on_sge.jobs()) == 2, PATIENCE, "they")
            finally:
                client.send_signal(number)
            client.wait(PATIENCE)
            others = 1 if moment == "pending" else 0
            wait_until(lambda: len(on_sge.jobs()) == others, PATIENCE, "the jobs have gone")

    def test_which_way_leads_to_the_nodes_of_a_job(self, on_sge):
        within = {"PE": "smp", "PE_HOSTFILE": "/nowhere", "JOB_ID": "1"}
        assert way_within(within) == "qrsh"  # its control_slaves is TRUE
        assert way_within({**within, "PE": "none"}) == "ssh"
        assert way_within({"SLURM_JOB_ID": "1"}) == "srun"
        assert way_within({}) == "ssh"

    def test_a_manager_in_a_job(self, on_sge, tmp_path):
        (tmp_path / "program.py").write_text(PROGRAM)
        script = f"export PYTHONPATH={PACKAGE_PARENT}\n{sys.executable} {tmp_path}/program.py\n"
        (tmp_path / "job").write_text(f"#!/bin/bash\n{script}echo over\n")
        output = tmp_path / "output"
        options = "-pe", "smp", "2", "-j", "y", "-o", str(output), "-S", "/bin/bash", "-V"
        on_sge.run("qsub", *options, str(tmp_path / "job"))
        wait_until(lambda: output.exists() and "over" in output.read_text(), PATIENCE, "it")
        assert "[1, 2] ['None']" in output.read_text()


@pytest.fixture
def gateway(slurm, make_hosts):
    """A host from which a SLURM is reached that is not to be reached from here."""
    hosts = make_hosts(1, env={"SLURM_CONF": "/srv/home/slurm.conf"})
    (host,) = hosts
    text = Path(slurm.environ["SLURM_CONF"]).read_text()
    (host.home / "slurm.conf").write_text(text)
    yield host
    wait_until(lambda: not slurm.jobs(), PATIENCE, "no job is left")


@pytest.fixture
def login(gateway):
    """How that is named."""
    return {"login": gateway.name, "ssh_config": gateway.ssh_config}


def words_of(pid):
    """Return the command line of a process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# As it is on a laptop that sleeps, or whose cable is cut.
LAPTOP = """\
import sys, time
from ostap_parallel import Slurm, WorkManager

if __name__ == "__main__":
    entry = Slurm(
        2, cpus=2, walltime="10m", login=sys.argv[1], ssh_config=sys.argv[2], keepalive=3
    )
    with WorkManager(0, [entry], config=(), silent=True) as manager:
        manager.process(time.sleep, [600])
"""

BLOCK = "#!/bin/sh\nexec sleep 600\n"


def jobs(workers, **given):
    return Slurm(workers, cpus=2, walltime="10m", python=sys.executable, name="gpu", **given)


class TestThroughALoginHost:
    def test_jobs_are_hosts(self, slurm, login):
        assert "to start at" in jobs(2, **login).check()
        with manage(jobs(4, memory="900M", **login)) as manager:
            assert sum(v for v, _, _ in manager.process(where, range(200))) == SQUARES
            assert manager.wait_for_hosts(PATIENCE)
            assert manager.workers == {"gpu/1": 2, "gpu/2": 2}
            assert len(slurm.jobs()) == 2
            big = os.urandom(32 << 20)
            assert manager.process(lambda data: data[::-1], [big]) == [big[::-1]]

    def test_refusals(self, slurm, login):
        with manage(jobs(2, options="--partition=nowhere", **login)) as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            assert "invalid partition" in str(manager.executor.hosts[0].error)
        elsewhere = {**login, "login": "nowhere"}
        with manage(jobs(2, **elsewhere)) as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            assert manager.executor.hosts[0].error.step == "login"
        with pytest.raises(HostError, match="nowhere"):
            jobs(2, **elsewhere).check()
        with pytest.raises(ConfigError, match="wanted"):
            jobs(2, login="h*2")

    def test_a_client_that_is_cut_off(self, slurm, gateway, tmp_path):
        """Its jobs go, also those that wait, even if the controller is away just then."""
        folder = Path(tempfile.mkdtemp(prefix="op-"))
        (tmp_path / "client.py").write_text(LAPTOP)
        argv = [sys.executable, tmp_path / "client.py", gateway.name, gateway.ssh_config]
        environ = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "TMPDIR": str(folder)}
        options = "--parsable", "--exclusive", "-N2", "--output=/dev/null"
        blocks = slurm.run("sbatch", *options, data=BLOCK).strip()
        with subprocess.Popen(argv, env=environ, stderr=subprocess.DEVNULL) as client:
            try:
                wait_until(lambda: len(slurm.jobs()) == 2, PATIENCE, "it waits")
                ours = [pid for pid, _ in processes_with(folder)]
                for pid in ours:  # nothing goes either way then, and nobody is told
                    os.kill(pid, signal.SIGSTOP)
                slurm.stop("slurmctld", signal.SIGTERM)  # it keeps what it knows
                far = [pid for pid in gateway.processes() if b"\0-I\0" in words_of(pid)]
                assert far
                wait_until(lambda: not any(map(words_of, far)), PATIENCE, "the far end has gone")
                slurm.start("slurmctld")
                wait_until(lambda: len(slurm.jobs()) == 1, 2 * PATIENCE, "only the other is left")
            except AssertionError as exc:
                raise AssertionError(slurm.jobs(), gateway.processes()) from exc
            finally:
                for pid, _ in processes_with(folder):
                    os.kill(pid, signal.SIGKILL)
                client.wait(PATIENCE)
                slurm.try_("scancel", blocks)
                shutil.rmtree(folder)

    def test_a_connection_that_breaks(self, slurm, login):
        with manage(jobs(4, **login), patience=PATIENCE) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            total = 0
            for number, (value, _, _) in enumerate(manager.iexecute(where, range(200))):
                total += value
                if number == 10:
                    (pid,) = ssh_to(login["login"])
                    os.kill(pid, signal.SIGKILL)
            assert total == SQUARES


@pytest.fixture
def at_the_cable(monkeypatch, tmp_path):
    """A cable to the first node of a SLURM."""
    with contextlib.ExitStack() as stack:
        try:
            cable = stack.enter_context(open_cable())
        except CableUnavailable as exc:
            pytest.skip(str(exc))
        opening = open_slurm(2, 2, accounts=False, cables=[cable])
        cluster = stack.enter_context(cluster_or_skip(opening))
        folder = Path(tempfile.mkdtemp(prefix="op-"))  # short, as it is to have sockets
        stack.callback(shutil.rmtree, folder)
        monkeypatch.setenv("TMPDIR", str(folder))
        for name, value in cluster.environ.items():
            monkeypatch.setenv(name, value)
        yield cable
        cable.heal()
        wait_until(lambda: not cluster.jobs(), PATIENCE, "no job is left")
        wait_until(lambda: not processes_with(folder), PATIENCE, "no process is left")
        assert list(folder.iterdir()) == []


def far_away(cable):
    """Return the processes of jobs at the far end of a cable."""
    space, found = Path(cable.space).readlink(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_there = (entry / "ns/net").readlink() == space
            if is_there and b"SLURM_JOB_ID=" in (entry / "environ").read_bytes():
                found.append(words_of(entry.name))
    return found


class TestACutCable:
    def test_to_a_node(self, at_the_cable, monkeypatch):
        """Nobody is told, at either end; the run goes on elsewhere, and nothing stays there."""
        monkeypatch.setattr(allocations, "UNKNOWN", 2.0)
        # the time after which a job that nobody cancels ends by itself
        short = holder().replace("op_nap=8 ", "op_nap=1 ")
        monkeypatch.setattr(sources, "holder", lambda: short)
        cable = at_the_cable
        with manage(jobs(4, keepalive=3)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            assert far_away(cable)
            hosts, found = manager.executor.hosts, []
            is_lost = lambda: [host.lost for host in hosts].count(1) == 1  # noqa: E731
            for value in manager.iexecute(slow, [0.1] * 200):
                found.append(value)
                if len(found) == 20:
                    cable.cut()
                if len(found) == 150:  # only the other node has done these
                    wait_until(is_lost, PATIENCE, "it is lost")
                    cable.heal()
            assert (len(found), len(set(found))) == (200, 200)
            assert manager.process(abs, [-1]) == [1]
            assert manager.wait_for_hosts(2 * PATIENCE)  # its node has come back
            running = manager.executor.submit(slow, 600)
            wait_until(running.running, PATIENCE, "it runs")
            cable.cut()
        wait_until(lambda: not far_away(cable), PATIENCE, "its processes have ended, alone")


def ssh_to(name):
    """Return the processes of ours that lead to a host."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environ = (entry / "environ").read_bytes()
            mine = f"TMPDIR={os.environ['TMPDIR']}\0".encode() in environ
            if words[0] == b"ssh" and name.encode() in words and mine:
                found.append(int(entry.name))
    return found

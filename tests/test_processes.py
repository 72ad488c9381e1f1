"""Helper processes: no signal of a terminal reaches them, no fork keeps them, they end with us."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import open_manager, wait_clean, wait_until
from sshd import describe

from ostap_parallel.config import HostConfig
from ostap_parallel.engine.engine import Engine
from ostap_parallel.supply.processes import run_apart, start_apart
from ostap_parallel.supply.session import Session
from ostap_parallel.supply.ssh import Ssh, control_directory
from ostap_parallel.worker.processes import keep_from_forks, let_forks_keep

PATIENCE = 60  # seconds; only a hang takes that long
PACKAGE_PARENT = Path(sys.modules["ostap_parallel"].__file__).parents[1]

pytestmark = pytest.mark.slow

# Each signal is sent by another process to the whole group, without a pause, as a terminal would.
FLOOD = """
import os, signal, subprocess, sys
from ostap_parallel.supply.processes import run_apart, start_apart

numbers = [signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP]
for number in numbers:
    signal.signal(number, lambda *_: None)
sender = "import os, signal\\nfor n in {}: signal.signal(n, signal.SIG_IGN)\\nwhile os.getppid() == {}:"
sender += "\\n for n in {}: os.killpg({}, n)"
words = [list(map(int, numbers)), os.getpid(), list(map(int, numbers)), os.getpgrp()]
with subprocess.Popen([sys.executable, "-c", sender.format(*words)], start_new_session=True) as flood:
    bad = []
    for n in range(150):
        done = run_apart(["true"])
        process = start_apart(["true"], restore=n % 2 == 0)
        bad += [status for status in (done.status, process.wait(60)) if status]
    flood.kill()
print("bad", bad, flush=True)
"""  # noqa: E501


def test_no_signal_of_the_terminal_at_any_moment():
    done = subprocess.run(
        [sys.executable, "-c", FLOOD],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
    )
    assert done.stdout == "bad []\n", done.stderr


def test_what_runs_programs_of_the_user_minds_signals():
    """ssh ends its ProxyCommand by SIGHUP."""
    masks = ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]
    process = start_apart(masks, restore=True, stdout=subprocess.PIPE)
    lines = dict(line.split() for line in process.communicate()[0].splitlines())
    assert int(lines[b"SigBlk:"], 16) == 0
    terminal = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
    minded = [n for n in terminal if signal.getsignal(n) is not signal.SIG_IGN]  # as with nohup
    assert int(lines[b"SigIgn:"], 16) & sum(1 << n - 1 for n in minded) == 0


def test_an_exit_status_that_cannot_be_known_is_none():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run_apart(["false"]).status is None
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert run_apart(["false"]).status == 1


@pytest.fixture
def no_sigchld():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


class TestSigchldIsIgnored:
    def test_a_host_works(self, hosts, no_sigchld):
        with open_manager(hosts, "h1*1") as manager:
            assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
            assert manager.process(abs, [-1]) == [1]
        wait_clean(hosts)

    @pytest.mark.parametrize(
        ("given", "step"),
        [({"environment": "exit 3"}, "environment"), ({"tmpdir": "/no"}, "tmpdir")],
    )
    def test_a_failure_is_one_and_tells_no_wrong_status(self, hosts, no_sigchld, given, step):
        with open_manager(hosts, "h1*1", **given) as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            (status,) = manager.executor.hosts
            assert status.error.step == step
            assert "status 0" not in status.error.reason

    def test_a_copy_that_fails(self, make_hosts, no_sigchld):
        (host,) = hosts = make_hosts(1)
        tar = host.bin / "tar"
        tar.write_text("#!/bin/sh\necho no tar today >&2\nexit 1\n")
        tar.chmod(0o755)
        with open_manager(hosts, "h1*1") as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            (status,) = manager.executor.hosts
            assert (status.error.step, status.error.reason) == ("copy", "no tar today")


# -- forks ------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys, time
from ostap_parallel import WorkManager

ssh_config, how = sys.argv[1:]
wm = WorkManager(0, "h1*1", ssh_config=ssh_config, config=(), silent=True)
assert wm.wait_for_hosts(60), wm.executor.hosts
if how == "ends":
    if (pid := os.fork()) == 0:
        sys.exit(0)
    os.waitpid(pid, 0)
    directory = [name for name in os.listdir(os.environ["TMPDIR"]) if "ostap-parallel-" in name]
    print(len(directory), wm.process(abs, [-1, -2]), wm.executor.hosts[0].lost, flush=True)
    wm.close()
elif how == "closes":
    if (pid := os.fork()) == 0:
        wm.executor.backend._supervisor.close()
        os._exit(0)
    os.waitpid(pid, 0)
    print(wm.process(abs, [-1, -2]), wm.executor.hosts[0].lost, flush=True)
    wm.close()
elif how == "outlives":
    if (pid := os.fork()) == 0:
        os.close(1)
        time.sleep(1000)
    print(pid, flush=True)
    time.sleep(1000)
"""


@contextmanager
def forking(hosts, tmp_path, how):
    script = tmp_path / "client.py"
    script.write_text(FORKS)
    with subprocess.Popen(
        [sys.executable, str(script), str(hosts.ssh_config), how],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(PACKAGE_PARENT)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def short_path():
    """A directory in which a control socket has room."""
    path = Path(os.environ["TMPDIR"], f"f{time.monotonic_ns() % 10**6}")
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


class TestForks:
    def test_one_that_ends_takes_nothing_along(self, hosts, short_path):
        with forking(hosts, short_path, "ends") as process:
            assert process.communicate(timeout=PATIENCE)[0] == "1 [1, 2] 0\n"
        wait_clean(hosts)

    def test_one_that_closes_does_nothing(self, hosts, short_path):
        with forking(hosts, short_path, "closes") as process:
            assert process.communicate(timeout=PATIENCE)[0] == "[1, 2] 0\n"
        wait_clean(hosts)

    def test_one_that_outlives_us_keeps_nothing(self, hosts, short_path):
        with forking(hosts, short_path, "outlives") as process:
            pid = int(process.stdout.readline())
            try:
                process.kill()
                process.wait(PATIENCE)
                wait_clean(hosts)
                assert Path(f"/proc/{pid}/cmdline").read_bytes()
                ours = f"TMPDIR={short_path}".encode()
                wait_until(lambda: with_environment(ours) == [pid], 5, "nothing here but the fork")
            finally:
                os.kill(pid, signal.SIGKILL)


def with_environment(text):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if text in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


# -- the user's ssh configuration, and start-up files ------------------------------------------

ODD = ["SessionType none", "StdinNull yes", "ForkAfterAuthentication yes", "RequestTTY force"]


@pytest.mark.parametrize("option", ODD)
class TestOddConfigurations:
    @pytest.fixture
    def ssh_config(self, hosts, short_path, option):
        path = short_path / "ssh_config"
        path.write_text(f"Host *\n  {option}\n  Include {hosts.ssh_config}\n")
        return path

    def test_a_host_works(self, hosts, ssh_config):
        with open_manager(hosts, "h1*1", ssh_config=ssh_config) as manager:
            assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
            assert manager.process(abs, [-1]) == [1]
        wait_clean(hosts)


def test_ssh_ends_with_us_even_if_it_does_not_read(hosts, short_path):
    """As an option on its command line may have it."""
    code = (
        "import time\nfrom ostap_parallel.supply.session import Session\n"
        "deaf = 'trap \"\" TERM HUP PIPE; while :; do sleep 0.2; done'\n"
        "session = Session('x', ['sh', '-c', deaf], print)\nsession.open()\n"
        "print(session._process.pid, flush=True)\ntime.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
    ) as process:
        pid = int(process.stdout.readline())
        try:
            wait_until(lambda: "sleep 0.2" in describe(pid), PATIENCE, "it runs")
        finally:
            process.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10, "it is gone")


def test_a_configuration_for_ipv6_only(hosts, short_path):
    one = hosts["h1"]
    path = short_path / "ssh_config"
    path.write_text(
        f"Host h1\n  AddressFamily inet6\n  ProxyCommand ssh -F {hosts.ssh_config} -W "
        f"{one.address}:{one.port} h2\n  HostKeyAlias [{one.address}]:{one.port}\n"
        f"Host *\n  Include {hosts.ssh_config}\n"
    )
    with open_manager(hosts, "h1*1", ssh_config=path) as manager:
        assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
        assert manager.process(abs, [-1]) == [1]
    wait_clean(hosts)


class TestStartUpFiles:
    @pytest.mark.parametrize("reads", ["read answer", "read a; read b; read c"])
    def test_one_that_reads_a_line(self, make_hosts, reads):
        hosts = make_hosts(login_shell="/bin/bash", rc=f"export SEEN=rc\n{reads}\n")
        with open_manager(hosts, "h1*1") as manager:
            assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
            assert manager.process(lambda _: os.environ["SEEN"], [1]) == ["rc"]
        wait_clean(hosts)

    def test_one_that_reads_all(self, make_hosts):
        hosts = make_hosts(login_shell="/bin/bash", rc="cat >/dev/null\n")
        begin = time.monotonic()
        with open_manager(hosts, "h1*1") as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            (status,) = manager.executor.hosts
            assert status.state == "failed"
            assert "reads standard input" in status.error.reason
        assert time.monotonic() - begin < PATIENCE
        wait_clean(hosts)

    def test_one_that_takes_its_time(self, make_hosts):
        hosts = make_hosts(login_shell="/bin/bash", rc="sleep 6\n")
        with open_manager(hosts, "h1*1") as manager:
            assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts


# -- callbacks --------------------------------------------------------------------------------


def test_a_handler_that_raises_loses_its_line_only(hosts, caplog):
    seen = []

    def on_event(host, event):
        seen.append(event)
        if "bad" in str(event):
            raise UnicodeEncodeError("ascii", "\u2713", 0, 1, "no")

    config = HostConfig(name="h1", ssh_config=hosts.ssh_config, ncpus=1)
    with Engine(0, [config], on_event=on_event) as executor:
        for text in "bad", "bad again", "good":
            assert executor.call(print, [text]).result(PATIENCE) is None
        begin = time.monotonic()
        executor.flush()
        assert time.monotonic() - begin < 3
    assert "good" in str(seen)
    notices = [r for r in caplog.records if "cannot be shown" in r.getMessage()]
    assert len(notices) == 1
    wait_clean(hosts)


def test_a_reader_goes_on_after_a_line_that_made_it_raise(hosts, caplog):
    lines = []

    def on_line(line):
        lines.append(line)
        raise RuntimeError

    config = HostConfig(name="h1", ssh_config=hosts.ssh_config)
    with control_directory() as directory:
        session = Session("h1", Ssh(config, directory / "c").argv(), on_line)
        session.open()
        session.write("echo one; echo two; exit\n")
        wait_until(lambda: lines == ["one", "two", None], PATIENCE, "all lines")
        session.close()
    assert len([r for r in caplog.records if "is lost" in r.getMessage()]) == 1


def test_forks_keep_what_has_the_number_of_something_of_ours():
    other, ours = os.pipe()
    keep_from_forks(ours)
    os.close(ours)  # by whoever has it otherwise
    reader, writer = os.pipe()
    try:
        assert reader == ours
        if not (pid := os.fork()):
            os._exit(not stat.S_ISFIFO(os.fstat(reader).st_mode))
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        let_forks_keep(ours)
        for descriptor in (other, reader, writer):
            os.close(descriptor)

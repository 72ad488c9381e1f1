"""However a run ends and whatever dies, nothing of it remains; and no secret leaks out."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import GONE, is_worker, kill, matching, open_manager, wait_clean, wait_until
from sshd import descendants, describe, live_pids

from ostap_parallel import WorkManager

pytestmark = pytest.mark.slow

PATIENCE = 60  # seconds; only a hang takes that long
PACKAGE_PARENT = Path(sys.modules["ostap_parallel"].__file__).parents[1]

CLIENT = """\
import os, subprocess, sys, time
from ostap_parallel import WorkManager

ssh_config, how, environment = sys.argv[1:]

def work(n):
    subprocess.Popen(["sleep", "4242"])
    subprocess.run(["sh", "-c", "trap '' TERM HUP INT; sleep 4242; true"])

def stubborn(n):
    while True:
        try:
            time.sleep(4242)
        except KeyboardInterrupt:
            subprocess.Popen(["sleep", "2424"])  # tells that it was interrupted

if __name__ == "__main__":
    wm = WorkManager(
        1, "h1*1 h2*1", ssh_config=ssh_config, config=(), silent=True,
        environment=environment or None,
    )
    if how == "run":
        with wm:
            wm.wait_for_hosts()
            wm.process(work, range(100))
    elif how == "stubborn":
        wm.wait_for_hosts()
        done = wm.iexecute(lambda n: n and stubborn(n), range(100), chunk_size=1)
        try:
            print(next(done), flush=True)
            next(done)
        finally:
            print("merged", wm.report.merged, flush=True)
    elif how == "started":
        with wm:
            wm.process(time.sleep, [1000] * 3)
    elif how == "exit":
        with wm:
            wm.wait_for_hosts()
            print(wm.process(lambda n: n * n, range(9), chunk_size=1))
    elif how == "unclosed":
        wm.wait_for_hosts()
        print(wm.process(lambda n: n * n, range(9), chunk_size=1))
    elif how == "forgotten":
        wm.wait_for_hosts()
        print(wm.process(lambda n: n * n, range(9), chunk_size=1))
        del wm
    elif how == "exception":
        wm.wait_for_hosts()
        for number in wm.iexecute(lambda n: n * n, range(10**9)):
            if number > 100:
                print([n * n for n in range(9)])
                raise SystemExit("an exception")
"""


@contextmanager
def client(hosts, tmp_path, how, environment="", terminal=False):
    """Run a client in another process; yield it. In the end all that it left here is counted.

    With `terminal` it has one, whose other end is the descriptor ``process.terminal``.
    """
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    private = tempfile.mkdtemp()
    environ = {**os.environ, "TMPDIR": private, "PYTHONPATH": str(PACKAGE_PARENT)}
    command = [sys.executable, str(script), str(hosts.ssh_config), how, environment]
    stdin = subprocess.DEVNULL
    if terminal:
        outer, stdin = os.openpty()
    try:
        with subprocess.Popen(
            ["setsid", "--ctty", *command] if terminal else command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            start_new_session=not terminal,
        ) as process:
            if terminal:
                os.close(stdin)
                process.terminal = outer
            try:
                yield process
            finally:
                process.kill()
        wait_until(lambda: not marked(private), GONE, "no process here")
    finally:
        for pid in marked(private):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(private)


def marked(folder):
    """Return the processes of this machine with the temporary directory `folder`."""
    mark = f"TMPDIR={folder}".encode()
    return [pid for pid in live_pids() if mark in read(f"/proc/{pid}/environ").split(b"\0")]


def read(path):
    try:
        return Path(path).read_bytes()
    except OSError:  # the process has just ended
        return b""


class TestTheClientEnds:
    @pytest.mark.parametrize("how", ["exit", "unclosed", "forgotten", "exception"])
    def test_by_itself(self, hosts, tmp_path, how):
        with client(hosts, tmp_path, how) as process:
            out, err = process.communicate(timeout=PATIENCE)
            assert str([n * n for n in range(9)]) in out.decode(), err.decode()
            assert process.returncode == (1 if how == "exception" else 0)
            wait_clean(hosts)

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
    def test_by_a_signal_while_tasks_run_programs(self, hosts, tmp_path, name):
        with client(hosts, tmp_path, "run") as process:
            for host in hosts:
                wait_until(lambda host=host: len(matching(host, "sleep 4242")) >= 2, 30, "tasks")
            process.send_signal(getattr(signal, name))
            process.communicate(timeout=PATIENCE)
            assert process.returncode != 0
            wait_clean(hosts)

    def test_by_ctrl_c_twice(self, hosts, tmp_path):
        with client(hosts, tmp_path, "stubborn") as process:
            assert process.stdout.readline() == b"0\n"
            for host in hosts:
                wait_until(
                    lambda host=host: sum(map(is_worker, host.processes())) == 1, 30, "workers"
                )
            process.send_signal(signal.SIGINT)
            # It waits for the tasks now, which do not end.
            wait_until(lambda: any(matching(host, "sleep 2424") for host in hosts), 30, "seen")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
            assert (process.returncode, out) == (-signal.SIGINT, b"merged 1\n")
            assert b"KeyboardInterrupt" in err
            wait_clean(hosts)

    def test_by_its_terminal_that_closes(self, hosts, tmp_path):
        with client(hosts, tmp_path, "run", terminal=True) as process:
            for host in hosts:
                wait_until(lambda host=host: len(matching(host, "sleep 4242")) >= 2, 30, "tasks")
            os.close(process.terminal)
            assert process.wait(PATIENCE) == -signal.SIGHUP
            wait_clean(hosts)

    @pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
    def test_while_a_script_runs(self, hosts, tmp_path, name):
        with client(hosts, tmp_path, "started", "sleep 4242") as process:
            for host in hosts:
                wait_until(lambda host=host: matching(host, "sleep 4242"), 30, "the script runs")
            process.send_signal(getattr(signal, name))
            process.communicate(timeout=PATIENCE)
            wait_clean(hosts)

    def test_while_a_script_runs_that_ignores_signals(self, hosts, tmp_path):
        text = "trap '' TERM HUP INT PIPE; set -m; sleep 4242; sleep 4243"
        with client(hosts, tmp_path, "started", text) as process:
            for host in hosts:
                wait_until(lambda host=host: matching(host, "sleep 4242"), 30, "the script runs")
            process.kill()
            process.communicate(timeout=PATIENCE)
            wait_clean(hosts)

    def test_while_files_are_copied(self, make_hosts, tmp_path):
        hosts = make_hosts(2)
        for host in hosts:
            tar = host.bin / "tar"
            tar.write_text('#!/bin/sh\nsleep 2\nexec /usr/bin/env -i /bin/tar "$@"\n')
            tar.chmod(0o755)
        with client(hosts, tmp_path, "started") as process:
            for host in hosts:
                wait_until(lambda host=host: matching(host, "sleep 2"), 30, "the copy runs")
            process.kill()
            process.communicate(timeout=PATIENCE)
            wait_clean(hosts)

    def test_while_it_starts(self, hosts, tmp_path):
        """At whatever moment of the start: the next one may be killed a bit later."""
        for tenths in 3, 5, 7, 9:
            with client(hosts, tmp_path, "started") as process:
                time.sleep(tenths / 10)
                process.kill()
                process.communicate(timeout=PATIENCE)
                wait_clean(hosts)


class TestClosing:
    def test_while_scripts_run(self, hosts):
        manager = open_manager(hosts, environment="sleep 4242")
        for host in hosts:
            wait_until(lambda host=host: matching(host, "sleep 4242"), 30, "the script runs")
        manager.close()
        wait_clean(hosts)
        assert [host.state for host in manager.executor.hosts] == ["closed", "closed"]

    def test_at_any_moment_of_the_start(self, hosts, caplog):
        for hundredths in range(0, 60, 8):
            manager = open_manager(hosts)
            time.sleep(hundredths / 100)
            manager.close()
            wait_clean(hosts)
            assert {host.state for host in manager.executor.hosts} == {"closed"}
        # what was asked for is no error
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []

    def test_while_a_connection_hangs(self, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            path = tmp_path / "ssh_config"
            port = silent.getsockname()[1]
            path.write_text(f"Host silent\n HostName 127.0.0.1\n Port {port}\n")
            manager = WorkManager(0, "silent", ssh_config=path, config=(), silent=True)
            connection, _ = silent.accept()
            with connection:
                closing = threading.Thread(target=manager.close)
                closing.start()
                closing.join(60)
                assert not closing.is_alive()

    def test_while_a_proxy_hangs_that_outlives_ssh(self, tmp_path):
        path, pids = tmp_path / "ssh_config", tmp_path / "pids"
        path.write_text(f"Host h\n ProxyCommand sh -c 'echo $$ >{pids}; exec sleep 60'\n")
        manager = WorkManager(0, "h", ssh_config=path, config=(), silent=True)
        wait_until(lambda: pids.exists() and pids.read_text(), PATIENCE, "the proxy runs")
        closing = threading.Thread(target=manager.close, daemon=True)
        closing.start()
        closing.join(60)
        os.kill(int(pids.read_text()), signal.SIGKILL)  # it is the user's
        assert not closing.is_alive()

    def test_while_a_lost_server_is_ended(self, hosts):
        manager = open_manager(hosts, "h1*1", keepalive=3)
        assert manager.wait_for_hosts(PATIENCE)
        (status,) = manager.executor.hosts
        frozen = hosts["h1"].processes()
        kill(frozen, signal.SIGSTOP)
        try:
            wait_until(lambda: status.state == "lost", PATIENCE, "h1 is lost")
            manager.close()
            ours = [line for line in map(describe, descendants(os.getpid())) if " -- h1 " in line]
            assert ours == []
        finally:
            kill(frozen, signal.SIGCONT)
        wait_clean(hosts)

    def test_an_iteration_that_is_left_stops_its_tasks(self, hosts):
        with open_manager(hosts) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            for _ in manager.iexecute(
                lambda n: time.sleep(1000 * (n > 3)), range(9), chunk_size=1
            ):
                break
            assert manager.process(lambda n: -n, range(3)) == [0, -1, -2]

    def test_a_task_that_starts_a_session_of_its_own(self, hosts):
        with open_manager(hosts) as manager:

            def work(_):
                subprocess.Popen(["sleep", "4242"], start_new_session=True)

            manager.process(work, range(2))
            assert matching(hosts[0], "sleep 4242") + matching(hosts[1], "sleep 4242")
        wait_clean(hosts)


@pytest.fixture(scope="module")
def running(hosts):
    """A manager with a local worker and two hosts, which have scripts too."""
    with WorkManager(
        1,
        "h1*1 h2*1",
        environment="export SEEN=yes",
        ssh_config=hosts.ssh_config,
        config=(),
        silent=True,
    ) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        assert manager.process(lambda n: n, range(20), chunk_size=1) == list(range(20))
        yield manager


class TestSecrecy:
    """What of a secret is to be seen is in test_security.py."""

    def test_secrets_differ(self, hosts, running):
        with WorkManager(0, config=()) as other:
            secrets = [one.executor.backend._secret for one in (other, running)]
        assert [len(secret) for secret in secrets] == [64, 64]
        assert secrets[0] != secrets[1]

    def test_the_server_listens_on_loopback_only(self, hosts, running):
        ports = {host.about["port"] for host in running.executor.hosts}
        assert len(ports) == 2
        found = [entry for entry in listening() if entry[1] in ports]
        assert sorted(found) == sorted(("0100007F", port) for port in ports)

    def test_files_on_the_host_are_private(self, hosts, running):
        for host in hosts:
            (folder,) = host.tmp.iterdir()
            assert folder.name.startswith("ostap-parallel.")
            assert folder.stat().st_mode & 0o777 == 0o700
            names = {path.name for path in folder.iterdir()}
            assert {"ppserver", "environment.sh"} <= names
            assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}


def listening():
    """Return (address, port) of all sockets that listen, as the kernel writes addresses."""
    found = []
    for table in "tcp", "tcp6":
        for line in read(f"/proc/net/{table}").decode().splitlines()[1:]:
            _, local, _, status = line.split()[:4]
            if status == "0A":
                address, port = local.split(":")
                found.append((address, int(port, 16)))
    return found

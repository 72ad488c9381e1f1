"""The private ssh hosts are what the other tests take them for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import sshd
from cable import CableUnavailable, open_cable
from conftest import hosts_or_skip
from helpers import wait_until
from sshd import HostOptions, SshdUnavailable, descendants, describe, open_hosts, stat_of

pytestmark = pytest.mark.slow


def need_private(hosts):
    if not hosts[0].private:
        pytest.skip("hosts share the account and /tmp with this machine")


def test_python_is_bare_and_of_the_same_minor_version(hosts):
    need_private(hosts)
    script = "import sys; print(*sys.version_info[:2])"
    done = hosts["h1"].run(f"python3 -c '{script}'")
    assert done.stdout.split() == [str(n) for n in sys.version_info[:2]]
    for package in ("dill", "ppft", "pathos", "ostap_parallel"):
        done = hosts["h1"].run(f"python3 -c 'import {package}'")
        assert "ModuleNotFoundError" in done.stderr


def test_two_hosts_do_not_share_tmp(hosts):
    assert hosts["h1"].run("touch ${TMPDIR:-/tmp}/mine").returncode == 0
    assert (hosts["h1"].tmp / "mine").exists()
    assert not (hosts["h2"].tmp / "mine").exists()
    assert hosts["h2"].run("ls -A ${TMPDIR:-/tmp}").stdout == ""
    (hosts["h1"].tmp / "mine").unlink()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no memory to share")
def test_nor_memory_with_this_machine(hosts):
    need_private(hosts)
    assert hosts["h1"].run("echo text > /dev/shm/ostap-mine").returncode == 0
    assert hosts["h1"].run("ls /dev/shm").stdout == "ostap-mine\n"
    assert hosts["h2"].run("ls /dev/shm").stdout == ""
    assert not Path("/dev/shm/ostap-mine").exists()
    assert hosts["h1"].run("rm /dev/shm/ostap-mine").returncode == 0


def test_a_host_has_its_own_name_and_resolves_it(hosts):
    need_private(hosts)
    script = "import socket as s; n = s.gethostname(); print(n, s.gethostbyname(n))"
    assert hosts["h2"].run(f"python3 -c '{script}'").stdout.split() == ["h2", hosts["h2"].address]


def test_the_home_is_private(hosts):
    done = hosts["h1"].run("echo $HOME")
    assert done.stdout.strip() == hosts["h1"].inside(hosts["h1"].home)


def test_processes_counts_what_runs(hosts):
    host = hosts["h1"]
    assert host.processes() == []
    argv = ["ssh", "-F", str(hosts.ssh_config), "h1", "sleep 60"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as ssh:
        try:
            wait_until(
                lambda: any(describe(pid).endswith(" sleep 60") for pid in host.processes()),
                10,
                "the remote sleep",
            )
            assert hosts["h2"].processes() == []
            # Without a terminal it outlives its client: ended by hand here.
            subprocess.run(["kill", *sleeping(host)], check=True)
        finally:
            ssh.terminate()
    wait_until(lambda: not host.processes(), 5, "no process")


def sleeping(host):
    return [str(pid) for pid in host.processes() if describe(pid).endswith(" sleep 60")]


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash", "/usr/bin/tcsh"])
def test_the_login_shell_is_what_was_asked(make_hosts, shell):
    if not Path(shell).exists():
        pytest.skip(f"no {shell}")
    (host,) = make_hosts(login_shell=shell, rc="echo from the rc file\n")
    done = host.run("echo $0 $SHELL")
    name, variable = done.stdout.splitlines()[-1].split()
    assert (name, variable) == (shell.rpartition("/")[2], shell)
    # dash reads no file for a command; the others do, though no one is there to read the words.
    printed = "from the rc file" in done.stdout
    assert printed == (shell != "/bin/sh")
    assert host.run("getent passwd $USER").stdout.strip().endswith(f":{shell}")


def test_options_may_differ_by_host(make_hosts):
    one, two = make_hosts(each=[HostOptions(env={"COLOUR": "red"}), HostOptions(path="/bin")])
    assert one.run("echo $COLOUR").stdout == "red\n"
    assert two.run("echo $PATH").stdout == "/bin\n"


def test_extra_lines_win(make_hosts):
    (host,) = make_hosts(extra="AllowTcpForwarding no\nForceCommand echo forced")
    assert host.run("true").stdout == "forced\n"


def test_limits_are_those_of_sshd(make_hosts):
    (host,) = make_hosts()
    sessions = [
        subprocess.Popen(
            ["ssh", "-F", str(host.ssh_config), host.name, "true"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(40)
    ]
    codes = [session.wait(60) for session in sessions]
    assert set(codes) <= {0, 255}
    if 255 in codes:  # by chance: sshd drops 30 % of what comes beyond ten at once
        assert "MaxStartups" in host.log


def test_restart_keeps_the_address_and_the_files(make_hosts):
    (host,) = make_hosts()
    (host.tmp / "kept").touch()
    host.stop()
    assert "refused" in host.run("true").stderr
    host.restart()
    assert host.run("ls ${TMPDIR:-/tmp}").stdout == "kept\n"
    (host.tmp / "kept").unlink()


def test_kill_ends_sessions_under_way(make_hosts):
    (host,) = make_hosts()
    argv = ["ssh", "-F", str(host.ssh_config), host.name, "echo up; sleep 60"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as ssh:
        assert ssh.stdout.readline() == b"up\n"
        host.kill()
        assert ssh.wait(60) == 255
    assert host.processes() == []


def test_nothing_is_left_when_the_block_ends(tmp_path):
    before = set(descendants(os.getpid()))
    mounts = Path("/proc/self/mountinfo").read_text()
    try:
        with open_hosts(1, tmp_path / "with a space") as hosts:
            argv = ["ssh", "-F", str(hosts.ssh_config), "h1", "echo up; setsid sleep 60"]
            ssh = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            assert ssh.stdout.readline() == b"up\n"
            (host,) = hosts
    except SshdUnavailable as exc:
        pytest.skip(str(exc))
    ssh.wait(60)  # its status depends on what died first
    ssh.stdout.close()
    assert host.processes() == []
    others = set(descendants(os.getpid())) - before  # of what else this process does, some come
    assert not [pid for pid in others if "ssh" in describe(pid) or str(tmp_path) in describe(pid)]
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_server_that_does_not_start_says_why(tmp_path):
    started = time.monotonic()
    with (
        pytest.raises(SshdUnavailable, match=r"NoSuchKeyword|install"),
        open_hosts(1, tmp_path, HostOptions(extra="NoSuchKeyword yes")),
    ):
        pass
    assert time.monotonic() - started < sshd.PATIENCE / 2


# -- a small /tmp ------------------------------------------------------------------------------


@pytest.fixture
def small(make_hosts):
    (host,) = make_hosts(tmp_size="1M")
    yield host
    host.run("rm -f /tmp/*")


def test_a_small_tmp_gets_full(small):
    done = small.run("head -c 2M /dev/zero > /tmp/zeros")
    assert "No space left" in done.stderr
    assert (small.tmp / "zeros").stat().st_size == 2**20
    assert small.inside(small.tmp / "zeros") == "/tmp/zeros"


def test_a_small_tmp_outlives_the_listener(small):
    small.run("echo kept > /tmp/file")
    small.restart()
    assert small.run("cat /tmp/file").stdout == "kept\n"
    assert (small.tmp / "file").read_text() == "kept\n"


# -- a network of its own ----------------------------------------------------------------------

LISTEN = """
import socket
server = socket.create_server(("127.0.0.1", 2223))
socket.create_connection(("127.0.0.1", 2223)).sendall(b"x")
print(server.accept()[0].recv(1), flush=True)
input()
"""


def start_ssh(host, command, *options):
    argv = ["ssh", "-F", str(host.ssh_config), *options, host.name, command]
    return subprocess.Popen(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=0)


def is_silent(host):
    with start_ssh(host, "true", "-oConnectTimeout=1") as ssh:
        return b"timed out" in ssh.communicate(timeout=60)[1]


def test_hosts_have_networks_of_their_own(make_hosts):
    one, two = make_hosts(2, network=True)
    assert one.address != two.address
    # Both can have the same port on their loopback.
    with start_ssh(one, f"python3 -c '{LISTEN}'") as ssh1:
        assert ssh1.stdout.readline() == b"b'x'\n"
        with start_ssh(two, f"python3 -c '{LISTEN}'") as ssh2:
            assert ssh2.stdout.readline() == b"b'x'\n"
            ssh2.communicate(b"\n", timeout=60)
        ssh1.communicate(b"\n", timeout=60)
    for host in (one, two):
        assert host.run("echo $SSH_CONNECTION").stdout.split()[2] == host.address
        devices = host.run("cat /proc/net/dev").stdout.splitlines()[2:]
        assert {line.partition(":")[0].strip() for line in devices} == {"lo", "eth0"}


def test_a_restart_keeps_the_network(make_hosts):
    (host,) = make_hosts(network=True)
    with start_ssh(host, "echo up; cat") as ssh:
        assert ssh.stdout.readline() == b"up\n"
        host.restart()
        assert host.run("echo new").stdout == "new\n"
        assert ssh.communicate(b"old", timeout=60) == (b"old", b"")


def test_a_session_ends_by_itself_after_a_cut(make_hosts):
    (host,) = make_hosts(network=True)
    probes = "-oServerAliveInterval=1", "-oServerAliveCountMax=2"
    with start_ssh(host, "echo up; exec sleep 60", *probes, "-oLogLevel=INFO") as ssh:
        assert ssh.stdout.readline() == b"up\n"
        host.cut()
        assert ssh.wait(60) == 255
        assert b"not responding" in ssh.stderr.read()
    (pid,) = sleeping(host)  # no one has told it
    assert is_silent(host)
    host.heal()
    assert host.run("echo again").stdout == "again\n"
    assert sleeping(host) == [pid]
    subprocess.run(["kill", pid], check=True)


def test_a_session_survives_a_short_cut(make_hosts):
    (host,) = make_hosts(network=True)
    with start_ssh(host, "echo up; cat") as ssh:
        assert ssh.stdout.readline() == b"up\n"
        host.cut()
        ssh.stdin.write(b"lost, and sent again\n")
        assert is_silent(host)
        host.heal()
        assert ssh.stdout.readline() == b"lost, and sent again\n"
        assert ssh.communicate(b"", timeout=60) == (b"", b"")
        assert ssh.returncode == 0


def test_a_crash_after_a_cut_is_silent(make_hosts):
    (host,) = make_hosts(network=True)
    with start_ssh(host, "echo up; sleep 60") as ssh:
        assert ssh.stdout.readline() == b"up\n"
        host.cut()
        host.kill()
        assert host.processes() == []
        assert is_silent(host)
        assert ssh.poll() is None
        ssh.kill()


def test_a_cable_delays_both_ways(make_hosts):
    (host,) = make_hosts(delay=0.02)
    for _ in range(3):
        begin = time.monotonic()
        with socket.create_connection((host.address, host.port), timeout=10):
            assert time.monotonic() - begin >= 2 * 0.02
    assert host.run("echo here").stdout == "here\n"
    wait_until(lambda: not host.processes(), 10, "the connections are dropped")


def test_a_host_without_a_cable_says_so(hosts):
    with pytest.raises(SshdUnavailable, match="h1 has no cable: give HostOptions"):
        hosts["h1"].cut()


@pytest.fixture
def cables():
    """Open no cable, but skip where none can be had."""
    try:
        with open_cable():
            pass
    except CableUnavailable as exc:
        pytest.skip(str(exc))


@pytest.mark.usefixtures("cables")
def test_nothing_is_left_of_a_cable():
    with open_cable() as one, open_cable() as two:
        links = {(socket.if_nametoindex(each.device), each.device) for each in (one, two)}
        space = Path(one.space).readlink()
        assert len({one.near, one.far, two.near, two.far}) == 4
        argv = ["nsenter", f"--net={one.space}", "sh", "-c", "echo up; exec sleep 60"]
        inhabitant = subprocess.Popen(argv, stdout=PIPE)
        assert inhabitant.stdout.readline() == b"up\n"
    assert inhabitant.wait(5) == -9
    inhabitant.stdout.close()
    assert not links & set(socket.if_nameindex())
    assert space not in {space_of(pid) for pid in sshd.live_pids()}


def space_of(pid):
    try:
        return Path(f"/proc/{pid}/ns/net").readlink()
    except OSError:
        return None


STARTER = """
import subprocess, sys
from pathlib import Path
from sshd import HostOptions, open_hosts
with open_hosts(1, Path(sys.argv[1]), HostOptions(network=True)) as hosts:
    argv = ["ssh", "-F", hosts.ssh_config, "h1", "echo up; sleep 60"]
    ssh = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    ssh.stdout.readline()
    print(ssh.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.usefixtures("cables")
def test_nothing_is_left_of_the_network_when_its_starter_is_killed(tmp_path):
    argv = [sys.executable, "-c", STARTER, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(Path(sshd.__file__).parent)}
    with subprocess.Popen(argv, stdin=PIPE, stdout=PIPE, env=environ) as starter:
        client = int(starter.stdout.readline())
        below = descendants(starter.pid)
        assert any(describe(pid).endswith(" sleep 60") for pid in below)
        starter.kill()
    os.kill(client, 9)  # which waits for an answer
    wait_until(lambda: not any(map(stat_of, below)), 10, "the cable and the host's processes end")


@pytest.fixture
def no_ip(monkeypatch, tmp_path):
    """Take the program ``ip`` from PATH."""
    for name in ("ssh", "ssh-keygen", "sh", "mount", "hostname", "unshare", "nsenter"):
        if path := shutil.which(name):
            (tmp_path / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("cables", "no_ip")
@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_a_missing_network_is_a_failure_in_ci(monkeypatch, tmp_path, ci, outcome):
    monkeypatch.setenv("CI", ci)
    with (
        pytest.raises(outcome, match=r"'ip'; it needs .* docker run --privileged"),
        hosts_or_skip(1, tmp_path / "hosts", HostOptions(network=True)),
    ):
        pass


@pytest.mark.usefixtures("cables")
def test_without_the_right_to_networks_they_are_not_private(tmp_path):
    script = """
import sys
from pathlib import Path
from sshd import HostOptions, NotPrivate, open_hosts
try:
    open_hosts(1, Path(sys.argv[1]), HostOptions(network=True)).__enter__()
except NotPrivate as exc:
    print(exc)
"""
    # Its two lists are what root gets on exec.
    argv = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    argv += [sys.executable, "-c", script, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(Path(sshd.__file__).parent)}
    done = subprocess.run(argv, stdin=DEVNULL, capture_output=True, text=True, env=environ)
    assert "Operation not permitted; it needs root" in done.stdout
    assert done.stderr == ""

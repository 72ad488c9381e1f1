"""The private ssh hosts are what the other tests take them for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import wait_until
from sshd import HostOptions, SshdUnavailable, descendants, describe, open_hosts


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
        assert ssh.wait(5) == 255
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
    ssh.wait(5)  # its status depends on what died first
    ssh.stdout.close()
    assert host.processes() == []
    assert set(descendants(os.getpid())) == before
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_server_that_does_not_start_says_why(tmp_path):
    started = time.monotonic()
    with (
        pytest.raises(SshdUnavailable, match=r"NoSuchKeyword|install"),
        open_hosts(1, tmp_path, HostOptions(extra="NoSuchKeyword yes")),
    ):
        pass
    assert time.monotonic() - started < 5

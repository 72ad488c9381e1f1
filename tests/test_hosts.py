"""Runs on real ssh hosts: who works, how hosts are prepared, and what is said when they fail."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import ppft
import pytest
from helpers import core_of, wait_until
from servers import PACKAGE_PARENT, open_server
from sshd import HostOptions, descendants, free_port

from ostap_parallel import WorkManager
from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError, RemoteTraceback, ServersUnavailable, WorkerLost
from ostap_parallel.machine.cpus import usable_cpus
from ostap_parallel.machine.serve import MARK
from ostap_parallel.supply.host import HostServer, HostSource

PATIENCE = 60  # seconds; only a hang takes that long
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def manage(hosts):
    """A function that makes a quiet manager of `hosts` without local workers."""
    with ExitStack() as stack:

        def make(servers, *, ncpus=0, **given):
            settings = {"ssh_config": hosts.ssh_config, "config": (), "silent": True, **given}
            return stack.enter_context(WorkManager(ncpus, servers, **settings))

        yield make


@pytest.fixture(scope="module")
def cluster(own_hosts):
    """A manager with one worker on each of two hosts and none here; many tests share it."""
    servers = ["h1*1", "h2*1"]
    with WorkManager(
        0, servers, ssh_config=own_hosts.ssh_config, config=(), silent=True
    ) as manager:
        assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
        yield manager


@pytest.fixture
def write_config(tmp_path):
    """A function that writes a configuration file."""

    def write(text):
        path = tmp_path / "ostaprc"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def aliases(hosts, tmp_path):
    """A function that gives more names to `hosts` in turn; returns the ``ssh_config``."""

    def write(*names):
        sections = [
            f"Host {name}\n  HostName {host.address}\n  Port {host.port}\n"
            for name, host in zip(names, list(hosts) * len(names), strict=False)
        ]
        path = tmp_path / "ssh_config"
        path.write_text("".join(sections) + f"Host *\n  Include {hosts.ssh_config}\n")
        return path

    return write


@contextmanager
def meeting(count):
    """Yield a function that returns, in a worker, once `count` of its calls run at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            with ExitStack() as stack, server:
                callers = [stack.enter_context(server.accept()[0]) for _ in range(count)]
                for caller in callers:
                    caller.sendall(b"!")

        def meet():
            with socket.create_connection(("127.0.0.1", port), timeout=30) as caller:
                return caller.recv(1) == b"!"

        threading.Thread(target=answer, daemon=True).start()
        yield meet


def host_here():
    """Return a function that names the host it runs on: ``h1``, ``h2`` or nothing."""

    def here():
        return Path(os.environ.get("PRIVATE_SSHD", "")).name

    return here


def run_together(manager, count, func):
    """Call `func` in `count` workers at the same time; return what it gives, sorted."""
    with meeting(count) as meet:

        def call(_):
            return (meet(), func())

        results = manager.process(call, range(count), chunk_size=1)
    assert all(met for met, _ in results)
    return sorted(value for _, value in results)


class TestWho:
    def test_hosts_do_it_all(self, cluster):
        assert run_together(cluster, 2, host_here()) == ["h1", "h2"]
        assert cluster.workers == {"h1": 1, "h2": 1}
        assert cluster.executor.backend.pids() == []
        assert {host: stat.njobs for host, stat in cluster.report.stats} == {"h1": 1, "h2": 1}

    @pytest.mark.slow
    def test_local_workers_and_hosts(self, manage):
        manager = manage(["h1*1", "h2*1"], ncpus=1)
        assert manager.wait_for_hosts(PATIENCE)
        assert run_together(manager, 3, host_here()) == ["", "h1", "h2"]
        assert [name for name, _ in sorted(manager.report.stats)] == ["h1", "h2", "local"]

    @pytest.mark.slow
    def test_a_host_joins_a_run_that_is_going_on(self, manage, hosts):
        gate = hosts["h1"].home / "gate"
        gate.unlink(missing_ok=True)
        here = host_here()
        manager = manage("h1*1", ncpus=1, environment="until [ -e ~/gate ]; do sleep 0.1; done")
        done = []
        numbers = iter(range(10**9))
        try:
            for where in manager.iexecute(lambda _: here(), numbers, chunk_size=1):
                done.append(where)
                if len(done) == 20:
                    assert manager.workers == {"local": 1}
                    gate.touch()
                if where == "h1":
                    break
        finally:
            gate.unlink(missing_ok=True)
        assert set(done) == {"", "h1"}
        assert manager.workers == {"local": 1, "h1": 1}

    def test_a_bare_host_needs_no_package(self, own_hosts, cluster):
        for package in "dill", "ppft", "ostap_parallel":
            assert (
                "ModuleNotFoundError"
                in own_hosts["h1"].run(f"python3 -c 'import {package}'").stderr
            )
        source = cluster.process(lambda _: sys.modules["dill"].__file__, [0])[0]
        assert "/ppserver/" in source

    @pytest.mark.slow
    def test_workers_are_as_many_as_the_host_grants(self, manage, write_config):
        if not shutil.which("taskset"):
            pytest.skip("no taskset")
        pin = "taskset -p -c 0 $$ >/dev/null"
        config = write_config(f"[Parallel:h1]\nenvironment = {pin}\n")
        manager = manage("h1 h2", config=config)
        assert manager.wait_for_hosts(PATIENCE)
        assert manager.workers == {"h1": 1, "h2": usable_cpus()}

    @pytest.mark.slow
    def test_the_number_of_workers_can_be_given(self, manage, write_config):
        manager = manage(["h1*1", "h2"], config=write_config("[Parallel]\nncpus = 3\n"))
        assert manager.wait_for_hosts(PATIENCE)
        assert manager.workers == {"h1": 1, "h2": 3}
        assert len(set(run_together(manager, 4, os.getpid))) == 4


# -- profile, environment, script -------------------------------------------------------------

# The manual's, but for what it sources, and with all that may trip a quoting.
EXAMPLE = r"""#!/bin/bash
    # a comment; "quotes' and $(what) `not`
    export OLD=/a/LCG_95/bin:/b/LCG_96/bin:/c/LCG_95:/d
    export SEEN=$(IFS=':';t=($OLD);n=${#t[*]};a=();for ((i=0;i<n;i++)); do p="${t[i]%%*LCG_95*}"; [ "${p}" ] && a[i]="${p}"; done;echo "${a[*]}");
    cat > ~/from_heredoc <<'END'
$HOME `ls` 100%(no)s !! "
END
    export DOCUMENT=$(cat ~/from_heredoc); rm ~/from_heredoc
"""  # noqa: E501

# What a script does, and what the variable SEEN is then.
GOOD_SCRIPTS = {
    "prints": ("echo out; echo err >&2; export SEEN=yes", "yes"),
    "prints-our-lines": ("printf '\\036ostap-parallel {x\\n'; export SEEN=yes", "yes"),
    "reads": ("cat >/dev/null; read x; export SEEN=${x:-nothing}", "nothing"),
    "set-eu": ("set -eu; export SEEN=yes", "yes"),
    "set-ex": ("set -ex; export SEEN=yes", "yes"),
    "posix": ("set -o posix -o noglob -o noclobber; export SEEN=yes", "yes"),
    "cd": ("cd /usr; export SEEN=$PWD", "/usr"),
    "traps": ("trap 'echo bye' EXIT; trap '' TERM; export SEEN=yes", "yes"),
    "background": ("sleep 1000 & export SEEN=yes", "yes"),
    "stubborn": ("trap '' TERM; sleep 1000 & export SEEN=yes", "yes"),
    "ifs": ("IFS=:; export SEEN=yes", "yes"),
    "returns": ("export SEEN=yes; return; export SEEN=no", "yes"),
    "literal": (
        r"""export SEEN='$HOME `id` !! \n "x" %d %(y)s'""",
        r'$HOME `id` !! \n "x" %d %(y)s',
    ),
    "unicode": ("export SEEN='\u00fc \u20ac'", "\u00fc \u20ac"),
}

# What a script does; the exit status and some last words it is known by.
BAD_SCRIPTS = {
    "exit-3": ("echo last words >&2; exit 3", 3, "last words"),
    "return-4": ("echo 'out again'; return 4", 4, "out again"),
    "exit-0": ("exit 0", 0, "exit status 0"),
    "set-e": ("set -e; ls /no/such/place", 2, "/no/such/place"),
    "set-u": ("set -u; echo $no_such_variable", 1, "no_such_variable: unbound variable"),
    "trap": ("trap 'echo bye' EXIT; exit 5", 5, "exit status 5"),
    "ifs": ("IFS=:; exit 6", 6, "exit status 6"),
    "path": ("PATH=/nowhere; exit 7", 7, "exit status 7"),
    "exec": ("exec 1>&- 2>&-; exit 8", 8, "exit status 8"),
}


@pytest.mark.slow
class TestPreparation:
    def test_profile_environment_script_in_this_order(self, manage, hosts, tmp_path):
        (hosts["h1"].home / "order.sh").write_text('export ORDER="$ORDER profile"\n')
        script = tmp_path / "it's a script.sh"
        script.write_text('export ORDER="$ORDER script"\n')
        manager = manage(
            "h1*1",
            profile="order.sh",
            environment='export ORDER="$ORDER environment"',
            script=script,
        )
        assert manager.process(lambda _: os.environ["ORDER"], [0]) == [
            " profile environment script"
        ]

    def test_a_relative_directory_stays_where_it_is(self, manage, hosts):
        manager = manage("h1*1", tmpdir=".", environment="cd /")
        assert manager.process(abs, [-1]) == [1]
        home = hosts["h1"].home
        assert len(list(home.glob("ostap-parallel.*"))) == 1
        manager.close()
        wait_until(lambda: not list(home.glob("ostap-parallel.*")), PATIENCE, "a clean home")

    @pytest.mark.parametrize("form", ["absolute", "relative", "home"])
    def test_a_profile_is_found(self, manage, hosts, form):
        folder = hosts["h1"].home / "a 'b"
        folder.mkdir(exist_ok=True)
        (folder / "profile.sh").write_text("export FOUND=here\n")
        path = {
            "absolute": hosts["h1"].inside(folder / "profile.sh"),
            "relative": "a 'b/profile.sh",
            "home": "~/a 'b/profile.sh",
        }[form]
        manager = manage("h1*1", profile=path)
        assert manager.process(lambda _: os.environ["FOUND"], [0]) == ["here"]

    def test_each_level_of_the_configuration(self, manage, hosts, aliases, write_config, tmp_path):
        names = ["one.test.example", "two.test.example", "three.other.example"]
        for name in "host", "domain", "all":
            (tmp_path / f"{name}.sh").write_text(f'export LEVELS="$LEVELS {name}-script"\n')
            for host in hosts:
                text = f'export LEVELS="$LEVELS {name}-profile"\n'
                (host.home / f"{name}.sh").write_text(text)
        config = write_config(
            f"""
[Parallel:One.Test.Example]
environment = export LEVELS="$LEVELS host-environment"
    # kept
    export NAME=one
[Parallel:TEST.EXAMPLE]
script = {tmp_path}/domain.sh
environment = export LEVELS="$LEVELS domain-environment" NAME=two
[Parallel]
profile = all.sh
environment = export LEVELS="$LEVELS all-environment" NAME=three
script = {tmp_path}/all.sh
ncpus = 1
"""
        )
        manager = manage(names, config=config, ssh_config=aliases(*names))
        assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
        assert run_together(manager, 3, lambda: (os.environ["NAME"], os.environ["LEVELS"])) == [
            ("one", " all-profile host-environment domain-script"),
            ("three", " all-profile all-environment all-script"),
            ("two", " all-profile domain-environment domain-script"),
        ]

    def test_the_manuals_example(self, manage):
        manager = manage("h1*1", environment=EXAMPLE)
        seen, document = manager.process(
            lambda _: (os.environ["SEEN"], os.environ["DOCUMENT"]), [0]
        )[0]
        assert seen == "/b/LCG_96/bin:/d"
        assert document == '$HOME `ls` 100%(no)s !! "'

    def test_scripts_may_do_what_scripts_do(self, manage, aliases, write_config):
        config = write_config(
            "".join(
                f"[Parallel:{name}.example]\nenvironment = {text}\n    export CASE={name}\n"
                for name, (text, _) in GOOD_SCRIPTS.items()
                if name != "returns"
            )
            + f"[Parallel:returns.example]\nenvironment = export CASE=returns\n    "
            f"{GOOD_SCRIPTS['returns'][0]}\n"
        )
        names = [f"{name}.example" for name in GOOD_SCRIPTS]
        manager = manage(
            [f"{name}*1" for name in names], config=config, ssh_config=aliases(*names)
        )
        manager.wait_for_hosts(PATIENCE)
        assert failures_of(manager) == {}
        seen = run_together(
            manager, len(names), lambda: (os.environ["CASE"], os.environ.get("SEEN"))
        )
        assert dict(seen) == {name: value for name, (_, value) in GOOD_SCRIPTS.items()}

    def test_what_a_script_prints_is_logged(self, manage, caplog):
        caplog.set_level(logging.DEBUG)
        manager = manage("h1*1", environment="echo to out; echo to err >&2")
        assert manager.wait_for_hosts(PATIENCE)
        words = [r.getMessage() for r in caplog.records if r.name == "h1"]
        assert "to out" in words
        assert "to err" in words


def failures_of(manager):
    """Return step and reason by host, of those that have failed."""
    return {
        host.name: (host.error.step, host.error.reason)
        for host in manager.executor.hosts
        if host.error
    }


# -- failures ---------------------------------------------------------------------------------


@pytest.fixture
def fail(manage, write_config):
    """A function that runs on a host that fails and on the good ``h2``; returns the error."""

    def run(server="h1", section="", name=None, state="failed", **given):
        config = write_config(f"[Parallel:{name or server}]\n{section}\n")
        manager = manage([server, "h2*1"], config=config, **given)
        assert not manager.wait_for_hosts(PATIENCE)
        assert manager.process(lambda n: n * n, range(5)) == [0, 1, 4, 9, 16]
        bad, good = manager.report.hosts
        assert (bad.name, bad.state, bad.workers) == (server, state, 0)
        assert (good.name, good.state, good.error) == ("h2", "up", None)
        assert isinstance(bad.error, HostError)
        assert bad.error.host == server
        reason = bad.error.reason.replace("\n", "\n    ")
        assert f"host {server} {state}: {bad.error.step}: {reason}" in str(manager.report)
        return bad.error

    return run


@pytest.fixture(scope="session")
def other_python():
    """An interpreter of another minor version, from 3.8 on."""
    names = [f"python3.{minor}" for minor in range(8, 20)]
    places = [*os.environ["PATH"].split(os.pathsep)]
    places += map(str, Path(sys.base_prefix).parent.glob("*/bin"))
    for place in places:
        for name in names:
            path = shutil.which(name, path=place)
            if path is None or f"python{VERSION}" == name:
                continue
            print_it = "import sys; print(sys.executable, *sys.version_info[:2])"
            done = subprocess.run([path, "-c", print_it], capture_output=True, text=True)
            executable, *version = done.stdout.split() or ["", ""]
            if done.returncode == 0 and ".".join(version) != VERSION:
                return executable, ".".join(version)
    return pytest.skip("this machine has one Python version only")


@pytest.mark.slow
class TestFailures:
    def test_another_minor_version(self, fail, other_python):
        python, version = other_python
        error = fail(section=f"python = {python}")
        assert error.step == "python"
        assert f"is Python {version}, but the caller runs Python {VERSION}" in error.reason
        assert "python_mismatch = allow" in error.reason

    def test_another_minor_version_may_be_allowed(self, manage, other_python):
        python, version = other_python
        manager = manage("h1*1", python=python, python_mismatch="allow")
        if not manager.wait_for_hosts(PATIENCE):
            ((step, reason),) = failures_of(manager).values()
            assert step == "server"
            assert "the caller runs" not in reason
        else:
            about = manager.executor.hosts[0].about
            assert about["python"].startswith(version + ".")

    def test_no_python(self, fail):
        error = fail(section="python = no-such-python")
        assert error.step == "python"
        assert "no-such-python: not found; PATH is " in error.reason

    def test_a_python_that_is_none(self, fail):
        error = fail(section="python = /bin/false")
        assert error.step == "python"
        assert "exit status 1" in error.reason

    def test_no_profile(self, fail):
        error = fail(section="profile = ~/no/profile.sh")
        assert error.step == "profile"
        assert "/no/profile.sh: no such file on this host, or not readable" in error.reason

    def test_a_script_that_fails(self, fail, tmp_path):
        script = tmp_path / "script.sh"
        script.write_text("echo the end is near >&2\nexit 3\n")
        error = fail(section=f"script = {script}")
        assert error.step == "script"
        assert "the end is near" in error.reason
        assert "exit status 3" in error.reason

    def test_environments_that_fail(self, manage, aliases, write_config):
        config = write_config(
            "".join(
                f"[Parallel:{name}.example]\nenvironment = {text}\n"
                for name, (text, _, _) in BAD_SCRIPTS.items()
            )
        )
        names = [f"{name}.example" for name in BAD_SCRIPTS]
        manager = manage(names, config=config, ssh_config=aliases(*names))
        manager.wait_for_hosts(PATIENCE)
        failures = failures_of(manager)
        assert {name: step for name, (step, _) in failures.items()} == dict.fromkeys(
            names, "environment"
        )
        wrong = {
            name: failures[f"{name}.example"][1]
            for name, (_, status, words) in BAD_SCRIPTS.items()
            if words not in failures[f"{name}.example"][1]
            or f"exit status {status}" not in failures[f"{name}.example"][1]
        }
        assert wrong == {}

    def test_a_failure_after_a_script_has_changed_the_shell(self, fail):
        error = fail(section="environment = IFS=:; PATH=/nowhere; cd /")
        assert error.step == "python"
        assert "python3: not found; PATH is /nowhere" in error.reason

    def test_a_refused_key(self, make_hosts, fail):
        one, _ = make_hosts(2)
        (one.home.parent / "etc/authorized_keys").write_text("")
        error = fail(ssh_config=one.ssh_config)
        assert error.step == "connect"
        assert "Permission denied (publickey)" in error.reason

    def test_an_unknown_host_key(self, fail):
        error = fail(section="ssh_options = -oUserKnownHostsFile=/dev/null")
        assert error.step == "connect"
        assert "Host key verification failed" in error.reason

    def test_a_refused_connection(self, fail, hosts):
        port = free_port(hosts["h1"].address)
        error = fail(f"h1:{port}", name="h1", state="lost")  # it may come up
        assert error.step == "connect"
        assert "Connection refused" in error.reason
        assert str(port) in error.reason

    def test_a_name_that_does_not_resolve(self, fail):
        error = fail("no-such-host.invalid")
        assert error.step == "connect"
        assert "Could not resolve hostname no-such-host.invalid" in error.reason

    @pytest.mark.parametrize("tmpdir", ["/no/such/directory", "/proc", "/no/a b$(id)"])
    def test_a_directory_that_cannot_be_written(self, fail, tmpdir):
        error = fail(section=f"tmpdir = {tmpdir}")
        assert error.step == "tmpdir"
        assert tmpdir in error.reason
        assert "ostap-parallel" in error.reason

    def test_a_full_directory(self, make_hosts, fail):
        one, _ = make_hosts(2)
        if not one.private:
            pytest.skip("a small file system needs root")
        mount = "mkdir /tmp/small && mount -t tmpfs -o size=64k none /tmp/small"
        assert one.run(mount).returncode == 0
        try:
            small = "tmpdir = /tmp/small"
            error = fail(section=small, ssh_config=one.ssh_config, state="lost")
            empty = lambda: one.run("ls -A /tmp/small").stdout == ""  # noqa: E731
            wait_until(empty, PATIENCE, "nothing is left; it is tried again now and then")
        finally:
            one.run("umount /tmp/small && rmdir /tmp/small")
        assert error.step == "copy"
        # what GNU tar says depends on whether a part of the last block fitted
        assert re.search("No space left on device|Wrote only .* bytes", error.reason)

    def test_nobody_is_left(self, manage):
        manager = manage(["h1", "no-such-host.invalid"], python="no-such-python")
        with pytest.raises(ServersUnavailable) as caught:
            manager.process(lambda n: n, range(3))
        assert [error.host for error in caught.value.errors] == ["h1", "no-such-host.invalid"]
        assert [error.step for error in caught.value.errors] == ["python", "connect"]
        lines = str(caught.value).splitlines()
        assert len(lines) == 3
        assert lines[1].strip().startswith("h1: python: no-such-python: not found")
        assert lines[2].strip().startswith("no-such-host.invalid: connect: ssh: Could not resolve")
        assert manager.report.merged == 0


# -- servers that run already -----------------------------------------------------------------


@contextmanager
def stock_server(secret, path, port=None):
    """Run ppft's own ``ppserver`` with one worker; yield its port."""
    port = port or free_port("127.0.0.1")
    script = Path(sys.executable).parent / "ppserver"
    if not script.exists():
        pytest.skip("no ppserver script beside this interpreter")
    argv = [sys.executable, str(script), "-w", "1", "-i", "127.0.0.1", "-p", str(port)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    with subprocess.Popen(
        [*argv, "-s", secret], env=environ, stdin=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            wait_until(lambda: listens(port), 20, "ppserver listens")
            yield port
        finally:
            workers = descendants(server.pid)
            server.kill()
            wait_until(lambda: not alive(workers), 10, "ppserver's workers end")


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and not is_zombie(pid)]


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class TestExistingServers:
    def test_it_gives_right_results(self):
        with (
            open_server("a secret") as port,
            WorkManager(
                0, f"localhost:{port}", secret="a secret", config=(), silent=True
            ) as manager,
        ):
            assert manager.process(lambda n: n**2, range(100)) == [n**2 for n in range(100)]
            assert manager.workers == {f"localhost:{port}": 1}
            with pytest.raises(ZeroDivisionError):
                manager.process(lambda n: 1 // n, range(3))
            assert manager.process(lambda n: -n, range(3)) == [0, -1, -2]

    @pytest.mark.slow
    def test_a_stock_server_is_refused(self, fail):
        with stock_server("a secret", [PACKAGE_PARENT]) as port:
            error = fail(f"localhost:{port}", name="x.example", secret="a secret")
        assert error.step == "server"
        assert error.reason.startswith("what answers is no server of ours")
        assert "start servers by ostap-parallel launch" in error.reason

    @pytest.mark.slow
    def test_the_wrong_secret(self, fail):
        with open_server("right") as port:
            error = fail(f"localhost:{port}", name="x.example", secret="wrong")
        assert error.step == "server"
        assert "does not accept our secret" in error.reason

    @pytest.mark.slow
    def test_another_version_of_ppft(self, fail, tmp_path):
        source = Path(ppft.__file__).parent
        shutil.copytree(source, tmp_path / "ppft", ignore=shutil.ignore_patterns("__pycache__"))
        changed = 0
        for file in (tmp_path / "ppft").glob("*.py"):
            text = file.read_text()
            if ppft.__version__ in text:
                file.write_text(text.replace(ppft.__version__, "1.7.1"))
                changed += 1
        assert changed
        with open_server("secret", path=[tmp_path]) as port:
            error = fail(f"localhost:{port}", name="x.example", secret="secret")
        assert error.step == "server"
        assert f"it runs ppft '1.7.1', the caller ppft '{ppft.__version__}'" in error.reason

    @pytest.mark.slow
    def test_a_version_that_ends_in_zero(self, hosts, tmp_path):
        """What ppft tells is ``version.rstrip(".dev0")``: "1.9" for 1.9.0."""
        shutil.copytree(Path(ppft.__file__).parent, tmp_path / "lib/ppft")
        info = tmp_path / "lib/ppft/__info__.py"
        info.write_text(info.read_text().replace(ppft.__version__, "1.9.0"))
        done = run_script(hosts, tmp_path, tmp_path / "lib")
        assert done.stdout.splitlines() == ["True 11 h1", "True 12 h1"], done.stderr

    @pytest.mark.slow
    def test_no_server(self, fail):
        port = free_port("127.0.0.1")
        error = fail(f"localhost:{port}", name="x.example", secret="secret")
        assert error.step == "server"
        assert f"no server answers on port {port}" in error.reason


class TestLoginShells:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("shell", "rc"),
        [
            ("/bin/dash", ""),
            ("/bin/bash", "echo to out; echo to err >&2; alias rm='echo no' ls=false\n"),
            ("/usr/bin/tcsh", "echo to out\nsh -c 'echo to err >&2'\nalias ls false\n"),
        ],
        ids=["dash", "bash", "tcsh"],
    )
    def test_runs_work(self, make_hosts, manage, shell, rc):
        if not Path(shell).exists():
            pytest.skip(f"no {shell}")
        (host,) = make_hosts(login_shell=shell, rc=rc)
        manager = manage("h1*1", ssh_config=host.ssh_config, environment="export SEEN='a b'")
        assert manager.process(lambda n: (n, os.environ["SEEN"]), [1, 2]) == [
            (1, "a b"),
            (2, "a b"),
        ]


def test_an_event_that_the_end_has_cut_off():
    events = []
    source = HostSource(HostConfig(name="h1"), "secret")
    server = HostServer(source, SimpleNamespace(event=events.append, ended=print))
    server._receive(f'{MARK}{{"kind": "pri')
    server._receive(None)
    assert server.has_ended(0)
    assert events == []


@pytest.mark.slow
class TestLimits:
    def test_sixteen_hosts_behind_one_gateway(self, hosts, manage, tmp_path):
        names = [f"node{i}" for i in range(16)]
        gateway, inner = hosts
        path = tmp_path / "ssh_config"
        path.write_text(
            f"Host node*\n  HostName {inner.address}\n  Port {inner.port}\n"
            f"  ProxyCommand ssh -F {hosts.ssh_config} -W %h:%p {gateway.name}\n"
            f"Host *\n  Include {hosts.ssh_config}\n"
        )
        manager = manage([f"{name}*1" for name in names], ssh_config=path)
        manager.wait_for_hosts(100)
        assert failures_of(manager) == {}
        assert manager.workers == dict.fromkeys(names, 1)
        assert len(set(run_together(manager, 16, os.getpid))) == 16

    def test_a_refused_session_is_an_error(self, make_hosts, fail):
        options = [HostOptions(extra="MaxSessions 1"), HostOptions()]
        one, _ = make_hosts(each=options)
        error = fail(ssh_config=one.ssh_config)
        assert error.step == "copy"
        assert "session" in error.reason.lower()
        assert one.log.count("Accepted publickey") == 1


# -- what runs --------------------------------------------------------------------------------

SCRIPT = """\
import os, sys
from ostap_parallel import WorkManager

OFFSET = 10

class Point:
    def __init__(self, x):
        self.x = x

def helper(point):
    return Point(point.x + OFFSET)

def work(point):
    return helper(point), os.environ["PRIVATE_SSHD"].rpartition("/")[2]

if __name__ == "__main__":
    with WorkManager(0, sys.argv[2], ssh_config=sys.argv[1], silent=True, config=()) as wm:
        for point, host in wm.process(work, [Point(1), Point(2)]):
            print(type(point) is Point, point.x, host)
"""


def run_script(hosts, folder, *path):
    """Run `SCRIPT` in another process, with more places to import from."""
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(folder / "script.py"), str(hosts.ssh_config), "h1*1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, PACKAGE_PARENT]))},
    )


class TestFunctions:
    def test_lambdas_closures_methods_and_partials(self, cluster):
        offset = 5

        class Adder:
            def __init__(self, n):
                self.n = n

            def add(self, x):
                return self.n + x

            __call__ = add

        def closure(x):
            return x + offset

        for func in (lambda x: x + 5, closure, Adder(5).add, Adder(5)):
            assert cluster.process(func, range(3)) == [5, 6, 7]

    @pytest.mark.slow
    def test_functions_of_main(self, hosts, tmp_path):
        done = run_script(hosts, tmp_path)
        assert done.stdout.splitlines() == ["True 11 h1", "True 12 h1"], done.stderr

    def test_a_module_that_the_host_does_not_have(self, cluster):
        with pytest.raises(ModuleNotFoundError, match=__name__):
            cluster.process(host_here, [0])

    def test_an_exception_tells_where_it_was_raised(self, cluster):
        def work(n):
            return 12 // n

        with pytest.raises(ZeroDivisionError) as caught:
            cluster.process(work, [4, 3, 0], ordered=True)
        cause = caught.value.__cause__
        assert isinstance(cause, RemoteTraceback)
        assert "in work" in cause.tb
        assert "item 2 on h" in cause.tb
        if sys.version_info >= (3, 11):
            assert any(note.startswith("item 2 (0) on h") for note in caught.value.__notes__)

    def test_failures_are_collected(self, cluster):
        results = cluster.process(lambda n: 12 // n, [4, 0, 3], on_error="collect")
        assert [results[0], results[2]] == [3, 4]
        assert isinstance(results[1].error, ZeroDivisionError)
        assert results[1].host in ("h1", "h2")
        report = cluster.report
        assert (report.submitted, report.merged, report.failed) == (3, 2, 1)

    def test_output_comes_while_the_task_runs(self, cluster, capfd):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]

            def work(_):
                print("printed")
                os.write(1, b"written\n")
                print("to err", file=sys.stderr)
                with socket.create_connection(("127.0.0.1", port), timeout=30) as release:
                    return release.recv(1)

            runner = threading.Thread(target=cluster.process, args=[work, [0]])
            runner.start()
            seen = {"out": "", "err": ""}

            def complete():
                out, err = capfd.readouterr()
                seen["out"] += out
                seen["err"] += err
                return "written" in seen["out"] and "to err" in seen["err"]

            try:
                wait_until(complete, 20, "what the task printed")
            finally:
                server.accept()[0].close()
                runner.join()
        host = seen["err"].partition(",")[0]
        assert host in ("h1", "h2")
        assert sorted(seen["out"].splitlines()) == [f"{host}: printed", f"{host}: written"]
        assert f"{host}, item 0: to err\n" in seen["err"]

    def test_log_records_arrive_with_their_host(self, cluster, caplog):
        caplog.set_level(logging.INFO)

        def work(n):
            logging.getLogger("my.logger").info("item %d", n)

        cluster.process(work, [7])
        (record,) = [r for r in caplog.records if r.getMessage() == "item 7"]
        assert record.name in ("h1.my.logger", "h2.my.logger")
        assert record.levelno == logging.INFO
        assert record.funcName == "work"


# Whatever time limit a program on the host sets to a socket, it is a second.
HASTY = """
mkdir -p ~/site
cat > ~/site/sitecustomize.py <<'END'
import socket

class Hasty(socket.socket):
    def settimeout(self, limit):
        super().settimeout(limit and min(limit, 1))

socket.socket = Hasty
END
export PYTHONPATH=$HOME/site
"""


@pytest.mark.slow
class TestNothingIsLost:
    """What ppft and pathos lose on a host."""

    def test_a_task_that_raises(self, cluster):
        with pytest.raises(KeyError, match="what"):
            cluster.pool.map(lambda _: {}["what"], [1])

    def test_output_of_c_code(self, cluster, capfd):
        def work(n):
            os.write(1, b"written by C\n")
            return n

        assert cluster.process(work, range(4)) == [0, 1, 2, 3]
        assert capfd.readouterr().out.count("written by C\n") == 4

    def test_much_output_on_standard_error(self, cluster, capfd):
        def work(n):
            os.write(2, b"x" * 1000 + b"\n")
            for _ in range(200):
                os.write(2, b"y" * 1000 + b"\n")
            return n

        assert cluster.process(work, [1, 2]) == [1, 2]
        assert capfd.readouterr().err.count("y" * 1000) == 400

    @pytest.mark.parametrize("how", ["exit", "SIGKILL", "SIGSEGV"])
    def test_a_worker_that_dies(self, cluster, how):
        def work(n):
            if n == 2 and how == "exit":
                os._exit(7)
            elif n == 2:
                os.kill(os.getpid(), getattr(signal, how))
            return n

        results = cluster.process(work, range(6), on_error="collect")
        lost = results.pop(2)
        assert results == [0, 1, 3, 4, 5]
        assert isinstance(lost.error, WorkerLost)
        assert lost.error.host in ("h1", "h2")
        ending = "ended with exit status 7" if how == "exit" else f"was killed by {how}"
        assert ending in lost.error.reason
        # both hosts are as good as before
        assert run_together(cluster, 2, host_here()) == ["h1", "h2"]

    def test_prints_are_clean(self, cluster, capfd):
        def work(n):
            print(f"item {n}")

        for n in range(4):
            cluster.process(work, [n])
        lines = sorted(line.partition(": ")[2] for line in capfd.readouterr().out.splitlines())
        assert lines == [f"item {n}" for n in range(4)]

    def test_an_inline_lambda(self, cluster):
        calls = []
        (calls.append(1), cluster.process(lambda x: x + 1, [1]))
        assert calls == [1]
        assert cluster.pool.map(lambda x: x + 1, [1, 2]) == [2, 3]

    def test_keyword_arguments(self, cluster):
        assert cluster.pool.pipe(lambda a, b=0: (a, b), 1, b=2) == (1, 2)
        assert cluster.pool.apipe(lambda a, b=0: (a, b), 1, b=2).get(timeout=30) == (1, 2)

    def test_no_connection_has_a_time_limit(self, cluster):
        links = core_of(cluster).links()
        assert len(links) >= 1
        assert {link.channel.socket.gettimeout() for link in links} == {0}  # they do not block

    def test_a_task_may_run_longer_than_any_time_limit(self, manage):
        manager = manage("h1*1", environment=HASTY)

        def work(n):
            time.sleep(2.5)
            return socket.socket.__name__, n

        assert manager.process(work, [3]) == [("Hasty", 3)]
        assert manager.report.retried == 0


class TestWithinTasks:
    """A bare host has neither pathos nor rich, and can have workers of its own all the same."""

    @pytest.mark.parametrize("face", ["Pool", "Executor", "WorkManager"])
    def test_local_workers(self, cluster, face):
        def work(count):
            import ostap_parallel as here

            if face == "Pool":
                with here.Pool(2) as pool:
                    return pool.map(abs, range(count))
            if face == "Executor":
                with here.Executor(1) as executor:
                    return list(executor.map(abs, range(count)))
            with here.WorkManager(1) as manager:
                return manager.process(abs, range(count))

        assert cluster.process(work, [3]) == [[0, 1, 2]]


def test_what_tasks_leave_behind_does_not_stay_as_zombies(cluster):
    def leave(item):
        if os.fork() == 0:  # its child is an orphan that ends soon
            if os.fork() == 0:
                os.setsid()
                time.sleep(0.1)
            os._exit(0)
        os.wait()
        return item

    def zombies(item):
        """Return how many there are below the server of this host; others are not ours."""
        about = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
                state, parent, *_ = rest.split()
                about[int(folder.name)] = name, state, int(parent)

        def server_of(pid):
            while pid in about and about[pid][0] != "ppserver":
                pid = about[pid][2]
            return pid

        ours = server_of(os.getpid())
        assert ours in about
        return sum(about[pid][1] == "Z" and server_of(pid) == ours for pid in list(about))

    assert cluster.process(leave, range(6)) == list(range(6))
    wait_until(lambda: cluster.process(zombies, range(6)) == [0] * 6, PATIENCE, "no zombies")

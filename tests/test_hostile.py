"""Hostile text in every place that reaches a shell, a command or a file: refused, or literal.

Wherever a shell would read it, it makes a file ``canary`` in the working directory.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import PACKAGE_PARENT

from ostap_parallel import GenericTask, WorkManager
from ostap_parallel.config import HostConfig, load_settings
from ostap_parallel.config.files import absolute
from ostap_parallel.errors import ConfigError
from ostap_parallel.machine.serve import MARK
from ostap_parallel.supply import host as hosts_server
from ostap_parallel.supply.host import HostServer, HostSource
from ostap_parallel.supply.session import Session
from ostap_parallel.supply.ssh import Ssh, control_directory, ssh_argv

pytestmark = pytest.mark.slow

PATIENCE = 60  # seconds; only a hang takes that long
MISSING = "no such file on this host, or not readable"

PARTS = ["$(touch canary)", "`touch canary`", ";touch canary;", "|touch canary", "&touch canary"]
PARTS += ["\ntouch canary\n", "'", '"', "\\", "-oProxyCommand=touch canary", "--", "*", "?", "[a]"]
PARTS += ["~", "/", "%h", "${IFS}", "{", "{0}", "!", "#", " ", "\t", "\r", "\0", "\x1b[2J", "="]
PARTS += ["\udcff", "\ud800", "\u2028", "\u00a0", "\u00e9", "<canary", ">canary", "x" * 5000]

# Few parts, so that any two meet; and whatever else there is.
hostile = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join) | st.text()

examples = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """Where it would be."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("command", ["$(touch canary)", "`touch canary`", "\ntouch canary\n"])
def test_the_canary_works(command, canary):
    subprocess.run(["bash", "-c", f"echo {command}"], check=True, capture_output=True)
    assert canary.exists()
    canary.unlink()


TEXTS = ["profile", "environment", "script", "python", "user", "tmpdir", "python_mismatch"]
TEXTS += ["ssh_config", "ssh_options", "port", "ncpus_per_host", "keepalive", "start_timeout"]
TEXTS += ["preload", "start"]


def load(*args, **given):
    """Return the hosts, or none and the words of the refusal."""
    try:
        return load_settings(*args, **given).hosts, ""
    except ConfigError as exc:
        return (), str(exc)


def literal(name, text):
    """Return what a setting has to be if it is not refused."""
    match name:
        case _ if not text.strip():
            return getattr(HostConfig(name="h1"), name)
        case "ssh_options":
            return tuple(shlex.split(text))
        case "preload":
            return tuple(text.replace(",", " ").split())
        case "script" | "ssh_config":
            return absolute(text, Path.cwd())
        case "port" | "ncpus" | "keepalive" | "start_timeout":
            return int(text)
    return text


class TestSettings:
    @pytest.mark.parametrize("name", TEXTS)
    def test_arguments(self, name):
        key = name.removesuffix("_per_host")

        @examples
        @given(hostile)
        def check(text):
            hosts, refusal = load(["h1"], config=(), **{name: text})
            if refusal:
                assert key in refusal
                return
            assert getattr(hosts[0], key) == literal(key, text)
            assert key != "environment" or b"\0" not in text.encode()
            argv = ssh_argv(hosts[0], Path("/tmp/control"))
            assert all(b"\0" not in os.fsencode(word) for word in argv)
            if key != "ssh_options":
                assert all(word.startswith("-") for word in argv[1:])

        check()

    @examples
    @given(hostile)
    def test_servers(self, text):
        for servers in [text], text:
            hosts, refusal = load(servers, config=(), environ={})
            assert not refusal or "server" in refusal
            for host in hosts:
                assert not set(host.name) & set(" \t\r\n\0'\"\\$`;|&<>*?[]{}()!#~/")
                assert not host.name.startswith("-")

    @pytest.mark.parametrize("key", ["ppservers", "profile", "user", "ssh_options", "script"])
    def test_files(self, tmp_path, key):
        @examples
        @given(hostile)
        def check(text):
            file = tmp_path / "config"
            file.write_bytes(f"[Parallel]\n{key} = {text}\n".encode("utf-8", "surrogatepass"))
            _, refusal = load("auto", config=file, environ={}, hostname="h0")
            assert not refusal or str(file) in refusal

        check()

    @pytest.mark.parametrize("variable", ["OSTAP_CONFIG", "OSTAP_DIR", "OSTAP_PPSERVERS", None])
    def test_names_of_files(self, variable):
        @examples
        @given(hostile)
        def check(text):
            given = {"environ": {variable: text}} if variable else {"config": text, "environ": {}}
            load("auto", hostname="h0", **given)

        check()


@contextmanager
def bash_on(host):
    """Yield a function that has bash on a host run text, and returns the lines it prints."""
    lines = queue.Queue()
    with control_directory() as directory:
        config = HostConfig(name=host.name, ssh_config=host.ssh_config)
        session = Session("h1", Ssh(config, directory / "control").argv(), lines.put)
        session.open()

        def run(text):
            session.write(f"(\n{text}\n) </dev/null 2>&1; echo; echo done $?\n")
            found = []
            while not (line := lines.get(timeout=PATIENCE)).startswith("done "):
                found.append(line)
            return found

        try:
            script = Path(hosts_server.__file__).with_name("remote.bash").read_text()
            session.write(f"op_mark='{MARK}' op_tmpdir=/tmp\n{script}\n")
            while not lines.get(timeout=PATIENCE).startswith(f"{MARK}directory"):
                pass
            yield run
        finally:
            session.close()


def test_paths_in_the_bash_of_a_host(hosts):
    """A profile and an interpreter that do not exist are told by their names."""
    with bash_on(hosts["h1"]) as run:

        @examples
        @given(hostile.filter(lambda text: "canary" in text))
        def check(text):
            hosts, _ = load(["h1"], config=(), environ={}, profile=text, python=text)
            if not hosts:
                return
            (config,) = hosts
            source = HostSource(config, "secret")
            server = HostServer(source, SimpleNamespace(event=print, ended=print))
            name = text if "/" in text else f"./{text}"
            name = re.sub("^~(?=/)", home, name)
            assert run(server._sources("/dir"))[-2:] == [f"{name}: {MISSING}", ""]
            assert run(hosts_server.serve_line(config))[-2].startswith(
                f"{text}: not found; PATH is "
            )

        (home, _) = run("echo ~")
        check()
        assert run("ls canary ~/canary /canary 2>/dev/null") == [""]


NAMES = ["a b'c\"d$(touch canary)`touch canary`;touch canary\\", "-rf * ~ ? {0} %h \u00e9 | & # !"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_all_kinds_are_literal(hosts, tmp_path, name):
    """All of them exist, and serve."""
    host = hosts["h1"]
    there, here = host.home / name, tmp_path / name
    there.mkdir()
    here.mkdir()
    (there / "profile").write_text("export SEEN=profile\n")
    (there / "python").write_text('#!/bin/sh\nexec python3 "$@"\n')
    (there / "python").chmod(0o755)
    (here / "script").write_text("SEEN+=,script\n")
    shutil.copy(host.ssh_config, here / "config")
    try:
        with WorkManager(
            0,
            "h1*1",
            config=(),
            silent=True,
            ssh_config=here / "config",
            script=here / "script",
            profile=host.inside(there / "profile"),
            python=host.inside(there / "python"),
            tmpdir=host.inside(there),
        ) as manager:
            assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
            assert manager.process(lambda _: os.environ["SEEN"], [1]) == ["profile,script"]
            assert len(list(there.iterdir())) == 3
        assert not (host.home / "canary").exists()
    finally:
        shutil.rmtree(there)


def test_names_of_any_bytes_are_printed(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.sh"
    Path(os.fsdecode(name)).touch()
    argv = [sys.executable, "-m", "ostap_parallel", "config", "--script", name, "h1"]
    done = subprocess.run(argv, capture_output=True, cwd=PACKAGE_PARENT)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"script = " + name in done.stdout


# -- tasks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manager():
    with WorkManager(1, silent=True) as manager:
        yield manager


def see(jobid, item):
    return os.environ.get("NAME"), os.getcwd()  # noqa: PTH109


class TestTasks:
    def test_variables(self, manager):
        @examples
        @given(hostile)
        def check(text):
            try:
                seen, _ = manager.process(GenericTask(see, environment={"NAME": text}), [0])
            except ConfigError as exc:
                assert "environment: NAME" in str(exc)  # noqa: PT017
            else:
                assert seen == text

        check()

    @pytest.mark.parametrize("key", ["environment", "prepend_to", "append_to"])
    @pytest.mark.parametrize("name", ["", "A=B", "A\0", "\ud800"])
    def test_what_is_no_name_of_a_variable(self, key, name):
        with pytest.raises(ConfigError, match=key):
            GenericTask(see, **{key: {name: "x"}})

    def test_directories(self, manager, tmp_path):
        @examples
        @given(hostile)
        def check(text):
            folder = f"{tmp_path}/{text}"
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError):
                with pytest.raises((ConfigError, OSError)):
                    manager.process(GenericTask(see, directory=folder), [0])
            else:
                _, seen = manager.process(GenericTask(see, directory=folder), [0])
                assert seen == str(Path(folder).resolve())

        check()


def told(session):
    """Return what a session's file says that has this number."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    first = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]  # when it began
    return f"{boot} {first} {session}\n"


def left_by(there, session):
    """Return a session's directory, made here."""
    directory = there / f"ostap-parallel.{session}"
    directory.mkdir(parents=True)
    (directory / "session").write_text(told(session))
    return directory


def begin_session(there):
    script = Path(hosts_server.__file__).with_name("remote.bash").read_text()
    text = f"op_mark=@ op_tmpdir={there}\n{script}"
    subprocess.run(["bash", "-s"], input=text, text=True, timeout=60, check=False)


def test_a_link_among_what_killed_sessions_have_left(tmp_path):
    """Anybody can make one in a directory for temporary files."""
    there, home = tmp_path / "there", left_by(tmp_path / "home", 1 << 23)  # nobody's number
    left_by(there, 1 << 23)
    (there / "ostap-parallel.link").symlink_to(home)
    begin_session(there)
    assert list(there.iterdir()) == []
    assert (home / "session").read_text() == told(1 << 23)


def test_what_those_have_left_that_nobody_has_asked_about(tmp_path):
    argv = ["sh", "-c", "sleep 600 & echo; exec cat"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as leader:
        left = left_by(tmp_path, leader.pid)
        leader.stdout.readline()
        try:
            leader.stdin.close()
            os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
            begin_session(tmp_path)
            assert left.exists()  # another of its processes is there
        finally:
            os.killpg(leader.pid, signal.SIGKILL)
        wait_until(lambda: not members_of(leader.pid), 60, "they have ended")
        begin_session(tmp_path)
        assert not left.exists()


def members_of(session):
    """Return the processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
            if of == str(session) and state != "Z":
                found.append(stat)
    return found

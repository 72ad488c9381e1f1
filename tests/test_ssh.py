"""One connection to a real sshd: what it runs, copies and forwards, and what it refuses."""

from __future__ import annotations

import os
import queue
import shlex
import socket
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pathos.secure
import pytest
from helpers import wait_until
from pathos.connection import PipeException

from ostap_parallel import WorkManager
from ostap_parallel.config import HostConfig
from ostap_parallel.errors import ConfigError, HostError
from ostap_parallel.supply.here import run_here
from ostap_parallel.supply.relay import open_relay
from ostap_parallel.supply.session import Session
from ostap_parallel.supply.ssh import Copier, Ssh, Tunnel, control_directory, ssh_version
from ostap_parallel.supply.ways import write_files

NASTY = ["a b", "quote'quote", 'double"double', "$HOME", "`id`", "$(id)", "*", "-rf", "new\nline"]
NASTY += ["back\\slash", "tab\there", "!!", "\u00fc\u20ac", "~", ";ls"]


@contextmanager
def open_session(host, **given):
    """Yield a session to `host`, and a queue of the lines that arrive."""
    lines = queue.Queue()
    with control_directory() as directory:
        config = HostConfig(name=host.name, ssh_config=host.ssh_config, **given)
        way = Ssh(config, directory / "control")
        session = Session("h1", way.argv(), lines.put)
        session.way = way
        session.open()
        try:
            yield session, lines
        finally:
            session.close()


@pytest.fixture
def session(hosts):
    """A session to ``h1`` that is up."""
    with open_session(hosts["h1"]) as (session, lines):
        session.write("echo up\n")
        assert lines.get(timeout=60) == "up"
        session.lines = lines
        yield session


@pytest.fixture
def folder(hosts):
    """A directory on ``h1``, as the test sees it."""
    folder = hosts["h1"].home / "folder"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", folder], check=True)


@pytest.fixture
def listener():
    """A port of this machine that greets whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"hello")

        threading.Thread(target=greet, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def greeting(port):
    """Return what is said on a local port, or the name of the error."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            return connection.recv(5)
    except OSError as exc:
        return type(exc).__name__


def write_much(session):
    """Write more than any buffer on the way holds."""
    for _ in range(1000):
        session.write("true\n" * 1000)


class TestSession:
    @pytest.mark.parametrize("text", NASTY)
    def test_bash_reads_what_is_written(self, session, text):
        session.write(f"printf %s {shlex.quote(text)} | od -An -v -tx1 | tr -d ' \\n'; echo\n")
        assert bytes.fromhex(session.lines.get(timeout=60)) == text.encode()

    def test_output_that_is_no_text_arrives_nevertheless(self, session):
        session.write(r"printf 'a\377b\n'" + "\n")
        assert session.lines.get(timeout=60) == "a\\xffb"

    def test_the_end_is_told(self, session):
        session.write("echo last; echo words >&2; exit 3\n")
        assert session.lines.get(timeout=60) == "last"
        assert session.lines.get(timeout=60) is None
        assert session.last_words == "words"
        with pytest.raises(HostError, match="words"):
            write_much(session)

    def test_closing_ends_the_shell(self, hosts):
        with open_session(hosts["h1"]) as (session, lines):
            session.write("echo $$\n")
            lines.get(timeout=60)
            assert hosts["h1"].processes()
            session.close()
            assert lines.get(timeout=1) is None
            assert not session.way.control.exists()
            session.close()
            with pytest.raises(HostError, match="closed"):
                session.write("true\n")
        wait_until(lambda: not hosts["h1"].processes(), 5, "no process")

    def test_one_that_was_closed_does_not_open(self, hosts):
        config = HostConfig(name="h1", ssh_config=hosts.ssh_config)
        with control_directory() as directory:
            session = Session("h1", Ssh(config, directory / "control").argv(), print)
            session.close()
            with pytest.raises(HostError, match="closed"):
                session.open()
        assert hosts["h1"].processes() == []

    def test_commands_share_the_connection_or_fail(self, session):
        done = subprocess.run(
            [*session.way.command(), "echo $SSH_CONNECTION"], capture_output=True
        )
        session.write("echo $SSH_CONNECTION\n")
        assert done.stdout.decode().strip() == session.lines.get(timeout=60)
        session.close()
        done = subprocess.run([*session.way.command(), "true"], capture_output=True, timeout=20)
        assert done.returncode == 255

    @pytest.mark.parametrize(
        "name",
        ["", "-oProxyCommand=id", "a b", "a;id", "a$(id)", "a`id`", "a|b", "a\nb", "a'b", "a/b"],
    )
    def test_hostile_names_reach_no_shell(self, name):
        with pytest.raises(ConfigError):
            WorkManager(0, [name], config=())

    @pytest.mark.parametrize("user", ["-l", "a b", "a;id", "$(id)", "a@b", "a\nb"])
    def test_hostile_users_reach_no_shell(self, user):
        with pytest.raises(ConfigError):
            WorkManager(0, ["h1"], user=user, config=())


class TestControlDirectory:
    def test_it_is_private_and_goes(self):
        with control_directory() as directory:
            assert directory.stat().st_mode & 0o777 == 0o700
            assert len(str(directory)) < 80
        assert not directory.exists()

    def test_what_a_dead_process_has_left_goes(self, dead_pid):
        left = Path(tempfile.gettempdir(), f"ostap-parallel-{dead_pid}-x")
        left.mkdir()
        with control_directory():
            assert not left.exists()

    def test_one_in_use_stays_whoever_has_its_pid(self, dead_pid):
        """A process of another container looks dead from here."""
        theirs = Path(tempfile.gettempdir(), f"ostap-parallel-{dead_pid}-x")
        with control_directory() as directory:
            directory.rename(theirs)
            with control_directory():
                assert theirs.exists()
        with control_directory():
            assert not theirs.exists()

    @pytest.mark.parametrize("name", ["a b", "per%h", "quote'", "$HOME"])
    def test_ssh_reads_nothing_into_its_name(self, monkeypatch, tmp_path, name):
        monkeypatch.setattr(tempfile, "tempdir", f"/tmp/{name}")
        with control_directory() as directory:
            assert str(directory.parent) == "/tmp"


@pytest.fixture
def dead_pid():
    with subprocess.Popen(["true"]) as process:
        return process.pid


class TestCopier:
    @pytest.mark.parametrize("name", NASTY)
    def test_any_name_arrives(self, session, folder, hosts, tmp_path, name):
        staging = tmp_path / f"s{name}"
        staging.mkdir()
        (folder / name).mkdir()
        files = {name: b"\x00\xff\n" * 1000, "empty": b""}
        write_files(staging, files)
        copier = Copier(session.way)
        assert isinstance(copier, pathos.secure.Copier)
        copier.copy(staging, hosts["h1"].inside(folder / name))
        arrived = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        assert arrived == files
        modes = {path.stat().st_mode & 0o077 for path in (folder / name).iterdir()}
        assert modes == {0}

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
    def test_files_belong_to_who_logs_in(self, session, folder, hosts, tmp_path):
        (tmp_path / "file").write_text("text")
        os.chown(tmp_path / "file", 12345, 12345)
        Copier(session.way).copy(tmp_path, hosts["h1"].inside(folder))
        assert (folder / "file").stat().st_uid == folder.stat().st_uid

    def test_a_failure_is_noticed(self, session, tmp_path):
        (tmp_path / "file").write_text("text")
        with pytest.raises(HostError, match="/no/such/place") as caught:
            Copier(session.way).copy(tmp_path, "/no/such/place")
        assert (caught.value.host, caught.value.step) == ("h1", "copy")

    def test_a_connection_that_is_gone_is_noticed(self, session, tmp_path):
        session.close()
        with pytest.raises(HostError) as caught:
            Copier(session.way).copy(tmp_path, "/tmp")
        assert caught.value.step == "copy"

    def test_as_pathos_writes_it(self, session, folder, hosts, tmp_path):
        """``copier(source=..., destination=...)``, then ``launch``, then ``response``."""
        (tmp_path / "a b.txt").write_text("text")
        copier = Copier(session.way)
        there = hosts["h1"].inside(folder)
        settings = copier(source=tmp_path / "a b.txt", destination=f"h1:{there}")
        assert settings["destination"] == f"h1:{there}"
        copier.launch()
        assert copier.response() == ""
        assert (folder / "a b.txt").read_text() == "text"
        assert repr(copier).startswith("Pipe('ssh ")
        assert copier.pid() == 0
        assert copier.config()["options"] == ""
        for wrong in {"launcher": "cp"}, {"command": "id"}:
            with pytest.raises(KeyError):
                copier(**wrong)

    def test_in_the_background(self, session, folder, hosts, tmp_path):
        (tmp_path / "file").write_bytes(bytes(1 << 20))
        copier = Copier(session.way)
        copier(source=tmp_path, destination=hosts["h1"].inside(folder), background=True)
        copier.launch()
        assert copier.pid() > 0
        assert copier.response() == ""
        wait_until(lambda: (folder / "file").stat().st_size == 1 << 20, 10, "the whole file")
        copier.kill()
        assert copier.pid() == 0

    def test_a_failure_is_an_exception_of_pathos_too(self, session, tmp_path):
        (tmp_path / "file").touch()
        copier = Copier(session.way)
        copier(source=tmp_path, destination="/no/such/place")
        with pytest.raises(PipeException):
            copier.launch()


class TestTunnel:
    def test_as_pathos_writes_it(self, session, listener):
        tunnel = Tunnel(session.way)
        assert repr(tunnel) == "Tunnel('tunnel')"
        first = tunnel.connect("localhost", listener)
        assert repr(tunnel) == f"Tunnel('127.0.0.1:{first}:localhost:{listener} h1')"
        second = tunnel.connect("127.0.0.1", port=listener, through="h1")  # in place of the first
        assert greeting(first) == "ConnectionRefusedError"
        assert greeting(second) == b"hello"
        tunnel.disconnect()
        assert (tunnel.connected, repr(tunnel)) == (False, "Tunnel('tunnel')")
        assert greeting(second) == "ConnectionRefusedError"
        for wrong in {"through": "h2", "port": 9}, {}:
            with pytest.raises(pathos.secure.TunnelException):
                tunnel.connect("localhost", **wrong)

    def test_it_is_up_when_connect_returns(self, session, listener):
        tunnel = Tunnel(session.way)
        assert isinstance(tunnel, pathos.secure.Tunnel)
        assert not tunnel.connected
        port = tunnel.connect("127.0.0.1", listener)
        assert tunnel.connected
        assert greeting(port) == b"hello"

    def test_disconnect_takes_it_back(self, session, listener):
        tunnel = Tunnel(session.way)
        port = tunnel.connect("127.0.0.1", listener)
        tunnel.disconnect()
        assert not tunnel.connected
        assert greeting(port) == "ConnectionRefusedError"
        tunnel.disconnect()
        # the session goes on
        session.write("echo here\n")
        assert session.lines.get(timeout=60) == "here"

    def test_it_ends_with_its_session(self, session, listener):
        port = Tunnel(session.way).connect("127.0.0.1", listener)
        session.close()
        assert greeting(port) == "ConnectionRefusedError"

    def test_many(self, session, listener):
        tunnels = [Tunnel(session.way) for _ in range(5)]
        ports = [tunnel.connect("127.0.0.1", listener) for tunnel in tunnels]
        assert len(set(ports)) == 5
        assert {greeting(port) for port in ports} == {b"hello"}
        tunnels[0].disconnect()
        assert [greeting(port) for port in ports[1:]] == [b"hello"] * 4

    def test_it_listens_on_loopback_only(self, session, listener):
        port = Tunnel(session.way).connect("127.0.0.1", listener)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.9", port), timeout=5)

    def test_a_port_where_nobody_listens(self, session, listener):
        with socket.create_server(("127.0.0.1", 0)) as server:
            unused = server.getsockname()[1]
        # The forward itself is up; a connection through it ends at once.
        port = Tunnel(session.way).connect("127.0.0.1", unused)
        assert greeting(port) in (b"", "ConnectionResetError")

    def test_without_a_session_it_is_not_connected(self, session, listener):
        session.close()
        tunnel = Tunnel(session.way)
        with pytest.raises(HostError) as caught:
            tunnel.connect("127.0.0.1", listener)
        assert caught.value.step == "tunnel"
        assert not tunnel.connected

    def test_a_host_that_forbids_forwarding(self, make_hosts, listener):
        (host,) = make_hosts(extra="AllowTcpForwarding no")
        with open_session(host) as (session, lines):
            session.write("echo up\n")
            assert lines.get(timeout=60) == "up"
            port = Tunnel(session.way).connect("127.0.0.1", listener)
            assert greeting(port) in (b"", "ConnectionResetError")


CHATTY = r"printf 'no:\r\n\n there\rand not here \r\r\n' >&2; exit 255"


def words_of(way):
    """Return what a session is told by a program that fails."""
    lines, ended = [], threading.Event()

    def take(line):
        if line is None:
            ended.set()

    session = Session("h1", way.argv(), take, lines.append)
    session.open()
    try:
        assert ended.wait(60)
    finally:
        session.close()
    assert session.last_words == "\n".join(lines)
    return session.last_words


def test_lines_of_reasons_end_in_one_way(tmp_path, monkeypatch):
    """ssh ends some of its lines by CR and LF, which no report can show."""
    ssh_version()  # which is kept, of the real one
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(f"#!/bin/sh\n{CHATTY}\n")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    way = Ssh(HostConfig(name="h1"), tmp_path / "control")
    reasons = [words_of(way), run_here(["ssh"]).words]
    with open_relay("h1", ["ssh"], keepalive=20, python="python3", judge=str) as relay:
        reasons.append(words_of(relay).removesuffix("\nssh has ended: exit status 255"))
    calls = [lambda: way.copy({}, "/tmp", 60), lambda: way.forward(1), lambda: way.backward(1)]
    for call in calls:
        with pytest.raises(HostError) as caught:
            call()
        reasons.append(caught.value.reason)
    assert reasons == ["no:\n there\nand not here"] * 6

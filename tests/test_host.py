"""One host, with commands, functions, files and tunnels through one connection."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from conftest import check_hosts, hosts_or_skip
from sshd import HostOptions

from ostap_parallel.commands import CommandFailed
from ostap_parallel.errors import ConfigError, HostError
from ostap_parallel.hosts import Host
from ostap_parallel.worker import files

PATIENCE = 60


@pytest.fixture(scope="module")
def own_hosts(tmp_path_factory):
    with hosts_or_skip(1, tmp_path_factory.mktemp("own"), HostOptions()) as hosts:
        yield hosts
        check_hosts(hosts, {})


@pytest.fixture(scope="module")
def host(own_hosts):
    with Host("h1", ssh_config=own_hosts.ssh_config, config=()) as host:
        yield host


def test_commands(host):
    assert host.run(["printf", "%s", "$HOME"]).check().text == "$HOME"
    assert host.shell("basename $PRIVATE_SSHD").check().text == "h1\n"
    with pytest.raises(CommandFailed, match=r"exit 7 on h1: exit status 7"):
        host.shell("exit 7").check()
    assert host.run(["kill", "-9", "$$"]).status == 1
    assert host.shell("kill -9 $$").signal == signal.SIGKILL
    assert host.run(["cat"], stdin="text", directory="/").text == "text"
    assert host.run(["sleep", "9"], timeout=0.2).timed_out


def test_functions(host):
    def add(a, b=0):
        return a + b

    assert host.python(add, 1, b=2) == 3
    with pytest.raises(TypeError):
        host.python(add)


def test_a_host_that_cannot_be_had(own_hosts):
    with pytest.raises(HostError, match="h9"):
        Host("h9", ssh_config=own_hosts.ssh_config, config=())
    with pytest.raises(ConfigError, match="one server"):
        Host("h1 h2", ssh_config=own_hosts.ssh_config, config=())


def make_tree(top: Path) -> None:
    top.mkdir()
    (top / "empty").mkdir()
    (top / "sub it's").mkdir()
    (top / "sub it's" / "file\n1").write_text("one")
    (top / "run.sh").write_text("#!/bin/sh\n")
    (top / "run.sh").chmod(0o750)
    (top / "link").symlink_to("run.sh")
    (top / "nothing").touch()
    (top / "large").write_bytes(os.urandom(2 * files.BATCH + 17))


def tree(top: Path) -> dict[str, object]:
    """Return what is in a directory, with contents, modes and targets."""
    return {
        str(path.relative_to(top)): (
            path.lstat().st_mode,
            path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes(),
        )
        for path in top.rglob("*")
    }


def test_a_directory_goes_there_and_comes_back(host, tmp_path):
    make_tree(tmp_path / "tree")
    there = host.put(tmp_path / "tree", "~/copies/")
    assert there == host.shell("echo ~/copies/tree").text.strip()
    back = host.get("~/copies/tree", tmp_path / "back")
    assert back == tmp_path / "back"
    assert tree(back) == tree(tmp_path / "tree")
    host.run(["rm", "-r", there]).check()


def test_files(host, tmp_path):
    (tmp_path / "a").write_text("a")
    assert host.put(tmp_path / "a", "~/b").endswith("/b")
    assert host.shell("cat ~/b").text == "a"
    assert host.get("$HOME/b", tmp_path) == tmp_path / "b"
    assert (tmp_path / "b").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        host.put(tmp_path / "none", "~/")
    with pytest.raises(FileNotFoundError):
        host.get("~/none", tmp_path)


def test_nothing_is_written_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="elsewhere"):
        files.make((str(tmp_path / "top"), [files.Entry("../x", "directory")]))


def echo_server() -> int:
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, server.accept()[0] as peer:
            peer.sendall(peer.recv(100).upper())

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as peer:
        peer.sendall(b"hello")
        return peer.recv(100)


def test_tunnels(host):
    port = host.tunnel(echo_server())
    assert ask(port) == b"HELLO"
    port = host.reverse_tunnel(echo_server())
    text = f"exec 3<>/dev/tcp/127.0.0.1/{port}; printf hello >&3; head -c 5 <&3"
    assert host.shell(text).check().text == "HELLO"


def test_there_is_one_connection(host, own_hosts):
    (one,) = own_hosts
    assert host.python(os.getpid)
    masters = [pid for pid in one.processes() if "sshd" in Path(f"/proc/{pid}/comm").read_text()]
    before = len(masters)
    host.run(["true"])
    host.tunnel(echo_server())
    masters = [pid for pid in one.processes() if "sshd" in Path(f"/proc/{pid}/comm").read_text()]
    assert len(masters) == before

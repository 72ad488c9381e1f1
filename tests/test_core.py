"""The verbs of pathos.core: what they return, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import wait_until
from sshd import describe

from ostap_parallel import core
from ostap_parallel.commands import pipes
from ostap_parallel.core import Copier, Pipe, Tunnel, copy, execute
from ostap_parallel.errors import ConfigError, HostError

PATIENCE = 60


@pytest.fixture(autouse=True, scope="module")
def places(own_hosts):
    yield  # its hosts are still there when this goes on
    core.close()


@pytest.fixture(params=["here", "h1"])
def where(request, own_hosts):
    """Keywords for this machine, and for a host."""
    if request.param == "here":
        return {}
    return {"host": "h1", "ssh_config": own_hosts.ssh_config, "config": ()}


@pytest.fixture
def there(own_hosts):
    return {"ssh_config": own_hosts.ssh_config, "config": ()}


class TestExecute:
    @pytest.mark.slow
    def test_what_is_printed(self, where):
        pipe = execute("echo 'a   b' \"$((1 + 1))\" é; printf '\\377'", bg=False, **where)
        assert pipe.response() == "a   b 2 é\n\udcff"
        assert pipe.response() == "a   b 2 é\n\udcff"
        assert pipe.status == 0

    def test_nothing_is_expanded_here(self, there):
        text = 'echo "$(basename $PRIVATE_SSHD)"'
        assert execute(text, "h1", bg=False, **there).response() == "h1\n"

    def test_failures(self, where):
        done = execute("echo words >&2; exit 3", bg=False, **where).wait(PATIENCE)
        assert (done.status, done.stderr) == (3, b"words\n")
        assert execute("kill -9 $$", **where).wait(PATIENCE).signal == signal.SIGKILL
        pipe = execute("echo words >&2; exit 3", **where)
        assert pipe.response() == "words\n"
        assert pipe.status == 3

    def test_bytes(self, where):
        assert execute("printf '\\0'", bg=False, decode=False, **where).response() == b"\0"

    def test_one_in_the_background_ends_when_told(self, where):
        pipe = execute("sleep 73911", **where)
        wait_until(lambda: describe(pipe.pid()).endswith(" sleep 73911"), PATIENCE, "it runs")
        assert pipe.response() is None
        assert pipe.status is None
        pipe.kill()
        wait_until(lambda: "(ended)" in describe(pipe.pid()), PATIENCE, "it is gone")

    def test_standard_input(self, where, tmp_path):
        (tmp_path / "in").write_text("text")
        with (tmp_path / "in").open() as file:
            assert execute("cat", bg=False, stdin=file, **where).response() == "text"

    def test_a_pipe_is_used_again(self, where):
        pipe = Pipe("name", **where)
        pipe.launch()
        assert pipe.response() == "name\n"
        assert pipe(command="echo 2; echo 3 >&2", background=True)["message"].startswith("echo 2")
        pipe.launch()
        assert pipe.response() == "2\n3\n"

    def test_a_host_that_cannot_be_had(self, there):
        with pytest.raises(HostError, match="h9"):
            execute("true", "h9", **there)

    def test_options_of_ssh(self):
        with pytest.raises(ConfigError, match="ssh_config"):
            execute("true", "h1", options="-p 22")

    @pytest.mark.slow
    def test_nothing_outlives_the_program(self, own_hosts, tmp_path):
        program = tmp_path / "program.py"
        program.write_text(
            "from ostap_parallel.core import execute\n"
            f"ours = dict(ssh_config={str(own_hosts.ssh_config)!r}, config=())\n"
            "print(execute('sleep 73912', 'h1', **ours).pid(), execute('sleep 73912').pid())\n"
        )
        done = subprocess.run([sys.executable, program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pids = [int(word) for word in done.stdout.split()]
        assert len(pids) == 2
        wait_until(lambda: "73912" not in "".join(map(describe, pids)), PATIENCE, "both ended")


class TestProcesses:
    def test_which_it_is(self, where):
        pipe = execute("exec -a 'name of (it)+' sleep 73913", **where)
        try:
            wait_until(lambda: "bash" not in describe(pipe.pid()), PATIENCE, "it runs")
            assert core.getpid("[N,n]ame of (it)+", **where) == pipe.pid()
            assert "sleep" not in str(core.getpid("[N,n]ame of (it)+", all=True, **where))
            assert str(pipe.pid()) in core.getpid(pipe.pid(), all=True, **where)
            assert core.getpid(pipe.pid(), **where) == pipe.pid()
            parent = core.getppid(pipe.pid(), **where)
            assert pipe.pid() in core.getchild(parent, **where)
            assert core.getppid(pipe.pid(), group=True, **where) == pipe.pid()
            assert core.getchild(pipe.pid(), **where) == []
            assert core.kill(pipe.pid(), **where) == ""
            assert pipe.wait(PATIENCE).signal == signal.SIGTERM
        finally:
            pipe.kill()
        with pytest.raises(OSError, match="No such process"):
            core.kill(pipe.pid(), **where)
        with pytest.raises(OSError, match="No such process"):
            core.getpid("[N,n]ame of (it)+", **where)
        for verb in (core.getppid, core.getchild):
            with pytest.raises(OSError, match="No such process"):
                verb(pipe.pid(), **where)

    def test_this_one(self):
        assert core.getpid() == os.getpid()
        assert core.getppid() == os.getppid()
        with pytest.raises(OSError, match="No such process"):
            core.getpid(host="h1")


class TestCopy:
    @pytest.mark.slow
    def test_there_and_back(self, there, tmp_path, own_hosts):
        (tmp_path / "it's $HOME").write_text("text")
        copy(str(tmp_path / "it's $HOME"), "h1:copy", **there)
        assert (own_hosts[0].home / "copy").read_text() == "text"
        copy("h1:copy", "h2:other", **there)
        copy("h2:other", str(tmp_path), **there)
        assert (tmp_path / "other").read_text() == "text"

    def test_here(self, tmp_path, monkeypatch):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "f").write_text("text")
        copy(str(tmp_path / "d"), str(tmp_path / "e"))
        assert (tmp_path / "e" / "f").read_text() == "text"
        monkeypatch.chdir(tmp_path / "e")
        copy("localhost:../d/f")
        assert (tmp_path / "e" / "f").read_text() == "text"

    def test_what_is_not_there(self, there, tmp_path):
        with pytest.raises(FileNotFoundError):
            copy("h1:no-such", str(tmp_path), **there)
        with pytest.raises(FileNotFoundError):
            copy("/no/such", "h1:", **there)

    def test_a_copier_is_used_again(self, there, tmp_path, own_hosts):
        copier = Copier("name", **there)
        for name in ("a", "b"):
            (tmp_path / name).write_text(name)
            copier(source=str(tmp_path / name), destination=f"h1:to-{name}")
            copier.launch()
            assert (own_hosts[0].home / f"to-{name}").read_text() == name


class TestTunnels:
    def test_it_is_up_and_then_down(self, there):
        with socket.create_server(("127.0.0.1", 0)) as far:
            tunnel = core.connect("h1", far.getsockname()[1], **there)
            assert tunnel.connected
            with socket.create_connection(("127.0.0.1", tunnel._lport), timeout=PATIENCE) as near:
                ours, _ = far.accept()
                with ours:
                    ours.sendall(b"x")
                    assert near.recv(1) == b"x"
            port = tunnel._lport
            tunnel.disconnect()
            assert not tunnel.connected
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
            # the connection stays
            assert execute("echo a", "h1", bg=False, **there).response() == "a\n"

    def test_through_another(self, there):
        with socket.create_server(("127.0.0.2", 0)) as far:
            tunnel = Tunnel("name", **there)
            port = tunnel.connect("127.0.0.2", far.getsockname()[1], through="h1")
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE):
                far.accept()[0].close()
            tunnel.disconnect()

    def test_ports_are_free(self, where):
        ports = {core.randomport(**where) for _ in range(20)}
        assert all(1024 <= port <= 65535 for port in ports)
        with socket.create_server(("127.0.0.1", ports.pop())):
            pass


class TestConnect:
    """The command line."""

    def start(self, own_hosts, *words, **options):
        argv = [sys.executable, "-m", "ostap_parallel", "connect"]
        argv += ["--ssh-config", str(own_hosts.ssh_config), *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["enter", signal.SIGINT, signal.SIGTERM])
    def test_a_tunnel(self, own_hosts, end):
        with contextlib.ExitStack() as stack:
            far = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            with self.start(own_hosts, "h1", far.getsockname()[1]) as process:
                found = re.match(r"localhost:(\d+) leads to", process.stdout.readline())
                near = socket.create_connection(("127.0.0.1", int(found[1])), timeout=PATIENCE)
                with near, far.accept()[0]:
                    pass
                if end == "enter":
                    process.stdin.write("\n")
                    process.stdin.flush()
                else:
                    process.send_signal(end)
                assert process.wait(PATIENCE) == 0

    @pytest.mark.slow
    def test_the_other_way(self, own_hosts):
        with contextlib.ExitStack() as stack:
            near = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = near.getsockname()[1]
            with self.start(own_hosts, "--reverse", "h1", port) as process:
                found = re.match(r"localhost:(\d+) of h1 leads", process.stdout.readline())
                text = f"exec 3<>/dev/tcp/127.0.0.1/{found[1]}; echo word >&3"
                settings = {"ssh_config": own_hosts.ssh_config, "config": ()}
                execute(text, "h1", bg=False, **settings).response()
                with near.accept()[0] as ours:
                    assert ours.recv(5) == b"word\n"
                process.send_signal(signal.SIGINT)
                assert process.wait(PATIENCE) == 0

    @pytest.mark.slow
    def test_a_port_is_chosen(self, own_hosts):
        with self.start(own_hosts, "h1") as process:
            assert re.match(
                r"localhost:\d+ leads to localhost:\d+ of h1", process.stdout.readline()
            )
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0

    @pytest.mark.slow
    def test_what_is_wrong(self, own_hosts):
        for words, status in ((["--reverse", "h1"], 2), (["h1", "0"], 2), (["h9", "1"], 1)):
            with self.start(own_hosts, *words, stderr=subprocess.PIPE) as process:
                assert process.wait(PATIENCE) == status


class TestServe:
    def test_it_listens(self, where, tmp_path, own_hosts):
        folder = own_hosts[0].home if where else tmp_path
        server = folder / "server"
        python = Path(sys.executable).resolve()  # hosts may not have the environment
        server.write_text(f"#!/bin/sh\nexec {python} -m http.server -b 127.0.0.1 $2\n")
        server.chmod(0o700)
        port = core.randomport(**where)
        name = "~/server" if where else str(server)
        pipe = core.serve(name, port=port, **where)
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
        pipe.kill()
        wait_until(lambda: "(ended)" in describe(pipe.pid()), PATIENCE, "it is gone")

    def test_one_that_ends(self, where):
        with pytest.raises(OSError, match="no-such"):
            core.serve("no-such-server", **where)


def test_a_host_that_is_slow_to_come_holds_up_no_other(monkeypatch):
    asked, come, there = threading.Event(), threading.Event(), []

    class Slow:
        is_up = True

        def __init__(self, name, **settings):
            if name == "slow":
                asked.set()
                come.wait(PATIENCE)
            there.append(name)

        def close(self):
            pass

    monkeypatch.setattr(pipes, "Host", Slow)
    places = pipes._Places()
    waiting = threading.Thread(target=places.host, args=["slow", {}])
    waiting.start()
    try:
        assert asked.wait(PATIENCE)
        assert places.host("quick", {}) is places.host("quick", {})
        assert there == ["quick"]
    finally:
        come.set()
        waiting.join(PATIENCE)
    places.close()


class TestPrograms:
    """Programs for pathos, with their imports changed."""

    def run(self, tmp_path, text, stdin=""):
        (tmp_path / "program.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, "HOME": str(tmp_path)},
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @pytest.mark.slow
    def test_hello(self, tmp_path):
        text = """
from ostap_parallel.core import Pipe
if __name__ == "__main__":
    launcher = Pipe("LauncherSSH")
    for command in ('echo "hello from..."', "uname -n"):
        launcher(command=command, rhost="localhost", background=False)
        launcher.launch()
        print(launcher.response())
"""
        assert self.run(tmp_path, text) == f"hello from...\n\n{os.uname().nodename}\n\n"

    @pytest.mark.slow
    def test_a_copy(self, tmp_path):
        text = """
from ostap_parallel.core import Copier, Pipe
if __name__ == "__main__":
    with open("test.txt", "w") as file:
        file.write("Test Successful!\\\\n")
    copier = Copier("LauncherSCP")
    copier(source="test.txt", destination="localhost:~/one.txt")
    copier.launch()
    copier(source="localhost:~/one.txt", destination="localhost:~/two.txt")
    copier.launch()
    copier(source="localhost:~/two.txt", destination="./three.txt")
    copier.launch()
    launcher = Pipe("cleanup")
    launcher(command="rm ~/one.txt ~/two.txt", rhost="localhost", background=True)
    launcher.launch()
    assert launcher.response() == ""
"""
        self.run(tmp_path, text)
        assert (tmp_path / "three.txt").read_text() == "Test Successful!\\n"
        assert not list(Path(tmp_path).glob("t*o.txt"))

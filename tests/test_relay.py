"""The relay: many streams over one program that leads to bash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from functions import script_environ
from helpers import wait_until

from ostap_parallel import HostError, WorkManager
from ostap_parallel.config import HostConfig
from ostap_parallel.supply.host import HostSource
from ostap_parallel.supply.relay import open_relay
from ostap_parallel.supply.session import Session
from ostap_parallel.worker.mux import Mux

PATIENCE = 60  # seconds; only a hang takes that long

BIG = 24 << 20

OLD = ("3.6", "3.7", "3.8", "3.9")


def pythons():
    """Return other interpreters than ours, by version."""
    paths = Path("~/.pyenv/versions").expanduser().glob("*/bin/python3.*")
    found = {path.name.removeprefix("python"): str(path) for path in paths}
    return [pytest.param(found.get(version), id=version) for version in OLD]


class Ends:
    """A session through a relay, and what has come from it."""

    def __init__(self, way, **given):
        self.way = way
        self.lines, self.words = [], []
        self.over = threading.Event()
        self.session = Session("there", way.argv(), self._take, self.words.append, **given)
        self.session.open()

    def _take(self, line):
        self.lines.append(line)
        if line is None:
            self.over.set()

    def say(self, text):
        self.session.write(text)

    def wait_for(self, line):
        try:
            wait_until(lambda: line in self.lines or self.over.is_set(), PATIENCE, line)
        finally:
            assert line in self.lines, (self.lines, self.words)


@contextlib.contextmanager
def open_ends(program=("bash", "-s"), *, python=sys.executable, keepalive=20, judge=None):
    judge = judge or (lambda words: "failed")
    with open_relay("there", program, keepalive=keepalive, python=python, judge=judge) as way:
        ends = Ends(way)
        try:
            yield ends
        finally:
            ends.session.close(0.5)


@pytest.fixture
def ends():
    with open_ends() as ends:
        ends.say("echo up\n")
        ends.wait_for("up")
        yield ends


@pytest.fixture
def echo():
    """The port of a server that says what it is told."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(peer):
            with peer, contextlib.suppress(OSError):
                while data := peer.recv(1 << 16):
                    peer.sendall(data)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=[server.accept()[0]], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def there_and_back(port, data):
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as peer:

        def send():
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        back = b"".join(iter(lambda: peer.recv(1 << 20), b""))
        sender.join()
        return back


def far_of(ends):
    """Return the process of the far end."""
    ends.say("echo far $PPID\n")
    wait_until(lambda: any(str(x).startswith("far ") for x in ends.lines), PATIENCE, "its pid")
    return next(int(line.split()[1]) for line in ends.lines if str(line).startswith("far "))


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestStreams:
    def test_a_session_with_its_status_and_words(self, ends):
        ends.say("echo 'a  b'; echo oops >&2; exit 7\n")
        assert ends.over.wait(PATIENCE)
        assert ends.lines == ["up", "a  b", None]
        assert (ends.session.exit_status, ends.words) == (7, ["oops"])
        assert ends.way.judge(7, "oops") == "ended"

    def test_what_has_no_line_end_comes_at_once(self, ends, echo):
        _, port = ends.way.forward(echo)
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as peer:
            for _ in range(3):
                peer.sendall(b"\0")
                assert peer.recv(9) == b"\0"

    @pytest.mark.slow
    def test_commands_beside_it(self, ends):
        data = os.urandom(BIG)
        code = "import sys, hashlib; d = sys.stdin.buffer.read(); sys.stderr.write('oops')\n"
        code += "sys.stdout.buffer.write(d[::-1]); sys.stdout.flush(); sys.exit(3)"
        done = ends.way.run([sys.executable, "-c", code], data, PATIENCE)
        assert (done.status, done.errors) == (3, b"oops")
        digest = hashlib.sha256(data[::-1]).hexdigest()
        assert hashlib.sha256(done.output).hexdigest() == digest
        assert ends.way.run(["sh", "-c", "kill -9 $$"]).status == 128 + 9
        missing = ends.way.run(["no-such-program"])
        assert (missing.status, missing.errors.split(b":")[0]) == (127, b"no-such-program")
        assert ends.way.answers()

    def test_a_command_of_many_words(self, ends):
        words = [str(number) * 1000 for number in range(60)]
        done = ends.way.run(["printf", "%s\n", *words], timeout=PATIENCE)
        assert done.output.decode().split() == words

    def test_what_a_command_has_left_behind_keeps_nobody_waiting(self, ends):
        done = ends.way.run(["sh", "-c", "sleep 60 & echo $!"], timeout=PATIENCE)
        os.kill(int(done.output), signal.SIGKILL)
        assert done.status == 0

    def test_who_leaves_a_command_ends_it(self, ends, tmp_path):
        pid = tmp_path / "pid"
        argv = ends.way.command(["sh", "-c", f"echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 60"])
        with subprocess.Popen(argv) as command:
            wait_until(pid.exists, PATIENCE, "it runs")
            command.kill()
        wait_until(lambda: not is_there(int(pid.read_text())), PATIENCE, "it has ended")

    def test_files(self, ends, tmp_path):
        ends.way.copy({"a": b"\0" * BIG, "b b": b"x"}, str(tmp_path), PATIENCE)
        assert (tmp_path / "a").stat().st_size == BIG
        assert ((tmp_path / "b b").read_bytes(), (tmp_path / "a").stat().st_mode & 0o77) == (
            b"x",
            0,
        )
        with pytest.raises(HostError, match=r"there: copy: .*/nowhere"):
            ends.way.copy({"a": b""}, "/nowhere", PATIENCE)

    @pytest.mark.slow
    def test_ports_both_ways(self, ends, echo):
        data = os.urandom(BIG)
        address, port = ends.way.forward(echo)
        assert (address, there_and_back(port, data) == data) == ("127.0.0.1", True)
        assert there_and_back(ends.way.backward(echo), data) == data
        peers = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(60)]
        for number, peer in enumerate(peers):
            peer.sendall(b"%03d" % number)
        for number, peer in enumerate(peers):
            with peer:
                assert peer.recv(9) == b"%03d" % number

    def test_a_port_that_is_wanted(self, ends, echo):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert ends.way.forward(echo, port)[1] != port
        assert ends.way.forward(echo, port)[1] == port

    def test_a_port_where_nobody_listens(self, ends):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        _, near = ends.way.forward(port)
        with socket.create_connection(("127.0.0.1", near), PATIENCE) as peer:
            assert peer.recv(1) == b""

    def test_who_does_not_read_holds_up_nobody(self, ends, echo):
        _, port = ends.way.forward(echo)
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as lazy:
            lazy.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    lazy.send(b"x" * (1 << 16))
            assert there_and_back(port, b"y" * BIG) == b"y" * BIG

    @pytest.mark.slow
    @pytest.mark.parametrize("python", pythons())
    def test_an_old_python_there(self, python, echo):
        if python is None:
            pytest.skip("there is no such Python here")
        with open_ends(python=python) as ends:
            far = far_of(ends)
            assert python in str(Path(f"/proc/{far}/exe").readlink())
            assert ends.way.run(["cat"], b"x" * BIG, PATIENCE).output == b"x" * BIG
            assert there_and_back(ends.way.forward(echo)[1], b"x" * BIG) == b"x" * BIG
            assert ends.way.run(["no-such-program"]).status == 127
            os.kill(far, signal.SIGUSR1)
            wait_until(lambda: any("SIGUSR1" in w for w in ends.words), PATIENCE, "it is told")
            ends.say("exit 3\n")
            assert ends.over.wait(PATIENCE)
            assert ends.session.exit_status == 3


class TestEnds:
    def test_nothing_is_left_when_the_near_end_is_killed(self, ends):
        far = far_of(ends)
        ends.say("echo bash $$\n")
        ends.wait_for(f"far {far}")
        wait_until(lambda: any(str(x).startswith("bash ") for x in ends.lines), PATIENCE, "bash")
        (bash,) = (int(x.split()[1]) for x in ends.lines if str(x).startswith("bash "))
        ends.session._process.kill()
        wait_until(lambda: not is_there(far) and not is_there(bash), PATIENCE, "they have ended")

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has it only")
    def test_a_program_that_waits_ends_with_a_near_end_that_is_killed(self, tmp_path):
        program = ["sh", "-c", f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; "]
        program[-1] += "exec sleep 1000"  # which reads nothing, as srun in a queue
        with open_ends(program) as ends:
            wait_until((tmp_path / "pid").exists, PATIENCE, "it waits")
            ends.session._process.kill()
            pid = int((tmp_path / "pid").read_text())
            wait_until(lambda: not is_there(pid), PATIENCE, "it has ended")

    def test_the_directory_of_who_is_killed_goes(self, tmp_path):
        script = tmp_path / "client.py"
        script.write_text(
            "import sys, time\nfrom ostap_parallel.supply.relay import open_relay\n"
            "from ostap_parallel.supply.session import Session\n"
            "with open_relay('there', ['bash', '-s'], keepalive=20) as way:\n"
            "    say = lambda line: print(line, way.directory, flush=True)\n"
            "    session = Session('there', way.argv(), say, directory=way.directory)\n"
            "    session.open()\n"
            "    session.write('echo up\\n')\n"
            "    time.sleep(600)\n"
        )
        with subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, text=True, env=script_environ()
        ) as client:
            line = client.stdout.readline().split()
            client.kill()
        assert line[0] == "up"
        wait_until(lambda: not Path(line[1]).exists(), PATIENCE, "it is gone")

    def test_what_does_not_mind_its_end_is_killed(self, ends):
        far = far_of(ends)
        ends.say("trap '' TERM HUP INT; echo $$ pid; exec sleep 1000\n")
        wait_until(lambda: any(str(x).endswith(" pid") for x in ends.lines), PATIENCE, "it runs")
        (pid,) = (int(x.split()[0]) for x in ends.lines if str(x).endswith(" pid"))
        ends.session._process.kill()
        wait_until(lambda: not is_there(far) and not is_there(pid), PATIENCE, "they have ended")

    def test_a_near_end_that_is_silent_has_gone(self):
        with open_ends(keepalive=2) as ends:
            far = far_of(ends)
            os.kill(ends.session._process.pid, signal.SIGSTOP)
            try:
                wait_until(lambda: not is_there(far), PATIENCE, "it has ended")
            finally:
                os.kill(ends.session._process.pid, signal.SIGCONT)

    def test_signals_are_told_and_reach_nobody_else(self, ends):
        far = far_of(ends)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.killpg(far, number) if os.getpgid(far) == far else os.kill(far, number)
            line = f"\x1eostap-parallel signal {number.name}"
            wait_until(lambda line=line: line in ends.words, PATIENCE, line)
        ends.say("echo still here\n")
        ends.wait_for("still here")

    def test_what_start_up_files_print_is_passed_over(self):
        program = ["sh", "-c", "printf 'Welcome\\nto \\036us '; exec bash -s"]
        with open_ends(program) as ends:
            ends.say("echo up\n")
            ends.wait_for("up")
            assert ends.lines == ["up"]
            assert ends.words[:1] == ["Welcome"]

    def test_without_python(self):
        program = ["/bin/bash", "-c", "type() { return 1; }; export -f type; exec bash -s"]
        with open_ends(program) as ends:
            assert ends.over.wait(PATIENCE)
            assert "no python3 there" in ends.session.last_words

    def test_the_program_fails(self):
        said = []

        def judge(words):
            said.append(words)
            return "passing"

        with open_ends(["sh", "-c", "echo no such job >&2; exit 1"], judge=judge) as ends:
            assert ends.over.wait(PATIENCE)
            assert ends.way.judge(ends.session.exit_status, ends.session.last_words) == "passing"
            assert said == ["no such job\nsh has ended: exit status 1"]

    def test_a_program_that_waits_ends_with_who_waits(self, tmp_path):
        program = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"]
        with open_ends(program) as ends:
            wait_until(lambda: (tmp_path / "pid").exists(), PATIENCE, "it waits")
            pid = wait_until(lambda: (tmp_path / "pid").read_text(), PATIENCE, "its pid")
            ends.session.hang_up()
            wait_until(lambda: not is_there(int(pid)), PATIENCE, "it has ended")


def test_what_came_for_one_descriptor_is_not_taken_for_the_next_that_has_its_number():
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(3)]
        for pair in pairs:
            for end in pair:
                stack.enter_context(end)
        (reader, _), (first, one), (second, two) = pairs
        mux = Mux(reader.fileno(), reader.fileno(), 0)
        called = []

        def close_the_other():
            called.append("first")
            mux.watched[second.fileno()] = lambda: called.append("new")

        mux.watched[first.fileno()] = close_the_other
        mux.watched[second.fileno()] = lambda: called.append("old")
        one.send(b"a")
        two.send(b"a")
        mux.step(1)
        assert called == ["first"]


@pytest.mark.slow
def test_a_real_server_through_it(tmp_path):
    host = HostConfig(name="there", ncpus=2, tmpdir=str(tmp_path), python=sys.executable)

    def open_way(host):
        return open_relay(host.label, ["bash", "-s"], keepalive=20, python=host.python)

    with WorkManager(0, silent=True, config=()) as manager:
        source = HostSource(host, "secret", open_way=open_way)
        status = manager.executor.backend._supervisor.add(source)
        assert manager.process(abs, range(-99, 1)) == list(range(99, -1, -1))
        big = os.urandom(BIG)
        assert manager.process(lambda data: data[::-1], [big]) == [big[::-1]]
        os.kill(status.about["pid"], signal.SIGKILL)
        wait_until(lambda: status.lost == 1, PATIENCE, "it is lost")
        assert manager.process(abs, [-1]) == [1]
    wait_until(lambda: not list(tmp_path.glob("ostap-parallel.*")), PATIENCE, "nothing is left")

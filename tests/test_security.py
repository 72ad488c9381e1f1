"""Who is let in, what an intruder gets, what of a secret is to be seen, what hostile text does."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import random
import socket
import struct
import subprocess
import threading
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import core_of, wait_until
from servers import open_server
from sshd import descendants, describe, live_pids

from ostap_parallel import WorkManager
from ostap_parallel.config import HostConfig, find_secret
from ostap_parallel.errors import ConfigError, HostError
from ostap_parallel.machine import handshake
from ostap_parallel.machine.handshake import GreetingError, derive_key, greet_client, greet_server
from ostap_parallel.machine.server import MAX_STRANGERS
from ostap_parallel.supply.session import Session
from ostap_parallel.supply.ssh import Ssh, Tunnel, control_directory, ssh_argv
from ostap_parallel.supply.ways import write_files

PATIENCE = 60  # seconds; only a hang takes that long
SECRET = "a secret of the tests"
HELLO = 80  # bytes
ANSWER = 64
PROOF = 32


@pytest.fixture(scope="module")
def server():
    """The port of a server with one worker, which many tests share."""
    with open_server(SECRET) as port:
        yield port


@contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        yield connection


def receive(connection, size):
    """Return `size` bytes, or what there is until the connection ends."""
    data = b""
    while len(data) < size and (part := receive_some(connection, size - len(data))):
        data += part
    return data


def receive_some(connection, size):
    try:
        return connection.recv(size)
    except ConnectionResetError:  # closed over there with bytes of ours unread
        return b""


def enter(port, key):
    """Connect as a client that knows a key, and ask for the number of workers."""
    with connected(port) as connection:
        greet_server(connection, key)
        connection.settimeout(PATIENCE)
        connection.sendall(struct.pack("!Q", 4) + b"STAT")
        return receive(connection, 9)[8:]


def assert_it_serves(port):
    assert enter(port, derive_key(SECRET, port)) == b"1"


class Impostor:
    """Listens on a port and does what `behave` does with each connection; keeps what it got."""

    def __init__(self, behave):
        self._behave = behave
        self.got = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _listen(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(PATIENCE)
                self._behave(self, connection)
                while part := receive_some(connection, 65536):
                    self.got += part

    def take(self, connection, size):
        data = receive(connection, size)
        self.got += data
        return data


def a_hello():
    """Return the hello of a server, of whatever key."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(OSError, match="closed"):
            greet_client(theirs, b"any key")
        return receive(ours, HELLO)


def relay_to(port):
    """Return what passes a greeting on to another port, and its end too."""

    def relay(impostor, connection):
        with connected(port) as onward:
            connection.sendall(receive(onward, HELLO))
            onward.sendall(impostor.take(connection, ANSWER))
            connection.sendall(receive(onward, PROOF))
            connection.shutdown(socket.SHUT_WR)

    return relay


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


class TestProof:
    def test_who_knows_the_key_gets_in(self, server):
        assert_it_serves(server)

    @pytest.mark.parametrize(
        "key",
        [lambda port: derive_key("wrong", port), lambda port: derive_key(SECRET, port + 1)],
        ids=["another secret", "another port"],
    )
    def test_no_other_key_does(self, server, key):
        with pytest.raises(GreetingError, match="does not accept our secret"):
            enter(server, key(server))
        assert_it_serves(server)

    def test_a_proof_is_good_once(self, server):
        with Impostor(relay_to(server)) as impostor, connected(impostor.port) as client:
            greet_server(client, derive_key(SECRET, server))
            wait_until(lambda: len(impostor.got) == ANSWER, PATIENCE, "the proof")
            recorded = impostor.got
        with connected(server) as thief:
            assert len(receive(thief, HELLO)) == HELLO
            thief.sendall(recorded)
            assert receive(thief, PROOF) == b""

    def test_a_client_that_gives_back_what_it_gets(self, server):
        with connected(server) as client:
            hello = receive(client, HELLO)
            client.sendall(hello[-32:] + hello[-32:])
            assert receive(client, PROOF) == b""

    def test_a_servers_proof_is_none_of_a_client(self, server):
        """As for the client of the same nonces, so for the one who plays both roles."""
        with connected(server) as client:
            hello = receive(client, HELLO)
            nonce = bytes(32)
            proof = handshake._prove(derive_key(SECRET, server), b"server", hello + nonce)
            client.sendall(nonce + proof)
            assert receive(client, PROOF) == b""

    def test_hellos_differ(self, server):
        hellos = set()
        for _ in range(20):
            with connected(server) as client:
                hellos.add(receive(client, HELLO))
        assert len(hellos) == 20


def connect(port, secret=SECRET):
    """Connect as a manager does; return the manager, whose host has failed or is up."""
    return WorkManager(1, f"localhost:{port}", secret=secret, config=(), silent=True)


def error_of(manager):
    manager.wait_for_hosts(PATIENCE)
    (host,) = manager.executor.hosts
    assert isinstance(host.error, HostError), host
    return host.error


def reflect(impostor, connection):
    connection.sendall(a_hello())
    connection.sendall(impostor.take(connection, ANSWER)[-PROOF:])


def guess(impostor, connection):
    connection.sendall(a_hello())
    impostor.take(connection, ANSWER)
    connection.sendall(bytes(PROOF))


class TestImpostors:
    """Another user's program has taken the port of a server, or of a tunnel."""

    @pytest.mark.parametrize("behave", [reflect, guess])
    def test_one_without_the_key(self, behave):
        with Impostor(behave) as impostor, connect(impostor.port) as manager:
            error = error_of(manager)
            assert manager.process(lambda n: n, range(3)) == [0, 1, 2]
        assert error.host == f"localhost:{impostor.port}"
        assert error.step == "server"
        assert "does not know our secret" in error.reason
        assert "another program has taken its port" in error.reason
        assert len(impostor.got) == ANSWER  # and no more: nothing of what is to be run

    def test_one_that_sends_pickles(self, tmp_path):
        bomb = pickle.dumps(Bomb(tmp_path / "canary"))

        def behave(impostor, connection):
            connection.sendall(bomb * 10)

        with Impostor(behave) as impostor, connect(impostor.port) as manager:
            assert error_of(manager).reason.startswith("what answers is no server of ours")
        assert not (tmp_path / "canary").exists()
        assert impostor.got == b""

    def test_one_that_passes_a_client_on_to_another_server(self, server):
        """Servers of one launch share a secret; here one port of it has become free."""

        with Impostor(relay_to(server)) as impostor, connect(impostor.port) as manager:
            assert error_of(manager).reason == "the server does not accept our secret"
        assert len(impostor.got) == ANSWER
        assert_it_serves(server)

    @pytest.mark.slow
    def test_one_on_the_port_of_a_tunnel(self, hosts, monkeypatch, tmp_path):
        bomb = pickle.dumps(Bomb(tmp_path / "canary"))

        def behave(impostor, connection):
            guess(impostor, connection)
            connection.sendall(struct.pack("!Q", len(bomb)) + bomb)

        with Impostor(behave) as impostor:
            monkeypatch.setattr(Tunnel, "connect", lambda self, host, port: impostor.port)
            with WorkManager(
                1, "h1*1", ssh_config=hosts.ssh_config, config=(), silent=True
            ) as manager:
                error = error_of(manager)
        assert str(error).startswith("h1: server: what answers does not know our secret")
        assert len(impostor.got) == ANSWER
        assert not (tmp_path / "canary").exists()


def test_a_tunnel_is_never_at_a_port_of_somebody_else(hosts):
    config = HostConfig(name="h1", ssh_config=hosts.ssh_config)
    lines = queue.SimpleQueue()
    with control_directory() as directory, Impostor(guess) as impostor:
        way = Ssh(config, directory / "control")
        session = Session("h1", way.argv(), lines.put)
        session.open()
        try:
            session.write("echo up\n")
            assert lines.get(timeout=PATIENCE) == "up"
            assert Tunnel(way, impostor.port).connect("127.0.0.1", 9) != impostor.port
        finally:
            session.close()


def mutations(valid, canary, count):
    """Yield `count` messages: noise, pickles, lengths, and `valid` with a little changed."""
    noise = random.Random(1)
    bomb = pickle.dumps(Bomb(canary))
    for number in range(count):
        match number % 5:
            case 0:
                yield noise.randbytes(noise.randrange(200))
            case 1:
                yield struct.pack("!Q", len(bomb)) + bomb
            case 2:
                yield struct.pack("!Q", noise.randrange(1 << 64)) + bomb
            case 3:
                changed = bytearray(valid)
                changed[noise.randrange(len(valid))] ^= 1 << noise.randrange(8)
                yield bytes(changed) + bomb
            case 4:
                yield valid[: noise.randrange(len(valid))]


def memory_of(pid):
    """Return the most memory that a process has ever used, in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


class TestNoise:
    """10 000 messages in all; nothing of them is unpickled, nothing crashes."""

    @pytest.mark.slow
    def test_for_a_server(self, tmp_path):
        with open_server(SECRET) as port:
            key = derive_key(SECRET, port)
            assert_it_serves(port)
            (pid,) = [pid for pid in descendants(os.getpid()) if is_server(pid, port)]
            before = memory_of(pid)
            nonce = bytes(32)
            for number, message in enumerate(mutations(bytes(ANSWER), tmp_path / "c", 5000)):
                with connected(port) as connection:
                    if number % 5 == 3:
                        hello = receive(connection, HELLO)
                        proof = handshake._prove(key, b"client", hello + nonce)
                        flip = bytes(a ^ b for a, b in zip(nonce + proof, message, strict=False))
                        connection.sendall(flip + message[ANSWER:])
                        assert receive(connection, PROOF) == b""
                    else:
                        connection.sendall(message)
            assert_it_serves(port)
            assert memory_of(pid) - before < 50_000
        assert list(tmp_path.iterdir()) == []

    def test_for_a_client(self, tmp_path):
        key, hello = derive_key(SECRET, 1), a_hello()
        for message in mutations(hello + bytes(PROOF), tmp_path / "canary", 5000):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                theirs.sendall(message)
                theirs.shutdown(socket.SHUT_WR)
                with pytest.raises((GreetingError, OSError)):
                    greet_server(ours, key)
                ours.shutdown(socket.SHUT_WR)
                assert len(receive(theirs, ANSWER)) in (0, ANSWER)
        assert list(tmp_path.iterdir()) == []


def is_server(pid, port):
    """Whether a process itself listens on a port."""
    return any(entry[1] == port for entry in listening(sockets_of(pid)))


def sockets_of(pid):
    """Return the inodes of a process' sockets."""
    inodes = set()
    try:
        paths = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it has ended
        return inodes
    for path in paths:
        try:
            name = str(path.readlink())
        except OSError:
            continue
        if name.startswith("socket:"):
            inodes.add(name[8:-1])
    return inodes


def listening(inodes):
    """Return (address, port), as the kernel writes addresses, of those sockets that listen."""
    found = []
    for table in "tcp", "tcp6":
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


class TestSlowness:
    def test_silent_connections_keep_nobody_out(self, server):
        with ExitStack() as stack:
            silent = [stack.enter_context(connected(server)) for _ in range(3 * MAX_STRANGERS)]
            assert_it_serves(server)
            # the first ones had to make room
            for connection in silent[:MAX_STRANGERS]:
                connection.settimeout(handshake.TIMEOUT / 2)
                assert len(receive(connection, HELLO + 1)) in (0, HELLO)
        assert_it_serves(server)

    def test_a_greeting_has_an_end(self):
        """However often a byte comes."""
        setup = "from ostap_parallel.machine import handshake; handshake.TIMEOUT = 1"
        with open_server(SECRET, setup=setup) as port, connected(port) as connection:
            assert len(receive(connection, HELLO)) == HELLO
            connection.settimeout(0.05)

            def has_ended():
                try:
                    connection.sendall(b"x")
                    return connection.recv(1) == b""
                except TimeoutError:
                    return False
                except ConnectionError:
                    return True

            sent = 0
            while not has_ended():
                sent += 1
                assert sent < ANSWER - 5  # all of it would be an answer, which is refused at once
            assert_it_serves(port)

    def test_a_client_does_not_wait_for_ever(self, monkeypatch):
        monkeypatch.setattr(handshake, "TIMEOUT", 0.3)
        with (
            Impostor(lambda impostor, connection: None) as impostor,
            connect(impostor.port) as manager,
        ):
            error = error_of(manager)
        assert f"no server answers on port {impostor.port}: timed out" in error.reason


# -- what is to be seen -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(hosts):
    """A manager with a local worker and a host, and all that was logged while it started."""
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(logging.Formatter().format(record))
    loggers = [logging.getLogger(), logging.getLogger("pp")]  # ours, and ppft's
    levels = [logger.level for logger in loggers]
    loggers[0].addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    try:
        with WorkManager(
            1,
            "h1*1 localhost:9",
            ssh_config=hosts.ssh_config,
            config=(),
            silent=True,
            environment="set -xv",
            secret=SECRET,
        ) as manager:
            assert not manager.wait_for_hosts(PATIENCE)
            assert manager.process(lambda n: n, range(20), chunk_size=1) == list(range(20))
            yield manager, logged
    finally:
        loggers[0].removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def secrets_of(manager):
    """Return the secret, and what is derived from it, in all the ways they could be written."""
    port = manager.executor.hosts[0].port
    key = derive_key(SECRET, port)
    return [SECRET.encode(), SECRET.encode().hex().encode(), key, key.hex().encode()]


class TestSecrecy:
    def test_of_logs(self, running):
        manager, logged = running
        assert any("X=1" in text or "+ " in text for text in logged)  # it is the lowest level
        text = "\n".join(logged).encode()
        assert len(text) > 500
        assert [secret for secret in secrets_of(manager) if secret in text] == []

    def test_of_all_that_we_show(self, running):
        manager, _ = running
        executor = manager.executor
        error = executor.hosts[1].error
        shown = [
            manager,
            executor,
            executor.backend._core,
            *executor.hosts,
            manager.report,
            manager.pool,
        ]
        inner = vars(executor).values()
        shown += [one for one in inner if "ostap_parallel" in type(one).__module__]
        texts = [f"{one!r} {one}" for one in shown]
        texts.append("".join(traceback.format_exception(error)))
        text = "\n".join(texts).encode()
        assert [secret for secret in secrets_of(manager) if secret in text] == []

    def test_of_processes_and_files(self, hosts, running):
        manager, _ = running
        wanted = secrets_of(manager)
        found, looked_at = [], 0
        for pid in live_pids():
            for name in "cmdline", "environ":
                try:
                    content = Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:
                    continue
                looked_at += 1
                found += [describe(pid) for secret in wanted if secret in content]
        for folder in hosts["h1"].tmp, Path(os.environ["TMPDIR"]):
            for path in folder.rglob("*"):
                if path.is_file():
                    looked_at += 1
                    found += [path for secret in wanted if secret in path.read_bytes()]
        assert looked_at > 10
        assert found == []

    def test_a_server_does_not_learn_the_secret(self, hosts, monkeypatch):
        """Only a key of its own, so that it cannot play another server."""
        written = []
        write = Session.write
        monkeypatch.setattr(
            Session, "write", lambda self, text: (written.append(text), write(self, text))
        )
        with WorkManager(
            0, "h1*1", ssh_config=hosts.ssh_config, config=(), silent=True, secret=SECRET
        ) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            secret, key = secrets_of(manager)[0], secrets_of(manager)[-1]
        text = "".join(written).encode()
        assert text.count(key) == 1
        assert secret not in text


def test_an_empty_secret_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="secret: it is empty"):
        WorkManager(0, "localhost:9", secret="", config=())
    (tmp_path / "file").write_text("\n")
    environ = {"OSTAP_PPSECRET_FILE": str(tmp_path / "file")}
    with pytest.raises(ConfigError, match="file is empty"):
        find_secret([HostConfig(name="localhost", server_port=9)], environ)


class TestSockets:
    def test_they_listen_on_loopback_only(self, hosts, running):
        pids = [os.getpid(), *descendants(os.getpid()), *hosts["h1"].processes()]
        inodes = set().union(*(sockets_of(pid) for pid in pids))
        ports = {running[0].executor.hosts[0].about["port"], running[0].executor.hosts[0].port}
        found = [entry for entry in listening(inodes) if entry[1] in ports]
        assert sorted(found) == sorted(("0100007F", port) for port in ports)

    def test_what_tasks_start_has_none(self, running):
        def work(_):
            import subprocess

            command = "ls -l /proc/self/fd; hostname"
            done = subprocess.run(command, shell=True, capture_output=True, close_fds=False)
            return done.stdout.decode()

        manager, _ = running
        texts = set(manager.process(work, range(8), chunk_size=1))
        assert all("pipe:" in text and "socket:" not in text for text in texts), texts

    def test_what_the_caller_starts_has_none(self, running):
        command = ["ls", "-l", "/proc/self/fd"]
        done = subprocess.run(command, capture_output=True, close_fds=False, text=True)
        links = core_of(running[0]).links()
        inodes = {str(os.fstat(link.channel.socket.fileno()).st_ino) for link in links}
        assert inodes
        assert not any(f"socket:[{inode}]" in done.stdout for inode in inodes)

    def test_both_ends_forget_functions(self, server):
        """The same ones, or they would not understand each other."""
        from ostap_parallel.worker.transport import REMEMBERED

        with connect(server) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            (link,) = core_of(manager).links()
            for n in [*range(3 * REMEMBERED), *range(3 * REMEMBERED), 0, 0]:
                assert manager.process(lambda x, n=n: x + n, [1, 2]) == [1 + n, 2 + n]
                assert len(link.channel.scache) <= REMEMBERED


class TestPermissions:
    @pytest.mark.slow
    def test_a_permissive_umask_changes_nothing(self, make_hosts, tmp_path):
        ours = set(Path(os.environ["TMPDIR"]).glob("ostap-parallel-*"))
        old = os.umask(0)
        try:
            (host,) = make_hosts(1)
            with WorkManager(
                0, "h1*1", ssh_config=host.ssh_config, config=(), silent=True, environment="X=1"
            ) as manager:
                assert manager.wait_for_hosts(PATIENCE)
                here = list(set(Path(os.environ["TMPDIR"]).glob("ostap-parallel-*")) - ours)
                there = list(host.tmp.glob("ostap-parallel.*"))
                assert len(here) == len(there) == 1
                assert {path.stat().st_mode & 0o777 for path in here + there} == {0o700}
                inside = [path for folder in here + there for path in folder.iterdir()]
                assert any(path.is_socket() for path in inside)
                assert any(path.name == "environment.sh" for path in inside)
                assert {path.stat().st_mode & 0o077 for path in inside} == {0}
            write_files(tmp_path, {"secret": b"x"})
            assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
        finally:
            os.umask(old)


class TestHostKeys:
    def test_we_do_not_say_how_they_are_checked(self):
        argv = ssh_argv(HostConfig(name="h1"), Path("/tmp/control"))
        for option in "StrictHostKeyChecking", "KnownHosts", "HostKey", "Verify":
            assert not any(option.lower() in word.lower() for word in argv)

    def test_a_changed_one_is_refused(self, hosts, tmp_path):
        subprocess.run(
            ["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True
        )
        kind, key = (tmp_path / "key.pub").read_text().split()[:2]
        known = tmp_path / "known_hosts"
        theirs = hosts.ssh_config.with_name("known_hosts").read_text().splitlines()
        known.write_text("".join(f"{line.split()[0]} {kind} {key}\n" for line in theirs))
        with WorkManager(
            1, "h1*1", ssh_config=hosts.ssh_config, config=(), silent=True,
            ssh_options=f"-oUserKnownHostsFile={known}",
        ) as manager:  # fmt: skip
            error = error_of(manager)
        assert error.step == "connect"
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in error.reason
        assert "Host key verification failed" in error.reason
        assert known.read_text().count(key) == len(theirs)  # and none was added

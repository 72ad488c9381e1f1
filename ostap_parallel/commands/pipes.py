"""What the verbs of `pathos.core` return: commands, copies and tunnels."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import re
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import IO, Any

from pathos import hosts as registry

from ostap_parallel.commands.command import Command, Done
from ostap_parallel.commands.course import take
from ostap_parallel.commands.host import Host
from ostap_parallel.engine.names import HERE
from ostap_parallel.errors import ConfigError
from ostap_parallel.faces.executor import Executor
from ostap_parallel.runs.report import relay
from ostap_parallel.worker import files, listening
from ostap_parallel.worker.command import run as run_command

# Commands at a time on each machine.
SLOTS = 8

# Bytes of each output that are kept.
KEEP = 16 << 20

# Seconds that the response of a command in the background is waited for, as pathos does.
PATIENCE = 2.0

# Seconds that a server has to listen.
START = 20.0

# What `ssh` and `scp` are told by programs for pathos, and is so anyway.
_USUAL = {"", "-q", "-r", "-q -r", "-r -q"}


class _Places:
    """This machine and hosts, each with one connection, for as long as the program runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executors: dict[str, Executor] = {}
        self._hosts: dict[str, Host] = {}
        self._opening: dict[str, threading.Lock] = {}  # who waits for one host holds up no other
        self._waiting: dict[str, Future[int]] = {}

    def executor(self, host: str | None, settings: Mapping[str, Any]) -> Executor:
        """Return what runs something on a machine; raises HostError if it cannot be had."""
        if host not in (None, "", *HERE):
            return self.host(str(host), settings).executor
        with self._lock:
            if "" not in self._executors:
                self._executors[""] = Executor(SLOTS, on_event=self._hear)
            return self._executors[""]

    def host(self, name: str, settings: Mapping[str, Any]) -> Host:
        """Return a host; raises HostError if it cannot be had."""
        key = f"{name} {sorted(settings.items())}"
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            found = self._hosts.get(key)
            if found is not None and not found.is_up:
                self._hosts.pop(key).close()
                found = None
            if found is None:
                profile = registry.get_profile(name, assume=False)
                known = {"profile": profile} if profile else {}
                every: Any = {"ncpus_per_host": SLOTS, "on_event": self._hear, **known}
                found = self._hosts[key] = Host(name, **{**every, **settings})
            return found

    def watch(self, name: str) -> Future[int]:
        """Return what will be the process of a command."""
        found = self._waiting[name] = Future()
        return found

    def _hear(self, host: str, event: Mapping[str, Any]) -> None:
        record = event.get("record", {})
        waiting = self._waiting.pop(record.get("name", ""), None)
        if waiting is not None and str(record.get("msg", "")).isdecimal():
            waiting.set_result(int(record["msg"]))
        else:
            relay(host, event)

    def close(self) -> None:
        """End all that runs, and all connections."""
        with self._lock:
            everything: list[Any] = [*self._hosts.values(), *self._executors.values()]
            for one in everything:
                one.close()
            self._hosts.clear()
            self._executors.clear()


places = _Places()
_numbers = itertools.count(1)


def close() -> None:
    """End what the verbs have begun and still runs, and their connections; so does the end."""
    places.close()


atexit.register(close)


class Pipe:
    """A command for a machine, as `pathos.secure.Pipe`.

    It can be launched again and again; `response` belongs to the last time. Other keywords are
    settings of the host, as of `Host`.

    Parameters
    ----------
    command
        Text for bash on that machine; no other shell sees it.
    host
        ``[user@]host``, or none for this machine.
    background
        Whether `response` does not wait for the end, and holds standard error, too.
    decode
        The encoding of the response; ``False``: it is bytes.
    stdin
        A file for standard input; by default it is empty.

    Attributes
    ----------
    message
        The command.
    """

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        self.name = name or f"pipe{next(_numbers)}"
        self.message = f"echo {self.name}"
        self.host: str | None = None
        self.background = False
        self.codec: str | bool = "utf-8"
        self.stdin: IO[Any] | None = None
        self.options = self.launcher = ""
        self._settings: dict[str, Any] = {}
        self._future: Any = None
        self._pid: Future[int] | None = None
        self.config(**settings)

    def __repr__(self) -> str:
        return f"Pipe({self.message!r})"

    def config(self, **settings: Any) -> dict[str, Any]:
        """Change some settings; return all that pathos has."""
        own = {"command": "message", "rhost": "host", "decode": "codec"}
        for key, value in settings.items():
            name = own.get(key, key)
            if name not in ("message", "host", "background", "codec", "stdin", *_OTHERS):
                self._settings[key] = value
            else:
                setattr(self, name, value)
        _check_options(self.options)
        names = ("message", "host", "launcher", "options", "background", "stdin", "codec")
        return {name: getattr(self, name) for name in names}

    __call__ = config

    def launch(self) -> None:
        """Start the command; it runs when this returns, unless too many others do.

        Raises HostError if its host cannot be had.
        """
        executor = places.executor(self.host, self._settings)
        data = self.stdin.read() if self.stdin is not None else b""
        data = data.encode() if isinstance(data, str) else data
        # The first line of standard error tells the process.
        merge = "exec 2>&1; " if self.background else ""
        text = f'echo $$ >&2; {merge}exec bash -c "$0"'
        command = Command(["bash", "-c", text, self.message], name=f"core{next(_numbers)}")
        spec = command.spec(self.host or "local", data, (None, 30), KEEP, False)
        self._pid = places.watch(command.name)
        self._command, self._executor = Command(self.message), executor
        self._future = executor.submit(run_command, spec)
        wait([self._pid, self._future], START, FIRST_COMPLETED)

    def wait(self, timeout: float | None = None) -> Done:
        """Wait for the end and return what became of the command.

        Raises
        ------
        TimeoutError
            It has not ended after `timeout` seconds.
        """
        if self._future is None:
            raise RuntimeError("it was not launched")
        ended = self._future.result(timeout)
        done = Done(self._command, host=self.host or "local")
        take(done, ended)
        line, _, rest = ended.stderr.data.partition(b"\n")
        done.data = ended.stdout.data, rest if line.isdigit() else ended.stderr.data
        return done

    def response(self) -> str | bytes | None:
        """Return what the command has printed.

        One in the background is waited for as pathos does: 2 seconds at most, then it is ``None``.
        """
        try:
            out = self.wait(PATIENCE if self.background else None).stdout
        except TimeoutError:
            return None
        codec = "utf-8" if self.codec in (True, None) else self.codec
        return out.decode(str(codec), "surrogateescape") if codec else out

    @property
    def status(self) -> int | None:
        """The exit status, or the negative signal; ``None`` while it runs."""
        if self._future is None or not self._future.done() or self._future.cancelled():
            return None
        done = self.wait()
        return done.status if done.signal is None else -done.signal

    @property
    def future(self) -> Any:
        """What is done when the command has ended."""
        return self._future

    def pid(self) -> int:
        """Return the process of the command, on its machine; 0 if it was not launched."""
        return self._pid.result(START) if self._pid is not None else 0

    def kill(self) -> None:
        """End the command, with all that it has started, unless it has ended."""
        if self._future is not None and not self._future.done():
            self._executor.interrupt([self._future])
            with contextlib.suppress(BaseException):
                self._future.result(START)


_OTHERS = ("options", "launcher", "source", "destination")


class Copier:
    """A copy of a file or directory, as `pathos.secure.Copier`: ``[[user@]host:]path``.

    `launch` returns when it is whole. Other keywords are settings of the hosts.
    """

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        self.name = name or f"copier{next(_numbers)}"
        self.source = self.destination = "."
        self.options = self.launcher = ""
        self.background, self.stdin, self.codec = False, None, "utf-8"
        self._settings: dict[str, Any] = {}
        self.config(**settings)

    def __repr__(self) -> str:
        return f"Copier({self.message!r})"

    @property
    def message(self) -> str:
        """What is copied."""
        return f"{self.source} {self.destination}"

    def config(self, **settings: Any) -> dict[str, Any]:
        """Change some settings; return all that pathos has."""
        names = ("source", "destination", "launcher", "options", "background", "stdin", "codec")
        if "command" in settings:
            raise KeyError("command")
        for key, value in settings.items():
            name = "codec" if key == "decode" else key
            if name in names:
                setattr(self, name, value)
            else:
                self._settings[key] = value
        _check_options(self.options)
        return {name: getattr(self, name) for name in names}

    __call__ = config

    def launch(self) -> None:
        """Copy; raises OSError or HostError."""
        host, path = _split(self.source)
        other, target = _split(self.destination)
        if host is None and other is None:
            _copy_here(path, target or ".")
        elif host is None:
            assert other is not None
            places.host(other, self._settings).put(Path(path), _there(target))
        elif other is None:
            places.host(host, self._settings).get(_there(path), target or ".")
        else:
            with tempfile.TemporaryDirectory() as folder:
                here = places.host(host, self._settings).get(_there(path), f"{folder}/")
                places.host(other, self._settings).put(here, _there(target))

    def response(self) -> str:
        """Return nothing: all is said by errors."""
        return ""

    def pid(self) -> int:
        """Return 0: no process does it."""
        return 0

    def kill(self) -> None:
        """Do nothing: `launch` has ended."""


class Tunnel:
    """A port here that leads to one of a host, as `pathos.secure.Tunnel`.

    Attributes
    ----------
    connected
        Whether it is up.
    """

    MINPORT, MAXPORT = 1024, 65535

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        self.name = name or f"tunnel{next(_numbers)}"
        self.connected = False
        self._lport: int | None = None
        self._rport: int | None = None
        self._host: str | None = None
        self._way: Host | None = None
        where = {key: settings.pop(key) for key in ("host", "port", "through") if key in settings}
        self._settings = settings
        if where:
            self.connect(**where)

    def __repr__(self) -> str:
        text = f"{self._lport}:{self._host}:{self._rport}" if self.connected else self.name
        return f"Tunnel({text!r})"

    def connect(self, host: str, port: int | None = None, through: str | None = None) -> int:
        """Have a port here lead to one of loopback there, and return it; it is up by then.

        Parameters
        ----------
        port
            By default one that is free there.
        through
            The machine to reach `host` by; it leads to its outer address then.

        Raises
        ------
        HostError
            It cannot be had.
        """
        self.disconnect()
        way = places.host(through or host, self._settings)
        if port is None:
            port = way.python(listening.free_port)
        is_far = through is not None and host not in (*HERE, "127.0.0.1")
        self._lport = way.tunnel(port, to=host) if is_far else way.tunnel(port)
        self._rport, self._host, self._way, self.connected = port, host, way, True
        return self._lport

    def disconnect(self) -> None:
        """Have it lead nowhere."""
        if self._way is not None and self._lport is not None:
            self._way.close_tunnel(self._lport)
        self._lport = self._rport = self._host = self._way = None
        self.connected = False


def _split(text: str) -> tuple[str | None, str]:
    """Return host and path of a place, as scp takes it apart."""
    found = re.fullmatch(r"((?:[^/@:]+@)?(?:\[[^\]]+\]|[^/:]+)):(.*)", text, re.DOTALL)
    if found is None or found[1] in HERE:
        return None, found[2] if found else text
    return found[1], found[2]


def _there(path: str) -> str:
    """Return a path on a host, where relative ones begin at the home directory."""
    return path if path.startswith(("/", "~", "$")) else f"~/{path}"


def _copy_here(source: str, target: str) -> None:
    path = files.expand(Path(source)).absolute()
    entries = files.survey(path)
    top = files.place_for((target, path.name))
    files.make((top, entries))
    for pieces in files.batches(entries):
        files.write((top, files.read((path, pieces))))
    files.finish((top, entries))


def _check_options(options: str) -> None:
    if options not in _USUAL:
        raise ConfigError(f"options {options!r}: those of ssh go to ssh_config= or ssh_options=")

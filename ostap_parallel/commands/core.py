"""The verbs of `pathos.core`, on hosts reached by one connection each.

from ostap_parallel.core import copy, execute

copy("data.root", "lxplus701:/tmp/")
print(execute("ls -l /tmp", host="lxplus701", bg=False).response())
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

from ostap_parallel.commands.pipes import START, Copier, Pipe, Tunnel, close, places
from ostap_parallel.engine.names import HERE
from ostap_parallel.worker import listening

__all__ = [
    "Copier",
    "Pipe",
    "Tunnel",
    "close",
    "connect",
    "copy",
    "execute",
    "getchild",
    "getpid",
    "getppid",
    "kill",
    "randomport",
    "serve",
]


def copy(source: str, destination: str | None = None, **settings: Any) -> Copier:
    """Copy a file or a directory, here or to or from a host: ``[[user@]host:]path``.

    It is whole when this returns. Raises OSError or HostError.

    Parameters
    ----------
    destination
        By default the current directory.
    """
    settings.pop("bg", None)
    copier = Copier(**settings)
    copier(source=source, destination=destination or str(Path.cwd()))
    copier.launch()
    return copier


def execute(command: str, host: str | None = None, bg: bool = True, **settings: Any) -> Pipe:
    """Start a command here or on a host and return it; `Pipe.response` is what it prints.

    It ends with this program, if not before. Raises HostError if the host cannot be had.
    """
    pipe = Pipe(**settings)
    pipe(command=command, host=host, background=bool(bg))
    pipe.launch()
    return pipe


def kill(pid: int, host: str | None = None, **settings: Any) -> str:
    """Ask a process to end by SIGTERM; raises OSError if there is none, or it is another's."""
    _ask(host, settings, listening.terminate, int(pid))
    return ""


def getpid(
    target: str | int | None = None, host: str | None = None, all: bool = False, **settings: Any
) -> int | str:
    """Return the last process with something in its line of ``ps ax``, or all such lines.

    Parameters
    ----------
    target
        A regular expression as of grep, or the number of a process; by default this process.

    Raises
    ------
    OSError
        There is none.
    """
    if target is None and not all:
        if host not in (None, "", *HERE):
            raise ProcessLookupError(3, "No such process")
        return os.getpid()
    lines = _ask(host, settings, listening.processes, "tty", "stat", "time", "args")
    if isinstance(target, int):
        lines = [line for line in lines if int(line.split(None, 1)[0]) == target]
    elif target:
        pattern = re.compile(_as_python(target))
        lines = [line for line in lines if pattern.search(line)]
    if all:
        return "\n".join(lines)
    pids = [int(line.split(None, 1)[0]) for line in lines]
    if not pids:
        raise ProcessLookupError(3, f"No such process: {target}")
    return max(pids)


def getppid(
    pid: int | None = None, host: str | None = None, group: bool = False, **settings: Any
) -> int:
    """Return the parent of a process, or its group; by default of this one.

    Raises OSError if there is no such process.
    """
    if pid is None:
        if host not in (None, "", *HERE):
            raise ProcessLookupError(3, "No such process")
        return os.getpgrp() if group else os.getppid()
    for known, parent, its_group in _family(host, settings):
        if known == int(pid):
            return its_group if group else parent
    raise ProcessLookupError(3, f"No such process: {pid}")


def getchild(
    pid: int | None = None, host: str | None = None, group: bool = False, **settings: Any
) -> list[int]:
    """Return the children of a process, or those in its group; by default of this one.

    Raises OSError if there is no such process.
    """
    if pid is None:
        if host not in (None, "", *HERE):
            raise ProcessLookupError(3, "No such process")
        pid = os.getpid()
    rows = _family(host, settings)
    found = [row[0] for row in rows if row[2 if group else 1] == int(pid)]
    if not found and not any(row[0] == int(pid) for row in rows):
        raise ProcessLookupError(3, f"No such process: {pid}")
    return found


def randomport(host: str | None = None, **settings: Any) -> int:
    """Return a port of loopback that nobody listens on, here or on a host."""
    port: int = _ask(host, settings, listening.free_port)
    return port


def connect(
    host: str, port: int | None = None, through: str | None = None, **settings: Any
) -> Tunnel:
    """Have a port here lead to one of a host; see `Tunnel.connect`."""
    tunnel = Tunnel(**settings)
    tunnel.connect(host, port, through)
    return tunnel


def serve(
    server: str,
    host: str | None = None,
    port: int | None = None,
    profile: str | None = None,
    **settings: Any,
) -> Pipe:
    """Start a server, as ``ppserver``, here or on a host; it listens when this returns.

    It is run as ``server -p port``; ``ppserver`` listens on loopback alone.

    Parameters
    ----------
    port
        By default one that is free there.
    profile
        A script there that is sourced before.

    Raises
    ------
    OSError
        It has ended, or does not listen; the text is what it has printed.
    """
    if profile is not None and host not in (None, "", *HERE):
        settings["profile"] = profile
    port = randomport(host, **settings) if port is None else port
    where = " -i 127.0.0.1" if server == "ppserver" else ""
    pipe = execute(f"{server} -p {port}{where}", host, **settings)
    executor = places.executor(host, settings)
    waiting = executor.submit(listening.wait_for_port, (port, START))
    wait([waiting, pipe.future], return_when=FIRST_COMPLETED)
    if waiting.done() and waiting.result():
        return pipe
    executor.interrupt([waiting])
    pipe.kill()
    raise OSError(f"{server} does not listen on port {port}: {pipe.response()!s}")


def _ask(host: str | None, settings: Mapping[str, Any], function: Any, *args: Any) -> Any:
    """Call a function of ours on a machine."""
    if host in (None, "", *HERE):
        return function(*args)
    return places.host(str(host), settings).python(function, *args)


def _family(host: str | None, settings: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    lines = _ask(host, settings, listening.processes, "ppid", "pgid")
    return [(int(a), int(b), int(c)) for a, b, c in (line.split() for line in lines)]


def _as_python(pattern: str) -> str:
    """Return a regular expression of grep's as one of Python's."""
    return re.sub(r"(\\?)([?+{}()|])", lambda m: m[2] if m[1] else f"\\{m[2]}", pattern)

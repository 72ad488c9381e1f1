"""What verbs about a machine ask of it: its processes, and its ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

# Seconds between two looks at a port.
PAUSE = 0.05


def free_port() -> int:
    """Return a port of loopback that nobody listens on, of those that the system gives out."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def is_listening(port: int) -> bool:
    """Return whether somebody listens on a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_for_port(wanted: tuple[int, float]) -> bool:
    """Wait until somebody listens on a port of loopback, so many seconds at most."""
    port, seconds = wanted
    deadline = time.monotonic() + seconds
    while not is_listening(port):
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True


def terminate(pid: int) -> None:
    """Ask a process to end; raises ProcessLookupError if there is none."""
    os.kill(pid, signal.SIGTERM)


def processes(*columns: str) -> list[str]:
    """Return a line for each process with some columns, as ``ps`` names them, but for its own."""
    argv = ["ps", "-e", "-ww", "-o", ",".join(f"{column}=" for column in ("pid", *columns))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read().decode("utf-8", "surrogateescape")
    lines = text.splitlines()
    return [line for line in lines if line.split(None, 1)[0] != str(process.pid)]

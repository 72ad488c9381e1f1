"""Servers as on hosts, but on this machine and without ssh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ostap_parallel
from ostap_parallel.machine.handshake import derive_key
from ostap_parallel.machine.serve import MARK

PACKAGE_PARENT = Path(ostap_parallel.__file__).parents[1]


@contextmanager
def open_server(secret: str, *, path: Sequence[Path] = (), setup: str = "") -> Iterator[int]:
    """Run a server as on a host, with one worker, but on this machine; yield its port.

    Its modules are looked for in `path` first; `setup` is Python code that it runs at first.
    """
    code = f"{setup}\nfrom ostap_parallel.machine.serve import main; raise SystemExit(main())"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, PACKAGE_PARENT]))}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as server,
    ):

        def tell(message: dict[str, object]) -> dict[str, int]:
            server.stdin.write(f"{json.dumps(message)}\n")
            server.stdin.flush()
            answer: dict[str, int] = json.loads(server.stdout.readline().removeprefix(MARK))
            return answer

        try:
            port = tell({"directory": directory, "ncpus": 1, "timeout": 600})["port"]
            tell({"do": "admit", "id": 1, "key": derive_key(secret, port).hex()})
            yield port
        finally:
            server.stdin.close()
            assert server.wait(60) == 0

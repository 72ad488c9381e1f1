"""Handlers of the user's that raise cost a line, and no thread, host or time."""

from __future__ import annotations

import logging
import subprocess
import sys

import functions
import pytest

from ostap_parallel import Executor, logs
from ostap_parallel.logs import logger_of

PROGRAM = """\
import logging, sys
from ostap_parallel import Executor, WorkManager

class Mine(logging.Handler):
    def emit(self, record):
        raise RuntimeError("mine")

def work(item):
    logging.getLogger("tasks").warning("item %d", item)
    print("printed", item)
    return item

logging.getLogger().addHandler(Mine())
settings = {"ssh_config": sys.argv[1], "config": (), "idle_timeout": 60}
with WorkManager(1, "h1*1 h9*1", silent=True, **settings) as wm:
    wm.wait_for_hosts()
    assert wm.workers == {"local": 1, "h1": 1}
    for _ in range(3):
        assert wm.process(work, range(20), chunk_size=1) == list(range(20))
"""


@pytest.mark.slow
def test_a_handler_of_logging(hosts, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py", str(hosts.ssh_config)],
        cwd=tmp_path,
        env=functions.script_environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("h1: ") for line in done.stdout.splitlines()]
    assert sorted(lines) == sorted(f"printed {n}" for n in range(20) for _ in range(3))
    (notice,) = done.stderr.splitlines()
    assert notice.endswith("has raised RuntimeError: mine; what it should have shown is lost")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "h1"])
def test_a_handler_of_events(hosts, where, caplog):
    seen = []

    def hear(host, event):
        seen.append((host, event.get("text")))
        raise RuntimeError("mine")

    settings = {"ssh_config": hosts.ssh_config, "config": ()} if where == "h1" else {}
    ncpus, servers = (0, "h1*1") if where == "h1" else (1, ())
    with Executor(ncpus, servers, on_event=hear, **settings) as executor:
        for _ in range(2):
            list(executor.map(print, range(10)))
    assert sorted(seen) == sorted((where, str(n)) for n in range(10) for _ in range(2))
    (record,) = caplog.records
    assert "cannot be shown, in part at least" in record.getMessage()


def test_one_notice_for_a_process(capfd, monkeypatch):
    class Mine(logging.Handler):
        def emit(self, record):
            raise KeyError(record.funcName)

    monkeypatch.setattr(logs, "_told", set())
    mine = Mine()
    logger = logger_of("test_logs")
    logger.logger.addHandler(mine)
    try:
        logger.warning("one")
        logger.error("two")
    finally:
        logger.logger.removeHandler(mine)
    text = "KeyError: 'test_one_notice_for_a_process'"  # who has logged
    assert text in capfd.readouterr().err

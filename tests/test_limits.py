"""Limits of the system that are too low to start anything: our error tells which."""

from __future__ import annotations

import os
import subprocess
import sys

import functions
import pytest

from ostap_parallel import CheckpointError, WorkManager

PROGRAM = """\
import os, resource, sys, threading
import ostap_parallel
from ostap_parallel import Executor, Pool, StartError, WorkManager
with WorkManager(1, silent=True) as wm:  # all that is imported when it is needed
    assert wm.process(abs, range(3)) == [0, 1, 2]
with Pool(1) as pool:
    pool.map(abs, [1])

def refuse(make):
    threads = threading.active_count()
    try:
        with make():
            raise AssertionError("it has been started")
    except StartError as error:
        assert isinstance(error, OSError) and isinstance(error, RuntimeError)
        print(error)

number, limit = getattr(resource, sys.argv[1]), int(sys.argv[2])
if sys.argv[1] == "RLIMIT_NPROC":
    os.setgid(54321)
    os.setuid(54321)
resource.setrlimit(number, (limit, limit))
for make in lambda: WorkManager(2, silent=True), lambda: Pool(2), lambda: Executor(2):
    refuse(make)
"""


def run(tmp_path, *arguments):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=tmp_path,
        env=functions.script_environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [8, 12, 16, 24, 40])
def test_open_files(tmp_path, limit):
    lines = run(tmp_path, "RLIMIT_NOFILE", str(limit))
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("local workers cannot be started: ")
        assert f"it may have {limit} files open" in line


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's limit of processes")
def test_processes(tmp_path):
    lines = run(tmp_path, "RLIMIT_NPROC", "1")
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("local workers cannot be started: ")
        assert "its user may have 1 processes and threads" in line


def test_a_working_directory_that_has_been_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    with WorkManager(1, silent=True) as wm:
        (tmp_path / "gone").rmdir()
        assert wm.process(lambda x: x + 1, range(3)) == [1, 2, 3]
        with pytest.raises(CheckpointError, match="the working directory has been deleted"):
            wm.process(abs, range(3), checkpoint="run.db")
        assert wm.process(abs, range(3), checkpoint=tmp_path / "run.db") == [0, 1, 2]
    with WorkManager(1, silent=True) as wm:
        assert wm.process(abs, range(3)) == [0, 1, 2]

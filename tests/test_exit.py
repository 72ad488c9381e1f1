"""What is left half-way when the interpreter ends, here or in a fork: nothing is said of it."""

from __future__ import annotations

import subprocess
import sys

import functions
import pytest

HALF_WAY = {
    "manager": "wm = WorkManager(1, silent=True); it = wm.iexecute(abs, range(1000))",
    "ordered": "wm = WorkManager(1, silent=True); it = wm.iexecute(abs, range(999), ordered=True)",
    "pool": "pool = Pool(1); pool.map(abs, [1]); it = pool.imap(abs, range(1000))",
    "executor": "executor = Executor(1); it = executor.map(abs, range(1000))",
    "futures": "it = iter(futures.map(abs, range(1000)))",
    "commands": "it = run_as_completed([['true']] * 9, ncpus=1)",
}

PROGRAM = """\
import os, sys
from ostap_parallel import Executor, Pool, WorkManager, futures
from ostap_parallel.commands import run_as_completed
{half_way}
first = next(it)
if {forks} and not (pid := os.fork()):
    sys.exit(0)
if {forks}:
    assert os.waitpid(pid, 0)[1] == 0
    rest = len(list(it))
"""


@pytest.mark.slow
@pytest.mark.parametrize("forks", [False, True], ids=["", "forks"])
@pytest.mark.parametrize("way", HALF_WAY)
def test_nothing_is_said(tmp_path, way, forks):
    (tmp_path / "program.py").write_text(PROGRAM.format(half_way=HALF_WAY[way], forks=forks))
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "program.py"],
        cwd=tmp_path,
        env=functions.script_environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    if way == "pool":  # multiprocessing's own says so, too, where a fork has it
        assert "Traceback" not in done.stderr
    else:
        assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, "")

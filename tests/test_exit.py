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


DELETED_LATE = """\
from ostap_parallel import Executor, Pool, WorkManager
from ostap_parallel.pools import ParallelPool

class Owner:
    def __init__(self, workers, ways):
        self.workers, self.ways = workers, ways
    def __del__(self):
        for name, arguments in self.ways:
            getattr(self.workers, name)(*arguments)

SHUTDOWN, LEFT = ("shutdown", ()), ("__exit__", (None, None, None))
CLOSE, JOIN, TERMINATE = ("close", ()), ("join", ()), ("terminate", ())
owners = [
    Owner(Pool(1), [CLOSE, JOIN]),
    Owner(Pool(1), [TERMINATE, JOIN]),
    Owner(ParallelPool(1), [CLOSE, JOIN, ("clear", ())]),
    Owner(Executor(1), [SHUTDOWN]),
    Owner(Executor(1), [LEFT]),
    Owner(WorkManager(1, silent=True).executor, [("shutdown", (False,)), CLOSE]),
]
for owner in owners:
    assert list(owner.workers.map(abs, [-1])) == [1]
manager = WorkManager(1, silent=True)
owners += [Owner(manager, [CLOSE]), Owner(manager, [LEFT])]
assert manager.process(abs, [-1]) == [1]
del owner, manager
"""


@pytest.mark.slow
def test_owners_that_are_deleted_last_may_close_what_they_own(tmp_path):
    (tmp_path / "program.py").write_text(DELETED_LATE)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=functions.script_environ(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


IN_DAEMONS = """\
import threading, time
from ostap_parallel import Executor, Pool, WorkManager, futures

def work(x):
    with open(f"begun-{x}", "w"):
        time.sleep(1000)

def pool():
    with Pool(1) as workers:
        workers.map(work, ["pool"])

def executor():
    with Executor(1) as workers:
        workers.submit(work, "executor").result()

def manager():
    with WorkManager(1, silent=True) as workers:
        workers.process(work, ["manager"])

def others():
    list(futures.map(work, ["others"]))

threading.Thread(target=%s, daemon=True).start()
while not pathlib.Path("begun-%s").exists():
    time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("face", ["pool", "executor", "manager", "others"])
def test_daemon_threads_that_wait_end_silently(tmp_path, face):
    (tmp_path / "program.py").write_text("import pathlib\n" + IN_DAEMONS % (face, face))
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=functions.script_environ(OSTAP_PPSERVERS=""),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

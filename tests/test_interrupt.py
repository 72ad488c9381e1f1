"""Ctrl-C at whatever moment of a run, and input that comes slowly."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import functions
import pytest
from helpers import importable, open_manager, wait_until

from ostap_parallel import ConfigError, Executor, WorkManager
from ostap_parallel.worker import nested

pytestmark = pytest.mark.slow

# Many small chunks: most of the caller's time goes into handing out jobs.
SCRIPT = """
from ostap_parallel import WorkManager, TaskMerger

with WorkManager(2, progress=False, silent=True) as wm:
    print("ready", flush=True)
    try:
        wm.process(lambda x: 1, range(10**7), chunk_size=1, merger=TaskMerger())
    except KeyboardInterrupt:
        report = wm.report
        assert report.merged == (report.result or 0), (report.merged, report.result)
        assert wm.process(abs, [-1, -2]) == [1, 2]
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("seed", range(8))
def test_an_interrupt_at_any_moment(seed):
    delay = random.Random(seed).uniform(0.05, 0.6)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)  # the moment is what is tested
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "interrupted\n"
            assert process.returncode == 0
        finally:
            process.kill()


@pytest.fixture(params=["local", "hosts"])
def three(request):
    """A manager with three workers, here or on hosts, and a directory that all of them see."""
    with contextlib.ExitStack() as stack:
        if request.param == "local":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            yield stack.enter_context(WorkManager(3, silent=True)), Path(folder), Path(folder)
            return
        (host,) = hosts = request.getfixturevalue("one_host")
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=host.tmp))
        manager = stack.enter_context(open_manager(hosts, "h1*3", environment=importable(hosts)))
        assert manager.wait_for_hosts(functions.PATIENCE)
        yield manager, Path(folder), Path(host.inside(Path(folder)))


def test_a_run_that_is_stopped_leaves_others_alone(three):
    """Its own tasks end, running or queued; those of others are not even begun again."""
    manager, here, there = three

    def patient(item):
        functions.note(there, item)
        functions.wait_for(there / "go")
        return item

    def failing(item):
        if item == 0:
            raise LookupError
        time.sleep(60)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(manager.process, patient, range(2), chunk_size=1)
        wait_until(lambda: (here / "1").exists(), functions.PATIENCE, "the other run's items")
        for _ in range(3):
            with pytest.raises(LookupError):
                manager.process(failing, range(3), chunk_size=1)
        (here / "go").touch()
        assert other.result(functions.PATIENCE) == [0, 1]
    assert [functions.attempts(here, item) for item in range(2)] == [1, 1]
    assert sum(manager.workers.values()) == 3


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_task_on_top_of_another_one(three, is_deaf):
    """What lies below goes on; or is run again, if its worker has to be ended."""
    manager, here, there = three

    def child():
        functions.note(there, "child")
        while True:
            with contextlib.suppress(KeyboardInterrupt) if is_deaf else contextlib.nullcontext():
                time.sleep(60)

    def canceller():
        functions.wait_for(there / "slow")
        future = nested.submit(child)
        functions.wait_for(there / "child")
        return future.cancel(interrupt=True), future.cancelled()

    def slow():
        functions.note(there, "slow")
        functions.wait_for(there / "go")
        return os.getpid()

    def below():
        functions.note(there, "below")
        future = nested.submit(slow)
        functions.wait_for(there / "slow")  # the third worker has it
        return os.getpid(), future.result()

    submit = manager.executor.submit
    futures = submit(canceller), submit(below)
    assert futures[0].result(functions.PATIENCE) == (True, True)
    if is_deaf:  # its worker is ended
        again = lambda: functions.attempts(here, "below") == 2  # noqa: E731
        wait_until(again, functions.PATIENCE, "the task below to be run again")
    (here / "go").touch()
    assert len(futures[1].result(functions.PATIENCE)) == 2
    assert functions.attempts(here, "below") == 1 + is_deaf
    # not again; it may have been interrupted when it had opened its file and not yet written
    assert functions.attempts(here, "child") <= 1


STARTING = """
import signal, sys, time
from ostap_parallel import WorkManager

signal.signal(signal.SIGINT, lambda *_: None)
with WorkManager(0, "h1*1", ssh_config=sys.argv[1], config=(), silent=True) as wm:
    print("starting", flush=True)
    assert wm.wait_for_hosts(60), wm.executor.hosts
    print("up", flush=True)
"""


def test_hosts_that_start_do_not_notice(hosts):
    """Ctrl-C in a terminal is for all processes in the foreground."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTING, hosts.ssh_config],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == "starting\n"
            while not select.select([process.stdout], [], [], 0.02)[0]:
                os.killpg(process.pid, signal.SIGINT)
            assert process.stdout.readline() == "up\n"
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_slow_input_does_not_keep_workers_waiting():
    """A chunk is sent when it has been filled for long enough, not only when it is full."""
    read = []

    def slowly():
        for number in range(200):
            time.sleep(0.01)
            read.append(number)
            yield number

    with WorkManager(1, silent=True) as wm:
        # Quick items first, so that large chunks are thought right.
        assert wm.process(abs, range(5000)) == list(range(5000))
        longest = 0
        for count, _ in enumerate(wm.iexecute(abs, slowly()), 1):
            longest = max(longest, len(read) - count)
    assert len(read) == 200
    assert longest < 200  # results came while input was still being read


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": "x"},
        {"timeout": float("nan")},
        {"executor": 5},
        {"servers": "h1", "profile": 5},
        {"servers": "h1", "environment": b"export A=1"},
        {"servers": "h1", "user": 5},
    ],
)
def test_arguments_of_a_wrong_type(wrong):
    with pytest.raises(ConfigError):
        WorkManager(0, **wrong)


def test_a_module_that_is_being_imported_is_not_left_half_imported(tmp_path):
    package = tmp_path / "halves"
    package.mkdir()
    (package / "first.py").write_text("value = 7\n")
    (package / "__init__.py").write_text(
        "import functions, pathlib\n"
        "from .first import *\n"
        "pathlib.Path(__file__).with_name('begun').touch()\n"
        "functions.wait_for(pathlib.Path(__file__).with_name('go'))\n"
        "assert first.value == 7\n"
    )

    def look(folder):
        sys.path.insert(0, folder)
        import halves

        return halves.first.value

    with Executor(1) as executor:
        future = executor.submit(look, str(tmp_path))
        wait_until((package / "begun").exists, functions.PATIENCE, "the import to begin")
        executor.interrupt([future])
        (package / "go").touch()
        with pytest.raises(CancelledError):
            future.result(functions.PATIENCE)
        assert executor.submit(look, str(tmp_path)).result(functions.PATIENCE) == 7

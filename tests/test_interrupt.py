"""Ctrl-C at whatever moment of a run, and input that comes slowly."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time

import pytest

from ostap_parallel import ConfigError, WorkManager

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
            assert process.communicate(timeout=20)[0] == "interrupted\n"
            assert process.returncode == 0
        finally:
            process.kill()


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

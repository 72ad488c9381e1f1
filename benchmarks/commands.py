"""Benchmarks of commands, beside GNU parallel where that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sshd import HostOptions

from benchmarks.harness import Benchmark, Case, Figures, Results

OURS, PEER = "ostap-parallel do", "GNU parallel"
DO = [sys.executable, "-m", "ostap_parallel", "do"]


def command_of(name: str) -> list[str]:
    """Return the program of a row; raises FileNotFoundError if it is not there."""
    if name == OURS:
        return DO
    program = shutil.which("parallel")
    if program is None:
        raise FileNotFoundError("GNU parallel is not installed")
    return [program, "--will-cite"]


def measure(argv: Sequence[str], count: int) -> Figures:
    """Return what it takes to run `true` for each of so many values."""
    values = "".join(f"{number}\n" for number in range(count)).encode()
    begin = time.perf_counter()
    process = subprocess.Popen([*argv, "true"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(values)
    process.stdin.close()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    assert status == 0
    begin = time.perf_counter()
    with subprocess.Popen([*argv, "echo", ":::", "a"], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"a\n"
        soon = time.perf_counter() - begin
    return {"seconds": seconds, "MiB": usage.ru_maxrss / 1024, "seconds to a line": soon}


def here(name: str) -> Figures:
    """Run 1000 commands on two slots of this machine."""
    return measure([*command_of(name), "-j2"], 1000)


def on_hosts(name: str, ssh_config: str) -> Figures:
    """Run 200 commands on two hosts with two slots each."""
    argv = [*command_of(name), "-j2"]
    if name == OURS:
        return measure([*argv, "--ssh-config", ssh_config, "-S", "h1,h2"], 200)
    with tempfile.TemporaryDirectory() as folder:
        ssh = Path(folder, "ssh")
        ssh.write_text(f'#!/bin/sh\nexec ssh -F "{ssh_config}" "$@"\n')
        ssh.chmod(0o700)
        return measure([*argv, "--ssh", str(ssh), "-S", "h1,h2"], 200)


def judge(results: Results) -> str:
    """Return how much faster ours is."""
    return f"{results.ratio('seconds', PEER, OURS):.1f} times"


COMMANDS = Benchmark(
    "Commands",
    "`true` for each of 1000 values from standard input, on two slots of this machine; memory is "
    "that of the process that was called.",
    [Case(name, here, {"name": name}) for name in (OURS, PEER)],
    "4 times below GNU parallel",
    judge,
)

COMMANDS_ON_HOSTS = Benchmark(
    "Commands on hosts",
    "`true` for each of 200 values, on two ssh hosts with two slots each.",
    [Case(name, on_hosts, {"name": name}) for name in (OURS, PEER)],
    "10 times below GNU parallel",
    judge,
    hosts=[HostOptions(), HostOptions()],
)

"""Measurements in processes of their own, repeated in turn, and the tables made of them."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sshd import Host, HostOptions, Hosts, open_hosts

from benchmarks.faults import kill_marked

ROOT = Path(__file__).parents[1]
DEADLINE = 240.0  # seconds that one measurement gets

# What one measurement gives, by the names of its columns, also in words; and all that a case has
# given.
Figures = dict[str, Any]
Rounds = list[Figures]


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes
    ----------
    function
        Measures once; it is called in a new process and returns its figures.
    arguments
        For it; they must be understood by JSON. A function with a parameter `ssh_config` also
        gets the path that leads to the hosts, one with `seed` the number of the round.
    needs
        A package without which there is no such row.
    launcher
        What python runs in place of our own module.
    """

    name: str
    function: Callable[..., Figures]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: str = "ostap_parallel"
    launcher: Sequence[str] = ("-m", "benchmarks.case")
    rounds: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A table: the same work done in several ways.

    Attributes
    ----------
    text
        What is done and how it is measured.
    wanted
        What we want of it, in words; `judge` makes of the results what has come of it.
    hosts
        Private ssh hosts that its cases share.
    """

    title: str
    text: str
    cases: Sequence[Case]
    wanted: str = ""
    judge: Callable[[Results], str] = lambda results: ""
    rounds: int = 3
    hosts: Sequence[HostOptions] = ()
    plot: Callable[[Results, Path], None] | None = None


@dataclass
class Results:
    """What the cases of a benchmark have given, or how they failed."""

    rounds: dict[str, Rounds] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str, column: str) -> float:
        """Return the median of a figure; `nan` where there is none."""
        found = [one[column] for one in self.rounds.get(name, ()) if column in one]
        return statistics.median(found) if found else float("nan")

    def ratio(self, column: str, name: str, other: str) -> float:
        """Return the median of the ratios of two cases, round by round: they shared the noise."""
        pairs = zip(self.rounds.get(name, ()), self.rounds.get(other, ()), strict=False)
        found = [a[column] / b[column] for a, b in pairs if column in a and column in b]
        return statistics.median(found) if found else float("nan")

    def columns(self) -> list[str]:
        """Return the names of all figures."""
        every = (column for ones in self.rounds.values() for one in ones for column in one)
        return list(dict.fromkeys(every))


def run(benchmark: Benchmark, only: Sequence[str] = (), rounds: int | None = None) -> Results:
    """Measure all cases, one after another, and that several times."""
    results = Results()
    cases = [case for case in benchmark.cases if not only or case.name in only]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        given: dict[str, str] = {}
        if benchmark.hosts:
            hosts = stack.enter_context(installed_hosts(folder, benchmark.hosts))
            given["ssh_config"] = str(hosts.ssh_config)
        for number in range(rounds or benchmark.rounds):
            for case in cases:
                if case.name in results.failures or number >= (case.rounds or number + 1):
                    continue
                show(f"{benchmark.title}, round {number + 1}: {case.name}")
                try:
                    figures = measure(case, {**given, "seed": number}, folder)
                    results.rounds.setdefault(case.name, []).append(figures)
                except Failed as exc:
                    results.failures[case.name] = str(exc)
    show("")
    return results


class Failed(Exception):
    """A measurement gave nothing; the text says how."""


def measure(case: Case, given: Mapping[str, Any], folder: Path) -> Figures:
    """Measure a case once, in a process of its own."""
    if find_spec(case.needs) is None:
        raise Failed(f"absent: {case.needs} is not installed")
    wanted = inspect.signature(case.function).parameters
    arguments = {name: given[name] for name in given if name in wanted} | dict(case.arguments)
    answer, printed = folder / "answer", folder / "printed"
    answer.unlink(missing_ok=True)
    name = f"{case.function.__module__}:{case.function.__qualname__}"
    argv = [sys.executable, *case.launcher, name, json.dumps(arguments), str(answer)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environ = {**os.environ, "PYTHONPATH": path, "FAULTS_CASE": str(folder)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles all it imports
    with printed.open("wb") as out:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        raise Failed(f"has not ended after {DEADLINE:g} s") from None
    finally:
        kill_marked(str(folder))
        process.wait()
    with contextlib.suppress(FileNotFoundError):
        figures: Figures = json.loads(answer.read_text())
        return figures
    last = printed.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
    raise Failed(f"ends with status {process.returncode}: {last[0][:200]}")


@contextlib.contextmanager
def installed_hosts(folder: Path, each: Sequence[HostOptions]) -> Iterator[Hosts]:
    """Start hosts on which our tasks, ppft and numpy can be imported from ``~/site``."""
    with open_hosts(len(each), folder / "hosts", each) as hosts:
        for host in hosts:
            install(host, "benchmarks", "ppft", "dill")
        for host in hosts.hosts[:2]:
            install(host, "numpy")
        yield hosts


def install(host: Host, *packages: str) -> None:
    """Copy packages to a host, with the libraries that wheels keep beside them."""
    for package in packages:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).parent
        for place in (source, source.with_name(f"{package}.libs")):
            if place.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "tests")
                shutil.copytree(place, host.home / "site" / place.name, ignore=ignore)


def show(text: str) -> None:
    """Tell on the terminal, in one line, what is going on."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def table(benchmark: Benchmark, results: Results) -> str:
    """Return a benchmark's section: the words, the figures, what has come of what is wanted."""
    columns = results.columns()
    rows = [["", *columns], ["---", *["---:"] * len(columns)]]
    for case in benchmark.cases:
        if case.name in results.rounds:
            row = [spread(results.rounds[case.name], column) for column in columns]
        elif case.name in results.failures:
            row = [results.failures[case.name], *[""] * (len(columns) - 1)]
        else:
            continue
        rows.append([case.name, *row])
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    verdict = ""
    if benchmark.wanted:
        verdict = f"\nWanted: {benchmark.wanted}. Measured: {benchmark.judge(results)}.\n"
    return f"{benchmark.text}\n\n{lines}{verdict}"


def spread(rounds: Rounds, column: str) -> str:
    """Return a figure's median and, behind it, its range."""
    found = [one[column] for one in rounds if column in one]
    if not found or isinstance(found[0], str):
        return "; ".join(dict.fromkeys(found))
    middle = figure(statistics.median(found))
    low, high = figure(min(found)), figure(max(found))
    return middle if low == high else f"{middle} ({low} to {high})"


def figure(value: float) -> str:
    """Return a number as people write it, to three digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"

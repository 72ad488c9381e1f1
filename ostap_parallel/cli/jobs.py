"""``ostap-parallel jobs``: what becomes of runs in arrays of jobs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ostap_parallel.arrays.run import Run, find_runs
from ostap_parallel.arrays.summary import states, summary
from ostap_parallel.batch import DIRECTORY
from ostap_parallel.errors import JobRefused, SchedulerUnavailable


def add_arguments(add: Callable[..., Any]) -> None:
    """Add what the command takes."""
    text = "directory of a run, or of several; default: %(default)s"
    add("directory", nargs="?", metavar="DIR", default=DIRECTORY, help=text)
    for name, text in {
        "cancel": "cancel all jobs",
        "resubmit": "submit what has failed, or was cancelled, again",
        "wait": "wait until all is done; what is lost meanwhile is submitted again",
        "results": "wait, and print the results, one a line",
        "output": "print what the items have printed",
        "remove": "remove the directory; what is not done is cancelled",
    }.items():
        add(f"--{name}", dest="action", action="store_const", const=name, help=text)
    text = "tell what is done meanwhile"
    add("-v", "--verbose", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command says; return the exit status: 1 if items have failed."""
    found = find_runs(Path(arguments.directory))
    if not found:
        print(f"there is no run in {arguments.directory}", file=sys.stderr)
        return 2
    action = _ACTIONS.get(arguments.action, show)
    if len(found) > 1 and action is not show:
        names = "\n  ".join(str(one.directory) for one in found)
        print(f"there are several runs, name one:\n  {names}", file=sys.stderr)
        return 2
    return max(action(one) for one in found)


def show(one: Run) -> int:
    """Print counts, states and errors."""
    print(summary(one))
    if not one.is_done and not one.is_cancelled:
        try:
            for words, count in sorted(states(one).items()):
                print(f"  {count:6} jobs: {words}")
        except (SchedulerUnavailable, JobRefused) as exc:
            print(f"  {exc}")
    return 1 if one.errors() else 0


def _cancel(one: Run) -> int:
    one.cancel()
    return 0


def _resubmit(one: Run) -> int:
    print(f"{one.resubmit()} items are submitted again")
    return 0


def _wait(one: Run) -> int:
    is_done = one.wait()
    return max(show(one), 0 if is_done else 1)


def _results(one: Run) -> int:
    values = one.results(return_exceptions=True)
    for value in values:
        print(repr(value))
    return 1 if one.errors() or not one.is_done else 0


def _output(one: Run) -> int:
    for record in sorted(one.records(), key=lambda record: (record.index, record.attempt)):
        head = f"item {record.index} on {record.host}, {record.seconds:.3g} s"
        for name, text in (("stdout", record.stdout), ("stderr", record.stderr)):
            if text:
                print(f"-- {head}, {name}:\n{text}", end="")
    return 0


def _remove(one: Run) -> int:
    one.remove()
    return 0


_ACTIONS: dict[str, Callable[[Run], int]] = {
    "cancel": _cancel,
    "resubmit": _resubmit,
    "wait": _wait,
    "results": _results,
    "output": _output,
    "remove": _remove,
}

"""``ostap-parallel report``: what a run has left behind, as text or as a page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ostap_parallel.arrays import account
from ostap_parallel.arrays.account import Account
from ostap_parallel.arrays.run import Run
from ostap_parallel.commands import logfacts
from ostap_parallel.errors import ConfigError
from ostap_parallel.runs import past
from ostap_parallel.runs.checkpoint import read_summary
from ostap_parallel.views.page import page_of
from ostap_parallel.views.words import printable


def report(args: argparse.Namespace) -> int:
    """Print what a file, or the directory of a run, tells, or write a page about it."""
    path = Path(args.file)
    is_log = logfacts.is_joblog(path)
    # not by Path.is_dir: that raises for a name that is too long
    run = account_in(path) if os.path.isdir(path) else None  # noqa: PTH112
    if args.html is not None:
        if run is not None:
            facts = account.facts_of(run)
        else:
            facts = logfacts.facts_of(path) if is_log else past.facts_of(path)
        target = Path(args.html or f"{path}.html")
        if target.resolve() == path.resolve():
            raise ConfigError(f"--html {target} is the file that is to be read: name another one")
        try:
            target.write_text(page_of(facts), encoding="utf-8", errors="backslashreplace")
        except OSError as exc:
            raise ConfigError(f"--html {target}: {exc.strerror}") from exc
        print(target)
        unfinished = int(facts.numbers.get("unfinished", "0"))
        return int(unfinished > 0 or facts.number_of_failures > 0)
    if run is not None:
        print(printable(account.text_of(run)))
        return int(not run.run.is_done or bool(run.failures))
    if is_log:
        text, failed = logfacts.text_of(path)
        print(printable(text))
        return int(failed > 0)
    summary = read_summary(path)
    print(printable(str(summary)))
    return int(not summary.complete or summary.failed > 0)


def account_in(path: Path) -> Account:
    """Return what is told in the directory of a run of batch jobs; raises `ConfigError`."""
    try:
        return Account(Run(path))
    except (FileNotFoundError, PermissionError) as exc:
        raise ConfigError(str(exc)) from exc


def add_arguments(add: Callable[..., object]) -> None:
    """Add what the command takes."""
    text = "a checkpoint, the job log of commands, or the directory of a run of batch jobs"
    add("file", metavar="FILE", help=text)
    text = "write a page for a browser; default: FILE.html"
    add("--html", metavar="PAGE", nargs="?", const="", help=text)

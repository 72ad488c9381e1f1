"""``ostap-parallel report``: what a checkpoint or a job log tells, as text or as a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ostap_parallel.commands import logfacts
from ostap_parallel.errors import ConfigError
from ostap_parallel.runs import past
from ostap_parallel.runs.checkpoint import read_summary
from ostap_parallel.views.page import page_of
from ostap_parallel.views.words import printable


def report(args: argparse.Namespace) -> int:
    """Print what a file tells of its runs, or write a page about it."""
    path = Path(args.file)
    is_log = logfacts.is_joblog(path)
    if args.html is not None:
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
    if is_log:
        text, failed = logfacts.text_of(path)
        print(printable(text))
        return int(failed > 0)
    summary = read_summary(path)
    print(printable(str(summary)))
    return int(not summary.complete or summary.failed > 0)


def add_arguments(add: Callable[..., object]) -> None:
    """Add what the command takes."""
    add("file", metavar="FILE", help="the checkpoint, or the job log of commands")
    text = "write a page for a browser; default: FILE.html"
    add("--html", metavar="PAGE", nargs="?", const="", help=text)

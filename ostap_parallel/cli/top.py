"""``ostap-parallel top`` and ``status``: what runs are doing, again and again or once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ostap_parallel.arrays import account
from ostap_parallel.cli.report import account_in
from ostap_parallel.commands import logfacts
from ostap_parallel.errors import ConfigError
from ostap_parallel.runs import past
from ostap_parallel.views import live
from ostap_parallel.views.screen import NOTHING, screen_of, text_of


def top(args: argparse.Namespace) -> int:
    """Show what runs are doing until Ctrl-C; without a terminal once."""
    if not args.seconds > 0:
        raise ConfigError(f"--seconds must be a positive number, not {args.seconds}")
    if not sys.stdout.isatty():
        return status(args)
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, emoji=False, highlight=False)
    try:
        looks = _looks(args.files)
        with Live(console=console, screen=True, auto_refresh=False) as shown:
            while True:
                shown.update(screen_of(looks()), refresh=True)
                time.sleep(args.seconds)
    except KeyboardInterrupt:
        return 0


def status(args: argparse.Namespace) -> int:
    """Print once what runs are doing; return 1 if there is none."""
    runs = _looks(args.files)()
    if getattr(args, "json", False):
        print(json.dumps(runs, indent=1))
    else:
        print("\n".join(map(text_of, runs)) or NOTHING)
    return int(not runs)


def _looks(files: list[str]) -> Callable[[], list[dict[str, Any]]]:
    """Return what looks at files, or at all runs, as often as it is called."""
    each = [_look_at(Path(file)) for file in files]
    return (lambda: [look() for look in each]) if files else live.runs


def _look_at(path: Path) -> Callable[[], dict[str, Any]]:
    """Return what tells how far a run is."""
    if path.is_dir():
        return partial(account.look, account_in(path))
    return partial(logfacts.look if logfacts.is_joblog(path) else past.look, path)


def add_arguments(add: Callable[..., object], is_top: bool) -> None:
    """Add what the commands take."""
    text = "checkpoints, job logs and directories of batch runs to look at; "
    text += "default: all runs of yours on this machine"
    add("files", metavar="FILE", nargs="*", help=text)
    if is_top:
        text = "seconds between two looks; default: %(default)s"
        add("-s", "--seconds", metavar="N", type=float, default=1.0, help=text)
    else:
        add("--json", action="store_true", help="for scripts: all of it, as JSON")

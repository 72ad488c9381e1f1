"""``ostap-parallel top`` and ``status``: what runs are doing, again and again or once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        with Live(console=console, screen=True, auto_refresh=False) as shown:
            while True:
                shown.update(screen_of(_look(args.files)), refresh=True)
                time.sleep(args.seconds)
    except KeyboardInterrupt:
        return 0


def status(args: argparse.Namespace) -> int:
    """Print once what runs are doing; return 1 if there is none."""
    runs = _look(args.files)
    if getattr(args, "json", False):
        print(json.dumps(runs, indent=1))
    else:
        print("\n".join(map(text_of, runs)) or NOTHING)
    return int(not runs)


def _look(files: list[str]) -> list[dict[str, Any]]:
    return [_of_file(Path(file)) for file in files] if files else live.runs()


def _of_file(path: Path) -> dict[str, Any]:
    """Return what a checkpoint or a job log tells of how far a run is."""
    return logfacts.look(path) if logfacts.is_joblog(path) else past.look(path)


def add_arguments(add: Callable[..., object], is_top: bool) -> None:
    """Add what the commands take."""
    text = "checkpoints and job logs to look at; default: all runs of yours on this machine"
    add("files", metavar="FILE", nargs="*", help=text)
    if is_top:
        text = "seconds between two looks; default: %(default)s"
        add("-s", "--seconds", metavar="N", type=float, default=1.0, help=text)
    else:
        add("--json", action="store_true", help="for scripts: all of it, as JSON")

"""The command sync-dirs: a directory as it is in another one, its files copied in parallel."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ostap_parallel.errors import ConfigError
from ostap_parallel.faces.manager import WorkManager
from ostap_parallel.machine.cpus import usable_cpus


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the arguments of the command."""
    text = "commands that run at the same time; default: one per CPU, %(default)s"
    add("--parallel", metavar="N", type=int, default=usable_cpus(), help=text)
    add("--progress", action="store_true", help="show how far it is")
    text = "copies one file, as in 'COMMAND SOURCE TARGET'; default: rsync -a, or cp -p without it"
    add("-c", "--command", metavar="COMMAND", help=text)
    add("-v", "--verbose", action="store_true", help="print the files")
    add("source", metavar="SOURCE", type=Path, help="the directory that is there")
    add("target", metavar="TARGET", type=Path, help="the directory that gets what is in it")


def run(args: argparse.Namespace) -> int:
    """Copy what is in a directory into another one; exit 1 if a file could not be copied."""
    command = shlex.split(args.command or "") or default_command()
    source, target = args.source.absolute(), args.target.absolute()
    if not source.is_dir():
        raise ConfigError(f"not a directory: {source}")
    if target == source or source in target.parents:
        raise ConfigError(f"{target} is in {source}")
    target.mkdir(parents=True, exist_ok=True)
    pairs = list(find_pairs(source, target))
    with ThreadPoolExecutor(max(1, args.parallel)) as threads:
        manager = WorkManager(executor=threads, silent=True)
        # the default of chunks is meant for processes: a file may be large
        found = manager.process(
            partial(attempt, command),
            pairs,
            chunk_size=1,
            progress=args.progress,
            description="Files",
        )
    failures = [each for each in found if isinstance(each, Exception)]
    for failure in failures:
        print(failure, file=sys.stderr)
    if args.verbose:
        print(*(each for each in found if isinstance(each, str)), sep="\n")
    return int(bool(failures))


def default_command() -> list[str]:
    """Return the command that copies a file if none is given."""
    return ["rsync", "-a"] if shutil.which("rsync") else ["cp", "-pP"]


def find_pairs(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Yield each file, or symbolic link, with its new name; directories are made."""
    for folder, folders, files in os.walk(source):
        new = target / Path(folder).relative_to(source)
        new.mkdir(exist_ok=True)
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in (*files, *links):
            yield str(Path(folder, name)), str(new / name)


def attempt(command: list[str], pair: tuple[str, str]) -> str | Exception:
    """Return what `copy` does, or what it raises: all of that is told here, and once."""
    try:
        return copy(command, pair)
    except Exception as exc:
        return exc


def copy(command: list[str], pair: tuple[str, str]) -> str:
    """Copy a file by a command; return its new name."""
    if Path(pair[1]).is_symlink():  # it would be followed
        Path(pair[1]).unlink()
    # No shell sees the names, and none looks like an option or a remote file: they are absolute.
    done = subprocess.run([*command, *pair], stderr=subprocess.PIPE, errors="replace")
    if done.returncode:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise OSError(f"{pair[0]}: {reason}")
    return pair[1]

"""Functions that workers import, and scripts that tests run."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ostap_parallel.worker import nested

PROJECT = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds until something that must happen counts as hanging


def square(item):
    return item * item


def same(item):
    return item


def with_index(jobid, item):
    return jobid, item


def slowly(item):
    time.sleep(0.02)
    return item


def sum_of_children(count):
    slowly(None)
    futures = [nested.submit(slowly, n) for n in range(count)]
    return sum(future.result() for future in futures)


def pid_of(item):
    return os.getpid()


def identity(item):
    """Return what names this process, and what programs for `multiprocessing` call it."""
    process = multiprocessing.current_process()
    (number,) = process._identity
    return os.getpid(), (process.name, number)


def version_of(name):
    """Return a module's VERSION and where it is."""
    module = importlib.import_module(name)
    return module.VERSION, str(Path(module.__file__).parent)


def version_of_slowly(name):
    """Return the same, after some time: other workers have items, too, then."""
    time.sleep(0.1)
    return version_of(name)


def wait_for(path, seconds=PATIENCE):
    """Wait, in a worker, for a file that somebody else makes."""
    deadline = time.monotonic() + seconds
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {path}")
        time.sleep(0.005)


def note(folder, name):
    """Count one attempt on `name`; return the number of this one, from 1."""
    with (Path(folder) / str(name)).open("ab") as file:
        file.write(b".")
        return file.tell()


def attempts(folder, name):
    """Return how many attempts on `name` were noted."""
    return (Path(folder) / str(name)).stat().st_size


def add(a, b=10):
    return a + b


def late(go, item):
    """Return the item; if it is 0, when a file is there."""
    if item == 0:
        wait_for(go)
    return item


def tree(depth):
    """Return the number of nodes, each of which is a task."""
    if depth == 0:
        return 1
    children = nested.submit_all([(tree, (depth - 1,), {})] * 2)
    return 1 + sum(child.result() for child in children)


def chain(length):
    return 1 + nested.submit(chain, length - 1).result() if length else 0


def meet(folder, name, others):
    """Wait for others, who do the same at the same time."""
    note(folder, name)
    for other in others:
        wait_for(Path(folder) / other)
    return os.getpid()


def die(how):
    """End this process the hard way."""
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    ctypes.string_at(0)


class Bar:
    """Iterates over something and may not know its length, as bars of progress do."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)


class Refusal(Exception):
    """An exception of the user's own, as usual ones are."""

    def __init__(self, item, reason):
        super().__init__(item, reason)
        self.item, self.reason = item, reason


def refuse(item):
    """Return the item unless it is divisible by 3."""
    if item % 3 == 0:
        raise Refusal(item, "divisible")
    return item


def refuse_noted(folder, item):
    """Count the item, and return it unless it is 0."""
    note(folder, item)
    if item == 0:
        raise LookupError("the first")
    return item


class OddInit(Exception):
    """Pickles, but does not unpickle: ``args`` are not the arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class OddReduce(Exception):
    """Does not pickle at all."""

    def __reduce__(self):
        raise ValueError("not to be pickled")


class Unreadable:
    """Pickles, and raises when it is unpickled."""

    def __reduce__(self):
        return int, ("no number",)


class Unsendable:
    """Does not pickle."""

    def __reduce__(self):
        raise ValueError("stays here")


def script_environ(**more):
    """Return the environment of scripts that use this package."""
    paths = [str(PROJECT), str(PROJECT / "tests")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run_python(*arguments, cwd, **more):
    """Run Python with `arguments`; return what it printed, and fail if it failed."""
    done = run_to_its_end(*arguments, cwd=cwd, **more)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_to_its_end(*arguments, cwd, **more):
    """Run Python with `arguments`; return how it ended, and what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=script_environ(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def call_it(function):
    return function()

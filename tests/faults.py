"""Tasks, items and results that go wrong; workers on bare hosts import this."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ostap_parallel.runs.task import Task

# How a worker dies, and what is said of it.
DEATHS = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
    "SIGSEGV": (lambda: ctypes.string_at(0), "was killed by SIGSEGV"),
    "exit 0": (lambda: os._exit(0), "ended with exit status 0"),
    "exit 1": (lambda: os._exit(1), "ended with exit status 1"),
}


@dataclass(frozen=True)
class Folder:
    """A directory as this process and as the worker sees it."""

    here: Path
    there: Path


class Sum(Task):
    def initialize_local(self):
        self.total = 0

    def initialize_remote(self, jobid=-1):
        pass

    def process(self, jobid, item):
        return item

    def merge_results(self, result, jobid=-1):
        self.total += result

    def results(self):
        return self.total


class ReadsBadly:
    """Unpickling it goes wrong in the way that its name says, in workers only."""

    def __init__(self, how):
        self.how, self.home = how, os.getpid()

    def __setstate__(self, state):
        self.__dict__.update(state)
        if os.getpid() == self.home:
            return
        if self.how == "die":
            os._exit(3)
        if self.how == "raise":
            raise LookupError("not to be read")
        if self.how == "hang":
            time.sleep(60)


class ResultThat:
    """Unpickling it goes wrong wherever it is done."""

    def __init__(self, how):
        self.how = how

    def __setstate__(self, state):
        if state["how"] == "hang":
            time.sleep(60)
        if state["how"] == "exit":
            raise SystemExit("not to be read")
        raise LookupError("not to be read")


class ErrorThat(Exception):
    """An exception of the same kind."""

    def __init__(self, how):
        super().__init__(how)
        if how == "read":
            time.sleep(60)

    def __reduce__(self):
        return ErrorThat, ("read",)


def hang_in_python(item):
    time.sleep(60)


def hang_in_c(item):
    libc = ctypes.PyDLL(None)  # holds the interpreter
    while True:
        libc.sleep(60)


def swallow(item):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue


def hang_in_reading(item):
    return ResultThat("hang")


def hang_in_reading_by_dill(item):
    result = ResultThat("hang")
    result.lock = threading.Lock()  # pickle refuses it, dill does not
    return result


def hang_in_an_error(item):
    raise ErrorThat("hang")


def deaf(item):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGALRM])
    time.sleep(60)


def leave(how):
    """Leave this process in another state; see `state`."""
    if how == "directory":
        os.chdir("/")
    elif how == "no directory":
        gone = tempfile.mkdtemp()
        os.chdir(gone)
        os.rmdir(gone)  # noqa: PTH106
    elif how == "module path":
        sys.path = ["/nowhere", *sys.path]
    elif how == "module entries":
        sys.path.insert(0, "/nowhere")
    elif how == "environment":
        os.environ["LEFT"] = "behind"
        os.environ.pop("HOME", None)
    elif how == "handlers":
        for name in "INT", "TERM", "ALRM", "CHLD", "PIPE", "HUP", "USR1", "USR2":
            signal.signal(getattr(signal, f"SIG{name}"), lambda *_: None)
    elif how == "mask":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGALRM])
    elif how == "timers":
        signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        signal.setitimer(signal.ITIMER_PROF, 60)
    elif how == "closed descriptors":
        os.closerange(0, 3)
    elif how == "other descriptors":
        with open(os.devnull, "r+") as null:  # noqa: PTH123
            for descriptor in range(3):
                os.dup2(null.fileno(), descriptor)
    elif how == "closed streams":
        for stream in sys.stdin, sys.stdout, sys.stderr:
            stream.close()
    elif how == "other streams":
        sys.stdin = sys.stdout = sys.stderr = io.StringIO()
    elif how == "umask":
        os.umask(0o777)
    elif how == "recursion":
        sys.setrecursionlimit(200)
    elif how == "threads":
        for daemon in True, False:
            threading.Thread(target=time.sleep, args=[60], daemon=daemon).start()
    elif how == "alarm while it is put back":
        signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
        signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-3)
    else:
        raise ValueError(how)


WAYS = (
    "directory",
    "no directory",
    "module path",
    "module entries",
    "environment",
    "handlers",
    "mask",
    "timers",
    "closed descriptors",
    "other descriptors",
    "closed streams",
    "other streams",
    "umask",
    "recursion",
    "threads",
    "alarm while it is put back",
)


def state():
    """Return what a task finds."""
    names = "INT", "TERM", "ALRM", "CHLD", "PIPE", "HUP", "USR1", "USR2"
    mask = os.umask(0)
    os.umask(mask)
    return {
        "pid": os.getpid(),
        "directory": os.getcwd(),  # noqa: PTH109
        "path": list(sys.path),
        "environment": dict(os.environ),
        "handlers": [str(signal.getsignal(getattr(signal, f"SIG{name}"))) for name in names],
        "mask": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "timers": [signal.getitimer(timer) for timer in range(3)],
        "descriptors": [(os.fstat(n).st_dev, os.fstat(n).st_ino) for n in range(3)],
        "streams": [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "umask": mask,
        "recursion": sys.getrecursionlimit(),
    }


def stop(item):
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


class Stop(Exception):
    """Carries what does not travel, and more."""

    def __init__(self, what):
        super().__init__(what)
        self.lines = (line for line in [what])


class Hostile:
    """Whatever is asked of it raises; only pickling works."""

    def refuse(self, *_):
        raise LookupError("do not ask")

    __repr__ = __str__ = __eq__ = __hash__ = __bool__ = __len__ = __iter__ = refuse


class HostileError(Exception):
    """The same as an exception."""

    def __str__(self):
        raise LookupError("do not ask")

    __repr__ = __bool__ = __str__


class HostileExit(Exception):
    """Asking for its text ends the program."""

    def __str__(self):
        raise SystemExit(3)

    __repr__ = __str__


def deep(n):
    return deep(n + 1)


def deep_list(depth):
    """Return a list that is nested too deep to be pickled."""
    found = []
    for _ in range(depth):
        found = [found]
    return found

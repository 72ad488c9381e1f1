"""What recipes and node scripts of LOFAR's use besides, on any machine."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

# Lines that programs of LOFAR's print, and that tell nothing.
_NOISE = "Debug: registered context Global=0\n", "tcgetattr: Invalid argument\n"

_SEGFAULT = -11


@contextlib.contextmanager
def log_time(logger: logging.Logger) -> Iterator[None]:
    """Log how long the block took, and how much CPU time, with that of child processes."""
    begin, before = time.time(), _cpu()
    try:
        yield
    finally:
        user, system = (now - then for now, then in zip(_cpu(), before, strict=True))
        text = "Total time %.4fs; user time: %.4fs; system time: %.4fs"
        logger.info(text, time.time() - begin, user, system)


def _cpu() -> tuple[float, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime for one in used), sum(one.ru_stime for one in used)


def log_process_output(
    process_name: str, sout: str | bytes, serr: str | bytes, logger: logging.Logger
) -> None:
    """Log what a process has printed: standard output as DEBUG, standard error as WARNING."""
    for name, level, text in (
        ("stdout", logging.DEBUG, _text(sout)),
        ("stderr", logging.WARNING, _text(serr)),
    ):
        for noise in _NOISE:
            text = text.replace(noise, "")
        if text.strip():
            logger.log(level, "%s %s: %s", process_name, name, text)


def _text(data: str | bytes) -> str:
    return data.decode("utf-8", "backslashreplace") if isinstance(data, bytes) else data


def catch_segfaults(
    cmd: Sequence[str],
    cwd: str | None,
    env: Mapping[str, str] | None,
    logger: logging.Logger,
    max: int = 1,
    cleanup: Callable[[], object] = lambda: None,
    usageStats: Any = None,
) -> subprocess.Popen[bytes]:
    """Run a program, again if it crashes by a segmentation fault; log what it prints.

    Parameters
    ----------
    max
        How often it is run again.
    cleanup
        Called before.

    Raises
    ------
    subprocess.CalledProcessError
        It has failed, or crashed too often.
    """
    for _ in range(max + 1):
        logger.debug("Running: %s", " ".join(cmd))
        process = subprocess.Popen(
            cmd,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        sout, serr = process.communicate()
        log_process_output(cmd[0], sout, serr, logger)
        if process.returncode == 0:
            return process
        if process.returncode != _SEGFAULT:
            break
        logger.warning("%s process segfaulted!", cmd[0])
        cleanup()
    raise subprocess.CalledProcessError(process.returncode, cmd[0])


class SubProcessGroup:
    """Programs that run side by side; what they print is logged by line.

    Parameters
    ----------
    max_concurrent_processes
        How many run at a time.
    killSwitch
        When it is set, those that run are ended, and no other begins.
    """

    def __init__(
        self,
        logger: logging.Logger | None = None,
        usageStats: Any = None,
        max_concurrent_processes: int = 8,
        polling_interval: float = 10,
        killSwitch: threading.Event | None = None,
    ) -> None:
        self._logger = logger or logging.getLogger(__name__)
        self._period, self._switch = polling_interval, killSwitch
        self._pool = ThreadPoolExecutor(max_concurrent_processes)
        self._begun: list[tuple[list[str], Future[int]]] = []
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, cmd_in: str | list[str], unsave: bool = False, cwd: str | None = None) -> None:
        """Begin a program, or have it wait; text is split at blanks."""
        cmd = cmd_in.split() if isinstance(cmd_in, str) else list(cmd_in)
        self._begun.append((cmd, self._pool.submit(self._run, cmd, cwd)))

    def wait_for_finish(self) -> list[tuple[list[str], int]] | None:
        """Wait for all; return those that have failed, with their statuses, if there are any.

        Raises OSError if one could not be started.
        """
        begun, self._begun = self._begun, []
        left = {future for _, future in begun}
        while left:
            left = wait(left, self._period if self._switch else None).not_done
            if self._is_over():
                for process in list(self._running):
                    process.terminate()
        failed = [(cmd, future.result()) for cmd, future in begun if future.result()]
        return failed or None

    def _is_over(self) -> bool:
        return self._switch is not None and self._switch.is_set()

    def _run(self, cmd: list[str], cwd: str | None) -> int:
        if self._is_over():
            return 1
        name = " ".join(cmd)
        self._logger.info("Subprocess starting: %s", name)
        with subprocess.Popen(
            cmd, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            self._running.add(process)
            reader = threading.Thread(target=self._log, args=[process.stderr, logging.WARNING])
            reader.start()
            self._log(process.stdout, logging.DEBUG)
            reader.join()
        self._running.discard(process)
        self._logger.info("Subprocess completed with exit status %d: %s", process.returncode, name)
        return process.returncode

    def _log(self, stream: IO[bytes] | None, level: int) -> None:
        for line in stream or ():
            self._logger.log(level, "%s", _text(line).rstrip("\n"))


class CatchLog4CPlus:
    """Logs what a program writes by log4cplus during the block, which gets the logger.

    Its properties are in ``<executable_name>.log_prop`` in the working directory.
    """

    _PROPERTIES = """
log4cplus.rootLogger=DEBUG, FILE
log4cplus.logger.TRC=TRACE9
log4cplus.appender.FILE=log4cplus::RollingFileAppender
log4cplus.appender.FILE.File={file}
log4cplus.appender.FILE.ImmediateFlush=true
log4cplus.appender.FILE.MaxFileSize=10MB
log4cplus.appender.FILE.layout.ConversionPattern=%l [%-3p] - %m%n
"""

    def __init__(self, working_dir: str, logger_name: str, executable_name: str) -> None:
        self._properties = Path(working_dir, f"{executable_name}.log_prop")
        self._file = Path(working_dir, "pipeline_process.log")
        self._logger = logging.getLogger(logger_name)
        self._size = 0

    def __enter__(self) -> logging.Logger:
        self._size = self._file.stat().st_size if self._file.exists() else 0
        self._properties.write_text(self._PROPERTIES.format(file=self._file))
        return self._logger

    def __exit__(self, *error: object) -> None:
        if self._file.exists():
            with self._file.open("rb") as file:
                file.seek(self._size)
                for line in file:
                    self._logger.debug("%s", _text(line).strip())


def create_directory(dirname: str) -> None:
    """Make a directory, and those it is in, unless it is there."""
    if dirname:
        Path(dirname).mkdir(parents=True, exist_ok=True)


def delete_directory(dirname: str) -> None:
    """Remove a directory with all that is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(dirname)


def get_mountpoint(path: str) -> str:
    """Return where the file system of a path is mounted."""
    found = Path(path).absolute()
    while not found.is_mount():
        found = found.parent
    return str(found)


def disk_usage(*paths: str) -> int:
    """Return how many bytes files, and those in directories, have."""
    total = 0
    for path in paths:
        every = [Path(path)]
        for folder, folders, files in os.walk(path):
            every += [Path(folder, name) for name in (*folders, *files)]
        total += sum(one.lstat().st_size for one in every)
    return total


def read_initscript(
    logger: logging.Logger, filename: str, shell: str = "/bin/sh"
) -> dict[str, str]:
    """Return the environment that a script leaves; if there is none, nothing, and a warning."""
    if not Path(filename).exists():
        logger.warning("Environment initialisation script not found!")
        return {}
    logger.debug("Reading environment from %s", filename)
    argv = [shell, "-c", '. "$0" >&2; env -0', filename]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    pairs = (os.fsdecode(one).partition("=") for one in done.stdout.split(b"\0") if b"=" in one)
    return {name: value for name, _, value in pairs}


def string_to_list(my_string: str) -> list[str]:
    """Return the words of ``"[a, b]"``, as lists stand in configuration files."""
    words = (word.strip() for word in my_string.strip("[] ").split(","))
    return [word for word in words if word]


def is_iterable(obj: Any) -> bool:
    """Return whether something can be iterated over."""
    try:
        iter(obj)
    except TypeError:
        return False
    return True

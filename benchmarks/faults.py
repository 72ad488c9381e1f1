"""The same faults against several engines; what each of them did goes to faults.md.

    pip install -e ".[bench]"
    python -m benchmarks.faults

Each case, one fault with one engine, is a process of its own. A name in the environment marks it
and all that it starts, so that what it leaves behind is found.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sshd import kill_if, live_pids

DEADLINE = 30.0  # seconds that a case gets
PATIENCE = 5.0  # seconds that processes get to end after their caller
COLLECT = 10.0  # seconds that results of other items get
AT_ONCE = 2  # cases; those that hang cost nothing

HEADER = """\
# Faults

What became of each fault, written by `python -m benchmarks.faults`. Every case is a process of
its own with an engine as it is by default, and two workers: it maps a task over a few items, then
does other work with the same pool, closes it and ends. Judged is what the caller gets: *right* are
the results that the task without the fault has, else there is the class of the error, or the wrong
result; what has not ended after {deadline:g} s is a *hang*. "Then" tells of the other work; what
still runs {patience:g} s after the caller should have ended is left behind. Bold is what should
not be.

{machine}

"""


# -- the tasks; what they need is imported in them, as pathos sends some as source text -----------


def double(n: int) -> int:
    return 2 * n


def raise_error(n: int) -> int:
    raise ValueError(f"item {n}")


def die_once(flag: str) -> int:
    import os
    import signal

    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return 1
    return os.kill(os.getpid(), signal.SIGKILL) or 0


def read_null(n: int) -> int:
    import ctypes

    return ctypes.c_int.from_address(0).value


def leave(n: int) -> int:
    import os

    os._exit(0)


def crash_at_7(n: int) -> int:
    import ctypes

    return ctypes.c_int.from_address(0).value if n == 7 else 2 * n


def print_in_c(n: int) -> int:
    import os

    os.write(1, b"text of a task\n")
    return 2 * n


def print_much_in_c(n: int) -> int:
    import os

    for _ in range(1024):
        os.write(2, b"x" * 65535 + b"\n")
    return 2 * n


def make_generator(n: int) -> Any:
    return (i for i in range(n))


def consume(item: Any) -> int:
    return sum(item)


class OddError(Exception):
    """Pickles, but cannot be unpickled."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


def raise_odd_error(n: int) -> int:
    from benchmarks.faults import OddError

    raise OddError("item", n)


class Trap:
    """Pickles, but its unpickling raises."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def make_trap(n: int) -> Any:
    from benchmarks.faults import Trap

    return Trap()


def scale(n: int, factor: int = 1) -> int:
    return n * factor


def fork(n: int) -> int:
    import os

    os.fork()
    return 2 * n


def exit_python(n: int) -> int:
    import sys

    sys.exit(3)


def close_descriptors(n: int) -> int:
    import os

    for descriptor in range(3):
        os.close(descriptor)
    return 2 * n


def change_surroundings(n: int) -> int:
    import os

    os.chdir("/")
    os.environ["FAULTS_CHANGED"] = "yes"
    return 2 * n


def look_around(n: int) -> tuple[str, str]:
    import os
    from pathlib import Path

    return str(Path.cwd()), os.environ.get("FAULTS_CHANGED", "no")


def wait_long(flag: str) -> None:
    import os
    import time

    os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    time.sleep(600)


def wait_long_at_1(n: int) -> int:
    import time

    if n == 1:
        time.sleep(600)
    return 2 * n


# -- the engines -----------------------------------------------------------------------------

Function = Callable[..., Any]


class Unsupported(Exception):
    """The engine has no such thing."""


class Engine:
    """What all engines can be asked for."""

    packages: Sequence[str] = ()

    def __init__(self, workers: int) -> None:
        """Start the workers."""

    def map(self, function: Function, items: Iterable[Any]) -> Any:
        """Return the results in the order of the items."""
        raise NotImplementedError

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        """Return the result of one call."""
        raise NotImplementedError

    def collect(self, function: Function, items: Iterable[Any]) -> list[Any]:
        """Return the results that are to be had though some items fail."""
        raise NotImplementedError

    def map_with_limit(self, function: Function, items: Iterable[Any], seconds: float) -> Any:
        """Return the results that are to be had with a time limit per item."""
        raise Unsupported("no such limit")

    def close(self) -> None:
        """End the workers."""


class Pathos(Engine):
    packages = "pathos", "ppft"

    def __init__(self, workers: int) -> None:
        from pathos.pools import ParallelPool

        self.pool = ParallelPool(workers)

    def map(self, function: Function, items: Iterable[Any]) -> Any:
        return self.pool.map(function, items)

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        return self.pool.pipe(function, *args, **kwargs)

    def collect(self, function: Function, items: Iterable[Any]) -> list[Any]:
        jobs = [self.pool.apipe(function, item) for item in items]
        deadline = time.monotonic() + COLLECT
        while not all(job.ready() for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [job.get() for job in jobs if job.ready()]

    def close(self) -> None:
        self.pool.close()
        self.pool.join()
        self.pool.clear()


class Multiprocessing(Engine):
    def __init__(self, workers: int) -> None:
        import multiprocessing

        self.pool = multiprocessing.Pool(workers)

    def map(self, function: Function, items: Iterable[Any]) -> Any:
        return self.pool.map(function, items)

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        return self.pool.apply(function, args, kwargs)

    def collect(self, function: Function, items: Iterable[Any]) -> list[Any]:
        jobs = [self.pool.apply_async(function, [item]) for item in items]
        deadline = time.monotonic() + COLLECT
        found = []
        for job in jobs:
            with contextlib.suppress(Exception):
                found.append(job.get(max(0.0, deadline - time.monotonic())))
        return found

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class Loky(Engine):
    packages = ("loky",)

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @property
    def pool(self) -> Any:
        """The executor; a new one if it has broken, as its users do."""
        from loky import get_reusable_executor

        return get_reusable_executor(max_workers=self.workers)

    def map(self, function: Function, items: Iterable[Any]) -> Any:
        return list(self.pool.map(function, items))

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        return self.pool.submit(function, *args, **kwargs).result()

    def collect(self, function: Function, items: Iterable[Any]) -> list[Any]:
        pool = self.pool
        futures = [pool.submit(function, item) for item in items]
        return [future.result() for future in futures if not future.exception()]

    def close(self) -> None:
        self.pool.shutdown()


class Dask(Engine):
    packages = ("distributed",)

    def __init__(self, workers: int) -> None:
        from distributed import Client

        self.client = Client(n_workers=workers, threads_per_worker=1, dashboard_address=None)

    def map(self, function: Function, items: Iterable[Any]) -> Any:
        return self.client.gather(self.client.map(function, list(items), pure=False))

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        return self.client.submit(function, *args, **kwargs, pure=False).result()

    def collect(self, function: Function, items: Iterable[Any]) -> list[Any]:
        futures = self.client.map(function, list(items), pure=False)
        return list(self.client.gather(futures, errors="skip"))

    def close(self) -> None:
        self.client.shutdown()


class Ours(Engine):
    packages = ("ostap_parallel",)

    def __init__(self, workers: int) -> None:
        from ostap_parallel import WorkManager

        self.manager = WorkManager(workers, config=(), silent=True)

    def map(self, function: Function, items: Iterable[Any]) -> Any:
        return self.manager.process(function, items)

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        return self.manager.pool.pipe(function, *args, **kwargs)

    def collect(self, function: Function, items: Iterable[Any]) -> list[Any]:
        from ostap_parallel import Failure

        results = self.manager.process(function, items, on_error="collect")
        return [result for result in results if not isinstance(result, Failure)]

    def map_with_limit(self, function: Function, items: Iterable[Any], seconds: float) -> Any:
        from ostap_parallel import Failure

        results = self.manager.process(function, items, timeout=seconds, on_error="collect")
        return [result for result in results if not isinstance(result, Failure)]

    def close(self) -> None:
        self.manager.close()


ENGINES: dict[str, type[Engine]] = {
    "pathos ParallelPool": Pathos,
    "multiprocessing.Pool": Multiprocessing,
    "loky": Loky,
    "dask.distributed": Dask,
    "ostap_parallel": Ours,
}


# -- the faults ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes
    ----------
    play
        Does it, with an engine and an empty directory.
    wanted
        The right result; ``None`` where there can only be an error.
    error_will_do
        Whether an error in its place is as good as can be asked for.
    text
        What the caller must see printed.
    signal
        What the caller's process group gets, or the caller alone, once both tasks run.
    """

    play: Callable[[Engine, Path], Any]
    wanted: Any = None
    error_will_do: bool = False
    text: str = ""
    workers: int = 2
    signal: signal.Signals | None = None
    to_group: bool = True


def over(function: Function, *items: Any, **given: Any) -> Fault:
    """Return the fault of a function that is mapped over items."""
    return Fault(lambda engine, folder: engine.map(function, items), **given)


def surroundings(engine: Engine, folder: Path) -> Any:
    engine.call(change_surroundings, 1)
    return engine.call(look_around, 1)


def two_long_tasks(engine: Engine, folder: Path) -> Any:
    return engine.map(wait_long, [str(folder / "0"), str(folder / "1")])


DOUBLED = [2 * n for n in range(4)]
FAULTS: dict[str, Fault] = {
    "a task raises `ValueError`": over(raise_error, 1, 2, 3),
    "a task calls `sys.exit(3)`": over(exit_python, 1, 2, 3),
    "a task raises an exception that cannot be unpickled": over(raise_odd_error, 1, 2, 3),
    "an argument cannot be pickled": Fault(lambda e, _: e.map(consume, [make_generator(1)])),
    "a result cannot be pickled": over(make_generator, 1, 2, 3),
    "unpickling a result raises": over(make_trap, 1, 2, 3),
    "keyword arguments": Fault(lambda e, _: e.call(scale, 2, factor=3), wanted=6),
    "a worker is killed by SIGKILL, once": Fault(
        lambda e, folder: e.map(die_once, [str(folder / "flag")] * 4),
        wanted=[1] * 4,
        error_will_do=True,
    ),
    "a task reads address 0 (SIGSEGV)": over(read_null, 1),
    "a task calls `os._exit(0)`": over(leave, 1),
    "one of 20 items crashes: results of the other 19": Fault(
        lambda e, _: len(
            {2 * n for n in range(20) if n != 7} & set(e.collect(crash_at_7, range(20)))
        ),
        wanted=19,
    ),
    "a task writes to C stdout": over(
        print_in_c, *range(4), wanted=DOUBLED, text="text of a task\n"
    ),
    "a task writes 64 MB to C stderr": over(print_much_in_c, 1, wanted=[2]),
    "a task closes descriptors 0 to 2": over(close_descriptors, 1, wanted=[2], workers=1),
    "a task forks, and the child returns": over(fork, *range(4), wanted=DOUBLED),
    "a task changes directory and environment; what the next one sees": Fault(
        surroundings, wanted=(str(Path.cwd()), "no"), workers=1
    ),
    "a task runs for ever, with a time limit per task; results of the others": Fault(
        lambda e, _: e.map_with_limit(wait_long_at_1, range(4), 1.0), wanted=[0, 4, 6]
    ),
    "Ctrl-C in the terminal": Fault(two_long_tasks, signal=signal.SIGINT),
    "SIGINT for the caller only": Fault(two_long_tasks, signal=signal.SIGINT, to_group=False),
    "the caller is killed by SIGKILL": Fault(
        two_long_tasks, signal=signal.SIGKILL, to_group=False
    ),
}


# -- one case, in a process of its own --------------------------------------------------------


def run_case(engine: str, fault: str, folder: str) -> None:
    """Play a fault; tell step by step what happens, in a file of the directory."""
    what = FAULTS[fault]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    with (Path(folder) / "steps").open("w") as steps:

        def tell(step: str, call: Callable[[], Any], wanted: Any) -> None:
            try:
                value = call()
                told = (step, "right" if value == wanted else "wrong", repr(value))
            except (Exception, SystemExit) as exc:
                traceback.print_exc()
                kind = "unsupported" if isinstance(exc, Unsupported) else "error"
                told = (step, kind, name(exc))
            print(json.dumps(told), file=steps, flush=True)

        pool = ENGINES[engine](what.workers)
        tell("outcome", lambda: what.play(pool, Path(folder)), what.wanted)
        tell("then", lambda: pool.map(double, range(4)), DOUBLED)
        tell("close", pool.close, None)


def name(exc: BaseException) -> str:
    """Return what a table says of an exception: its class, and what it stands for."""
    of = f" ({exc.name})" if type(exc).__name__ == "RemoteError" else ""  # type: ignore[attr-defined]
    return type(exc).__name__ + of


def main() -> None:
    """Try every fault with every engine; write the table."""
    chosen = sys.argv[1:] or list(ENGINES)
    cases = [(engine, fault) for fault in FAULTS for engine in chosen]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        cells = dict(zip(cases, threads.map(lambda case: watch(*case), cases), strict=True))
    rows = [["fault", *chosen], ["---"] * (1 + len(chosen))]
    rows += [[fault, *(cells[engine, fault] for engine in chosen)] for fault in FAULTS]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    header = HEADER.format(deadline=DEADLINE, patience=PATIENCE, machine=machine())
    Path(__file__).with_suffix(".md").write_text(header + table)


def machine() -> str:
    """Return one sentence on where this runs, with which versions."""
    names = sorted({name for engine in ENGINES.values() for name in engine.packages})
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    where = f"Linux {platform.release()}, {os.cpu_count()} CPUs"
    return f"{where}, Python {platform.python_version()}, {packages}."


def watch(engine: str, fault: str) -> str:
    """Run a case and return what the table says of it."""
    code = "import sys; from benchmarks.faults import run_case; run_case(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "printed").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-c", code, engine, fault, folder],
            env={**os.environ, "FAULTS_CASE": folder},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )
        try:
            if FAULTS[fault].signal:
                return after_signal(process, FAULTS[fault], Path(folder))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DEADLINE)
            return describe(process, FAULTS[fault], Path(folder))
        finally:
            kill_marked(folder)
            process.wait()


def after_signal(process: subprocess.Popen[bytes], fault: Fault, folder: Path) -> str:
    """Send a signal once both tasks run; return what became of caller and workers."""
    deadline = time.monotonic() + DEADLINE
    while len(list(folder.glob("[01]"))) < 2:
        if time.monotonic() > deadline:
            return "**does not start**"
        time.sleep(0.05)
    (os.killpg if fault.to_group else os.kill)(process.pid, fault.signal)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    ends = "ends" if process.poll() is not None else f"**runs on after {PATIENCE:g} s**"
    return ends + left_behind(folder)


def describe(process: subprocess.Popen[bytes], fault: Fault, folder: Path) -> str:
    """Return what became of a case that has ended or had its time."""
    steps = [json.loads(line) for line in (folder / "steps").read_text().splitlines()]
    told = {step: (kind, text) for step, kind, text in steps}
    if "outcome" not in told:
        ended = process.poll()
        return "**hang**" if ended is None else f"**the caller ends with status {ended}**"
    cell = cell_of(*told["outcome"], fault)
    if fault.text and fault.text not in (folder / "printed").read_text(errors="replace"):
        cell += ", **text lost**"
    if "then" not in told:
        return f"{cell}, then **hang**"
    kind, text = told["then"]
    if kind != "right":
        cell += f", then **{text}**"
    if process.poll() is None:
        return f"{cell}, **hang when closed**"
    return cell + left_behind(folder)


def cell_of(kind: str, text: str, fault: Fault) -> str:
    """Return what the table says of the outcome of a fault."""
    if kind == "right":
        return "right"
    if kind == "unsupported":
        return "no such limit"
    if kind == "wrong":
        return f"**`{text if len(text) < 40 else text[:36] + ' ...'}`**"
    is_fine = fault.wanted is None or fault.error_will_do
    return text if is_fine else f"**{text}**"


def left_behind(folder: Path) -> str:
    """Return how many of a case's processes do not end by themselves."""
    deadline = time.monotonic() + PATIENCE
    while (left := marked(str(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return f", **leaves {len(left)} process{'es' * (len(left) > 1)}**" if left else ""


def marked(folder: str) -> list[int]:
    """Return the processes of a case that are alive."""
    return [pid for pid in live_pids() if is_marked(pid, folder)]


def is_marked(pid: int, folder: str) -> bool:
    """Return whether a process belongs to a case."""
    with contextlib.suppress(OSError):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        return f"FAULTS_CASE={folder}".encode() in environ.split(b"\0")
    return False


def kill_marked(folder: str) -> None:
    """End all that is left of a case."""
    while pids := marked(folder):
        for pid in pids:
            kill_if(pid, lambda pid: is_marked(pid, folder))
        time.sleep(0.05)


if __name__ == "__main__":
    main()

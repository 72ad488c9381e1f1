"""What a job of an array does: the items of one chunk, on workers of its own.

python start.py DIRECTORY ARRAY ELEMENT
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from ostap_parallel.arrays import memory
from ostap_parallel.arrays.layout import Header, Layout
from ostap_parallel.arrays.records import MAX_OUTPUT, Record, Writer, read
from ostap_parallel.engine.core import Core
from ostap_parallel.machine import forked
from ostap_parallel.machine.jobs import Job
from ostap_parallel.schedulers.quantities import parse_walltime
from ostap_parallel.worker.chunk import Lost, draw_id, pack_chunk, unpack_result

# Items that take less than so many seconds, and print nothing, are run together, up to so many.
BRIEF = 0.001
MOST = 64

# Seconds until the next time that is told who waits which items have ended: at first, and at most.
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0

# Seconds before the end of the wall time that an item should have ended by.
MARGIN = 5.0
BEGUN = time.monotonic()

# Sent before the end of a job; and at its end, some seconds before it is killed.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class Items:
    """Runs items one by one, brief ones together, and writes down what becomes of each.

    Parameters
    ----------
    settings
        Of the run.
    tell
        Called when items have ended and others have not, at first at once and then less often.
    ends
        When the wall time of the job is over, by `time.monotonic`.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        call: bytes,
        header: Header,
        items: list[tuple[int, Any]],
        writer: Writer,
        tell: Callable[[], object] = lambda: None,
        ends: float = math.inf,
    ) -> None:
        self._tell, self._next_time, self._pause = tell, 0.0, FIRST_PAUSE
        self._call, self._header, self._writer = call, header, writer
        self._ends, self._longest = ends, 0.0
        self._waiting = deque(items)
        self._running: dict[int, tuple[float, list[tuple[int, Any]]]] = {}  # by the first
        self._together = 1
        self._losses: dict[int, int] = {}
        self._lost_retries: int = settings["lost_retries"]
        self._run = draw_id(goes_on=False)
        self._news: queue.SimpleQueue[tuple[int, bytes] | str] = queue.SimpleQueue()
        self._printed: dict[int, dict[str, list[str]]] = {}
        self._kills = memory.count_kills()
        self.processes: int = settings["processes"]

    def stop(self, reason: str) -> None:
        """Begin no other item; from a signal handler."""
        self._news.put(reason)

    def run(self) -> str:
        """Run all; return ``"done"``, or why there was no time for that."""
        count = max(1, min(self.processes, len(self._waiting)))
        core = Core(count, self._hear)
        reason = ""
        try:
            while self._running or (self._waiting and not reason):
                while self._waiting and len(self._running) < count:
                    if reason := reason or self._why_no_other():
                        break
                    size = min(self._together, len(self._waiting))
                    self._begin(core, [self._waiting.popleft() for _ in range(size)])
                news = self._news.get()
                if isinstance(news, str):
                    reason = reason or news
                    if news == "ended":
                        break
                else:
                    core.hand_on_output()
                    self._end(*news)
        finally:
            core.close()
        return reason if self._waiting or self._running else "done"

    def _why_no_other(self) -> str:
        """Return why no other item is begun: it would not end in time, if it took the longest."""
        is_late = self._longest and time.monotonic() + self._longest > self._ends
        return "wall time" if is_late else ""

    def _hear(self, host: str, event: dict[str, Any]) -> None:
        """Take in what a worker prints."""
        kind, text = event["kind"], event.get("text", "")
        if kind == "log":
            kind, text = "stderr", _text_of(event["record"])
        self._printed.setdefault(event["pid"], {}).setdefault(kind, []).append(text)

    def _begin(self, core: Core, items: list[tuple[int, Any]]) -> None:
        indices = [index for index, _ in items]
        self._writer.add("began", dict.fromkeys(indices, time.time()))
        chunk = pack_chunk(indices, [packed for _, packed in items], None, self._run)
        first = indices[0]
        job = Job(
            self._call,
            chunk,
            lambda message: core.loop.deliver(partial(self._news.put, (first, message))),
            ask=core.nesting.ask,
        )
        self._running[first] = time.time(), items
        core.add(job)

    def _end(self, first: int, message: bytes) -> None:
        """Write down what became of items that were begun together."""
        result = unpack_result(message)
        start, items = self._running.pop(first)
        printed = self._printed.pop(result.pid, {})
        if isinstance(result, Lost):
            self._lose(result, start, items, printed)
            return
        start = result.begun or start  # its worker may have had to be started first
        used = memory.peak(result.pid)
        memory.forget_peak(result.pid)
        self._longest = max(self._longest, *result.seconds, 0.0)
        records = []
        for position, (index, _) in enumerate(items):
            record = self._record(index, result.pid, start, printed if position == 0 else {})
            record.memory = used
            if position < len(result.answers):
                record.ok = position not in result.failed
                record.answer, record.seconds = result.answers[position], result.seconds[position]
                start += record.seconds
            else:
                record.lost = "it was interrupted"
            records.append(record)
        self._writer.add("records", records)
        self._tell_now_and_then()
        is_brief = sum(result.seconds) < BRIEF * len(items) and not printed
        self._together = min(2 * self._together, MOST) if is_brief else 1

    def _tell_now_and_then(self) -> None:
        now = time.monotonic()
        if now >= self._next_time and (self._waiting or self._running):
            self._next_time, self._pause = now + self._pause, min(2 * self._pause, LAST_PAUSE)
            self._tell()

    def _lose(
        self, lost: Lost, start: float, items: list[tuple[int, Any]], printed: dict[str, list[str]]
    ) -> None:
        """Take in that a worker has ended; of several items each is begun again, alone."""
        self._together = 1
        kills = memory.count_kills()
        is_short, self._kills = kills > self._kills, kills
        if len(items) > 1:
            self._waiting.extendleft(reversed(items))
            return
        ((index, _),) = items
        record = self._record(index, lost.pid, start, printed)
        record.seconds, record.lost = time.time() - start, lost.reason
        record.out_of_memory = is_short
        if is_short:
            record.lost += ", as there was no memory left"
        else:
            self._losses[index] = self._losses.get(index, 0) + 1
            if self._losses[index] <= self._lost_retries:
                self._waiting.extendleft(items)
                return
        self._writer.add("records", [record])

    def _record(self, index: int, pid: int, start: float, printed: dict[str, list[str]]) -> Record:
        return Record(
            index,
            host=socket.gethostname(),
            pid=pid,
            start=start,
            attempt=self._header.attempt + self._losses.get(index, 0),
            stdout=_joined(printed.get("stdout", [])),
            stderr=_joined(printed.get("stderr", [])),
        )


def _joined(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)[-MAX_OUTPUT:]


def _text_of(record: dict[str, Any]) -> str:
    head = f"{record.get('levelname', '')}:{record.get('name', '')}:{record.get('msg', '')}"
    return "\n".join(filter(None, [head, record.get("exc_text", "")]))


def run_whole(settings: dict[str, Any], call: bytes, chunk: bytes, writer: Writer) -> str:
    """Run a chunk that another run has made, as one; what workers print is printed."""
    done: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    core = Core(1, _print)
    try:
        deliver = partial(core.loop.deliver)
        job = Job(call, chunk, lambda m: deliver(partial(done.put, m)), ask=core.nesting.ask)
        kills = memory.count_kills()
        core.add(job)
        result = unpack_result(done.get())
        core.hand_on_output()
    finally:
        core.close()
    if isinstance(result, Lost) and memory.count_kills() > kills:
        reason = f"{result.reason}, as there was no memory left"
        result = Lost(result.host, result.pid, reason, True, result.index)
    writer.add("whole", result)
    return "done"


def _print(host: str, event: dict[str, Any]) -> None:
    text = event.get("text") if event["kind"] != "log" else _text_of(event["record"])
    print(text, file=sys.stdout if event["kind"] == "stdout" else sys.stderr, flush=True)


def tell(layout: Layout, number: int) -> None:
    """Tell who waits, if anybody does and can be reached, that there is news of a chunk."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        hint = layout.read_json("hint")
        message = f"{hint['token']} {number}".encode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for address in hint["addresses"]:
                with contextlib.suppress(OSError):
                    sender.sendto(message, (address, hint["port"]))


def work(layout: Layout, array: int, element: int) -> None:
    """Do one element of an array."""
    job = f"{os.environ.get('SLURM_ARRAY_JOB_ID') or os.environ.get('JOB_ID') or os.getpid()}"
    known = layout.job_id(array)
    if (known and known != job) or (layout.root / "cancelled").exists():
        return  # submitted twice, as the first answer did not come; or too late
    number = layout.elements(array)[element]
    final = layout.root / layout.name("results", number)
    if final.exists():
        return
    forked.begin()  # the worker comes of it while this reads and gets ready
    settings = layout.read_json("settings")
    header, items = layout.read_chunk(number)
    call = layout.read(f"calls/{header.call}")
    parts = layout.parts(number)  # of this job, before it was begun anew, maybe more than once
    before = read(*parts)
    run = f"{os.environ.get('SLURM_RESTART_COUNT') or os.environ.get('RESTARTED') or 0}"
    part = final.with_name(f"{number}.{job}_{element}.{run}-{len(parts)}.part")
    writer = Writer(part, final, f"{job}_{element}", socket.gethostname())
    writer.add("records", list(before.records.values()))
    if isinstance(items, bytes):
        end = run_whole(settings, call, items, writer)
    else:
        left = [item for item in items if item[0] not in before.records]
        told = partial(tell, layout, number)
        doing = Items(settings, call, header, left, writer, told, _end_of_time(settings, header))
        for warning in WARNINGS:
            signal.signal(warning, lambda *_: doing.stop("wall time"))
        signal.signal(signal.SIGTERM, lambda *_: doing.stop("ended"))
        end = doing.run()
    writer.close(end)
    tell(layout, number)


def _end_of_time(settings: dict[str, Any], header: Header) -> float:
    """Return when the wall time of the job is over that was asked for, with a margin."""
    given = settings["walltime"]
    seconds = parse_walltime(given[min(header.attempt, len(given)) - 1])
    return BEGUN + seconds - min(MARGIN, seconds / 10) if seconds else math.inf


def main() -> None:
    """Do what the arguments say."""
    layout, array, element = Layout(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for warning in WARNINGS:  # SGE sends it to all processes of a job
        signal.signal(warning, signal.SIG_IGN)
    work(layout, array, element)
    index = os.environ.get("SLURM_ARRAY_TASK_ID") or os.environ.get("SGE_TASK_ID") or ""
    sys.stdout.flush()
    log = layout.log(array, index)
    with contextlib.suppress(OSError):
        if not log.stat().st_size:  # most print nothing
            log.unlink()

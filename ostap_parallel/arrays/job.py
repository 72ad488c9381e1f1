"""What a job of an array does: the items of one chunk, on workers of its own.

python start.py DIRECTORY ARRAY ELEMENT
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import time
from collections import deque
from functools import partial
from typing import Any

from ostap_parallel.arrays import memory
from ostap_parallel.arrays.layout import Header, Layout
from ostap_parallel.arrays.records import MAX_OUTPUT, Record, Writer, read
from ostap_parallel.engine.core import Core
from ostap_parallel.machine.jobs import Job
from ostap_parallel.worker.chunk import Lost, pack_chunk, unpack_result

# Sent before the end of a job; and at its end, some seconds before it is killed.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class Items:
    """Runs items one by one, and writes down what becomes of each.

    Parameters
    ----------
    settings
        Of the run.
    stop
        Is set when the job is about to be ended, to the reason.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        call: bytes,
        header: Header,
        items: list[tuple[int, Any]],
        writer: Writer,
    ) -> None:
        self._call, self._header, self._writer = call, header, writer
        self._waiting = deque(items)
        self._running: dict[int, tuple[Job, float, Any]] = {}
        self._losses: dict[int, int] = {}
        self._lost_retries: int = settings["lost_retries"]
        self._run = os.urandom(16)
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
                while self._waiting and not reason and len(self._running) < count:
                    self._begin(core, *self._waiting.popleft())
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

    def _hear(self, host: str, event: dict[str, Any]) -> None:
        """Take in what a worker prints."""
        kind, text = event["kind"], event.get("text", "")
        if kind == "log":
            kind, text = "stderr", _text_of(event["record"])
        self._printed.setdefault(event["pid"], {}).setdefault(kind, []).append(text)

    def _begin(self, core: Core, index: int, packed: Any) -> None:
        self._writer.add("began", index)
        chunk = pack_chunk([index], [packed], b"", self._run)
        job = Job(
            self._call,
            chunk,
            lambda message: core.loop.deliver(partial(self._news.put, (index, message))),
            ask=core.nesting.ask,
        )
        self._running[index] = job, time.time(), packed
        core.add(job)

    def _end(self, index: int, message: bytes) -> None:
        result = unpack_result(message)
        _, start, packed = self._running.pop(index)
        printed = self._printed.pop(result.pid, {})
        record = Record(
            index,
            host=socket.gethostname(),
            pid=result.pid,
            start=start,
            seconds=time.time() - start,
            memory=memory.peak(result.pid),
            attempt=self._header.attempt + self._losses.get(index, 0),
            stdout=_joined(printed.get("stdout", [])),
            stderr=_joined(printed.get("stderr", [])),
        )
        if isinstance(result, Lost):
            if self._is_to_be_tried_again(record, result):
                self._waiting.appendleft((index, packed))
                return
        elif not result.answers:
            record.lost = "it was interrupted"
        else:
            memory.forget_peak(result.pid)
            record.ok = not result.failed
            (record.answer,), (record.seconds,) = result.answers, result.seconds
        self._writer.add("record", record)

    def _is_to_be_tried_again(self, record: Record, lost: Lost) -> bool:
        kills = memory.count_kills()
        record.lost, record.out_of_memory = lost.reason, kills > self._kills
        self._kills = kills
        if record.out_of_memory:
            record.lost += ", as there was no memory left"
            return False
        self._losses[record.index] = self._losses.get(record.index, 0) + 1
        return self._losses[record.index] <= self._lost_retries


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
    """Tell who waits, if anybody does and can be reached, that a chunk has ended."""
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
    settings = layout.read_json("settings")
    header, items = layout.read_chunk(number)
    call = layout.read(f"calls/{header.call}")
    before = read(*layout.parts(number))  # of this job, before it was begun anew
    run = f"{os.environ.get('SLURM_RESTART_COUNT') or os.environ.get('RESTARTED') or 0}"
    part = final.with_name(f"{number}.{job}_{element}.{run}.part")
    writer = Writer(part, final, f"{job}_{element}", socket.gethostname())
    for record in before.records.values():
        writer.add("record", record)
    if isinstance(items, bytes):
        end = run_whole(settings, call, items, writer)
    else:
        left = [item for item in items if item[0] not in before.records]
        doing = Items(settings, call, header, left, writer)
        for warning in WARNINGS:
            signal.signal(warning, lambda *_: doing.stop("wall time"))
        signal.signal(signal.SIGTERM, lambda *_: doing.stop("ended"))
        end = doing.run()
    writer.close(end)
    tell(layout, number)


def main() -> None:
    """Do what the arguments say."""
    layout, array, element = Layout(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for warning in WARNINGS:  # SGE sends it to all processes of a job
        signal.signal(warning, signal.SIG_IGN)
    work(layout, array, element)

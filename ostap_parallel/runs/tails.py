"""The last words of workers: what they had printed when an item failed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Of what a worker prints so many lines, of so many characters, are kept, and of these so many
# characters for an item.
LINES = 100
LENGTH = 500
MOST_TEXT = 4000

# Workers of which lines are kept at most.
MOST = 1000

# Seconds before an item, and after it, in which a line is taken for one of its: what is printed
# on hosts comes by a way of its own, and may come later than the result.
BEFORE, AFTER = 0.2, 1.0

Lines = deque[tuple[float, str]]  # with the times when they came


@dataclass
class Tail:
    """The last lines that a worker has printed about a time.

    Attributes
    ----------
    begin, end
        From when to when, in seconds since the epoch.
    text
        The lines, once it is `closed`.
    """

    begin: float
    end: float
    text: str = ""
    closed: bool = False

    def close(self, lines: Lines) -> None:
        """Take the lines that are there."""
        self.closed = True
        text = "\n".join(text for came, text in lines if self.begin <= came <= self.end)
        self.text = text[-MOST_TEXT:]


class Tails:
    """The last lines that each worker has printed.

    Parameters
    ----------
    hand_on
        Gets all that is heard.
    """

    def __init__(self, hand_on: Callable[[str, Mapping[str, Any]], object]) -> None:
        self._hand_on = hand_on
        self._lock = threading.Lock()
        self._lines: dict[tuple[str, int], Lines] = {}
        self._open: dict[tuple[str, int], list[Tail]] = {}

    def hear(self, host: str, event: Mapping[str, Any]) -> None:
        """Take a line that a worker has printed or logged, see `machine.output.Sink`."""
        self._hand_on(host, event)
        if event["kind"] == "log":
            record = logging.makeLogRecord(dict(event["record"]))
            text = f"{record.levelname} {record.name}: {record.getMessage()}"
        else:
            text = event["text"]
        now, worker = time.time(), (host, event["pid"])
        with self._lock:
            if len(self._lines) > MOST:  # workers that have gone
                self._close_all()
                self._lines.clear()
            lines = self._lines.setdefault(worker, deque(maxlen=LINES))
            if (tails := self._open.get(worker)) and tails[0].end < now:
                for tail in tails:
                    if tail.end < now:
                        tail.close(lines)
                self._open[worker] = [tail for tail in tails if not tail.closed]
            lines.append((now, text[:LENGTH]))

    def about(self, host: str, pid: int, seconds: float) -> Tail:
        """Return the last lines of a worker that has just ended something that took so long."""
        now = time.time()
        tail = Tail(now - seconds - BEFORE, now + AFTER)
        with self._lock:
            self._open.setdefault((host, pid), []).append(tail)
        return tail

    def close(self) -> None:
        """End all that is still open: nothing more will come."""
        with self._lock:
            self._close_all()

    def _close_all(self) -> None:
        for worker, tails in self._open.items():
            for tail in tails:
                tail.close(self._lines.get(worker, deque()))
        self._open.clear()

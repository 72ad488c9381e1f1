"""When to stop running commands before the last, in GNU parallel's words."""

from __future__ import annotations

import re

from ostap_parallel.commands.command import Done
from ostap_parallel.errors import ConfigError

_FORM = re.compile(r"(now|soon),(fail|success|done)=(\d+)(%?)")

# Older words for the same.
_OLD = {
    "0": "never",
    "1": "soon,fail=1",
    "2": "now,fail=1",
    "-1": "soon,success=1",
    "-2": "now,success=1",
}

# A percentage of nobody knows how many means nothing before so many have failed, or ended well.
FEWEST = 3

# So many failures at most are told by an exit status.
MOST = 100


class Halt:
    """Stops a run: ``"now,fail=1"``, ``"soon,fail=10%"``, ``"now,success=1"``, ``"soon,done=5"``.

    ``soon`` begins no more commands, ``now`` also ends those that run; a percentage is that of all
    commands. Raises ConfigError for other text.

    Attributes
    ----------
    is_set
        Whether there is anything that stops it.
    is_now
        Whether to end what runs.
    is_percentage
        Whether it needs to know how many commands there are.
    total
        How many there are, if that is known; else a percentage is that of those that have ended.
    reached
        What was the last straw.
    """

    def __init__(self, text: str = "never") -> None:
        self.reached: Done | None = None
        self.total: int | None = None
        self._counts = {"fail": 0, "success": 0, "done": 0}
        words = _OLD.get(text, f"soon,fail={text}" if re.fullmatch(r"\d+%", text) else text)
        form = _FORM.fullmatch(words)
        if form is None and words != "never":
            raise ConfigError(
                f"halt: {text!r} is not understood: never, or one of now and soon, a comma, and "
                "fail, success or done with a number or percentage, as in now,fail=1"
            )
        self.is_set = form is not None
        self.is_now = form is not None and form[1] == "now"
        self._why, self._limit = (form[2], int(form[3])) if form else ("done", 0)
        self.is_percentage = bool(form and form[4])

    def count(self, done: Done) -> bool:
        """Count what has ended; return whether this is when to stop."""
        if done.is_skipped:
            return False
        counts = self._counts
        counts["done"] += 1
        counts["success" if done.succeeded else "fail"] += 1
        if self.reached or not self._limit:
            return False
        is_cause = self._why == "done" or done.succeeded == (self._why == "success")
        if is_cause and self._is_enough(counts[self._why]):
            self.reached = done
        return self.reached is done

    def _is_enough(self, count: int) -> bool:
        if not self.is_percentage:
            return count >= self._limit
        total = self.total or self._counts["done"]
        is_known = self.total is not None or count >= FEWEST
        return is_known and count * 100 >= self._limit * total

    @property
    def status(self) -> int:
        """The exit status for all: GNU parallel's.

        It is the number of failures, 101 for more than 100; or where a percentage is the limit,
        that of failures; of a limit of 1 that was reached, the status of the last straw; 0 where
        as many were wanted that end well, and have.
        """
        failed, last = self._counts["fail"], self.reached
        if last is not None and self._why == "success":
            return 0
        if self.is_percentage:
            return -(-failed * 100 // (self.total or self._counts["done"] or 1))
        if last is not None and self._limit == 1:
            if last.timed_out or (last.status is None and last.signal is None):
                return 255
            return 128 + last.signal if last.signal is not None else last.status or 0
        return min(failed, MOST + 1)

"""When to stop running commands before the last, in GNU parallel's words."""

from __future__ import annotations

import re

from ostap_parallel.commands.command import Done
from ostap_parallel.errors import ConfigError

_FORM = re.compile(r"(now|soon),(fail|success|done)=(\d+)(%?)")

# A percentage means nothing before so many have failed, or ended well.
FEWEST = 3


class Halt:
    """Stops a run: ``"now,fail=1"``, ``"soon,fail=10%"``, ``"now,success=1"``, ``"soon,done=5"``.

    ``soon`` begins no more commands, ``now`` also ends those that run. Raises ConfigError for
    other text.

    Attributes
    ----------
    is_now
        Whether to end what runs.
    reached
        What was the last straw.
    """

    def __init__(self, text: str = "never") -> None:
        self.reached: Done | None = None
        self._counts = {"fail": 0, "success": 0, "done": 0}
        form = _FORM.fullmatch(text)
        if form is None and text not in ("never", "0"):
            raise ConfigError(
                f"halt: {text!r} is not understood: never, or one of now and soon, a comma, and "
                "fail, success or done with a number or percentage, as in now,fail=1"
            )
        self.is_now = form is not None and form[1] == "now"
        self._why, self._limit = (form[2], int(form[3])) if form else ("done", 0)
        self.is_percentage = bool(form and form[4])

    def count(self, done: Done) -> bool:
        """Count what has ended; return whether this is when to stop."""
        counts = self._counts
        counts["done"] += 1
        counts["success" if done.succeeded else "fail"] += 1
        if self.reached or not self._limit or done.is_skipped:
            return False
        count = counts[self._why]
        if self.is_percentage:
            is_enough = count >= FEWEST and count * 100 >= self._limit * counts["done"]
        else:
            is_enough = count >= self._limit
        is_cause = self._why == "done" or done.succeeded == (self._why == "success")
        if is_enough and is_cause:
            self.reached = done
        return self.reached is done

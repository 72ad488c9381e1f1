"""What several test files share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], seconds: float, what: str) -> T:
    """Look every 20 ms until `predicate` returns something true, and return that.

    Raises
    ------
    AssertionError
        It did not within `seconds`; the text holds `what` and what was returned last.
    """
    deadline = time.monotonic() + seconds
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what} (last: {value!r})"
        time.sleep(0.02)
    return value

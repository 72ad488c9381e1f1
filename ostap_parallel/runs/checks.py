"""Whether the numbers that a run is given make sense, before anything expensive starts."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sized
from numbers import Integral, Real
from typing import Any

from ostap_parallel.engine.backend import Backend


def length_of(items: Iterable[Any]) -> int | None:
    """Return the number of items, if the input tells it."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:  # of a progress bar around a generator, for example
        return None


def check_number(name: str, value: Any, least: int, or_none: bool = False) -> None:
    """Raise ValueError unless it is a whole number that is large enough, or may be ``None``."""
    if or_none and value is None:
        return
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} on, not {value!r}")


def check_callable(name: str, value: Any) -> None:
    """Raise TypeError unless it can be called, or is ``None``."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, not {value!r}")


def check_seed(seed: Any) -> None:
    """Raise TypeError unless it is a whole number, a text or ``None``."""
    if seed is not None and not isinstance(seed, Integral | str):
        raise TypeError(f"seed must be a whole number or a text, not {seed!r}")


def check_timeout(timeout: Any, backend: Backend) -> None:
    """Raise ValueError unless it is a time, TypeError if the backend cannot limit it."""
    if timeout is None:
        return
    is_number = isinstance(timeout, Real) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout <= threading.TIMEOUT_MAX / 2:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
    if not backend.abilities.time_limit:
        raise TypeError(f"timeout is for our own workers: {backend.name} cannot end an item")

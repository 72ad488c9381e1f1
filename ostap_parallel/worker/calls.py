"""Functions that the faces send in place of the user's, which they call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def spread(function: Callable[..., Any], args: Iterable[Any]) -> Any:
    """Call a function with arguments that travel as one item."""
    return function(*args)


def call_each(function: Callable[..., Any], many: Iterable[Iterable[Any]]) -> list[Any]:
    """Call a function with each of many sets of arguments."""
    return [function(*args) for args in many]

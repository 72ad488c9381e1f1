"""Functions that the faces send in place of the user's, which they call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from itertools import accumulate
from typing import Any

# Whether this is a task on somebody else's executor, where nothing leads back to the caller.
on_foreign: ContextVar[bool] = ContextVar("on_foreign", default=False)


@contextmanager
def being_on_foreign() -> Iterator[None]:
    """Have this be a task on somebody else's executor."""
    token = on_foreign.set(True)
    try:
        yield
    finally:
        on_foreign.reset(token)


def spread(function: Callable[..., Any], args: Iterable[Any]) -> Any:
    """Call a function with arguments that travel as one item."""
    return function(*args)


def call_each(function: Callable[..., Any], many: Iterable[Iterable[Any]]) -> list[Any]:
    """Call a function with each of many sets of arguments."""
    return [function(*args) for args in many]


Operation = Callable[[Any, Any], Any]


def reduce_block(
    function: Callable[..., Any], operation: Operation, block: Iterable[Iterable[Any]]
) -> Any:
    """Call a function with each of many sets of arguments; reduce what it returns."""
    return reduce(operation, (function(*args) for args in block))


def scan_block(
    function: Callable[..., Any], operation: Operation, block: Iterable[Iterable[Any]]
) -> list[Any]:
    """As `reduce_block`, and return what it has come to after each call."""
    return list(accumulate((function(*args) for args in block), operation))


def prepend(operation: Operation, before: Any, block: Sequence[Any]) -> list[Any]:
    """Continue a scan with that of a block."""
    return [operation(before, value) for value in block]

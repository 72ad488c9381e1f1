"""Loggers whose handlers, which are the user's, may raise: what is lost is that record."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:  # which Python 3.10 cannot subscribe
    Adapter = logging.LoggerAdapter


class Logger(Adapter):
    """A logger that never raises: who logs is often a thread on which a host, or all, depends."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message; of the first handler that raises standard error tells."""
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        try:
            super().log(level, msg, *args, **kwargs)
        except Exception as exc:  # a handler, a filter or a formatter
            tell(exc)


def logger_of(name: str) -> Logger:
    """Return the logger with a name."""
    return Logger(logging.getLogger(name), {})


def hand_on(host: str, record: logging.LogRecord) -> None:
    """Log what was logged on a host, as its logger here does, with the host before its name.

    A logger of that longer name, or of the beginning of it, decides what it has been told.
    """
    logger = logging.getLogger(record.name)
    record.name = f"{host}.{record.name}"
    words = record.name.split(".")
    known = logger.manager.loggerDict
    named = [known.get(".".join(words[:n])) for n in range(len(words), 0, -1)]
    own = [one for one in named if isinstance(one, logging.Logger)]
    shown = vars(record).pop(SHOWN, {})
    decides = next((one for one in own if one.level), logger)
    if not decides.isEnabledFor(record.levelno):
        return
    if any(one.handlers or not one.propagate for one in own):
        own[0].handle(record)
    elif all(one.filter(record) and not one.disabled for one in own[:1]):
        _handle(logger, record, shown)


# The field of a record in which `shown_by` travels.
SHOWN = "ostap_parallel_shown"


def shown_by(record: logging.LogRecord, is_near: bool) -> dict[str, list[str]]:
    """Return the kinds of handlers that a record has here on its way to the root, by logger.

    Modules bring handlers, here as where the script runs: what they show, on standard error for
    example, arrives anyhow; what they write into files does not, unless this `is_near`.
    """
    hidden = (logging.NullHandler,) if is_near else (logging.NullHandler, logging.FileHandler)
    shown, one = {}, logging.getLogger(record.name)
    while one.parent is not None:
        kinds = [
            type(handler).__qualname__
            for handler in one.handlers
            if record.levelno >= handler.level and not isinstance(handler, hidden)
        ]
        if kinds:
            shown[one.name] = kinds
        one = one.parent
    return shown


def _handle(
    logger: logging.Logger, record: logging.LogRecord, shown: dict[str, list[str]]
) -> None:
    """Do what a logger does with a record, without the handlers that have `shown` it there."""
    if not shown:
        logger.handle(record)
        return
    if logger.disabled or not (passed := logger.filter(record)):
        return
    if isinstance(passed, logging.LogRecord):  # from Python 3.12 on
        record = passed
    one: logging.Logger | None = logger
    while one is not None:
        kinds = [*shown.get(one.name, ())]
        for handler in one.handlers:
            if (kind := type(handler).__qualname__) in kinds:
                kinds.remove(kind)
            elif record.levelno >= handler.level:
                handler.handle(record)
        one = one.parent if one.propagate else None


def tell(error: Exception) -> None:
    """Say on standard error, once, that a handler of the user's has raised."""
    if os.getpid() in _told:
        return
    _told.add(os.getpid())
    with contextlib.suppress(Exception):  # it may be closed, or its text not to be had
        text = f"a handler of logging has raised {type(error).__name__}: {error}"
        print(f"ostap_parallel: {text}; what it should have shown is lost", file=sys.stderr)


_told: set[int] = set()  # processes

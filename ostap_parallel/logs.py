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
    decides = next((one for one in own if one.level), logger)
    if not decides.isEnabledFor(record.levelno):
        return
    if any(one.handlers or not one.propagate for one in own):
        own[0].handle(record)
    elif all(one.filter(record) and not one.disabled for one in own[:1]):
        logger.handle(record)


def tell(error: Exception) -> None:
    """Say on standard error, once, that a handler of the user's has raised."""
    if os.getpid() in _told:
        return
    _told.add(os.getpid())
    with contextlib.suppress(Exception):  # it may be closed, or its text not to be had
        text = f"a handler of logging has raised {type(error).__name__}: {error}"
        print(f"ostap_parallel: {text}; what it should have shown is lost", file=sys.stderr)


_told: set[int] = set()  # processes

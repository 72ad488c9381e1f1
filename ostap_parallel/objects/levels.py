"""What a script has told its loggers to let through, which those of workers let through, too."""

from __future__ import annotations

import logging
import sys
from typing import ClassVar

from ostap_parallel import libraries

# By the name of a logger, its level and whether it is disabled, of those that were told anything;
# the root's is "". Last the level up to which nothing at all is logged, see `logging.disable`.
Levels = tuple[dict[str, tuple[int, bool]], int]


class _Here:
    """What this process, a worker, was told."""

    told: ClassVar[Levels] = ({}, 0)


def look() -> Levels:
    """Return what this process has told its loggers."""
    root = logging.getLogger()
    found = {
        name: (one.level, one.disabled)
        for name, one in list(root.manager.loggerDict.items())
        if isinstance(one, logging.Logger) and (one.level or one.disabled)
    }
    found[""] = root.level, root.disabled
    return found, root.manager.disable


def told() -> Levels:
    """Return what this process was told, as `look` does in that of the caller."""
    return _Here.told


def take(wanted: Levels) -> None:
    """Tell the loggers here what `look` has returned; the others stay as they are."""
    (before, _), (loggers, least) = _Here.told, wanted
    if logging.Logger.setLevel is _usual:
        logging.Logger.setLevel = _set_level  # type: ignore[method-assign,assignment]
    for name in {*before, *loggers}:
        if loggers.get(name) != before.get(name):
            logger = logging.getLogger(name)
            level, logger.disabled = loggers.get(name, (logging.NOTSET, False))
            logger.setLevel(level)
    logging.disable(least)
    _Here.told = wanted


_usual = logging.Logger.setLevel


def _set_level(logger: logging.Logger, level: int | str) -> None:
    """Set the level of a logger, unless a module does so as it is imported, and the script has.

    In the script's process that module was there before.
    """
    if logger.name not in _Here.told[0] or not libraries.is_importing(sys._getframe(1)):
        _usual(logger, level)

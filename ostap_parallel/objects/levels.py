"""What a script has told its loggers to let through, which those of workers let through, too."""

from __future__ import annotations

import logging
from typing import ClassVar

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
    _Here.told = wanted
    for name in {*before, *loggers}:
        if loggers.get(name) != before.get(name):
            logger = logging.getLogger(name)
            level, logger.disabled = loggers.get(name, (logging.NOTSET, False))
            logger.setLevel(level)
    logging.disable(least)

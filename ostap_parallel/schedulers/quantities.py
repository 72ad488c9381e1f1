"""Memory and times, as people write them."""

from __future__ import annotations

import re
from datetime import timedelta

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?", re.IGNORECASE)
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d{1,2}):(\d{1,2})")
_DAYS = re.compile(r"(\d+)-(\d{1,2})(?::(\d{1,2}))?")  # as SLURM has them: days, hours, minutes
_WORDS = r"s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?)?|h(?:ours?)?|d(?:ays?)?"
_SPAN = re.compile(rf"(\d+(?:\.\d+)?)\s*({_WORDS})", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """Return the bytes of e.g. ``"4G"`` or ``"500M"``; 0 for an empty text.

    Raises ValueError with what is expected.
    """
    if not text:
        return 0
    found = _MEMORY.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None or not float(found[1]):
        raise ValueError(
            f"memory must be a number with its unit, such as 500M or 4G, not {text!r}"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_walltime(text: str | int | timedelta) -> int:
    """Return the seconds of e.g. ``"4:00:00"``, ``"1-12:00:00"`` or ``"90m"``; 0 for none.

    A number is seconds. Raises ValueError with what is expected.
    """
    number = int(text.total_seconds()) if isinstance(text, timedelta) else text
    if isinstance(number, int) and not isinstance(number, bool) and number > 0:
        return number
    if text == "":
        return 0
    found = None
    if isinstance(text, str):
        if span := _SPAN.fullmatch(text.strip()):
            return int(float(span[1]) * _SECONDS[span[2][0].lower()])
        found = _TIME.fullmatch(text.strip()) or _DAYS.fullmatch(text.strip())
    if found is None:
        example = "4:00:00, 1-12:00:00 or 90m"
        raise ValueError(f"walltime must be a time such as {example}, or seconds, not {text!r}")
    days, hours, minutes, *seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + sum(seconds)


def clock(seconds: int) -> str:
    """Return seconds as ``H:MM:SS``, which every batch system takes."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

"""Numbers in words, as all views write them."""

from __future__ import annotations

from datetime import timedelta


def duration(seconds: float) -> str:
    """Return a time in few characters, e.g. ``1.5 ms``, ``43.1 s``, ``2:05:00``."""
    if seconds < 0.9995:  # 999.5 ms would be written as 1e+03
        return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    return str(timedelta(seconds=round(seconds)))


def printable(text: str) -> str:
    """Return a text without what would steer a terminal; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


def cut(text: str, length: int) -> str:
    """Return a text of so many characters at most; dots stand for what is missing."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def named(index: int, item: str) -> str:
    """Return which item it is, with its text if that is known."""
    return f"item {index} ({item})" if item else f"item {index}"

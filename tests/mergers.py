"""Functions and mergers for workers here and on hosts."""

from __future__ import annotations

import operator
import os
import signal
import time
from pathlib import Path

BUFFER: list[int] = [0]
FUSES = "combine-fuse"


def name_of(item):
    return [item]


def reused(item):
    """Return the same object each time, as code that saves memory does."""
    BUFFER[0] = item
    return BUFFER


def join(merged, result):
    merged += result
    return merged


def unlucky(item):
    if item % 7 == 3:
        raise ValueError(item)
    return [item]


def lucky_later(item, folder):
    """Raise at the first attempt."""
    file = Path(folder, f"{FUSES}-{item}")
    if item % 7 == 3 and not file.exists():
        file.touch()
        raise ValueError(item)
    return [item]


def dies_once(item, folder):
    """Kill the worker at the first attempt, in the middle of a chunk."""
    file = Path(folder, f"{FUSES}-{item}")
    if item in (13, 57) and not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [item]


def dies(item):
    if item == 5:
        os._exit(3)
    return [item]


def slowly(item):
    time.sleep(0.01)
    return [item]


def refuses(merged, result):
    if 5 in result:
        raise ArithmeticError("five is not to be merged")
    return merged + result


def slow_sum(merged, result):
    time.sleep(0.01)
    return merged + result


def hangs(item):
    if item == 4:
        time.sleep(60)
    return [item]


def block(item):
    """Return something large that adds."""
    return Vector([item] * 10_000)


class Vector:
    """Adds element by element, as a histogram does."""

    def __init__(self, values):
        self.values = values

    def __add__(self, other):
        return Vector(list(map(operator.add, self.values, other.values)))

    def __eq__(self, other):
        return self.values == other.values


class Unpackable:
    """Adds to something that cannot be sent."""

    def __add__(self, other):
        return (item for item in ())

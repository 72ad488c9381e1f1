"""What SCOOP's own examples compute, with the import changed."""

from __future__ import annotations

import random
import time

import ostap_parallel as scoop
from ostap_parallel import futures, shared


def add(left, right):
    return left + right


def offset(left, right, *, by):
    return left + right + by


def hits(tries):
    """Count the points, of so many, that are in the quarter of a circle."""
    draw = random.Random(tries)
    return sum(draw.random() ** 2 + draw.random() ** 2 < 1 for _ in range(tries))


def tree(depth):
    """Return the number of leaves of a binary tree, each of whose nodes is a task."""
    return 1 if depth == 0 else sum(futures.map(tree, [depth - 1] * 2))


def queens(size, columns=()):
    """Return in how many ways queens can be placed in the rows that are left."""
    row = len(columns)
    if row == size:
        return 1
    free = [
        column
        for column in range(size)
        if all(column != c and abs(column - c) != row - r for r, c in enumerate(columns))
    ]
    boards = [(*columns, column) for column in free]
    if row > 1:
        return sum(queens(size, board) for board in boards)
    found = [futures.submit(queens, size, board) for board in boards]
    return sum(future.result() for future in futures.as_completed(found))


def scaled(number):
    return shared.getConst("factor") * number


def set_greeting(text):
    shared.setConst(greet=lambda name: f"{text} {name}")


def all_in_a_task(count):
    """Return what each function returns when a task calls it."""
    future = futures.submit(divmod, count, 0)
    return {
        "origin": scoop.IS_ORIGIN,
        "size": scoop.SIZE,
        "map": list(futures.map(max, range(count), [2] * count)),
        "as completed": sorted(futures.map_as_completed(abs, range(count))),
        "reduce": futures.map_reduce(str, add, range(count)),
        "scan": futures.map_scan(abs, add, range(count)),
        "error": type(future.exception()).__name__,
        "wait": futures.wait([future]).done == {future} == set(futures.as_completed([future])),
    }


def times_out(seconds):
    """Return whether a time limit holds within a task."""
    try:
        return list(futures.map(time.sleep, [seconds] * 8, timeout=0.05))
    except futures.TimeoutError:
        return True

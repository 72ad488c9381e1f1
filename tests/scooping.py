"""What SCOOP's own examples compute, with the import changed."""

from __future__ import annotations

import random

from ostap_parallel import futures, shared


def add(left, right):
    return left + right


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

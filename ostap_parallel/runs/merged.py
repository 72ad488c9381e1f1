"""What workers have merged of the items of a chunk, and what was raised in that."""

from __future__ import annotations

from ostap_parallel.errors import add_note
from ostap_parallel.runs.chunking import Item
from ostap_parallel.runs.outcome import Combined
from ostap_parallel.worker.chunk import ChunkOutcome, traced, unpack_error, unpack_value


def combined(result: ChunkOutcome, items: list[Item], start: int, stop: int) -> Combined:
    """Return items that were merged on the worker; raises what their value does in reading."""
    merged = items[start:stop]
    indices = [item.index for item in merged]
    try:
        value = unpack_value(result.answers[start])
    except Exception as exc:  # user code
        add_note(exc, f"while what items {indices[0]} to {indices[-1]} were merged to was read")
        raise
    rest = (result.seconds[start:stop], result.host, result.pid)
    return Combined(indices, [item.item for item in merged], [value], *rest)


def merge_error(result: ChunkOutcome, items: list[Item]) -> BaseException:
    """Return what merging on a worker has raised, with where that was."""
    assert result.merge_failure is not None
    start, stop, packed = result.merge_failure
    error, text = unpack_error(packed)
    assert error is not None  # it has no time limit
    what = f"while the results of items {items[start].index} to {items[stop - 1].index}"
    what += " were merged"
    traced(error, result, text, what)
    add_note(error, f"{what} on {result.host}, process {result.pid}")
    return error

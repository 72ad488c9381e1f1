"""What follows from what a job has told: which items are done, and which are begun again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ostap_parallel.arrays.layout import Header
from ostap_parallel.arrays.records import Record, Told
from ostap_parallel.arrays.settings import Settings
from ostap_parallel.arrays.watching import LOST, STUCK
from ostap_parallel.engine.retries import HOST_RETRIES
from ostap_parallel.errors import WorkerLost
from ostap_parallel.runs.outcome import Outcome
from ostap_parallel.schedulers.scheduler import End
from ostap_parallel.worker.chunk import traced, unpack_answer

# Ends for which no item is to blame that had not begun.
_AGAIN = {
    *(End.WALLTIME.value, End.MEMORY.value, End.NODE.value, End.PREEMPTED.value),
    *(STUCK, LOST),
}


@dataclass
class Again:
    """Items that are begun again, together."""

    indices: list[int] = field(default_factory=list)
    attempt: int = 1
    blameless: int = 0


@dataclass
class Verdict:
    """What becomes of the items of a chunk.

    Attributes
    ----------
    records
        Of those for which there will be no other.
    failed
        Why others have failed, by index.
    again
        Those that are begun again.
    """

    records: dict[int, Record] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    again: list[Again] = field(default_factory=list)


def judge(settings: Settings, header: Header, told: Told) -> Verdict:
    """Return what becomes of the items of a chunk, which is the same whenever it is asked."""
    verdict = Verdict()
    more = Again([], header.attempt + 1)
    progress = bool(told.records)
    untouched = Again([], header.attempt, 0 if progress else header.blameless + 1)
    may_go_on = header.attempt <= settings.retries
    for index in header.indices:
        record = told.records.get(index)
        if record is not None:
            if may_go_on and _wants_more_memory(settings, header, record):
                more.indices.append(index)
            else:
                verdict.records[index] = record
        elif told.end == "wall time" and told.has_begun and index not in told.running:
            untouched.indices.append(index)  # there was no time to begin it
        elif _takes_too_long(settings, header, told):
            verdict.failed[index] = _too_long(settings, header, told)
        elif not _is_worth_it(told):
            verdict.failed[index] = told.words or told.end
        elif told.has_begun and index not in told.running and (progress or told.end != LOST):
            untouched.indices.append(index)
        else:
            more.indices.append(index)
    if more.indices and not may_go_on:
        reason = f"{told.end}, {header.attempt} times: {told.words}"
        verdict.failed.update(dict.fromkeys(more.indices, reason))
        more.indices = []
    if untouched.blameless > HOST_RETRIES:
        verdict.failed.update(dict.fromkeys(untouched.indices, f"{told.end}: {told.words}"))
        untouched.indices = []
    verdict.again = [again for again in (more, untouched) if again.indices]
    return verdict


def _takes_too_long(settings: Settings, header: Header, told: Told) -> bool:
    """Return whether items that ran at the end of a job's wall time have had all of it, again.

    All of the chunk have begun with the job, and the next one would have no more time.
    """
    is_again = header.attempt > 1 and len(header.indices) <= settings.processes
    return told.end == End.WALLTIME.value and is_again and len(settings.walltime) == 1


def _too_long(settings: Settings, header: Header, told: Told) -> str:
    time = settings.walltime[0] or "that the site gives"
    remedy = "ask for more by walltime=, which may be a function of the attempt"
    what = f"wall time, {header.attempt} times: it had all of a job's ({time})"
    return f"{what}: {remedy}: {told.words}"


def _is_worth_it(told: Told) -> bool:
    """Return whether what has not ended may end well another time.

    A job that fails before it begins will do so again, and one that was cancelled was meant to.
    """
    if told.end == End.FAILED.value:
        return told.has_begun
    return told.end in _AGAIN or (told.end == End.DONE.value and not told.has_begun)


def _wants_more_memory(settings: Settings, header: Header, record: Record) -> bool:
    """Return whether another attempt may have memory enough for an item.

    If it has no more than this one, it is tried once: others may have had too much. Where memory
    is limited by the address space, the program is told so and may raise that.
    """
    if record.ok:
        return False
    if record.out_of_memory:
        return len(settings.memory) > 1 or header.attempt == 1
    if len(settings.memory) == 1 or record.lost:
        return False
    return isinstance(outcome_of(record).error, MemoryError)


def outcome_of(record: Record) -> Outcome:
    """Return what became of an item, with its value or error as it was."""
    rest: tuple[Any, ...] = (record.host, record.pid, record.seconds, record.attempt)
    if record.lost:
        reason = record.lost + _quoted(record.stderr)
        error: BaseException = WorkerLost(record.index, record.host, reason)
        return Outcome(record.index, None, None, error, reason, *rest)
    what, result = f"item {record.index}", record.outcome()
    value, failure, text = unpack_answer(result, 0, what)
    if failure is not None:
        traced(failure, result, text, what)
    return Outcome(record.index, None, value, failure, text, *rest)


def _quoted(text: str) -> str:
    """Return the last lines that a worker has printed, to be put behind how it has ended."""
    lines = text.strip().splitlines()[-10:]
    return "".join(f"\n  {line}" for line in lines)


def failure_of(index: int, reason: str, attempt: int) -> Outcome:
    """Return what became of an item whose jobs have ended before it did."""
    error = WorkerLost(index, "", reason)
    return Outcome(index, None, None, error, reason, "", 0, 0.0, attempt)

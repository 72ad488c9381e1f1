"""What a caller and a server on a host say to one another, over one connection for all jobs.

Each message begins with a letter, and most with a number or a digest. A job is preceded by its
function, as `transport.Remembering.csend` sends it. What is large is sent in pieces, so that what
is urgent need not wait for it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from ostap_parallel.machine.usage import Doing

# Of the caller.
FUNCTION = b"HN"  # either letter: what the next job is run by
JOB = b"J"
STOP = b"S"  # a number, and that of a signal, or 0: to give the job up
WHERE = b"L"  # a number: what the worker of that job does
ANSWER = b"A"  # a number, and the answer to what that job has asked
OFFER = b"B"  # what jobs refer to by its digest: the server says whether it is to be sent
PIECE = b"D"
FORGET = b"X"  # a digest: no job refers to that any more

# Of the server.
WORKERS = b"W"  # how many there are
RESULT = b"R"
PLACE = b"P"  # a number, and the answer to `WHERE`, see `pack_place`
QUESTION = b"?"  # a number, and what that job asks
BUSY = b"!"  # a number: no worker is free for that job
WANTED = b"G"  # a digest: it is to be sent
PRESENT = b"O"  # a digest: it is there
REFUSED = b"E"  # a digest, and why it cannot be taken

DIGEST_SIZE = 32  # characters
PIECE_SIZE = 1 << 18

_JOB = struct.Struct(">cQBBB")
_NUMBER = struct.Struct(">cQ")
_STOP = struct.Struct(">cQB")
_PLACE = struct.Struct(">cQqQQd")


class JobHead(NamedTuple):
    """What is said of a job: its number, whether it must not wait, and what it refers to."""

    number: int
    if_free: bool
    is_short: bool
    blobs: Sequence[str]
    modules: str


def pack_job(head: JobHead, chunk: bytes) -> bytes:
    """Return the message for a job."""
    flags = head.if_free | head.is_short << 1
    blobs = " ".join(head.blobs).encode()
    start = _JOB.pack(JOB, head.number, flags, len(blobs), len(head.modules))
    return b"".join([start, blobs, head.modules.encode(), chunk])


def unpack_job(message: bytes) -> tuple[JobHead, bytes]:
    """Undo `pack_job`."""
    _, number, flags, first, second = _JOB.unpack_from(message)
    start = _JOB.size
    blobs = message[start : start + first].decode().split()
    modules = message[start + first : start + first + second].decode()
    head = JobHead(number, bool(flags & 1), bool(flags & 2), blobs, modules)
    return head, message[start + first + second :]


def pack(kind: bytes, number: int, rest: bytes = b"") -> bytes:
    """Return a message about a number."""
    return _NUMBER.pack(kind, number) + rest


def unpack(message: bytes) -> tuple[int, bytes]:
    """Return the number and the rest of a message."""
    return _NUMBER.unpack_from(message)[1], message[_NUMBER.size :]


def pack_stop(number: int, signal: int = 0) -> bytes:
    """Return the message that stops a job, or sends its worker a signal and no more."""
    return _STOP.pack(STOP, number, signal)


def unpack_stop(message: bytes) -> tuple[int, int]:
    """Undo `pack_stop`."""
    _, number, signal = _STOP.unpack(message)
    return number, signal


def pack_place(number: int, doing: Doing) -> bytes:
    """Return the message about what the worker of a job does."""
    return _PLACE.pack(PLACE, number, *doing)


def unpack_place(message: bytes) -> tuple[int, Doing]:
    """Undo `pack_place`."""
    _, number, *doing = _PLACE.unpack(message)
    return number, Doing(*doing)


def pack_digest(kind: bytes, digest: str, rest: bytes = b"") -> bytes:
    """Return a message about a digest."""
    return kind + digest.encode() + rest


def unpack_digest(message: bytes) -> tuple[str, bytes]:
    """Return the digest and the rest of a message."""
    return message[1 : 1 + DIGEST_SIZE].decode(), message[1 + DIGEST_SIZE :]

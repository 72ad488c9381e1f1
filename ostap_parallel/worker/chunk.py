"""The bytes of a chunk and of what comes back, written and read here only.

A message for a chunk begins with where the shared object and the user's modules are on the
machine that runs it, and each of the two ends with a null byte. What comes back is a
`ChunkOutcome`, or `Lost`.

Items that are not plain are written one after another into a stream with one memo, so what they
share travels once per chunk. Each is read when its turn comes, so one that cannot be read harms
no other: those behind it are given back, and come again without it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import struct
import traceback
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ostap_parallel.errors import RemoteError, RemoteTraceback, SerializeError, last_words
from ostap_parallel.objects import serialize
from ostap_parallel.worker import modules

# Sent as they are inside a chunk's own list. (There, bytes stand for something serialised, and
# `NEXT` for what is next in the stream.)
PLAIN = (int, float, str, bool, type(None), complex)
ALL_PLAIN = frozenset(PLAIN)

NEXT = ...

# Why a chunk that was given up is lost.
INTERRUPTED = "it was interrupted"

# Characters that are kept of an exception's text and of its traceback.
MAX_TEXT = 100_000


@dataclass
class ChunkOutcome:
    """What became of a chunk.

    A worker gives the name of its machine as `host`; the caller puts in its own name for it.

    Attributes
    ----------
    answers
        For each item that ran, in the order of the chunk, its packed value, or, if it has failed,
        what `unpack_error` reads.
    seconds
        The time that each took.
    failed
        The positions of those that have failed.
    merged
        Ranges of positions whose values were merged: the answer of the first stands for all.
    merge_failure
        The range whose merging has failed, and what `unpack_error` reads.
    gave_back
        Whether items were left for others, as those before them had taken so long.
    was_prepared
        Whether the worker could be prepared; otherwise no item has begun, and all have failed.
    begun
        When the first item began, in seconds since the epoch by the clock there; 0: not known.
    """

    host: str
    pid: int
    answers: list[Any] = field(default_factory=list)
    seconds: array[float] = field(default_factory=lambda: array("d"))
    failed: set[int] = field(default_factory=set)
    merged: list[tuple[int, int]] = field(default_factory=list)
    merge_failure: tuple[int, int, bytes] | None = None
    gave_back: bool = False
    was_prepared: bool = True
    begun: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        seconds = self.seconds.tobytes()  # an array's own way takes longer than all else
        rest = self.failed, self.merged, self.merge_failure, self.gave_back, self.was_prepared
        return _outcome, (self.host, self.pid, self.answers, seconds, *rest, self.begun)

    def values(self, count: int) -> list[Any] | None:
        """Return the values of all items; ``None`` unless `count` of them have come singly."""
        if self.failed or self.merged or self.merge_failure or len(self.answers) != count:
            return None
        if bytes not in set(map(type, self.answers)):
            return self.answers
        try:
            return list(map(unpack_value, self.answers))
        except KeyboardInterrupt:
            raise
        except BaseException:  # user code
            return None


def _outcome(host: str, pid: int, answers: list[Any], seconds: bytes, *rest: Any) -> ChunkOutcome:
    return ChunkOutcome(host, pid, answers, array("d", seconds), *rest)


@dataclass(frozen=True)
class Lost:
    """What became of a chunk whose worker, connection or server ended before it did.

    Attributes
    ----------
    host
        Name of the host; empty where only the caller knows it.
    reason
        How it ended, e.g. ``"worker 4711 was killed by SIGKILL"``.
    by_worker
        The worker that ran the chunk died, so one of its items may be to blame.
    index
        The item that it was running then, if it was running one and that is known.
    timed_out
        It was ended as this item took too long and could not be interrupted.
    """

    host: str
    pid: int
    reason: str
    by_worker: bool = False
    index: int | None = None
    timed_out: bool = False


class Writer:
    """Writes the items of one chunk; `pack_chunk` takes what it gives.

    Parameters
    ----------
    cache
        See `serialize.dumps`.
    together
        What they share travels once. For values that all exist, and do not change, until the last
        of them has been added: one that is changed and added again would be taken for the same.

    Attributes
    ----------
    size
        Bytes so far, of what is not small.
    """

    def __init__(self, cache: dict[type, bytes] | None = None, together: bool = True) -> None:
        self.size = 0
        self._cache = cache
        self._stream = serialize.Stream(cache, _NOWHERE)
        self._is_open = together

    def add(self, value: Any, what: str) -> Any:
        """Return what stands for a value in the chunk's list; raises `SerializeError`."""
        if type(value) in PLAIN:
            self.size += len(value) if type(value) is str else 0
            return value
        if self._is_open:
            before = self._stream.size
            try:
                self._stream.add(value)
            except Exception:  # what others would share with it may not be there
                self._is_open = before == len(_NOWHERE)
                if self._is_open:
                    self._stream = serialize.Stream(self._cache, _NOWHERE)
            else:
                self.size += self._stream.size - before
                return NEXT
        packed = serialize.pack(value, what, cache=self._cache)
        self.size += len(packed)
        return packed

    def add_packed(self, packed: Any) -> Any:
        """Return what stands for a value that was added to another chunk, but `NEXT`."""
        self.size += len(packed) if type(packed) in (bytes, str) else 0
        return packed

    def stream(self) -> serialize.Stream:
        """Return what was written for those that `NEXT` stands for; `pack_chunk` takes it over."""
        return self._stream


def pack_chunk(
    indices: Sequence[int],
    items: Sequence[Any],
    stream: serialize.Stream | None = None,
    run: bytes = b"",
    limit: float = math.inf,
    settings: bytes = b"",
) -> bytes:
    """Return the argument message for a chunk of items, packed by a `Writer` or by `pack_value`.

    `run` is the same for all chunks of a run, and no other run has it; see `draw_id`.
    When the items have taken `limit` seconds, those that are left are given back. `settings` hold
    in place of the call's.
    """
    about = pickle.dumps((run, limit, settings, indices, items), serialize.PROTOCOL)
    about += _SIZE.pack(len(about))
    return _NOWHERE + about if stream is None else stream.complete(about)


def pack_call(function: Any, args: Iterable[Any], kwargs: Any, settings: bytes = b"") -> bytes:
    """Return the message for a chunk of one call, which `execute.apply` does; see `pack_chunk`."""
    call = function, tuple(args), dict(kwargs)
    if (item := serialize.dumps_call(call)) is not None:
        return pack_chunk([0], [item], settings=settings)
    writer = Writer()  # whose stream is copied nowhere, however large it is
    what = f"the call of {getattr(function, '__qualname__', type(function).__name__)}"
    item = writer.add(call, what)
    return pack_chunk([0], [item], writer.stream(), settings=settings)


def locate(chunk: bytes, locations: Iterable[str], places: bytes) -> bytes:
    """Return the message for a chunk with the places of what is shared and of modules there."""
    return b"".join((os.fsencode("\n".join(locations)), b"\0", places, memoryview(chunk)[1:]))


# Begins a message of which nothing is anywhere yet; what tells of the items ends it, as it is
# known last, and so much as may be in between is not copied. It is followed by its size.
_NOWHERE = b"\0\0"
_SIZE = struct.Struct("!Q")


_GOES_ON, _BEGINS_ANEW = b"+", b"-"


def draw_id(goes_on: bool) -> bytes:
    """Return an id for a run, which tells whether its items share the program with other runs."""
    return (_GOES_ON if goes_on else _BEGINS_ANEW) + os.urandom(16)


class Received:
    """A chunk as a worker has got it.

    Attributes
    ----------
    location, places
        Where the shared object and large arrays, a line each, and the user's modules are here.
    run, limit, settings, indices, items
        As of `pack_chunk`; each of `items` is to be read by `read`, in their order.
    goes_on
        Whether it shares the program with other runs, or is a call.
    is_broken
        Whether what is left of the stream cannot be read, as the last item could not.
    """

    def __init__(self, message: bytes) -> None:
        end = message.index(b"\0")
        begin = message.index(b"\0", end + 1) + 1
        self.location = os.fsdecode(message[:end])
        self.places = message[end + 1 : begin - 1]
        self._message, self._begin = message, begin
        end = len(message) - _SIZE.size
        (size,) = _SIZE.unpack_from(message, end)
        self.run: bytes
        self.limit: float
        self.indices: Sequence[int]
        self.items: Sequence[Any]
        self.settings: bytes
        about = pickle.loads(memoryview(message)[end - size : end])
        self.run, self.limit, self.settings, self.indices, self.items = about
        self.goes_on = not self.run or self.run.startswith(_GOES_ON)
        self.is_broken = False

    @cached_property
    def _stream(self) -> Any:
        file = io.BytesIO(self._message)
        file.seek(self._begin)
        return serialize.Unpickler(file)

    def read(self, packed: Any) -> Any:
        """Return an item, whose reading may run code of the user's."""
        if packed is not NEXT:
            return unpack_value(packed)
        self.is_broken = True
        value = self._stream.load()
        self.is_broken = False
        return value


def pack_value(value: Any, what: str) -> Any:
    """Return a result itself if it is plain, else its bytes; raises `SerializeError`."""
    return value if type(value) in PLAIN else serialize.pack(value, what, back=True)


def unpack_value(packed: Any) -> Any:
    """Undo `pack_value`."""
    return serialize.loads(packed) if type(packed) is bytes else packed


def pack_result(result: ChunkOutcome | Lost) -> bytes:
    """Return what a worker sends for `result`."""
    return pickle.dumps(result, serialize.PROTOCOL)


def unpack_result(message: bytes) -> ChunkOutcome | Lost:
    """Undo `pack_result`."""
    outcome: ChunkOutcome | Lost = pickle.loads(message)
    return outcome


def pack_error(exc: BaseException, is_over: Callable[[], bool] = bool) -> bytes:
    """Serialise an exception, what remains of it if it cannot travel, and its traceback.

    That time is over is asked last: it may be just this that takes too long.
    """
    words = "".join(f"the command wrote: {line}\n" for line in last_words(exc))
    text = _shorten("".join(_format_exception(exc)) + words)
    data = None
    # StopIteration would end the caller's iteration in place of being raised.
    if isinstance(exc, Exception) and not isinstance(exc, StopIteration):
        try:
            data = serialize.dumps(exc, back=True)
            # Many exceptions pickle well and fail in unpickling: try it where it costs nothing.
            if not isinstance(serialize.loads(data), type(exc)):
                data = None
        except BaseException:
            data = None
    name = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
    rest = None if is_over() else (name, _shorten(serialize.text_of(exc)))
    return pickle.dumps((data, rest, text), serialize.PROTOCOL)


def unpack_error(packed: bytes) -> tuple[BaseException | None, str]:
    """Return an item's exception and its traceback; ``None``: it took too long.

    An exception that cannot be read here, or could not be sent, becomes `RemoteError`.
    """
    data, rest, text = pickle.loads(packed)
    if rest is None:
        return None, text
    with contextlib.suppress(Exception, SystemExit, GeneratorExit):  # user code
        error = serialize.loads(data)
        if isinstance(error, BaseException):
            modules.advise(error)
            return error, text
    return RemoteError(*rest), text


def unpack_answer(
    result: ChunkOutcome, position: int, what: str
) -> tuple[Any, BaseException | None, str]:
    """Return value, error and traceback of an item; what cannot be read here is an error.

    Neither value nor error nor any text: that it took too long is told by the position alone,
    which is in `failed`. `what` names the item.
    """
    packed = result.answers[position]
    try:
        if position not in result.failed:
            return unpack_value(packed), None, ""
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # user code
        reason = f"it cannot be read here: {serialize.name_and_text(exc)}"
        unread = SerializeError.of(f"the result of {what}", reason, type(exc))
        return None, unread, str(unread)
    return None, *unpack_error(packed)


def traced(error: BaseException, result: ChunkOutcome, text: str, what: str = "") -> BaseException:
    """Return an error that knows where it was raised, by the traceback that came with it."""
    if error.__cause__ is None:
        where = f"{what} on {result.host}, process {result.pid}".lstrip()
        error.__cause__ = RemoteTraceback(f"\n{where}:\n{text}")
    return error


def unpack_call(result: ChunkOutcome) -> tuple[Any, BaseException | None]:
    """Return value and error of a chunk of one call, which has no time limit of its own."""
    value, error, text = unpack_answer(result, 0, "the call")
    return value, error and traced(error, result, text)


def _shorten(text: str) -> str:
    half = MAX_TEXT // 2
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:half]}\n[{len(text) - MAX_TEXT} characters]\n{text[-half:]}"


def _format_exception(exc: BaseException) -> Iterable[str]:
    # The first frames are ours: of no use to the reader of a task's traceback. Where code was
    # compiled it says that it is, wherever it was imported from.
    ours = Path(_format_exception.__code__.co_filename).parent
    tb = exc.__traceback__
    while tb is not None and Path(tb.tb_frame.f_code.co_filename).parent == ours:
        tb = tb.tb_next
    tb = tb or exc.__traceback__
    try:
        return traceback.format_exception(type(exc), exc, tb)
    except BaseException as failure:  # asked for its truth, for example
        reason = f"(more is not to be had: {type(failure).__name__})"
        return [*traceback.format_tb(tb), f"{type(exc).__name__} {reason}\n"]

"""Objects to bytes and back, between processes of the same Python version.

C pickle (protocol 5) carries the data. What the other side cannot import goes by value: functions
and classes of ``__main__``, with the global variables that they use, as *definitions* for the
program there, see `program`; lambdas, closures and local classes as they are. cloudpickle knows
how to reduce what pickle itself refuses; nothing here changes pickle for the user.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from ostap_parallel.errors import SerializeError
from ostap_parallel.objects import program
from ostap_parallel.objects.kinds import PROTOCOL as PROTOCOL
from ostap_parallel.objects.kinds import has_reader
from ostap_parallel.objects.pickler import Outer
from ostap_parallel.objects.plain import dumps_call as dumps_call

loads: Callable[[bytes], Any] = pickle.loads
Unpickler = pickle.Unpickler  # of a `Stream`


def dumps(
    obj: object,
    *,
    back: bool = False,
    cache: dict[Any, Any] | None = None,
    buffers: list[pickle.PickleBuffer] | None = None,
) -> bytes:
    """Serialise an object.

    Parameters
    ----------
    back
        The bytes return to the process that sent this one its functions and classes: those need
        no content. What runs code of the user's when it is unpickled is unpickled once here: if
        that fails, or never ends, this process is where it must.
    cache
        Keeps what classes and definitions became, for callers that serialise many objects; valid
        as long as those do not change.
    buffers
        Takes buffers that are not copied into the bytes, see PEP 574.

    Raises
    ------
    Exception
        Whatever pickle or the object's own ``__reduce__`` raise; see `pack`.
    """
    buffer = io.BytesIO()
    pickler = Outer(buffer, back, cache, buffers)
    pickler.dump(obj)
    data = buffer.getvalue()
    if back and any(map(has_reader, pickler.types)):
        loads(data)
    return data


def pack(obj: object, what: str, **how: Any) -> bytes:
    """Serialise as `dumps` does; whatever goes wrong becomes a `SerializeError` about `what`."""
    try:
        return dumps(obj, **how)
    except Exception as exc:
        reason = name_and_text(exc)
        if "through inheritance" in reason:
            reason += " (one of multiprocessing.Manager() can be sent)"
        raise SerializeError.of(what, reason, type(exc)) from exc


def name_and_text(exc: BaseException) -> str:
    """Return an exception's name and text, also where the text cannot be had."""
    return f"{type(exc).__name__}: {text_of(exc)}"


def text_of(exc: BaseException) -> str:
    """Return an exception's text; its class may raise in place of telling."""
    try:
        return str(exc)
    except KeyboardInterrupt:
        raise
    except BaseException as failure:
        return f"(its text is not to be had: {type(failure).__name__})"


class Stream:
    """Objects that are written one after another, and what they share once.

    They are read, in their order, by one `Unpickler`. Where pickle refuses one, it raises; what
    is written afterwards may refer to what was lost then. `before` precedes them.
    """

    def __init__(self, cache: dict[Any, Any] | None, before: bytes = b"") -> None:
        self.size = len(before)  # bytes
        self._buffer = io.BytesIO()
        self._buffer.write(before)
        self._pickler = Outer(self._buffer, False, cache, None)

    def add(self, obj: object) -> None:
        """Write an object, or raise as `dumps` does."""
        try:
            self._pickler.dump(obj)
        except BaseException:
            self._pickler.forget()
            self._buffer.seek(self.size)
            self._buffer.truncate()
            raise
        self.size = self._buffer.tell()

    def complete(self, after: bytes) -> bytes:
        """Return all that was written, and what follows it; nothing is written afterwards."""
        self._buffer.seek(self.size)
        self._buffer.write(after)
        return self._buffer.getvalue()


def call_for_good(packed: bytes) -> program.Kept:
    """Do a serialised call ``(function, arguments)``; return what it leaves in the program."""
    function, args = loads(packed)
    with program.keeping() as kept:
        function(*args)
    return kept

"""What runs once in each worker process, before its first job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ostap_parallel.errors import InitializerError
from ostap_parallel.worker import serialize
from ostap_parallel.worker.program import Kept

# What became of those that this process has run, by their tokens: the error, or what they have
# left in the program.
_ended: dict[bytes, InitializerError | Kept] = {}


@dataclass(frozen=True)
class Initializer:
    """A call for each worker process; made by `of`, run by calling it.

    Raises
    ------
    InitializerError
        It raised, in this process, now or before.
    """

    packed: bytes = field(repr=False)
    token: bytes = field(default_factory=lambda: os.urandom(16))

    @classmethod
    def of(cls, function: Callable[..., Any], args: Iterable[Any]) -> Initializer:
        """Return the initializer that calls ``function(*args)``; raises `SerializeError`."""
        if not callable(function):
            raise TypeError("initializer must be a callable")
        what = f"the initializer {getattr(function, '__qualname__', function)}"
        return cls(serialize.pack((function, tuple(args)), what))

    def __call__(self) -> None:
        if self.token not in _ended:
            _ended[self.token] = self._run()
        found = _ended[self.token]
        if isinstance(found, InitializerError):
            raise found
        found.restore()

    def _run(self) -> InitializerError | Kept:
        try:
            return serialize.call_for_good(self.packed)
        except BaseException as exc:  # user code
            error = InitializerError(serialize.name_and_text(exc))
            error.__cause__ = exc
            return error

"""What runs once in each worker process, before its first job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ostap_parallel.errors import InitializerError
from ostap_parallel.objects import serialize, settings
from ostap_parallel.objects.program import Kept
from ostap_parallel.worker import nested
from ostap_parallel.worker.shared import SMALL

# How many are remembered, in a process that serves many callers.
MANY = 64

# What became of those that this process has run, by their tokens: the error, or what they have
# left in the program, and changed of the settings.
_ended: dict[bytes, InitializerError | tuple[Kept, dict[str, settings.Change]]] = {}


@dataclass(frozen=True)
class Initializer:
    """A call for each worker process; made by `of`, run by calling it.

    Unless it is small it travels as a name: each process gets it once, as a constant of that
    name, see `nested.constant`, and does not keep it.

    Raises
    ------
    InitializerError
        It raised, in this process, now or before.
    """

    packed: bytes | None = field(repr=False)
    token: bytes = field(default_factory=lambda: os.urandom(16))

    @classmethod
    def of(
        cls, function: Callable[..., Any], args: Iterable[Any], constants: dict[str, Any]
    ) -> Initializer:
        """Return the initializer that calls ``function(*args)``.

        A large one is added to `constants`, by its name. Raises `SerializeError`.
        """
        if not callable(function):
            raise TypeError("initializer must be a callable")
        what = f"the initializer {getattr(function, '__qualname__', function)}"
        packed = serialize.pack((function, tuple(args)), what)
        if len(packed) <= SMALL:
            return cls(packed)
        large = cls(None)
        constants[large.name] = packed
        return large

    @property
    def name(self) -> str:
        """What a large one is kept under."""
        return f"initializer {self.token.hex()}"

    def __call__(self) -> None:
        if self.token not in _ended:
            packed = nested.constant(self.name) if self.packed is None else self.packed
            _ended[self.token] = _run(packed)
            if len(_ended) > MANY:
                del _ended[next(iter(_ended))]
        found = _ended[self.token]
        if isinstance(found, InitializerError):
            raise found
        kept, changes = found
        kept.restore()
        settings.change(changes)


def _run(packed: bytes) -> InitializerError | tuple[Kept, dict[str, settings.Change]]:
    try:
        with settings.changing() as changes:
            return serialize.call_for_good(packed), changes
    except BaseException as exc:  # user code
        error = InitializerError(serialize.name_and_text(exc))
        error.__cause__ = exc
        return error

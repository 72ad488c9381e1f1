"""What ``ostap-parallel run`` gives to a program: the workers of all that names none itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ostap_parallel.config.entries import KEYWORDS
from ostap_parallel.engine.backend import Backend
from ostap_parallel.supply.supervisor import EventHandler
from ostap_parallel.worker.launched import in_turn


class Closable(Protocol):
    """What has workers."""

    @property
    def backend(self) -> Backend:
        """What computes."""

    def close(self) -> None:
        """End them."""


@dataclass
class Launch:
    """Workers and settings for executors of a program that was launched.

    Attributes
    ----------
    ncpus, servers
        As of `Executor`.
    preparation
        What each worker calls first, and its arguments.
    config, sync, settings
        For hosts; those that a program gives come before them.
    take
        Sees each event first; returns whether it goes no further.
    was_used
        Whether there is an executor that has these workers, or was one.
    """

    ncpus: int
    servers: Sequence[str]
    preparation: tuple[Callable[..., Any], Sequence[Any]]
    config: Any = None
    sync: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    take: Callable[[str, dict[str, Any]], bool] = lambda host, event: False
    was_used: bool = False
    _executors: weakref.WeakSet[Closable] = field(default_factory=weakref.WeakSet)

    def add(self, executor: Closable) -> None:
        """Take notice of an executor that has these workers."""
        self.was_used = True
        self._executors.add(executor)

    def executors(self) -> list[Closable]:
        """Return those that have these workers, and are still referred to."""
        return list(self._executors)

    def prepared(
        self, initializer: Callable[..., Any] | None, initargs: Iterable[Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the initializer of workers, and its arguments."""
        then = () if initializer is None else ((initializer, tuple(initargs)),)
        return in_turn, ((self.preparation, *then),)

    def filled(self, config: Any, sync: Any) -> tuple[Any, Any]:
        """Return these, or the launch's if a program gives none."""
        return self.config if config is None else config, self.sync if sync is None else sync

    def hearing(self, on_event: EventHandler) -> EventHandler:
        """Return what hears of events, before a handler of the program's."""
        return partial(_hear, self.take, on_event)


_current: Launch | None = None


def begin(launch: Launch | None) -> None:
    """Have executors made from now on use a launch's workers."""
    global _current
    _current = launch


def for_program(ncpus: int | str, servers: Any) -> Launch | None:
    """Return the launch whose workers an executor has: it leaves them open, or asks for any."""
    is_open = servers == () or (isinstance(servers, str) and servers.lower() in KEYWORDS)
    return _current if ncpus == "autodetect" and is_open else None


def _hear(
    take: Callable[[str, dict[str, Any]], bool],
    on_event: EventHandler,
    host: str,
    event: dict[str, Any],
) -> None:
    if not take(host, event):
        on_event(host, event)

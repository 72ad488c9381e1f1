"""Hosts as users name them, and as a backend does."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ostap_parallel.engine.backend import Backend
from ostap_parallel.engine.core import LOCAL
from ostap_parallel.supply.source import HostStatus

# How users may call this machine; ":" is GNU parallel's.
HERE = {LOCAL, "localhost", ":"}


def bare_name(server: str) -> str:
    """Return the host in ``user@host:port*workers``."""
    name = server.partition("*")[0].rpartition("@")[2]
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name if name.count(":") > 1 else name.partition(":")[0] or name


def labels_of(names: Iterable[str], backend: Backend) -> frozenset[str]:
    """Return what a backend calls the hosts; names that it does not know stay."""
    known = [host.name for host in backend.hosts]
    return frozenset(label for name in names for label in _match(name, known))


def _match(name: str, known: list[str]) -> list[str]:
    if name in known:
        return [name]
    if name in HERE:
        return [LOCAL]
    short = bare_name(name)
    labels = [label for label in known if bare_name(label) == short]
    labels = labels or [label for label in known if bare_name(label).startswith(f"{short}.")]
    return labels or [name]


class Absences:
    """Why hosts of a backend cannot be had.

    One that was up and is lost may come back, for as long as the backend has patience.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._since: dict[str, float] = {}

    def reasons(self) -> dict[str, str]:
        """Return the reason for each host; empty if it can be had, or may come back."""
        return {host.name: self._reason(host) for host in self._backend.hosts}

    def _reason(self, host: HostStatus) -> str:
        if host.state != "lost":
            self._since.pop(host.name, None)
        if host.state == "closed":
            return f"{host.name} is closed"
        if host.state == "failed":
            return str(host.error)
        if host.state != "lost":
            return ""
        since = self._since.setdefault(host.name, time.monotonic())
        was_up = host.seconds is not None
        is_over = time.monotonic() - since >= self._backend.patience
        return "" if was_up and not is_over else str(host.error)

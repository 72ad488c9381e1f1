"""The profiles that workers send."""

from __future__ import annotations

import pstats
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ostap_parallel.worker.profiling import unpacked


class Profiles:
    """The profiles of workers, added up for each.

    Attributes
    ----------
    stats
        By host and process: ``h1-4711``.
    """

    def __init__(self) -> None:
        self.stats: dict[str, pstats.Stats] = {}
        self._files: dict[str, pstats.Stats] = {}

    def take(self, host: str, event: Mapping[str, Any]) -> None:
        """Take one from what a worker says."""
        _add(self.stats, f"{host}-{event['pid']}", event["record"]["msg"])

    def take_for_file(self, host: str, event: Mapping[str, Any]) -> None:
        """Take one, and write what its file has now."""
        self.take(host, event)
        record = event["record"]
        place = "" if host == "local" else f"{host}-"
        name = f"{record['prefix']}{place}{record['id']}{record['suffix']}"
        _add(self._files, name, record["msg"]).dump_stats(name)


received = Profiles()
"""Of functions that `profiled` has made."""


def worker_stats() -> dict[str, pstats.Stats]:
    """Return the profiles of workers by host and process, as ``h1-4711``."""
    return dict(received.stats)


def total_stats() -> pstats.Stats | None:
    """Return the profiles of all workers, added up; ``None`` if there is none."""
    first, *others = received.stats.values() or [None]
    if first is None:
        return None
    return pstats.Stats(_as_profile(first.stats)).add(*others)  # type: ignore[attr-defined]


def clear_worker_stats() -> None:
    """Forget the profiles of workers."""
    received.__init__()  # type: ignore[misc]


def _add(known: dict[str, pstats.Stats], name: str, text: str) -> pstats.Stats:
    added = _as_profile(unpacked(text))
    old = known.get(name)
    known[name] = old.add(added) if old else pstats.Stats(added)
    return known[name]


def _as_profile(stats: Any) -> Any:
    return SimpleNamespace(create_stats=lambda: None, stats=stats)

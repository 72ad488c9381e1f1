"""The values of what is asked of a batch system: checked, and collected."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from ostap_parallel.config.batch import BATCH_KEYS, BatchConfig
from ostap_parallel.config.entries import Entry, parse_entry
from ostap_parallel.config.host import Setting, check_name, check_number
from ostap_parallel.errors import ConfigError
from ostap_parallel.schedulers.directives import joined
from ostap_parallel.schedulers.quantities import clock, parse_memory, parse_walltime


def convert_batch(key: str, value: Any, where: str) -> Any:
    """Return the checked value of one of `BATCH_KEYS` that is not empty; raises ConfigError."""
    try:
        match key:
            case "batch" if value not in ("slurm", "sge"):
                raise ConfigError(f"{where}: neither 'slurm' nor 'sge': {value!r}")
            case "login":
                return _check_login(value, where)
            case "cpus" | "jobs":
                return check_number(value, None, where)
            case "adapt":
                return _check_range(value, where)
            case "walltime":
                seconds = parse_walltime(value)
                return value if isinstance(value, str) else clock(seconds)
            case "memory":
                parse_memory(value)
            case "options":
                text = joined("options", value, " ").strip()
                shlex.split(text)
                if "\n" in text:
                    raise ConfigError(f"{where}: one line of text is wanted, not {value!r}")
                return text
            case "skip":
                return _words(value, where)
    except (TypeError, ValueError) as exc:
        if isinstance(exc, ConfigError):
            raise
        raise ConfigError(f"{where}: {exc}") from exc
    return value


def _check_login(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: text is wanted, not {value!r}")
    entry = parse_entry(value, where, where)
    if entry.keys() & {"ncpus", "nice", "server_port"}:
        raise ConfigError(f"{where}: [user@]host[:port] is wanted, not {value!r}")
    return value.strip()


def _check_range(value: Any, where: str) -> tuple[int, int]:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        least, most = (int(word) for word in words)
    except (TypeError, ValueError):
        least, most = -1, 0
    if not 0 <= least <= most or most < 1:
        raise ConfigError(f"{where}: the least and the most workers are wanted, not {value!r}")
    return least, most


def _words(value: str | Iterable[str], where: str) -> tuple[str, ...]:
    words = value.replace(",", " ").split() if isinstance(value, str) else tuple(value)
    if not all(isinstance(word, str) and word for word in words):
        raise ConfigError(f"{where}: names of directives are wanted, not {value!r}")
    return tuple(words)


def batch_of(
    entry: Entry, own: Mapping[str, Setting], found: Mapping[str, Setting]
) -> BatchConfig | None:
    """Return what an entry asks of a batch system; ``None`` if it is a host.

    Parameters
    ----------
    own
        The section of that very name: no other one makes allocations of it.
    found
        All settings.
    """
    if not any(part.get("batch") and part["batch"].value for part in (entry, own)):
        return None
    for key in entry.keys() & {"user", "port", "server_port"}:
        text = f"{entry[key].origin}: {entry['name'].value} are allocations of a batch system: "
        raise ConfigError(f"{text}a {key} stands in its login")
    values = {key: found[key].value for key in BATCH_KEYS & found.keys()}
    batch = BatchConfig(**{key: value for key, value in values.items() if value is not None})
    ncpus = found.get("ncpus")
    batch.shares(entry["name"].value, ncpus.value if ncpus else None)
    return batch


class Allocation:
    """Jobs of a batch system, as an entry of a server list; see `supply.entries`."""

    batch = ""

    def __init__(self, name: str, workers: int | None, settings: Mapping[str, Any]) -> None:
        where = f"{type(self).__name__}({name!r})"
        given: dict[str, Any] = {"name": check_name(name, where), "batch": self.batch, **settings}
        if workers is not None:
            given["ncpus"] = check_number(workers, None, f"{where} workers")
        self.entry: Entry = {key: Setting(value, where) for key, value in given.items()}

    def __repr__(self) -> str:
        shown = {key: setting.value for key, setting in self.entry.items() if key != "batch"}
        text = ", ".join(f"{key}={value!r}" for key, value in shown.items())
        return f"{type(self).__name__}({text})"

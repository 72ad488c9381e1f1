"""Resolve servers and settings: argument > environment > files."""

from __future__ import annotations

import os
import socket
import subprocess
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ostap_parallel.config.batch import BATCH_KEYS
from ostap_parallel.config.entries import (
    KEYWORDS,
    Entry,
    parse_entries,
    parse_entry,
    split_entries,
)
from ostap_parallel.config.files import (
    GENERAL,
    LISTS,
    MORE,
    Sections,
    absolute,
    convert,
    read_files,
)
from ostap_parallel.config.host import HostConfig, Setting
from ostap_parallel.config.requests import Allocation, batch_of
from ostap_parallel.errors import ConfigError, see

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOOKUPS = 16  # names looked up at the same time
TEXTS = {
    *("profile", "environment", "environment_more", "python", "user", "tmpdir"),
    *("python_mismatch", "start", "way"),
}
SSH_TIMEOUT = 10  # seconds; a "Match exec" of the user's may hang


Servers = str | int | Allocation | Iterable[str | int | Allocation]
"""Entries of a server list, or one of them."""


class HostArguments(TypedDict, total=False):
    """Settings for all hosts that win over the files'.

    ``None`` is as good as absent; an empty string switches the setting off.
    """

    profile: str | None
    environment: str | None
    environment_more: str | None
    script: str | Path | None
    python: str | None
    ncpus_per_host: int | None
    user: str | None
    port: int | None
    ssh_options: str | Sequence[str] | None
    tmpdir: str | None
    python_mismatch: str | None
    keepalive: int | None
    start_timeout: int | None
    nice: int | None
    requires: str | Sequence[str] | None
    preload: str | Sequence[str] | None
    start: str | None
    way: str | None
    ssh_config: str | Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What arguments, environment and files come to.

    Attributes
    ----------
    hosts
        In the order of the server lists, each once.
    files
        The files that were read; a later one wins.
    sync
        The user's own modules that hosts get.
    sections
        What the files say, merged: settings by key, by what follows ``Parallel:`` in lower case
        (``""``: ``[Parallel]``). `HostConfig.origins` tells which of it a host got.
    notice
        What was looked at if the configured list was asked for and there is none; else empty.
    """

    hosts: tuple[HostConfig, ...] = ()
    files: tuple[Path, ...] = ()
    sync: tuple[Path, ...] = ()
    sections: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict, compare=False)
    notice: str = field(default="", compare=False)


def load_settings(
    servers: Servers = (),
    *,
    config: Iterable[Path | str] | Path | str | None = None,
    environ: Mapping[str, str] = os.environ,
    hostname: str | None = None,
    **arguments: Unpack[HostArguments],
) -> Settings:
    """Resolve the servers and each one's settings; no host is contacted.

    A setting is taken from the entry (``user@host:port*ncpus``), else from the arguments, else
    from ``[Parallel:<host>]``, ``[Parallel:<domain>]`` (longest first) or ``[Parallel]``. An empty
    value is a value: it switches the setting off for what is less specific.

    Parameters
    ----------
    servers
        Entries, also as one string that separates them by commas or white space. Among them
        ``auto``, ``config`` or ``*`` stand for the configured list and ``OSTAP_PPSERVERS``.
    config
        Files to read instead of the default ones; they must exist.
    environ
        Environment variables.
    hostname
        Name of this host, whose domain chooses the configured list; ``None`` asks the system.

    Raises
    ------
    ConfigError
        A setting is malformed, in whichever file or section of ours it stands.
    """
    given = check_arguments(**arguments)
    wanted = list(_list_files(config, environ))
    sections, files = read_files(wanted)
    notices: list[str] = []

    def configured() -> list[tuple[Entry, str]]:
        listed = list(_list_configured(sections, environ, hostname))
        if not listed:
            notices.append(_tell_looked_at(sections, files, [path for path, _ in wanted]))
        return listed

    entries = list(_parse_servers(servers, configured))
    ssh_config = given["ssh_config"].value if "ssh_config" in given else None
    hosts: dict[object, HostConfig] = {}
    with ThreadPoolExecutor(LOOKUPS) as pool:
        look_up = partial(_look_up_names, known=sections, ssh_config=ssh_config)
        for (entry, _), names in zip(entries, pool.map(look_up, entries), strict=True):
            host = _resolve(entry, names, given, sections)
            hosts.setdefault((host.user, host.name.lower(), host.port, host.server_port), host)
    sync = sections.get("", {}).get("sync")
    modules = sync.value or () if sync else ()
    found = tuple(hosts.values())
    notice = "".join(notices[:1])
    return Settings(hosts=found, files=files, sync=modules, sections=sections, notice=notice)


def check_arguments(**arguments: Unpack[HostArguments]) -> dict[str, Setting]:
    """Return the settings that arguments give; raises `ConfigError` for one that is malformed."""
    given: dict[str, Setting] = {}
    for name, value in arguments.items():
        key = name.removesuffix("_per_host")  # the manager has ncpus= for local workers
        if isinstance(value, bytes) or (name in TEXTS and not isinstance(value, str | None)):
            raise ConfigError(f"argument {name}: text is wanted, not {value!r}")
        if value is not None:
            given[key] = Setting(convert(key, value, "argument", _here()), "argument")
    return given


def check_servers(servers: object) -> None:
    """Raise `ConfigError` for what is neither an entry of a server list nor several."""
    is_known = isinstance(servers, int | Allocation | Iterable)
    if not is_known or isinstance(servers, bytes | Mapping):
        raise ConfigError(f"argument servers: neither text nor a list of entries: {servers!r}")


def _tell_looked_at(sections: Sections, files: Sequence[Path], wanted: Sequence[Path]) -> str:
    """Return what was looked at for the configured list."""
    unread = [path for path in dict.fromkeys(wanted) if path not in files]
    # not by Path.exists: that raises for a name that is too long
    others = [path for path in unread if os.path.exists(path)]  # noqa: PTH110
    names = {suffix: f"[Parallel{':' * bool(suffix)}{suffix}]" for suffix in sections}
    lists = [names[suffix] for suffix, keys in sections.items() if keys.keys() & LISTS]
    parts = [f"files read: {', '.join(map(str, files)) or 'none'}"]
    if others:
        parts.append(f"files not read: {', '.join(map(str, others))}")
    parts.append(f"sections of ours in them: {', '.join(names.values()) or 'none'}")
    if lists:
        parts.append(f"lists for other domains, or empty ones, in {', '.join(lists)}")
    text = f"no server is configured ({'; '.join(parts)}; OSTAP_PPSERVERS names none)"
    return text + see("configured")


def local_settings(found: Settings, **arguments: Unpack[HostArguments]) -> HostConfig:
    """Return what holds for workers of this machine: arguments, else what ``[Parallel]`` says.

    Raises ConfigError if an argument is malformed.
    """
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        general = found.sections.get("", {}).get(name)
        if value is not None:
            values[name] = convert(name, value, "argument", _here())
        elif general is not None:
            values[name] = general.value
    return HostConfig(name="localhost", **{k: v for k, v in values.items() if v is not None})


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was removed: what is relative to it is not found there
        return Path()


def _list_files(
    config: Iterable[Path | str] | Path | str | None, environ: Mapping[str, str]
) -> Iterator[tuple[Path, str]]:
    """Yield the files, each with who asked for it."""
    here, home = _here(), Path.home()
    if config is not None:
        if isinstance(config, bytes) or not isinstance(config, Iterable | Path):
            raise ConfigError(f"argument config: neither a path nor several: {config!r}")
        for path in [config] if isinstance(config, str | Path) else config:
            yield absolute(path, here), "argument config"
        return
    if environ.get("OSTAP_DIR"):
        yield absolute(environ["OSTAP_DIR"], here) / ".ostaprc", ""
    for directory in (home, home / ".config" / "ostap", here):
        yield directory / ".ostaprc", ""
    for part in environ.get("OSTAP_CONFIG", "").split(os.pathsep):
        if part.strip():
            yield absolute(part.strip(), here), "OSTAP_CONFIG"


def _parse_servers(
    servers: Servers, configured: Callable[[], Iterable[tuple[Entry, str]]]
) -> Iterator[tuple[Entry, str]]:
    """Yield the entries, each with the domain whose section listed it, or ``""``."""
    if isinstance(servers, str):
        servers = split_entries(servers)
    check_servers(servers)
    for server in [servers] if isinstance(servers, int | Allocation) else servers:
        if isinstance(server, Allocation):
            yield server.entry, ""
            continue
        if isinstance(server, str) and server.strip().lower() in KEYWORDS:
            yield from configured()
        else:
            yield parse_entry(server, "argument servers", "argument"), ""


def _list_configured(
    sections: Sections, environ: Mapping[str, str], hostname: str | None
) -> Iterator[tuple[Entry, str]]:
    """Yield the entries of the configured list, then those of ``OSTAP_PPSERVERS``."""
    lists = {
        suffix: settings.get("ppservers") or settings["workers"]
        for suffix, settings in sections.items()
        if settings.keys() & LISTS
    }
    here: tuple[str, ...] = ()
    if any(lists):  # else spare the look-up of this host's name
        here = (hostname,) if hostname else (socket.gethostname(), socket.getfqdn())
    for domain in _match_sections(lists, here)[:1]:
        for entry in lists[domain].value:
            yield entry, domain
    variable = "OSTAP_PPSERVERS"
    for entry in parse_entries(environ.get(variable, ""), variable, variable):
        yield entry, ""


def _match_sections(suffixes: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the sections for a host with these names.

    First its own, then domains, longest first, then the general one.
    """
    known = [name.lower() for name in names]
    found = [
        suffix
        for suffix in suffixes
        if not suffix or any(f".{name}".endswith(f".{suffix}") for name in known)
    ]
    return sorted(found, key=lambda suffix: (suffix not in known, -len(suffix)))


def _look_up_names(
    listed: tuple[Entry, str], known: Sections, ssh_config: Path | None
) -> tuple[str, ...]:
    """Return the name to use for ssh, then others by which the sections may know this host."""
    entry, domain = listed
    name: str = entry["name"].value
    if "batch" in entry or "batch" in known.get(name.lower(), {}):
        return (name,)
    if not any(known) or "server_port" in entry or "." in name or ":" in name:
        return (name,)
    full = f"{name}.{domain}" if domain else name
    if _is_alias(name, ssh_config):
        return name, full
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return full, name
    return name, full, socket.getfqdn(name)


def _is_alias(name: str, ssh_config: Path | None) -> bool:
    """Tell whether the user's ssh configuration gives `name` another host name."""
    argv = ["ssh", *(["-F", str(ssh_config)] if ssh_config else []), "-G", name]
    try:
        answer = subprocess.run(
            argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SSH_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    lines = (line.partition(" ") for line in answer.stdout.splitlines())
    return any(key == "hostname" and value.lower() != name.lower() for key, _, value in lines)


def _resolve(
    entry: Entry, names: tuple[str, ...], given: Mapping[str, Setting], sections: Sections
) -> HostConfig:
    """Return one host's settings; the most specific value of each wins."""
    own = {**entry, "name": Setting(names[0], entry["name"].origin)}
    chain = [dict(given), *(sections[suffix] for suffix in _match_sections(sections, names))]
    settings = ChainMap(own, *([] if "server_port" in entry else chain))
    batch = batch_of(entry, sections.get(names[0].lower(), {}), settings)
    others = LISTS | GENERAL | BATCH_KEYS | {MORE}
    found = {key: setting for key, setting in settings.items() if key not in others}
    if "server_port" not in entry and any(MORE in one for one in chain):
        found["environment"] = _add_up(chain)
    values: dict[str, Any] = {k: s.value for k, s in found.items() if s.value is not None}
    origins = {key: setting.origin for key, setting in found.items()}
    return HostConfig(**values, batch=batch, origins=origins)


def _add_up(chain: Sequence[Mapping[str, Setting]]) -> Setting:
    """Return the environment, with what more specific sections add to that of others behind it."""
    texts: list[Setting] = []
    for settings in reversed(chain):
        if "environment" in settings:
            texts = [settings["environment"]]
        if MORE in settings:
            texts.append(settings[MORE])
    parts = [setting.value for setting in texts if setting.value is not None]
    return Setting("\n".join(parts) or None, " + ".join(setting.origin for setting in texts))


def find_secret(
    hosts: Iterable[HostConfig], environ: Mapping[str, str] = os.environ
) -> str | None:
    """Return the secret of existing servers among `hosts`, ``None`` if there are none.

    It is read from the file that ``OSTAP_PPSECRET_FILE`` names; raises `ConfigError` if it is
    needed and not to be had.
    """
    if not any(host.server_port for host in hosts):
        return None
    name = environ.get("OSTAP_PPSECRET_FILE")
    if name is None:
        raise ConfigError(
            "an existing server needs its secret: give secret=..., or the name of a file that "
            "holds it in OSTAP_PPSECRET_FILE, as ostap-parallel launch prints it" + see("existing")
        )
    try:
        secret = Path(name).read_text().strip()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"OSTAP_PPSECRET_FILE: {name!r} cannot be read: {exc}") from exc
    if not secret:
        raise ConfigError(f"OSTAP_PPSECRET_FILE: {name} is empty")
    return secret

"""`HostConfig`: all that is known about one host, and the forms its parts must have."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ostap_parallel.config.batch import BatchConfig
from ostap_parallel.errors import ConfigError

_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
# IPv4, or IPv6 with or without a zone
_ADDRESS = re.compile(r"[0-9.]+|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9_.-]+)?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,255}")


@dataclass(frozen=True, slots=True)
class Setting:
    """A checked value, ``None`` if an empty one switches it off, and where it came from."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How to reach one host and what to start there.

    `load_settings` has checked what is in it.

    Attributes
    ----------
    name
        Host name, ``Host`` alias or address as ssh understands it, without user and port.
    user, port
        Login name and ssh port; ``None`` leaves them to ssh.
    ncpus
        Workers to start there; ``None``: as many as the host grants.
    profile
        Path of a script that exists on the host.
    environment
        Bash text; its last line has no line end.
    script
        Local file, absolute.
    python, tmpdir
        Interpreter and directory on the host.
    ssh_options
        Further words of the ssh command.
    python_mismatch
        What to do with a host whose Python has another minor version.
    keepalive
        Seconds of silence after which the host counts as lost, and its server, which cannot be
        reached then, ends itself.
    start_timeout
        Seconds until its server must be up, the user's scripts included, time in queues not.
    preload
        Modules that what starts workers imports once, for all of them.
    start
        ``"fork"``: workers are forks of that; ``"spawn"``: new interpreters.
    way
        By what it is reached: ``"srun"`` and ``"qrsh"`` lead to the nodes of the SLURM or SGE job
        that this is.
    ssh_config
        File for ``ssh -F``; ``None`` leaves the user's own in charge.
    nice
        By how much processes there are nicer than others, from 1 to 19.
    requires
        Modules that must be importable there.
    batch
        What is asked of a batch system, whose jobs these are then; ``None``: it is a host.
    server_port
        Local port of a server that runs already, or of a tunnel to it; then nothing else applies.
    origins
        Where each setting came from: ``"argument"``, ``"/home/me/.ostaprc [Parallel:cern.ch]"``.
        It also holds the settings that an empty value has switched off.
    """

    name: str
    user: str | None = None
    port: int | None = None
    ncpus: int | None = None
    profile: str | None = None
    environment: str | None = None
    script: Path | None = None
    python: str = "python3"
    tmpdir: str | None = None
    ssh_options: tuple[str, ...] = ()
    python_mismatch: Literal["refuse", "allow"] = "refuse"
    keepalive: int = 45
    start_timeout: int = 300
    preload: tuple[str, ...] = ()
    start: Literal["fork", "spawn"] = "fork"
    way: Literal["ssh", "srun", "qrsh"] = "ssh"
    ssh_config: Path | None = None
    nice: int | None = None
    requires: tuple[str, ...] = ()
    batch: BatchConfig | None = None
    server_port: int | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """The host as messages name it: ``user@name:port``, or ``localhost:<server_port>``."""
        if self.server_port is not None:
            return f"localhost:{self.server_port}"
        user = f"{self.user}@" if self.user else ""
        name = f"[{self.name}]" if ":" in self.name and self.port else self.name
        return f"{user}{name}:{self.port}" if self.port else f"{user}{name}"


def check_name(name: str, where: str) -> str:
    """Return `name` if it is a host name, alias or address; IPv6 in its short form.

    Names reach the command line of ssh: what an option or a shell could misread is refused.
    """
    if _ADDRESS.fullmatch(name):
        with suppress(ValueError):
            return str(ipaddress.ip_address(name))
    elif len(name) <= 253 and _NAME.fullmatch(name):
        return name
    raise ConfigError(f"{where}: not a host name, ssh alias or address: {name!r}")


def check_user(user: str, where: str) -> str:
    """Return `user` if it is a plain login name."""
    if not _USER.fullmatch(user):
        raise ConfigError(f"{where}: not a user name: {user!r}")
    return user


def check_number(value: int | str, most: int | None, where: str) -> int:
    """Return `value` as a number from 1 to `most`; ``None`` sets no limit."""
    # bool is an int, and int("1_0") is a number: both are slips here
    if re.fullmatch("[0-9]{1,9}", str(value)) and 1 <= int(value) <= (most or 10**9):
        return int(value)
    limits = "of at least 1" if most is None else f"from 1 to {most}"
    raise ConfigError(f"{where}: not a number {limits}: {value!r}")

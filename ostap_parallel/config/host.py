"""`HostConfig`: all that is known about one host, and the forms its parts must have."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ostap_parallel.errors import ConfigError

_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How to reach one host and what to start there.

    Names reach the command line of ssh, so whatever an option or a shell could misread is refused.

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
    ssh_config
        File for ``ssh -F``; ``None`` leaves the user's own in charge.
    server_port
        Local port of a tunnel or ppserver that runs already; then nothing else applies.
    origins
        Where each setting came from: ``"argument"``, ``"/home/me/.ostaprc [Parallel:cern.ch]"``.
        It also holds the settings that an empty value has switched off.

    Raises
    ------
    ConfigError
        A name, port or number is malformed.
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
    ssh_config: Path | None = None
    server_port: int | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        where = f"host {self.name!r}"
        check_name(self.name, where)
        if self.user is not None:
            check_user(self.user, where)
        for port in (self.port, self.server_port):
            if port is not None:
                check_number(port, 65535, where)
        if self.ncpus is not None:
            check_number(self.ncpus, None, where)

    @property
    def label(self) -> str:
        """The host as messages name it: ``user@name:port``, or ``localhost:<server_port>``."""
        if self.server_port is not None:
            return f"localhost:{self.server_port}"
        user = f"{self.user}@" if self.user else ""
        name = f"[{self.name}]" if ":" in self.name and self.port else self.name
        return f"{user}{name}:{self.port}" if self.port else f"{user}{name}"


def is_ipv6(name: str) -> bool:
    """Tell whether `name` is an IPv6 address, which may have a zone."""
    if not _IPV6.fullmatch(name):
        return False
    try:
        ipaddress.IPv6Address(name)
    except ValueError:
        return False
    return True


def _is_name(name: str) -> bool:
    if re.fullmatch("[0-9.]+", name):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            return False
        return True
    return len(name) <= 253 and _NAME.fullmatch(name) is not None


def check_name(name: str, where: str) -> str:
    """Return `name` if it is a host name, alias or address; IPv6 in its short form."""
    if is_ipv6(name):
        return str(ipaddress.IPv6Address(name))
    if not _is_name(name):
        raise ConfigError(f"{where}: not a host name, ssh alias or address: {name!r}")
    return name


def check_user(user: str, where: str) -> str:
    """Return `user` if it is a plain login name."""
    if not _USER.fullmatch(user):
        raise ConfigError(f"{where}: not a user name: {user!r}")
    return user


def check_number(value: int | str, most: int | None, where: str) -> int:
    """Return `value` as a number from 1 to `most`; ``None`` sets no limit."""
    # bool is an int, and int("1_0") is a number: both are slips here
    if re.fullmatch("[0-9]{1,9}", str(value)):
        number = int(value)
        if number >= 1 and (most is None or number <= most):
            return number
    limits = "of at least 1" if most is None else f"from 1 to {most}"
    raise ConfigError(f"{where}: not a number {limits}: {value!r}")

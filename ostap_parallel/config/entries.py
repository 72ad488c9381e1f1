"""Entries of server lists: ``user@host:port*8``, ``[ipv6]:port``, ``localhost:port`` ..."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ostap_parallel.config.host import check_name, check_number, check_user, is_ipv6
from ostap_parallel.errors import ConfigError

KEYWORDS = frozenset({"auto", "config", "*"})

# What the parts may hold is checked afterwards; this only cuts.
_ENTRY = re.compile(
    r"""(?: (?P<user> [^@]*) @ )?
        (?: \[ (?P<literal> [^][]*) \]
          | (?P<bare> [^][@*:\s]* : [^][@*:\s]* : [^][@*\s]* )
          | (?P<name> [^][@*:\s]* ) )
        (?: : (?P<port> [0-9]{1,9}) )?
        (?: \s* \* \s* (?P<ncpus> [0-9]{1,9}) )?""",
    re.VERBOSE,
)
_SERVER = re.compile(r"(?P<bare>[0-9]{1,9})|(?P<port>[0-9]{1,9}):localhost", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One server of a list, as it was written.

    Attributes
    ----------
    origin
        Where the list stood.
    domain
        The domain whose section held the list, in lower case, or ``""``.
    """

    name: str
    origin: str
    user: str | None = None
    port: int | None = None
    ncpus: int | None = None
    server_port: int | None = None
    domain: str = ""


def split_entries(text: str) -> list[str]:
    """Cut a list at commas and white space; it may look like a printed tuple or list."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    # "[::1], [::2]" is no list in brackets
    if text.startswith("[") and text.endswith("]") and not is_ipv6(text[1:].partition("]")[0]):
        text = text[1:-1]
    # "host * 8" is one entry, although it holds blanks
    text = re.sub(r"\s*\*\s*(?=[0-9])", "*", text)
    words = (re.sub(r"\A(['\"])(.*)\1\Z", r"\2", word) for word in re.split(r"[\s,]+", text))
    return [word for word in words if word]


def parse_entries(text: str, where: str, origin: str) -> tuple[Entry, ...]:
    """Return the entries of a comma or white-space separated list, in its order.

    Parameters
    ----------
    where
        Names the list in errors.
    origin
        What `Entry.origin` shall be.

    Raises
    ------
    ConfigError
        An entry has none of the known forms.
    """
    return tuple(parse_entry(word, where, origin) for word in split_entries(text))


def parse_entry(entry: str | int, where: str, origin: str) -> Entry:
    """Return one entry; the parameters are those of `parse_entries`."""
    where = f"{where}: server {entry!r}"
    text = str(entry).strip()
    if not isinstance(entry, str | int) or isinstance(entry, bool) or text.lower() in KEYWORDS:
        raise ConfigError(f"{where} cannot stand here")
    if server := _SERVER.fullmatch(text):
        return _running(server["bare"] or server["port"], where, origin)
    match = _ENTRY.fullmatch(text)
    if not match:
        raise ConfigError(
            f"{where} is none of host, user@host, host:port, host*ncpus, [ipv6]:port, "
            "localhost:port, port:localhost, port"
        )
    user, port, ncpus = match.group("user", "port", "ncpus")
    name = match["name"] or match["literal"] or match["bare"] or ""
    if match["name"] is None and not is_ipv6(name):
        raise ConfigError(f"{where}: not an IPv6 address: {name!r}")
    if name.lower() == "localhost" and port and user is None:
        if ncpus:
            raise ConfigError(f"{where} runs already, its number of workers is fixed")
        return _running(port, where, origin)
    return Entry(
        name=check_name(name, where),
        user=None if user is None else check_user(user, where),
        port=check_number(port, 65535, where) if port else None,
        ncpus=check_number(ncpus, None, where) if ncpus else None,
        origin=origin,
    )


def _running(port: str, where: str, origin: str) -> Entry:
    return Entry(name="localhost", server_port=check_number(port, 65535, where), origin=origin)

"""Entries of server lists: ``user@host:port*8~10``, ``[ipv6]:port``, ``localhost:port`` ..."""

from __future__ import annotations

import re

from ostap_parallel.config.host import Setting, check_name, check_number, check_user
from ostap_parallel.errors import ConfigError

KEYWORDS = frozenset({"auto", "config", "*"})

Entry = dict[str, Setting]
"""What an entry says: ``name``, with ``user, port, ncpus, nice`` or ``server_port``."""

# What the parts may hold is checked afterwards; this only cuts.
_ENTRY = re.compile(
    r"""(?: (?P<user> [^@]+) @ )?
        (?: \[ (?P<literal> [^][]* : [^][]*) \]
          | (?P<bare> [^][@*~:\s]* : [^][@*~:\s]* : [^][@*~\s]* )
          | (?P<name> [^][@*~:\s]+ ) )
        (?: : (?P<port> [0-9]{1,9}) )?
        (?: \s* \* \s* (?P<ncpus> [0-9]{1,9}) )?
        (?: \s* ~ \s* (?P<nice> [0-9]{1,9}) )?""",
    re.VERBOSE,
)
_SERVER = re.compile(r"(?:localhost:)?([0-9]{1,9})|([0-9]{1,9}):localhost", re.IGNORECASE)


def split_entries(text: str) -> list[str]:
    """Cut a list at commas and white space."""
    # "host * 8" is one entry: its star by itself would stand for the configured list
    return re.sub(r"\s*([*~])\s*(?=[0-9])", r"\1", text).replace(",", " ").split()


def parse_entries(text: str, where: str, origin: str) -> list[Entry]:
    """Return the entries of a comma or white-space separated list, in its order.

    Parameters
    ----------
    where
        Names the list in errors.
    origin
        Where the settings came from.

    Raises
    ------
    ConfigError
        An entry has none of the known forms.
    """
    return [parse_entry(word, where, origin) for word in split_entries(text)]


def parse_entry(entry: str | int, where: str, origin: str) -> Entry:
    """Return one entry; the parameters are those of `parse_entries`."""
    where = f"{where}: server {entry!r}"
    text = str(entry).strip()
    if not isinstance(entry, str | int) or isinstance(entry, bool) or text.lower() in KEYWORDS:
        raise ConfigError(f"{where} cannot stand here")
    if server := _SERVER.fullmatch(text):
        port = check_number(server[1] or server[2], 65535, where)
        return {"name": Setting("localhost", origin), "server_port": Setting(port, origin)}
    match = _ENTRY.fullmatch(text)
    if not match:
        raise ConfigError(
            f"{where} is none of host, user@host, host:port, host*ncpus, host~nice, [ipv6]:port, "
            "localhost:port, port:localhost, port"
        )
    name = match["name"] or match["literal"] or match["bare"]
    if name.lower() == "localhost" and match["port"] and not match["user"]:
        raise ConfigError(f"{where} runs already, its number of workers is fixed")
    parts: dict[str, str | int] = {"name": check_name(name, where)}
    if match["user"]:
        parts["user"] = check_user(match["user"], where)
    if match["port"]:
        parts["port"] = check_number(match["port"], 65535, where)
    if match["ncpus"]:
        parts["ncpus"] = check_number(match["ncpus"], None, where)
    if match["nice"]:
        parts["nice"] = check_number(match["nice"], 19, where)
    return {key: Setting(value, origin) for key, value in parts.items()}

"""Configuration files: which may be trusted, their sections, and the values in them."""

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.config.batch import BATCH_KEYS
from ostap_parallel.config.entries import parse_entries
from ostap_parallel.config.host import HostConfig, Setting, check_name, check_number, check_user
from ostap_parallel.config.requests import convert_batch
from ostap_parallel.errors import ConfigError, see
from ostap_parallel.logs import logger_of

logger = logger_of(__name__)

SPELLINGS = ("parallel", "paralell", "pathos")  # an earlier one wins
LISTS = {"ppservers", "workers"}
GENERAL = {"sync"}  # of [Parallel] itself: no host has its own
MORE = "environment_more"  # also written as "environment += ...": added to the less specific one
KEYS = (
    LISTS
    | GENERAL
    | {MORE}
    | BATCH_KEYS
    | HostConfig.__annotations__.keys() - {"name", "ssh_config", "server_port", "origins"}
)

Sections = dict[str, dict[str, Setting]]
"""Settings by key, by what follows ``Parallel:`` in lower case (``""``: ``[Parallel]``)."""

_HEADER = re.compile(r"\[((?:[^][]|\[[^][]*\])+)\]")  # may hold an address in brackets
_ADDED = re.compile(r"environment\s*\+")
_ITEM = re.compile(r"([^=:]*[^=:\s])\s*[=:]\s*(.*)")


def read_files(files: Iterable[tuple[Path, str]]) -> tuple[Sections, tuple[Path, ...]]:
    """Read and check our sections of all files; a later file wins.

    Parameters
    ----------
    files
        Absolute paths, each with who asked for it; a file that nobody (``""``) asked for may
        be missing.

    Returns
    -------
    :
        The merged sections, and the files they were read from, in order.

    Raises
    ------
    ConfigError
        A file that was asked for cannot be read, or what a file says is malformed.
    """
    texts: dict[Path, str] = {}
    for path, asked_by in files:
        texts.pop(path, None)  # one met again, as at home, counts where it was met last
        text = _read_trusted(path, asked_by)
        if text is not None:
            texts[path] = text
    parts = [part for path, text in texts.items() for part in _read_sections(path, text)]
    parts.sort(key=lambda part: -part[0])
    sections: Sections = {}
    for _, suffix, settings in parts:
        sections.setdefault(suffix, {}).update(settings)
    return sections, tuple(texts)


def _read_trusted(path: Path, asked_by: str) -> str | None:
    """Return the text of a file, or ``None`` if it is not to be used."""
    try:
        with open(path, encoding="utf-8-sig", opener=_open_at_once) as file:
            # The opened file is what gets read, whatever becomes of its name meanwhile.
            if danger := find_danger(os.fstat(file.fileno())):
                text = "%s is not read, for it could run commands: %s%s"
                logger.warning(text, path, danger, see("safe"))
                return None
            return file.read()
    except OSError as exc:
        if asked_by:
            raise ConfigError(f"{asked_by}: cannot read {path}: {exc.strerror}") from exc
        if not isinstance(exc, FileNotFoundError | NotADirectoryError):
            logger.warning("%s is not read: %s", path, exc.strerror)
        return None
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 text: {exc}") from exc
    except ValueError as exc:
        raise ConfigError(f"{asked_by}: no file has such a name: {str(path)!r}: {exc}") from exc


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK a named pipe would hang here, before it can be refused.
    return os.open(path, flags | os.O_NONBLOCK)


def find_danger(status: os.stat_result) -> str:
    """Say why the file must not be trusted; ``""`` if it may."""
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if status.st_uid not in (0, os.getuid()):
        return f"it belongs to another user (uid {status.st_uid})"
    if status.st_mode & stat.S_IWOTH:
        return "everybody can write it (chmod o-w)"
    if status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_uid, status.st_gid):
        return f"its group (gid {status.st_gid}) can write it (chmod g-w)"
    return ""


def _is_private_group(uid: int, gid: int) -> bool:
    try:
        owner, group = pwd.getpwuid(uid).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    # Users whose primary group it is are not among its members, so an experiment's group can
    # look empty; a private one also bears its owner's name.
    return group.gr_name == owner and set(group.gr_mem) <= {owner}


def _read_sections(path: Path, text: str) -> Iterator[tuple[int, str, dict[str, Setting]]]:
    """Yield rank of the spelling, suffix and settings of each section of ours."""
    for header, values in _parse(path, text):
        spelling, colon, suffix = (part.strip().lower() for part in header.partition(":"))
        if spelling not in SPELLINGS:
            if difflib.get_close_matches(spelling, SPELLINGS[:2], cutoff=0.75):
                text = "%s [%s] is not read: did you mean [Parallel%s]?"
                logger.warning(text, path, header, colon + header.partition(":")[2])
            continue
        origin = f"{path} [{header}]"
        if colon:
            suffix = check_name(suffix.removeprefix("[").removesuffix("]"), origin)
        settings = {}
        for key, lines in values.items():
            if key not in KEYS:
                nearest = difflib.get_close_matches(key, KEYS, n=1)
                known = f"; known are {', '.join(sorted(KEYS))}"
                hint = f", did you mean {nearest[0]!r}?" if nearest else known
                raise ConfigError(f"{origin} {key}: unknown key{hint}{see('keys')}")
            if suffix and key in GENERAL:
                raise ConfigError(f"{origin} {key}: it belongs into [Parallel]")
            if not suffix and key == "batch":
                raise ConfigError(f"{origin} {key}: it belongs into a section [Parallel:<name>]")
            value = convert(key, _join_lines(key, lines), origin, path.parent)
            settings[key] = Setting(value, origin)
        yield SPELLINGS.index(spelling), suffix, settings


def _parse(path: Path, text: str) -> list[tuple[str, dict[str, list[str]]]]:
    """Return the header of each section, and the lines of its values by key.

    The rules are configparser's, which itself would drop the ``#`` lines and the indentation
    within bash text.
    """
    sections: list[tuple[str, dict[str, list[str]]]] = []
    value: list[str] | None = None  # to which further lines may belong
    indent = 0  # of its key
    for number, line in enumerate(text.split("\n"), start=1):
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if value is not None and (not bare or depth > indent):
            value.append(line)
        elif not bare or bare[0] in "#;":
            continue
        elif header := _HEADER.match(bare):
            value = None
            sections.append((header[1], {}))
        elif not sections:
            raise ConfigError(f"{path}, line {number}: before the first [section]")
        elif item := _ITEM.fullmatch(bare):
            indent, value = depth, [item[2]]
            key = item[1].lower()
            sections[-1][1][MORE if _ADDED.fullmatch(key) else key] = value
        else:
            raise ConfigError(f"{path}, line {number}: not 'key = value': {line!r}")
    return sections


def _join_lines(key: str, lines: list[str]) -> str:
    """Return a value without the common indentation of all its lines but the first."""
    first, *lines = lines
    if key not in ("environment", MORE):  # only bash has comments of its own
        lines = [line for line in lines if not line.lstrip().startswith(("#", ";"))]
    while lines and not lines[-1].strip():
        lines.pop()
    indents = [line[: len(line) - len(line.lstrip())] for line in lines if line.strip()]
    cut = len(os.path.commonprefix(indents))
    return "\n".join([*([first] if first else []), *(line[cut:] for line in lines)])


def convert(key: str, value: Any, origin: str, base: Path) -> Any:
    """Return the checked value of one setting, ``None`` for an empty one.

    Parameters
    ----------
    origin
        File and section, or ``"argument"``; it precedes `key` in errors.
    base
        What relative paths start from.

    Raises
    ------
    ConfigError
        It is malformed, or names a local file that does not exist.
    """
    where = f"{origin} {key}"
    if key in LISTS:
        return parse_entries(value, where, origin)
    if isinstance(value, str) and not value.strip():
        return None
    if key in BATCH_KEYS:
        return convert_batch(key, value, where)
    match key:
        case "environment" | "environment_more":
            return _check_text(value, where)
        case "script" | "ssh_config":
            return _find_local(key, value, where, base)
        case "ncpus" | "port" | "keepalive" | "start_timeout":
            return check_number(value, 65535 if key == "port" else None, where)
        case "nice":
            return check_number(value, 19, where)
        case "requires":
            return _check_modules(value, where)
        case "user":
            return check_user(value, where)
        case "ssh_options":
            return _split_options(value, where)
        case "sync":
            return tuple(absolute(word, base) for word in _split_options(value, where))
        case "preload":
            return _check_preload(value, where, base)
        case "python_mismatch" if value not in ("refuse", "allow"):
            raise ConfigError(f"{where}: neither 'refuse' nor 'allow': {value!r}")
        case "start" if value not in ("fork", "spawn"):
            raise ConfigError(f"{where}: neither 'fork' nor 'spawn': {value!r}")
        case "way" if value not in ("ssh", "srun", "qrsh"):
            raise ConfigError(f"{where}: none of 'ssh', 'srun' and 'qrsh': {value!r}")
        case _ if not value.isprintable() or value.startswith("-"):
            raise ConfigError(f"{where}: more than one line, or starts with '-': {value!r}")
    return value


def absolute(path: str | Path, base: Path) -> Path:
    """Return `path` with ``~`` as the home directory; a relative one starts at `base`."""
    first, *rest = Path(path).parts or (".",)
    return Path.home().joinpath(*rest) if first == "~" else base / path


def _find_local(key: str, value: str | Path, where: str, base: Path) -> Path:
    path = absolute(value, base)
    with suppress(OSError, ValueError):  # a closed directory on the way, a NUL
        # ssh takes /dev/null for a configuration, but a script has to be copied
        if path.is_file() or (key == "ssh_config" and path.exists()):
            return path
    raise ConfigError(f"{where}: no such file: {path}")


def _split_options(value: str | Iterable[str], where: str) -> tuple[str, ...]:
    try:
        words = shlex.split(value) if isinstance(value, str) else value
    except ValueError as exc:
        raise ConfigError(f"{where}: {exc}: {value!r}") from exc
    return tuple(_check_text(word, where) for word in words)


def _check_modules(value: str | Iterable[str], where: str) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise ConfigError(f"{where}: not the names of modules: {value!r}")
    words = value.replace(",", " ").split() if isinstance(value, str) else tuple(value)
    for word in words:
        if not isinstance(word, str) or not all(map(str.isidentifier, word.split("."))):
            raise ConfigError(f"{where}: not the name of a module: {word!r}")
    return tuple(words)


def _check_preload(value: str | Iterable[str], where: str, base: Path) -> tuple[str, ...]:
    """Return names of modules, and the paths of files that some library takes for its own."""
    words: list[Any] = []
    if isinstance(value, str):
        words = value.replace(",", " ").split()
    elif isinstance(value, Iterable):
        words = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in value]
    else:
        _check_modules(value, where)
    found: list[str] = []
    for word in words:
        if not isinstance(word, str) or libraries.owner_of(word) is None:
            found += _check_modules([word], where)
            continue
        path = absolute(word, base)
        is_file = Path(str(path).rstrip("+gO")).is_file()
        if not is_file and not (word.startswith("lib") and os.sep not in word):
            raise ConfigError(f"{where}: no such file: {path}")
        found.append(str(path) if is_file else word)
    return tuple(found)


def _check_text(text: object, where: str) -> str:
    """Return `text` if a file and the words of a command can hold it."""
    with suppress(UnicodeEncodeError):
        if isinstance(text, str) and b"\0" not in text.encode():
            return text
    raise ConfigError(f"{where}: not text, or with characters that no text has: {text!r}")

"""Configuration files: which may be trusted, their sections, and the values in them."""

from __future__ import annotations

import configparser
import difflib
import grp
import logging
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostap_parallel.config.entries import parse_entries
from ostap_parallel.config.host import check_name, check_number, check_user
from ostap_parallel.errors import ConfigError

logger = logging.getLogger(__name__)

SPELLINGS = ("parallel", "paralell", "pathos")  # an earlier one wins
KEYS = (
    "ppservers",
    "workers",
    "profile",
    "environment",
    "script",
    "python",
    "ncpus",
    "user",
    "port",
    "ssh_options",
    "tmpdir",
    "python_mismatch",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A checked value, ``None`` if an empty one switches it off, and where it came from."""

    value: Any
    origin: str


Sections = dict[str, dict[str, Setting]]
"""Settings by key, by what follows ``Parallel:`` in lower case (``""``: ``[Parallel]``)."""


def read_files(files: Iterable[tuple[Path, str]], home: Path) -> tuple[Sections, tuple[Path, ...]]:
    """Read and check our sections of all files; a later file wins.

    Parameters
    ----------
    files
        Absolute paths, each with who asked for it; a file that nobody (``""``) asked for may
        be missing.
    home
        What ``~`` stands for.

    Returns
    -------
    :
        The merged sections, and the files they were read from, in order.

    Raises
    ------
    ConfigError
        A file that was asked for cannot be read, or what a file says is malformed.
    """
    texts: dict[tuple[int, int], tuple[Path, str]] = {}
    for path, asked_by in files:
        if found := _read_trusted(path, asked_by):
            identity, text = found
            # A file met again counts where it was met last, as if it had been read twice.
            texts.pop(identity, None)
            texts[identity] = path, text
    parts = [part for path, text in texts.values() for part in _read_sections(path, text, home)]
    parts.sort(key=lambda part: -part[0])
    sections: Sections = {}
    for _, suffix, settings in parts:
        sections.setdefault(suffix, {}).update(settings)
    return sections, tuple(path for path, _ in texts.values())


def _read_trusted(path: Path, asked_by: str) -> tuple[tuple[int, int], str] | None:
    """Return device, inode and text of a file, or ``None`` if it is not to be used."""
    try:
        # Without O_NONBLOCK a named pipe would hang here, before it can be refused.
        with open(
            path,
            encoding="utf-8-sig",
            opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK),
        ) as file:
            # The opened file is what gets read, whatever becomes of its name meanwhile.
            status = os.fstat(file.fileno())
            if danger := _find_danger(status):
                logger.warning("%s is not read, for it could run commands: %s", path, danger)
                return None
            return (status.st_dev, status.st_ino), file.read()
    except OSError as exc:
        if asked_by:
            raise ConfigError(f"{asked_by}: cannot read {path}: {exc.strerror}") from exc
        if not isinstance(exc, FileNotFoundError | NotADirectoryError):
            logger.warning("%s is not read: %s", path, exc.strerror)
        return None
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 text: {exc}") from exc


def _find_danger(status: os.stat_result) -> str:
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
        owner, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    # Users whose primary group it is are not among its members, so an experiment's group can
    # look empty; a private one also bears its owner's name.
    return (
        owner.pw_gid == gid
        and group.gr_name == owner.pw_name
        and set(group.gr_mem) <= {owner.pw_name}
    )


class _Parser(configparser.RawConfigParser):
    # The standard one ends a header at the last bracket of its line, also within a comment.
    SECTCRE = re.compile(r"\[(?P<header>(?:[^][]|\[[^][]*\])+)\]")


def _protect_lines(text: str) -> Iterator[str]:
    """Yield the lines so that configparser keeps values exactly and same-named sections apart.

    It would drop ``#`` lines and indentation inside values, so these lines get a fence at both
    ends. Headers get their line number.
    """
    indent: int | None = None  # of the key whose value may go on
    for number, line in enumerate(text.split("\n"), start=1):
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if indent is not None and (not bare or depth > indent):
            yield f"{' ' * (indent + 1)}|{line}|"
        elif not bare or bare[0] in "#;":
            yield line
        elif header := _Parser.SECTCRE.match(bare):
            indent = None
            yield f"[{header['header']}|{number}]"
        else:
            indent = depth
            yield line


def _restore_value(key: str, value: str) -> str:
    """Undo `_protect_lines` and remove the common indentation of all lines but the first."""
    first, *fenced = value.split("\n")
    lines = [line[1:-1] for line in fenced]
    if key != "environment":  # only bash has comments of its own
        lines = [line for line in lines if not line.lstrip().startswith(("#", ";"))]
    while lines and not lines[-1].strip():
        lines.pop()
    indents = [line[: len(line) - len(line.lstrip())] for line in lines if line.strip()]
    cut = len(os.path.commonprefix(indents))
    return "\n".join([*([first] if first else []), *(line[cut:] for line in lines)])


def _parse(path: Path, text: str) -> _Parser:
    # An empty section name cannot occur: [DEFAULT] is a section like any other.
    parser = _Parser(strict=False, default_section="")
    try:
        parser.read_string("\n".join(_protect_lines(text)))
    except configparser.MissingSectionHeaderError as exc:
        raise ConfigError(f"{path}, line {exc.lineno}: before the first [section]") from exc
    except configparser.ParsingError as exc:
        line, _ = exc.errors[0]
        found = text.split("\n")[line - 1]
        raise ConfigError(f"{path}, line {line}: not 'key = value': {found!r}") from exc
    return parser


def _read_sections(
    path: Path, text: str, home: Path
) -> Iterator[tuple[int, str, dict[str, Setting]]]:
    """Yield rank of the spelling, suffix and settings of each section of ours."""
    parser = _parse(path, text)
    for numbered in parser.sections():
        header = numbered.rpartition("|")[0]
        spelling, colon, suffix = (part.strip().lower() for part in header.partition(":"))
        if spelling not in SPELLINGS:
            continue
        origin = f"{path} [{header}]"
        if colon:
            suffix = check_name(suffix.removeprefix("[").removesuffix("]"), origin)
        settings = {}
        for key, value in parser.items(numbered):
            if key not in KEYS:
                raise ConfigError(f"{origin} {key}: unknown key{_suggest(key)}")
            bash = _restore_value(key, value)
            settings[key] = Setting(convert(key, bash, origin, path.parent, home), origin)
        yield SPELLINGS.index(spelling), suffix, settings


def _suggest(key: str) -> str:
    nearest = difflib.get_close_matches(key, KEYS, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(KEYS)}"


def convert(key: str, value: Any, origin: str, base: Path, home: Path) -> Any:
    """Return the checked value of one setting, ``None`` for an empty one.

    Parameters
    ----------
    origin
        File and section, or ``"argument"``; it precedes `key` in errors.
    base, home
        What relative paths and ``~`` start from.

    Raises
    ------
    ConfigError
        It is malformed, or names a local file that does not exist.
    """
    where = f"{origin} {key}"
    if key in ("ppservers", "workers"):
        return parse_entries(value, where, origin)
    if isinstance(value, str) and not value.strip():
        return None
    match key:
        case "environment":
            return value
        case "script" | "ssh_config":
            return _find_local(key, value, where, base, home)
        case "ncpus" | "port":
            return check_number(value, 65535 if key == "port" else None, where)
        case "user":
            return check_user(value, where)
        case "ssh_options":
            return _split_options(value, where)
        case "python_mismatch" if value not in ("refuse", "allow"):
            raise ConfigError(f"{where}: neither 'refuse' nor 'allow': {value!r}")
        case _ if not value.isprintable() or value.startswith("-"):
            raise ConfigError(f"{where}: more than one line, or starts with '-': {value!r}")
    return value


def absolute(path: str | Path, base: Path, home: Path) -> Path:
    """Return `path` with ``~`` as `home`; a relative one starts at `base`."""
    first, *rest = Path(path).parts or (".",)
    return home.joinpath(*rest) if first == "~" else base / path


def _find_local(key: str, value: str | Path, where: str, base: Path, home: Path) -> Path:
    path = absolute(value, base, home)
    # ssh takes /dev/null for a configuration, but a script has to be copied
    try:
        found = path.is_file() if key == "script" else path.exists()
    except (OSError, ValueError):  # a closed directory on the way, a NUL
        found = False
    if not found:
        raise ConfigError(f"{where}: no such file: {path}")
    return path


def _split_options(value: str | Iterable[str], where: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value)) if isinstance(value, str) else tuple(value)
    except ValueError as exc:
        raise ConfigError(f"{where}: {exc}: {value!r}") from exc

"""What a command line of ``ostap-parallel do`` asks for: which commands, and where."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ostap_parallel.commands.blocks import Blocks
from ostap_parallel.commands.command import Command
from ostap_parallel.commands.halting import Halt
from ostap_parallel.commands.inputs import ROOM, SOURCES, Reading, Row, in_groups, packed
from ostap_parallel.commands.template import Filled, Template
from ostap_parallel.commands.transfer import Transfer
from ostap_parallel.engine.names import HERE, bare_name
from ostap_parallel.errors import ConfigError
from ostap_parallel.machine.cpus import usable_cpus
from ostap_parallel.pipeline.datamap import DataMap

# With -j0.
MOST_SLOTS = 250

# Places that GNU parallel has and that are not here.
_NO_PLACE = re.compile(r"\{-?\d*=.*?=\}")
_NO_PLACE_OF_PLUS = re.compile(
    r"\{(?:[%#]{1,2}[^}%#][^}]*|:-?[^}]+|/[^}/]+/[^}]*|[\^,]{1,2}[^}]+|uniq|choose_k|hgrp|0[%#])\}"
)


class Plan:
    """The commands that the options of a command line make, and where they run.

    Attributes
    ----------
    servers
        The hosts that are named.
    pinned
        Where the commands must run, one by one; empty: anywhere.
    slots
        Commands at a time on each host; ``None``: as many as it has CPUs.
    here
        On this machine, if that is told.
    total
        How many commands there are, if that is known.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        words, sources = _split(args.words)
        self._check(words)
        self.servers, self.here = _servers(args)
        self.pinned: list[str] = []
        self._names: list[str] = []
        self._stdin: bytes | None = None
        rows: Iterable[Row]
        if args.pipe:
            if sources or not words:
                raise ConfigError("--pipe takes a command, and no values: -a is for files")
            for file in args.arg_file:
                if file != "-" and not os.access(file, os.R_OK):
                    raise ConfigError(f"{file}: it is not there, or cannot be read")
            rows = self._of_blocks()
        elif args.map or args.nonall:
            if sources or args.arg_file:
                raise ConfigError("--map and --nonall take the place of other values")
            rows = [()] if args.nonall else self._of_map()
        else:
            files = [("::::", [file]) for file in args.arg_file]
            rows, self._names = self._reading().read([*files, *sources])
        needs_all = args.shuf or args.plus or Halt(args.halt).is_percentage or args.onall
        if args.shuf:
            rows = random.sample(found := list(rows), len(found))
        self._template = self._template_of(words)
        groups: Iterable[list[Row]] = self._groups(rows)
        if needs_all or isinstance(rows, Sequence):
            groups = list(groups)
        if args.onall or args.nonall:
            groups = self._on_all(list(groups))
        self._groups_of_all = groups
        self.total = len(groups) if isinstance(groups, list) else None
        self.slots = self._slots()

    def _check(self, words: list[str]) -> None:
        args, text = self._args, " ".join(words)
        place = _NO_PLACE.search(text) or (args.plus and _NO_PLACE_OF_PLUS.search(text))
        if place:
            raise ConfigError(f"{place[0]}: there is no such place here; let the shell do it")
        if args.header > 1 and not args.pipe:
            raise ConfigError("--header: of values the first is a name, of each source: ':'")
        if args.results and re.search(r"\{.*\}|\.(?:csv|tsv|json)$", args.results):
            raise ConfigError(
                "--results: a directory is wanted, without places: see --joblog, too"
            )
        if args.onall and args.map:
            raise ConfigError("--map has hosts of its own: --onall does not go with it")
        if (args.onall or args.nonall) and not (args.servers or args.sshloginfile):
            raise ConfigError("--onall and --nonall need hosts: -S")

    def _of_blocks(self) -> Iterator[Row]:
        """Yield a value, which is none, for each block of input, which is there until the next."""
        args = self._args
        end = args.recend if args.recend is not None else "" if args.recstart else "\n"
        blocks = Blocks(
            size=args.block,
            records=args.max_replace_args or args.max_args,
            ends=args.max_lines or 1,
            end=os.fsencode(end),
            start=os.fsencode(args.recstart or ""),
            is_bare=args.rrs,
            header=args.header,
        )
        for file in args.arg_file or ["-"]:
            with contextlib.ExitStack() as closing:
                source = sys.stdin.buffer
                if file != "-":
                    source = closing.enter_context(Path(file).open("rb"))
                for self._stdin in blocks.read(source):
                    yield ("",)

    def _of_map(self) -> list[Row]:
        items = [item for item in DataMap.load(self._args.map) if not item.skip]
        self.pinned = [item.host for item in items]
        return [(item.file,) for item in items]

    def _reading(self) -> Reading:
        args = self._args
        columns = args.colsep.encode().decode("unicode_escape") if args.csv else args.colsep
        return Reading(
            end=b"\0" if args.null else args.delimiter,
            columns=columns,
            is_csv=args.csv,
            trim=(args.trim or ("lr" if args.colsep and not args.csv else "n")).replace("n", ""),
            stop=args.E,
            leave_empty=args.no_run_if_empty,
            has_header=args.header > 0,
            is_linked=args.link,
        )

    def _template_of(self, words: list[str]) -> Template | None:
        args = self._args
        if not words:  # the values are commands
            return None
        gets_none = args.nonall or args.pipe or 0 in (args.max_replace_args, args.max_args)
        how: dict[str, Any] = {
            "names": self._names,
            "more": args.plus,
            "all": args.I,
            "is_whole": gets_none,
        }
        return Template.of_words(words, **how) if args.quote else Template(" ".join(words), **how)

    def _groups(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Yield the values of each command."""
        args = self._args
        if args.pipe:
            return in_groups(rows, 1)
        most = args.max_args if args.max_lines is None else args.max_lines
        most = most if args.max_replace_args is None else args.max_replace_args
        if self._template is not None and (args.X or args.many or args.xargs or args.max_chars):
            room = ROOM if args.max_chars is None else min(args.max_chars - 1, ROOM)
            slots = 1 if args.xargs else self._slots() or usable_cpus()
            slots *= max(1, len(self.servers))
            return packed(
                rows, lambda group: str(self._fill(group, 1)), room=room, most=most, slots=slots
            )
        return in_groups(rows, 1 if most is None else most)

    def _on_all(self, groups: list[list[Row]]) -> list[list[Row]]:
        """Return the values again for each host."""
        hosts = ["local" if host in HERE else bare_name(host) for host in self.servers]
        self.pinned = hosts * len(groups)
        return [group for group in groups for _ in hosts]

    def _slots(self) -> int | None:
        text: str | None = self._args.max_per_node
        if text is None:
            return None
        if text == "0":
            total = getattr(self, "total", None)
            return max(1, min(total if total is not None else MOST_SLOTS, MOST_SLOTS))
        if text.isdecimal():
            return int(text)
        if any(host not in HERE for host in self.servers):
            raise ConfigError(f"-j {text} is about this machine: give hosts a number, as -j 4")
        cpus, number = usable_cpus(), int(text.rstrip("%"))
        if text.endswith("%"):
            number = cpus * number // 100
        return max(1, cpus + number if text[0] in "+-" else number)

    def _fill(self, group: Sequence[Row], number: int) -> str | Filled:
        args, values = self._args, [value for row in group for value in row]
        if self._template is None:
            return " ".join(values)
        count = getattr(self, "total", None) or 0
        if args.X:
            return self._template.fill_words(group, number, count=count)
        least = args.max_replace_args or args.max_args or args.max_lines or 0
        least = 1 << 20 if args.colsep or args.csv else least
        return self._template.fill(values, number, count=count, least=least)

    def _named(self, text: str, values: Sequence[str], number: int) -> str:
        """Return a text with its places filled, which no shell will see."""
        args = self._args
        template = Template(text, self._names, args.plus, args.I, is_whole=True)
        filled = template.fill(values, number, count=self.total or 0, quote=str)
        return str(filled)

    def commands(self) -> Iterator[tuple[str, Command]]:
        """Yield each command, behind the text that tags its output."""
        args = self._args
        inherited = {known: text for name in args.env for known, text in _variables(name)}
        for number, group in enumerate(self._groups_of_all, 1):
            values = [value for row in group for value in row]
            command = Command(
                self._fill(group, number) or " ",  # nothing is to be done, and that is done well
                host=self.pinned[number - 1] if self.pinned else None,
                directory=self._directory(number),
                timeout=args.timeout[0],
                retries=(args.retries or sys.maxsize) - 1,
                name=str(number),
                variables={
                    **inherited,
                    "PARALLEL_PID": str(os.getpid()),
                    "PARALLEL_SEQ": str(number),
                    "PARALLEL_JOBSLOT": Filled(("", "%", "")),
                    "PARALLEL_SSHHOST": Filled(("", "host", "")),
                    "PARALLEL_SSHLOGIN": Filled(("", "host", "")),
                },
                nice=args.nice,
                transfer=self._transfer(values, number),
                stdin=self._stdin,
            )
            tag = self._named(args.tagstring, values, number) if args.tagstring else None
            if tag is None:
                hosts = [self.pinned[number - 1]] if args.onall or args.nonall else []
                tag = " ".join([*hosts, *values])
            yield tag, command

    def _directory(self, number: int) -> str:
        """Return where a command runs; below the home directory it is that of the host."""
        text: str = self._args.workdir
        if text == "...":
            return f"~/.parallel/tmp/{platform.node()}-{os.getpid()}-{number}"
        if text != ".":
            return text
        here, home = Path.cwd(), Path.home()
        return f"~/{here.relative_to(home)}" if here.is_relative_to(home) else str(here)

    def _transfer(self, values: Sequence[str], number: int) -> Transfer | None:
        args = self._args
        sent = [*args.transferfile, *([args.I] if args.transfer or args.trc else [])]
        fetched = [*args.fetched, *args.trc]
        if not (sent or fetched or args.basefile or args.workdir):
            return None
        return Transfer(
            tuple(self._named(text, values, number) for text in sent),
            tuple(self._named(text, values, number) for text in fetched),
            cleanup=args.cleanup or bool(args.trc),
            base=tuple(args.basefile),
            is_temporary=args.workdir == "..." and (args.cleanup or bool(args.trc)),
        )


def _split(given: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the template, and the words behind each ``:::`` and the like."""
    words = given[1:] if given[:1] == ["--"] else given
    template: list[str] = []
    sources: list[tuple[str, list[str]]] = []
    for word in words:
        if word in SOURCES:
            sources.append((word, []))
        else:
            (sources[-1][1] if sources else template).append(word)
    return template, sources


def _servers(args: argparse.Namespace) -> tuple[list[str], int | None]:
    """Return entries for the hosts that are named, and the slots of this machine if given."""
    entries = list(itertools.chain(*(text.split(",") for text in args.servers or ())))
    for file in args.sshloginfile:
        if file == "..":
            file = str(Path.home() / ".parallel" / "sshloginfile")
        try:
            lines = sys.stdin if file == "-" else Path(file).read_text("utf-8").splitlines()
        except OSError as exc:
            raise ConfigError(f"{file}: {exc.strerror}") from exc
        texts = (line.partition("#")[0].strip() for line in lines)
        entries += filter(None, texts)
    servers: list[str] = []
    here = None
    for entry in filter(None, map(str.strip, entries)):
        count, slash, host = entry.rpartition("/")
        if " " in host or host.startswith("@"):
            raise ConfigError(
                f"{entry}: [user@]host[:port] is wanted; options of ssh go to --ssh-config"
            )
        if slash and not count.isdecimal():
            raise ConfigError(f"{entry}: a number is wanted before the slash")
        if host == ":":
            here = int(count) if slash else here
            servers.append(host)
        else:
            servers.append(f"{host}*{count}" if slash else host)
    return servers, here


def _variables(name: str) -> Iterator[tuple[str, str]]:
    """Yield a variable, or what bash exports a function as."""
    names = [known for known in (name, f"BASH_FUNC_{name}%%") if known in os.environ]
    if not names:
        raise ConfigError(f"--env {name}: there is no such variable, nor exported function")
    yield from ((known, os.environ[known]) for known in names)

"""``ostap-parallel do``: one command for each of many values, on this machine and on hosts."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from ostap_parallel.commands.command import Command, Done
from ostap_parallel.commands.feed import Feed
from ostap_parallel.commands.halting import Halt
from ostap_parallel.commands.running import open_executor, run_as_completed
from ostap_parallel.commands.template import Template, cross
from ostap_parallel.errors import ConfigError
from ostap_parallel.pipeline.datamap import DataMap
from ostap_parallel.runs.progress import open_progress
from ostap_parallel.runs.report import relay

# Of GNU parallel: so many failures at most are told by the exit status, and that something else
# is wrong.
MOST, WRONG = 100, 255

# Bytes of each output that stay in memory.
KEEP = 1 << 20

# Levels of records by which lines arrive at once; they only tell the streams apart.
OUT, ERR = logging.WARNING + 1, logging.WARNING + 2

# Options that other commands have, too.
COMMON = ("profile", "script", "python", "tmpdir", "ssh_config", "config")

SOURCES = (":::", ":::+", "::::", "::::+")


class Parser(argparse.ArgumentParser):
    """A parser that ends with GNU parallel's exit status."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all there is."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"there is no option {rest[0]}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit."""
        self.print_usage(sys.stderr)
        self.exit(WRONG, f"{self.prog}: error: {message}\n")


def add_arguments(add: Callable[..., object]) -> None:
    """Add the options and what is behind them."""
    text = "hosts, [user@]host[:port][*slots], with commas; : is this machine; default: it alone"
    add("-S", "--servers", "--sshlogin", metavar="LIST", action="append", help=text)
    text = "a LOFAR data map, whose files are the values, each on its host"
    add("--map", metavar="FILE", help=text)
    text = "commands at a time on each host; default: as many as it has CPUs"
    add("-j", "--max-per-node", "--jobs", metavar="N", type=_positive, help=text)
    add("-a", "--arg-file", metavar="FILE", help="read values from a file; as :::: FILE")
    add("-0", "--null", action="store_true", help="values in files and standard input end by \\0")
    add(
        "--link", action="store_true", help="the first values of all inputs go together, and so on"
    )
    add("--dry-run", action="store_true", help="print the commands, and run none")
    text = "begin each line of output with the values"
    add("--tag", action="store_true", help=text)
    add("-k", "--keep-order", action="store_true", help="print in the order of the values")
    text = "print whole lines as they come, in place of all of a command at its end"
    add("--line-buffer", "--lb", action="store_true", help=text)
    text = "show how far it is, with the time left"
    add("--progress", "--eta", "--bar", action="store_true", help=text)
    add("--joblog", metavar="FILE", help="a file with a line for each command that has ended")
    add("--resume", action="store_true", help="leave out what is in the job log")
    text = "leave out what has ended well by the job log"
    add("--resume-failed", action="store_true", help=text)
    text = "now or soon,fail or success or done=N or N%%: stop early"
    add("--halt", metavar="WHEN", default="never", help=text)
    text = "run what fails N times at most, elsewhere if that is possible"
    add("--retries", metavar="N", type=_positive, default=1, help=text)
    text = "end a command that takes longer"
    add("--timeout", metavar="SECONDS", type=_seconds, help=text)
    add("--results", metavar="DIR", help="keep what is printed in DIR/<number>/stdout and stderr")
    text = "directory in which the commands run"
    add("--workdir", "--wd", metavar="DIR", default="", help=text)
    add("--profile", metavar="FILE", help="script that is on the hosts; sourced first")
    add("--script", metavar="FILE", help="local script, sent to the hosts; sourced last")
    text = (
        "a command with places, see the manual, then ::: VALUES or :::: FILES; or standard input"
    )
    add("words", nargs=argparse.REMAINDER, metavar="TEMPLATE", help=text)


def do(args: argparse.Namespace) -> int:
    """Run a command for each value; return how many have failed, as GNU parallel does."""
    try:
        template, sources = _parse(args)
        if args.resume + args.resume_failed and not args.joblog:
            raise ConfigError("--resume and --resume-failed need --joblog")
        hosts: list[str] = []
        values: Iterable[tuple[str, ...]]
        if args.map:
            if sources:
                raise ConfigError("--map takes the place of other values")
            items = [item for item in DataMap.load(args.map) if not item.skip]
            hosts, values = [item.host for item in items], [(item.file,) for item in items]
        else:
            values = _values(sources, args)
        commands = _commands(template, values, args, hosts)
        if args.dry_run:
            for _, command in commands:
                print(command)
            return 0
        return _run(commands, len(values) if isinstance(values, list) else None, hosts, args)
    except (ConfigError, ValueError) as exc:
        print(f"ostap-parallel do: {exc}", file=sys.stderr)
        return WRONG


def _run(
    commands: Iterable[tuple[str, Command]],
    total: int | None,
    hosts: Sequence[str],
    args: argparse.Namespace,
) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)  # they end it as Ctrl-C does
    printer, halt = Printer(args), Halt(args.halt)
    servers = ",".join(args.servers or ())
    settings = {name: getattr(args, name) for name in COMMON}
    with contextlib.ExitStack() as stack:
        overflow = stack.enter_context(tempfile.TemporaryDirectory(prefix="ostap-parallel-do-"))
        executor = stack.enter_context(
            open_executor(
                servers,
                hosts,
                anywhere=not hosts,
                max_per_node=args.max_per_node,
                on_event=printer.hear,
                **settings,
            )
        )
        title = args.words[0] if args.words else "do"
        shown = open_progress(args.progress, total, title, lambda: executor.workers)
        progress = stack.enter_context(shown)
        results = run_as_completed(
            printer.remember(commands) if total is not None else Feed(printer.remember(commands)),
            executor=executor,
            max_per_node=args.max_per_node,
            results=args.results,
            overflow=overflow,
            joblog=args.joblog,
            resume="failed" if args.resume_failed else args.resume,
            halt=halt,
            keep=KEEP,
            levels=(OUT, ERR) if args.line_buffer else (None, None),
        )
        failed = 0
        for done in stack.enter_context(contextlib.closing(results)):
            progress.advance(1, int(not done.succeeded))
            failed += not done.succeeded and not done.is_skipped
            printer.take(done)
        executor.backend.flush()
        printer.end()
    if halt.reached is not None and not halt.is_percentage:
        status = halt.reached.status
        return MOST + 1 if status is None else status
    return min(failed, MOST + 1)


def _commands(
    template: str,
    values: Iterable[tuple[str, ...]],
    args: argparse.Namespace,
    hosts: Sequence[str],
) -> Iterator[tuple[str, Command]]:
    """Yield each command, behind the text that tags its output."""
    filling = Template(template) if template else None
    for number, chosen in enumerate(values, 1):
        # Without a template the values are commands.
        text = filling.fill(chosen, number) if filling else " ".join(chosen)
        command = Command(
            text,
            host=hosts[number - 1] if hosts else None,
            directory=args.workdir,
            timeout=args.timeout,
            retries=args.retries - 1,
            name=str(number),
        )
        yield "\t".join(chosen), command


def _parse(args: argparse.Namespace) -> tuple[str, list[tuple[str, list[str]]]]:
    """Return the template, and the words behind each ``:::`` and the like."""
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    template: list[str] = []
    sources: list[tuple[str, list[str]]] = []
    for word in words:
        if word in SOURCES:
            sources.append((word, []))
        else:
            (sources[-1][1] if sources else template).append(word)
    if args.arg_file:
        sources.insert(0, ("::::", [args.arg_file]))
    return " ".join(template), sources


def _values(
    sources: list[tuple[str, list[str]]], args: argparse.Namespace
) -> Iterable[tuple[str, ...]]:
    """Return the values of each command; a list where their number is known."""
    end = b"\0" if args.null else b"\n"
    if not sources:
        return ((value,) for value in _lines(sys.stdin.buffer, end))
    groups: list[list[Sequence[str]]] = []
    for kind, words in sources:
        inputs: list[Sequence[str]] = [words]
        if kind.startswith("::::"):
            inputs = [_read(file, end) for file in words]
        if (kind.endswith("+") or args.link) and groups:
            groups[-1] += inputs
        else:
            groups.append(inputs)
    linked = [list(zip(*group, strict=False)) for group in groups]
    return [tuple(itertools.chain(*chosen)) for chosen in cross(linked)]


def _read(file: str, end: bytes) -> list[str]:
    if file == "-":
        return list(_lines(sys.stdin.buffer, end))
    try:
        with Path(file).open("rb") as opened:
            return list(_lines(opened, end))
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from exc


def _lines(file: IO[bytes], end: bytes) -> Iterator[str]:
    """Yield what a file holds, by line or by another end."""
    if end == b"\n":
        parts: Iterable[bytes] = file
    else:
        parts = file.read().removesuffix(end).split(end)
    for part in parts:
        yield part.removesuffix(end).decode("utf-8", "surrogateescape")


class Printer:
    """Prints what commands print: all at their end, in order if wanted, or line by line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._live, self._tag, self._ordered = args.line_buffer, args.tag, args.keep_order
        # A progress bar has to know of what goes to its terminal.
        self._as_text = args.progress and sys.stdout.isatty()
        self._tags: dict[int, str] = {}
        self._held: dict[int, Done] = {}
        self._next = 1

    def remember(self, commands: Iterable[tuple[str, Command]]) -> Iterator[Command]:
        """Yield the commands, and keep their tags."""
        for number, (tag, command) in enumerate(commands, 1):
            if self._tag:
                self._tags[number] = tag
            yield command

    def hear(self, host: str, event: Mapping[str, Any]) -> None:
        """Print a line that has just come."""
        record = event.get("record", {})
        level = record.get("levelno")
        if level not in (OUT, ERR):
            relay(host, event, sys.stderr)
            return
        line = f"{record['msg']}\n".encode("utf-8", "surrogateescape")
        self._print(int(record["name"]), io.BytesIO(line), level == ERR)

    def take(self, done: Done) -> None:
        """Print what a command has printed, now or when its turn comes."""
        if not self._ordered or self._live:
            self._show(done)
            return
        self._held[done.number] = done
        while (done_now := self._held.pop(self._next, None)) is not None:
            self._show(done_now)
            self._next += 1

    def end(self) -> None:
        """Print what is still held back, as those before it have not run."""
        for number in sorted(self._held):
            self._show(self._held.pop(number))

    def _show(self, done: Done) -> None:
        if not self._live and not done.is_skipped:
            if done.files:
                for path, is_error in zip(done.files, (False, True), strict=True):
                    with path.open("rb") as file:
                        self._print(done.number, file, is_error)
            else:
                for data, is_error in zip(done.data, (False, True), strict=True):
                    self._print(done.number, io.BytesIO(data), is_error)
        if (done.error and done.status is None) or done.timed_out:
            print(f"ostap-parallel do: {done.command}: {done.reason()}", file=sys.stderr)

    def _print(self, number: int, file: IO[bytes], is_error: bool) -> None:
        stream = sys.stderr if is_error else sys.stdout
        tag = f"{self._tags.get(number, '')}\t".encode("utf-8", "surrogateescape")
        lines: Iterable[bytes] = file
        if self._tag:
            lines = (tag + line for line in file)
        for data in lines:
            if self._as_text:
                stream.write(data.decode("utf-8", "backslashreplace"))
            else:
                stream.buffer.write(data)
        if not self._as_text:
            stream.buffer.flush()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on is wanted, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    if text.endswith("%"):
        raise argparse.ArgumentTypeError("a percentage is not supported: give seconds")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"seconds are wanted, not {text!r}")
    return seconds

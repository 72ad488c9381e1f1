"""What commands print, on its way to the terminal."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from ostap_parallel.commands.command import Command, Done
from ostap_parallel.runs.report import relay
from ostap_parallel.worker.files import write_all

# Levels of records by which lines arrive at once; they only tell the streams apart.
OUT, ERR = logging.WARNING + 1, logging.WARNING + 2

# Bytes, in whole lines, that are written at a time.
SHARE = 1 << 16


def until_closed(function: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Do what a command does; who reads the beginning only, as ``head``, has it end there."""
    try:
        status = function(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # what is left in the buffer would be tried once more at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


class Printer:
    """Prints what commands print: all at their end, in order if wanted, or line by line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._live, self._ordered = args.line_buffer, args.keep_order
        self._tag, self._tells = bool(args.tag or args.tagstring), args.tell
        self._prints_commands = args.prints_commands
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
            if self._tells:
                print(command, file=sys.stderr)
            if self._prints_commands and self._live:
                self._print_command(number, command)
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
            if self._prints_commands:
                self._print_command(done.number, done.command)
            if done.files:
                for path, is_error in zip(done.files, (False, True), strict=True):
                    with path.open("rb") as file:
                        self._print(done.number, file, is_error)
            else:
                for data, is_error in zip(done.data, (False, True), strict=True):
                    if data:
                        self._print(done.number, io.BytesIO(data), is_error)
        if (done.error and not done.status) or done.timed_out:
            print(f"ostap-parallel do: {done.command}: {done.reason()}", file=sys.stderr)

    def _print_command(self, number: int, command: Command) -> None:
        text = f"{command}\n".encode("utf-8", "surrogateescape")
        self._print(number, io.BytesIO(text), False)

    def _print(self, number: int, file: IO[bytes], is_error: bool) -> None:
        stream = sys.stderr if is_error else sys.stdout
        tag = f"{self._tags.get(number, '')}\t".encode("utf-8", "surrogateescape")
        while lines := file.readlines(SHARE):  # one by one takes several times as long
            data = b"".join([tag + line for line in lines] if self._tag else lines)
            if self._as_text:
                stream.write(data.decode("utf-8", "backslashreplace"))
                continue
            write_all(stream.buffer, data)  # it has no buffer by PYTHONUNBUFFERED
        if not self._as_text:
            stream.buffer.flush()

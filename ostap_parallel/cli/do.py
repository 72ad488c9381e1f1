"""``ostap-parallel do``: one command for each of many values, on this machine and on hosts."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import signal
import sys
import tempfile

from ostap_parallel.cli.do_options import WRONG
from ostap_parallel.cli.plan import Plan
from ostap_parallel.cli.printing import ERR, OUT, Printer
from ostap_parallel.commands.halting import Halt
from ostap_parallel.commands.inputs import SOURCES
from ostap_parallel.commands.running import open_executor, run_as_completed
from ostap_parallel.errors import ConfigError
from ostap_parallel.runs.progress import open_progress
from ostap_parallel.supply.private import owned_directory

# Bytes of each output that stay in memory.
KEEP = 1 << 20

# Characters of the command that `ostap-parallel top` shows.
TITLE = 60

# Options that other commands have, too.
COMMON = ("profile", "script", "python", "tmpdir", "ssh_config", "config")


def do(args: argparse.Namespace) -> int:
    """Run a command for each value; return how many have failed, as GNU parallel does."""
    try:
        if args.resume + args.resume_failed and not args.joblog:
            raise ConfigError("--resume and --resume-failed need --joblog")
        plan = Plan(args)
        if args.dry_run:
            for _, command in plan.commands():
                print(command)
            return 0
        return _run(plan, args)
    except (ConfigError, ValueError) as exc:
        print(f"ostap-parallel do: {exc}", file=sys.stderr)
        return WRONG
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        if isinstance(exc, BrokenPipeError):  # nobody reads any more, as behind `head`
            return 128 + signal.SIGPIPE
        print(f"ostap-parallel do: {exc}", file=sys.stderr)  # of a full disk, for example
        return WRONG


def _run(plan: Plan, args: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)  # they end it as Ctrl-C does
    printer, halt = Printer(args), Halt(args.halt)
    halt.total = plan.total
    settings = {name: getattr(args, name) for name in COMMON}
    with contextlib.ExitStack() as stack:
        folder = owned_directory(tempfile.gettempdir())
        overflow = functools.cache(lambda: stack.enter_context(folder))
        executor = stack.enter_context(
            open_executor(
                plan.servers,
                plan.pinned,
                anywhere=not plan.pinned,
                ncpus=plan.here,
                max_per_node=plan.slots,
                on_event=printer.hear,
                **settings,
            )
        )
        title = args.words[0] if args.words else "do"
        shown = open_progress(args.progress, plan.total, title, lambda: executor.workers)
        progress = stack.enter_context(shown)
        commands = printer.remember(plan.commands())
        results = run_as_completed(
            commands,
            executor=executor,
            max_per_node=plan.slots,
            results=args.results,
            overflow=overflow,
            joblog=args.joblog and args.joblog.removeprefix("+"),
            resume=_resume(args),
            halt=halt,
            delay=args.delay,
            percent=args.timeout[1],
            keep=KEEP,
            levels=(OUT, ERR) if args.line_buffer else (None, None),
            title=_title(args.words),
            total=plan.total,
        )
        for done in stack.enter_context(contextlib.closing(results)):
            progress.advance(1, int(not done.succeeded))
            printer.take(done)
        executor.backend.flush()
        printer.end()
    if halt.reached is not None:
        text = f"{halt.reached.command}: {halt.reached.reason() or 'it has ended well'}"
        print(f"ostap-parallel do: no more commands are run: {text}", file=sys.stderr)
    return halt.status


def _resume(args: argparse.Namespace) -> bool | str:
    if args.resume or args.resume_failed:
        return "failed" if args.resume_failed else True
    return "append" if (args.joblog or "").startswith("+") else False


def _title(words: list[str]) -> str:
    """Return the command as `ostap-parallel top` names it."""
    command = itertools.takewhile(lambda word: word not in SOURCES, words)
    return " ".join(["do", *command])[:TITLE]

# PYTHON_ARGCOMPLETE_OK
"""The command line: run programs, check hosts, show the settings, keep servers up ..."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import queue
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from ostap_parallel import __version__
from ostap_parallel.cli import connect as tunnels
from ostap_parallel.cli import do, do_options, jobs, manual, report, sync_dirs, top
from ostap_parallel.cli.completion import complete
from ostap_parallel.cli.examples import epilog
from ostap_parallel.cli.printing import until_closed
from ostap_parallel.cli.run import ProgramParser, add_arguments, run
from ostap_parallel.config import HostConfig, Settings, find_secret, load_settings
from ostap_parallel.engine.engine import PATIENCE, Engine
from ostap_parallel.errors import (
    CheckpointError,
    ConfigError,
    OstapParallelError,
    ServersUnavailable,
    see,
)
from ostap_parallel.runs.report import relay
from ostap_parallel.supply.private import control_directory
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.supply.ways import write_files

# Seconds after which jobs are shown as queued.
QUEUED = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    It is that of the program that is run. Of others it is 0; 1 if hosts or items failed, or items
    remain; 2 for settings, options and files that are wrong; 130 after Ctrl-C.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # else what is opened next would be in its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123
    parser = _parser()
    complete(parser)
    args = parser.parse_args(argv)
    if args.run is not run:  # a program has its own ways
        _set_up_output(args.verbose)
    status: int
    try:
        status = args.run(args)
    except OstapParallelError as exc:
        print(f"ostap-parallel: {exc}", file=sys.stderr)
        status = 2 if isinstance(exc, ConfigError | CheckpointError) else 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    return status


def _set_up_output(verbose: bool) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files may be of any bytes
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")


def hosts(args: argparse.Namespace) -> int:
    """Start a server with one worker on each host, all at once, and print how that went."""
    # The table holds what would be warned of.
    logging.getLogger("ostap_parallel.supply").setLevel(logging.ERROR)
    each = [host if host.server_port else replace(host, ncpus=1) for host in _load_hosts(args)]
    with Engine(0, each, secret=find_secret(each)) as engine:
        engine.wait_for_hosts(QUEUED if any(host.batch for host in each) else None)
        while any(host.state == "starting" for host in engine.hosts):
            engine.wait_for_hosts(1.0)
        _print_table(engine.hosts)
        return int(any(host.state not in ("up", "queued") for host in engine.hosts))


def config(args: argparse.Namespace) -> int:
    """Print the files that were read, and each host's settings with their origins."""
    settings = _load(args)
    print("files read:", *(settings.files or ["none"]), sep="\n  ")
    for host in settings.hosts:
        print(f"\n{host.label}")
        for key in (field.name for field in fields(host)):
            if key in host.origins:
                value = getattr(host, key)
                text = shlex.join(value) if isinstance(value, tuple) else str(value)
                text = "(switched off)" if value is None else text.replace("\n", "\n      ")
                print(f"  {key} = {text}  ({host.origins[key]})")
    if not settings.hosts:
        print("\nno server is configured")
    if settings.sync:
        print("\nmodules of yours that hosts get:", *settings.sync, sep="\n  ")
    return 0


def launch(args: argparse.Namespace) -> int:
    """Keep servers with tunnels up until Ctrl-C or until the last of them is lost."""
    found = _load_hosts(args)
    for server in found:
        if server.server_port:
            origin = server.origins["server_port"]
            raise ConfigError(f"{server.label} ({origin}) is a server already: nothing to launch")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)  # they end it as Ctrl-C does
    secret = args.secret or secrets.token_hex(32)
    changes: queue.SimpleQueue[None] = queue.SimpleQueue()
    with (
        control_directory() as private,
        Engine(
            0,
            found,
            secret=secret,
            timeout=args.timeout,
            patience=args.patience,
            on_event=partial(relay, out=sys.stderr),
        ) as engine,
    ):
        write_files(private, {"secret": secret.encode()})
        engine.listen(lambda: changes.put(None))
        engine.wait_for_hosts()
        with contextlib.suppress(KeyboardInterrupt):
            up = [host for host in engine.hosts if host.state == "up"]
            _tell(up)
            if not up:
                errors = [host.error for host in engine.hosts if host.error]
                raise ServersUnavailable(tuple(errors))
            servers = ",".join(f"localhost:{host.port}" for host in up)
            print(f'export OSTAP_PPSERVERS="{servers}"')
            file = shlex.quote(str(private / "secret"))
            print(f"export OSTAP_PPSECRET_FILE={file}", flush=True)
            lost = {host.name: host.lost for host in engine.hosts}
            while True:
                engine.check()
                changes.get()
                back = [host for host in engine.hosts if host.state == "up"]
                _tell(host for host in back if host.lost > lost[host.name])
                lost |= {host.name: host.lost for host in back}
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the closing
        return 0


def _tell(hosts: Iterable[HostStatus]) -> None:
    for host in hosts:
        where = f"localhost:{host.port} (workers: {host.workers})"
        print(f"{host.name}: {where}", file=sys.stderr)


def _load_hosts(args: argparse.Namespace) -> tuple[HostConfig, ...]:
    found = _load(args).hosts
    if not found:
        raise ConfigError(
            "no server is configured: name some, or set ppservers in [Parallel] of ~/.ostaprc, "
            "or OSTAP_PPSERVERS" + see("configured")
        )
    return found


def _load(args: argparse.Namespace) -> Settings:
    return load_settings(
        args.servers or "auto",
        config=args.config,
        profile=args.profile,
        script=args.script,
        python=args.python,
        tmpdir=args.tmpdir,
        ssh_config=args.ssh_config,
    )


def _print_table(states: Sequence[HostStatus]) -> None:
    width = max(len(host.name) for host in states)
    row = f"{{:{width}}}  {{:9}}  {{:8}}  {{:>4}}  {{:>7}}  {{}}".format
    print(row("host", "reachable", "python", "cpus", "seconds", "what is wrong"))
    for host in states:
        about, error = host.about or {}, host.error
        # a server that was there already tells the number of its workers only
        cpus = about.get("cpus", host.workers or "")
        reachable = {"up": "yes", "queued": "queued"}.get(host.state, "no")
        seconds = "" if host.seconds is None else f"{host.seconds:.2f}"
        wrong = f"{error.step}: {error.reason}".strip().replace("\n", "\n    ") if error else ""
        wrong = host.reason if host.state == "queued" else wrong
        print(row(host.name, reachable, about.get("python", ""), cpus, seconds, wrong).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ostap-parallel",
        description="Run Python on local cores and on hosts reached by ssh.",
        epilog=epilog(""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    new_parser: Any = _new_parser
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=new_parser)
    text = "run a program with its tasks on local cores and hosts"
    usage = "%(prog)s [OPTION ...] [-m MODULE | PROGRAM] [ARGUMENT ...]"
    command = commands.add_parser("run", help=text, description=text, usage=usage)
    command.set_defaults(run=run)
    add_arguments(command)
    _add_common_arguments(command.add_argument)
    text = "run a command for each of many values, as GNU parallel does, here and on hosts"
    usage = "%(prog)s [OPTION ...] [TEMPLATE ...] [::: VALUE ... | :::: FILE ...]"
    command = commands.add_parser("do", help=text, description=text, usage=usage)
    command.set_defaults(run=do.do)
    do_options.add_arguments(command.add_argument)
    _add_common_arguments(command.add_argument, "--verbose")
    for function, count, text in (
        (hosts, "*", "check hosts: start a server with one worker on each, and print a table"),
        (config, "*", "print the settings, with the file and section that each came from"),
        (launch, "+", "start servers with tunnels, print how to use them, keep them up"),
    ):
        command = commands.add_parser(function.__name__, help=text, description=text)
        command.set_defaults(run=function)
        _add_arguments(command.add_argument, count)
        if function is launch:
            text = "seconds to wait for lost hosts when none is left; default: %(default)s"
            command.add_argument(
                "--patience", metavar="N", type=float, default=PATIENCE, help=text
            )
            _add_launch_arguments(command.add_argument)
    _add_others(commands)
    return parser


def _add_others(commands: Any) -> None:
    _add_views(commands)
    text = "have a port here lead to one of a host, until ENTER"
    command = commands.add_parser("connect", help=text, description=text)
    command.set_defaults(run=tunnels.connect)
    tunnels.add_arguments(command.add_argument)
    _add_common_arguments(command.add_argument)
    for name, room, text in (
        ("jobs", jobs, "tell of runs in arrays of batch jobs; cancel, resubmit, remove them"),
        ("sync-dirs", sync_dirs, "copy what is in a directory into another, many at a time"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=room.run)
        room.add_arguments(command.add_argument)


def _add_views(commands: Any) -> None:
    """Add what tells of runs."""
    text = "tell what a checkpoint or a job log knows: how far its runs are, and what failed"
    command = commands.add_parser("report", help=text, description=text)
    command.set_defaults(run=partial(until_closed, report.report), verbose=False)
    report.add_arguments(command.add_argument)
    for look, text in (
        (top.top, "show what your runs are doing: hosts, workers, items, rate, time left"),
        (top.status, "print once what your runs are doing"),
    ):
        command = commands.add_parser(look.__name__, help=text, description=text)
        command.set_defaults(run=partial(until_closed, look), verbose=False)
        top.add_arguments(command.add_argument, look is top.top)
    text = "show a page of the manual, or the chapter that a message names"
    command = commands.add_parser("help", help=text, description=text)
    command.set_defaults(run=partial(until_closed, manual.show), verbose=False)
    manual.add_arguments(command.add_argument)


def _new_parser(**how: Any) -> argparse.ArgumentParser:
    how |= {"epilog": epilog(how["prog"].split()[-1])}
    how |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
    if how["prog"].endswith(" run"):
        return ProgramParser(**how, allow_abbrev=False)  # `_find_program` knows no short forms
    if how["prog"].endswith(" do"):
        return do_options.Parser(**how, allow_abbrev=False)
    return argparse.ArgumentParser(**how)


def _add_arguments(add: Callable[..., object], servers: str) -> None:
    text = "[user@]host[:port][*workers], or auto: those of the configuration and OSTAP_PPSERVERS"
    add("servers", nargs=servers, metavar="SERVER", help=text)
    add("-p", "--profile", metavar="FILE", help="script that is on the hosts; sourced first")
    add("-c", "--script", metavar="FILE", help="local script, sent to the hosts; sourced last")
    _add_common_arguments(add)


def _add_launch_arguments(add: Callable[..., object]) -> None:
    """Add what `pplaunch` of Ostap takes besides."""
    text = "secret of the servers in place of a random one; others may see it among the processes"
    add("-s", "--secret", metavar="TEXT", help=text)
    text = "seconds without work after which the servers end; default: never"
    add("-t", "--timeout", metavar="N", type=float, default=math.inf, help=text)
    add("-d", "--debug", action="store_true", dest="verbose", help="the same as --verbose")
    add("-q", "--quiet", action="store_false", dest="verbose", help="the opposite")


def _add_common_arguments(add: Callable[..., object], *verbose: str) -> None:
    add("--python", metavar="COMMAND", help="Python on the hosts; default: python3")
    add("--tmpdir", metavar="DIR", help="directory for temporary files on the hosts")
    add("--ssh-config", metavar="FILE", help="configuration for ssh, in place of your own")
    text = "configuration file to read in place of the usual ones; may be given several times"
    add("--config", metavar="FILE", action="append", help=text)
    text = "tell what is done, and what ssh and the scripts on the hosts print"
    add(*verbose or ("-v", "--verbose"), action="store_true", help=text)

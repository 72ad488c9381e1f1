"""The command line: check hosts, show the settings, keep servers up for other programs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import queue
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ostap_parallel import __version__
from ostap_parallel.config import Settings, find_secret, load_settings
from ostap_parallel.errors import ConfigError, OstapParallelError
from ostap_parallel.executors.parallel import ParallelExecutor
from ostap_parallel.hosts.server import HostStatus
from ostap_parallel.hosts.ssh import control_directory, write_files
from ostap_parallel.report import relay

TIMEOUT = 7200.0  # seconds

NO_SERVER = (
    "no server is configured: name some, or set ppservers in [Parallel] of ~/.ostaprc, "
    "or OSTAP_PPSERVERS"
)
SERVERS = "[user@]host[:port][*workers], or auto: those of the configuration and OSTAP_PPSERVERS"

# A signal that asks us to end, or None when something about the hosts has changed.
News = queue.SimpleQueue[int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    It is 0; 1 if hosts failed; 2 for settings and options that are wrong; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    logging.getLogger("pp").setLevel(logging.WARNING)  # ppft tells of its own start only
    status: int
    try:
        status = args.run(args)
    except OstapParallelError as exc:
        print(f"ostap-parallel: {exc}", file=sys.stderr)
        status = 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    return status


def hosts(args: argparse.Namespace) -> int:
    """Start a server with one worker on each host, all at once, and print how that went."""
    found = _load(args).hosts
    if not found:
        raise ConfigError(NO_SERVER)
    # The table holds what would be warned of.
    logging.getLogger("ostap_parallel.executors").setLevel(logging.ERROR)
    each = [host if host.server_port else replace(host, ncpus=1) for host in found]
    with ParallelExecutor(0, each, secret=find_secret(each)) as executor:
        executor.wait_for_hosts()
        states = [replace(host) for host in executor.hosts]  # before they are closed
    _print_table(states)
    return int(any(host.state != "up" for host in states))


def config(args: argparse.Namespace) -> int:
    """Print the files that were read, and each host's settings with their origins."""
    settings = _load(args)
    print("files read:", *(settings.files or ["none"]), sep="\n  ")
    for host in settings.hosts:
        print(f"\n{host.label}")
        for key in (field.name for field in fields(host)):
            if key in host.origins:
                _print_setting(key, getattr(host, key), host.origins[key])
    if not settings.hosts:
        print("\nno server is configured")
    return 0


def launch(args: argparse.Namespace) -> int:
    """Keep servers with tunnels up until a signal comes or the last of them is lost."""
    found = _load(args).hosts
    if not found:
        raise ConfigError(NO_SERVER)
    for host in found:
        if host.server_port:
            origin = host.origins["server_port"]
            raise ConfigError(f"{host.label} ({origin}) is a server already: nothing to launch")
    secret = secrets.token_hex(32)
    news: News = queue.SimpleQueue()
    with (
        control_directory() as private,
        _signals_to(news.put),  # until all is closed, which a second Ctrl-C must not stop
        ParallelExecutor(
            0,
            found,
            secret=secret,
            timeout=args.timeout,
            on_event=_ignore if args.quiet else partial(relay, out=sys.stderr),
        ) as executor,
    ):
        write_files(private, {"secret": secret.encode()})
        executor.listen(lambda: news.put(None))
        if number := _wait_for_start(executor, news, args.quiet):
            return 128 + number
        if ports := [f"localhost:{host.port}" for host in executor.hosts if host.state == "up"]:
            print(f'export OSTAP_PPSERVERS="{",".join(ports)}"')
            print(f"export OSTAP_PPSECRET_FILE={shlex.quote(str(private / 'secret'))}", flush=True)
        while executor.workers:
            if news.get():
                return 0
        return 1


def _wait_for_start(executor: ParallelExecutor, news: News, quiet: bool) -> int:
    """Wait until each host is up or has failed; return a signal that came before, or 0."""
    told: set[str] = set()
    while True:
        # before the others are looked at: one that comes up meanwhile must not be missed
        is_starting = any(host.state == "starting" for host in executor.hosts)
        for host in executor.hosts:
            if host.state == "up" and host.name not in told and not quiet:
                workers = f"{host.workers} worker{'s' * (host.workers != 1)}"
                print(f"{host.name}: localhost:{host.port} ({workers})", file=sys.stderr)
                told.add(host.name)
        if not is_starting:
            return 0
        if number := news.get():
            return number


@contextlib.contextmanager
def _signals_to(put: Callable[[int], None]) -> Iterator[None]:
    """Hand over the signals that ask us to end, instead of ending at once."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a script's background job
            before[number] = signal.signal(number, lambda num, frame: put(num))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(host: str, event: Mapping[str, Any]) -> None:
    pass


def _load(args: argparse.Namespace) -> Settings:
    environment = None
    if args.environment_file is not None:
        try:
            environment = args.environment_file.read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"--environment-file: {exc}") from exc
    return load_settings(
        args.servers or "auto",
        config=args.config,
        profile=args.profile,
        environment=environment,
        script=args.script,
        python=args.python,
        tmpdir=args.tmpdir,
        ssh_config=args.ssh_config,
    )


def _print_setting(key: str, value: Any, origin: str) -> None:
    if isinstance(value, tuple):
        value = shlex.join(value)
    lines = ["(switched off)"] if value is None else str(value).split("\n")
    if len(lines) == 1:
        print(f"  {key} = {lines[0]}  ({origin})")
    else:
        print(f"  {key} =  ({origin})", *lines, sep="\n      ")


def _print_table(states: Sequence[HostStatus]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("host", "reachable", "python", "cpus", "seconds"):
        right = title in ("cpus", "seconds")
        table.add_column(title, no_wrap=True, justify="right" if right else "left")
    table.add_column("what is wrong", overflow="fold")
    longest = 0
    for host in states:
        about, error = host.about or {}, host.error
        wrong = f"{error.step}: {error.reason}".strip() if error else ""
        longest = max(longest, len(wrong))
        row = (
            host.name,
            "yes" if host.state == "up" else "no",
            about.get("python", ""),
            # a server that was there already tells the number of its workers only
            str(about.get("cpus", host.workers or "")),
            "" if host.seconds is None else f"{host.seconds:.2f}",
            wrong,
        )
        table.add_row(*map(Text.from_ansi, row))  # their brackets are no markup
    console = Console()
    if not console.is_terminal:
        console.width = 500 + longest
    with console.capture() as capture:
        console.print(table)
    print(*(line.rstrip() for line in capture.get().strip("\n").split("\n")), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ostap-parallel", description="Run Python on local cores and on hosts reached by ssh."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = _common_options()
    text = "check hosts: start a server with one worker on each, and print a table"
    command = commands.add_parser("hosts", parents=[common], help=text, description=text)
    command.add_argument("servers", nargs="*", metavar="SERVER", help=f"{SERVERS}; default: auto")
    command.set_defaults(run=hosts)
    text = "print the settings, with the file and section that each came from"
    command = commands.add_parser("config", parents=[common], help=text, description=text)
    command.add_argument("servers", nargs="*", metavar="SERVER", help=f"{SERVERS}; default: auto")
    command.set_defaults(run=config)
    text = "start servers with tunnels, print how to use them, and keep them up until Ctrl-C"
    command = commands.add_parser("launch", parents=[common], help=text, description=text)
    command.add_argument("servers", nargs="+", metavar="SERVER", help=SERVERS)
    _add_launch_options(command)
    command.set_defaults(run=launch)
    return parser


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("-p", "--profile", metavar="FILE", help="script that is on the hosts; sourced first")
    text = "bash text for the hosts, read from a local file; sourced next"
    add("--environment-file", metavar="FILE", type=Path, help=text)
    add("-c", "--script", metavar="FILE", help="local script, sent to the hosts; sourced last")
    add("--python", metavar="COMMAND", help="Python on the hosts; default: python3")
    add("--tmpdir", metavar="DIR", help="directory for temporary files on the hosts")
    add("--ssh-config", metavar="FILE", help="configuration for ssh, in place of your own")
    text = "configuration file to read in place of the usual ones; may be given several times"
    add("--config", metavar="FILE", action="append", help=text)
    text = "tell what is done, and what ssh and the scripts on the hosts print"
    add("-v", "--verbose", action="store_true", help=text)
    return common


def _add_launch_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("-q", "--quiet", action="store_true", help="print the exports and errors only")
    text = "a server ends after so much time without a sign of life from here; default: 7200"
    add("-t", "--timeout", metavar="SECONDS", type=_seconds, default=TIMEOUT, help=text)
    add("-s", "--secret", type=_refuse_secret, help=argparse.SUPPRESS)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"not a number of seconds from 1 on: {text}")
    return seconds


def _refuse_secret(_text: str) -> str:
    raise argparse.ArgumentTypeError(
        "all users of this machine would see it in the list of processes; the secret is random, "
        "and a private file hands it over"
    )

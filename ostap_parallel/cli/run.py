"""``ostap-parallel run``: a program with its tasks on hosts, as SCOOP's launcher runs it."""

from __future__ import annotations

import argparse
import atexit
import base64
import builtins
import io
import itertools
import logging
import marshal
import os
import pkgutil
import pstats
import runpy
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ostap_parallel.config import load_settings
from ostap_parallel.config.entries import KEYWORDS, split_entries
from ostap_parallel.config.host import check_number
from ostap_parallel.config.hostlist import Share, granted_hosts, merge_shares, read_hostfile
from ostap_parallel.errors import ConfigError
from ostap_parallel.faces import launch
from ostap_parallel.machine.cpus import usable_cpus
from ostap_parallel.supply.steps import way_within
from ostap_parallel.supply.syncing import Source, Sync, find_sources
from ostap_parallel.worker.launched import PROFILE, prepare

# Where the profiles go, below the current directory.
PROFILES = "profile"

# Said of a program that leaves no choice of workers.
UNUSED = (
    "ostap-parallel run: the hosts were not used ({hosts}): they are for futures, WorkManager, "
    "Pool, Executor and the joblib backend of ostap_parallel, where these are given neither hosts "
    "nor a number of workers"
)


class ProgramParser(argparse.ArgumentParser):
    """A parser whose options end where a program begins; that is ``program`` with its arguments.

    A list of hosts ends there too: a program has a slash in it, or ends in ``.py``.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the options before the program."""
        words = list(sys.argv[1:] if args is None else args)
        end = self._find_program(words)
        found, rest = super().parse_known_args(words[:end], namespace)
        found.program = words[end + (words[end : end + 1] == ["--"]) :]
        if not rest and not found.program and not found.module:
            self.error("a program, or -m MODULE, is wanted; write -- behind a list of hosts")
        return found, rest

    def _find_program(self, words: Sequence[str]) -> int:
        position = 0
        while position < len(words) and words[position].startswith("-"):
            word, position = words[position], position + 1
            if word == "--":
                return position - 1
            action = self._option_string_actions.get(word)
            if word == "-m":
                return position + 1
            if action is not None and action.nargs is None:
                position += 1
            elif action is not None and action.nargs == "+":
                rest = itertools.takewhile(_may_be_host, words[position:])
                position += len(list(rest))
        return min(position, len(words))


def _may_be_host(word: str) -> bool:
    return not word.startswith("-") and "/" not in word and not word.endswith((".py", ".pyz"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command, but for those that it shares with others."""
    add = parser.add_argument
    named = parser.add_mutually_exclusive_group()
    text = "[user@]host[:port][*workers] ...; this machine: localhost; to name one twice counts 2"
    named.add_argument("--hosts", "--host", nargs="+", metavar="HOST", help=text)
    text = "file with a host, and how many workers it has, on each line; n[01-04] are four hosts"
    named.add_argument("--hostfile", metavar="FILE", help=text)
    add("-n", metavar="N", dest="total", help="workers in all")
    add("-p", "--path", metavar="DIR", help="directory, here and there, in which all is run")
    add("--pythonpath", metavar="P", default="", help="more directories of modules, by colons")
    add("--prolog", metavar="FILE", help="script that prepares hosts; sourced by bash there")
    add("--nice", type=int, default=0, metavar="N", help="nice level of workers, here and there")
    text = "modules to send in place of the program's directory; may be given several times"
    add("--sync", action="append", metavar="PATH", help=text)
    text = f"write a profile of each worker to {PROFILES}/HOST-PID.prof here"
    add("--profile", action="store_true", help=text)
    text = "always the case: all data goes through ssh"
    add("--tunnel", action=argparse.BooleanOptionalAction, default=True, help=text)
    add("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")


def run(args: argparse.Namespace) -> int:
    """Run a program whose executors have workers on hosts; return its exit status.

    Raises
    ------
    ConfigError
        An option or a setting is wrong; nothing has been started.
    """
    if not args.tunnel:
        raise ConfigError("--no-tunnel: all data goes through ssh: leave the option out")
    if args.path is not None:
        _enter(args.path)
    shares, way = _shares(args, os.environ)
    if args.total is not None:
        shares = allot(shares, check_number(args.total, None, "-n"))
    ncpus, servers = split_local(shares)
    start, directory = _find_program(args)
    path = [os.path.abspath(part) for part in args.pythonpath.split(":") if part]  # noqa: PTH100
    sys.path[1:1] = path
    if args.verbose:
        _tell(ncpus, servers)
    profiles = Profiles(Path.cwd() / PROFILES) if args.profile else None
    names = "ssh_config", "python", "tmpdir"
    settings = {"script": args.prolog, "way": way, **{name: getattr(args, name) for name in names}}
    preparation = str(Path.cwd()), args.path is not None, path, args.nice, args.profile
    launched = launch.Launch(
        ncpus,
        servers,
        preparation=(prepare, preparation),
        config=args.config,
        sync=_sources(args, directory) if servers else (),
        settings={name: value for name, value in settings.items() if value is not None},
        take=profiles.take if profiles else _take_none,
    )
    # what is wrong is so now
    load_settings(servers, config=args.config, **launched.settings)
    find_sources(launched.sync)
    atexit.register(_finish, launched, profiles)
    launch.begin(launched)
    return run_as_python(start)


def _take_none(host: str, event: dict[str, Any]) -> bool:
    return False


def _finish(launched: launch.Launch, profiles: Profiles | None) -> None:
    """End the workers, behind all that the program has left to be done at its exit."""
    executors = launched.executors()
    if profiles is not None:
        for executor in executors:
            executor.backend.flush()
        profiles.write()
    for executor in executors:
        executor.close()
    if launched.servers and not launched.was_used:
        print(UNUSED.format(hosts=" ".join(launched.servers)), file=sys.stderr)


def _enter(directory: str) -> None:
    try:
        os.chdir(directory)
    except OSError as exc:
        raise ConfigError(f"--path: {directory}: {exc.strerror}") from exc


def _shares(
    args: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[list[Share], str | None]:
    """Return hosts and workers: of the options, the configuration, a batch system, or none.

    And by what they are reached, if that is known.
    """
    if args.hosts:
        words = split_entries(" ".join(args.hosts))
        return merge_shares(share for word in words for share in _read_share(word, args)), None
    if args.hostfile:
        return read_hostfile(args.hostfile, "--hostfile"), None
    if configured := _read_share("auto", args):
        return [("localhost", None), *configured], None
    if granted := granted_hosts(environ):
        return granted, way_within(environ)
    return [("localhost", None)], None


def _read_share(word: str, args: argparse.Namespace) -> list[Share]:
    if word.lower() in KEYWORDS:
        found = load_settings("auto", config=args.config, ssh_config=args.ssh_config).hosts
        return [(host.label, host.ncpus) for host in found]
    name, star, count = word.rpartition("*")
    return [(name, check_number(count, None, f"host {word!r}")) if star else (word, None)]


def allot(shares: Sequence[Share], total: int) -> list[Share]:
    """Give hosts `total` workers: first what each has, in order, and then one each by turns.

    A host whose workers are not known is taken for one that has one.
    """
    counts: dict[str, int] = {}
    for host, count in shares:
        counts[host] = min(count or 1, total - sum(counts.values()))
    hosts = itertools.cycle(counts)
    for _ in range(total - sum(counts.values())):
        counts[next(hosts)] += 1
    return [(host, count) for host, count in counts.items() if count]


def split_local(shares: Iterable[Share]) -> tuple[int, list[str]]:
    """Return the number of local workers, and the entries of the other hosts."""
    ncpus, servers = 0, []
    for host, count in shares:
        if is_here(host):
            ncpus += _granted_cpus() if count is None else count
        else:
            servers.append(host if count is None else f"{host}*{count}")
    return ncpus, servers


def is_here(name: str) -> bool:
    """Return whether a host of a list is this machine; one with a user or a port is another."""
    own = {socket.gethostname().lower(), os.environ.get("SLURMD_NODENAME", "").lower()}
    name = name.lower()
    if name in {"localhost", "127.0.0.1", "::1", *own}:
        return True
    # one of the two may be without the domain
    first, _, domain = name.partition(".")
    pairs = [(short, rest) for short, _, rest in (one.partition(".") for one in own)]
    return any(first == short and not (domain and rest) for short, rest in pairs)


def _granted_cpus() -> int:
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(usable_cpus(), int(granted)) if granted.isdecimal() else usable_cpus()


def _tell(ncpus: int, servers: Iterable[str]) -> None:
    log = logging.getLogger("ostap_parallel")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # the program may have its own way
    for host in [f"localhost*{ncpus}"] * bool(ncpus) + list(servers):
        name, star, count = host.rpartition("*")
        log.info("host %s, workers: %s", *((name, count) if star else (host, "as it grants CPUs")))


def _sources(args: argparse.Namespace, directory: Path) -> list[Sync]:
    configured = load_settings((), config=args.config).sync
    own: list[Sync] = args.sync or [Source(directory, directory)]
    return [*own, *configured]


def _find_program(args: argparse.Namespace) -> tuple[Callable[[], object], Path]:
    """Set ``sys.argv`` and ``sys.path`` as python does; return what runs it, and where it is."""
    if args.module:
        sys.argv = ["-m", *args.program]
        start: Callable[[], object] = partial(_run_module, args.module, True)
        directory = Path.cwd()
    else:
        sys.argv = args.program
        file = Path(sys.argv[0])
        if not file.exists():
            raise ConfigError(f"no such program: {file}")
        if pkgutil.get_importer(str(file)) is not None:  # a directory or a zip file
            start, directory = partial(_run_module, "__main__", False), file.absolute()
        else:
            start, directory = partial(_run_script, file.absolute()), file.resolve().parent
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(directory)
    return start, directory


def _run_module(name: str, alter_argv: bool) -> None:
    sys.modules["__main__"] = ModuleType("__main__")
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _run_script(file: Path) -> None:
    main = sys.modules["__main__"] = ModuleType("__main__")
    loader = SourceFileLoader("__main__", str(file))
    main.__dict__.update(
        __file__=str(file), __loader__=loader, __builtins__=builtins, __cached__=None
    )
    with io.open_code(str(file)) as source:
        code = compile(source.read(), str(file), "exec", dont_inherit=True)
    exec(code, main.__dict__)


def run_as_python(start: Callable[[], object]) -> int:
    """Run a program; return its exit status, after the traceback of what it has raised.

    SystemExit goes its usual way.
    """
    try:
        start()
    except SystemExit:
        raise
    except BaseException as exc:
        tb = exc.__traceback__
        while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
            tb = tb.tb_next
        sys.excepthook(type(exc), exc.with_traceback(tb), tb)
        return 128 + signal.SIGINT if isinstance(exc, KeyboardInterrupt) else 1
    return 0


class Profiles:
    """The profiles of workers, for a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stats: dict[str, pstats.Stats] = {}

    def take(self, host: str, event: Mapping[str, Any]) -> bool:
        """Take a profile from what a worker says; return whether it was one."""
        if event["kind"] != "log" or event["record"].get("name") != PROFILE:
            return False
        stats = marshal.loads(zlib.decompress(base64.b64decode(event["record"]["msg"])))
        added: Any = SimpleNamespace(create_stats=lambda: None, stats=stats)
        name = f"{host}-{event['pid']}"
        known = self._stats.get(name)
        self._stats[name] = known.add(added) if known else pstats.Stats(added)
        return True

    def write(self) -> None:
        """Write a file for each worker that has run anything."""
        self._directory.mkdir(exist_ok=True)
        for name, stats in self._stats.items():
            stats.dump_stats(self._directory / f"{name}.prof")

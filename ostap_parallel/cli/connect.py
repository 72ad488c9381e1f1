"""``ostap-parallel connect``: a port of a host, here, for as long as it is wanted."""

from __future__ import annotations

import argparse
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from ostap_parallel.commands.host import Host
from ostap_parallel.errors import ConfigError
from ostap_parallel.worker import listening


def add_arguments(add: Callable[..., object]) -> None:
    """Add the options."""
    add("server", metavar="HOST", help="[user@]host[:port]")
    text = "port of the host's own loopback; default: one that is free there"
    add("port", metavar="PORT", type=_port, nargs="?", help=text)
    text = "the other way round: a port of the host leads to PORT here"
    add("--reverse", action="store_true", help=text)
    add("-p", "--profile", metavar="FILE", help="script that is on the host; sourced first")
    add("-c", "--script", metavar="FILE", help="local script, sent to the host; sourced last")


def connect(args: argparse.Namespace) -> int:
    """Keep a tunnel up until ENTER, Ctrl-C, or until the host is lost; return 1 for that."""
    if args.reverse and args.port is None:
        raise ConfigError("--reverse wants the port here, too")
    news: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)  # they end it as Ctrl-C does
    names = ("profile", "script", "python", "tmpdir", "ssh_config", "config")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    with Host(args.server, ncpus_per_host=1, **settings) as host:
        host.executor.backend.listen(lambda: news.put("host"))
        try:
            print(_opened(host, args), flush=True)
            threading.Thread(target=_wait_for_enter, args=[news], daemon=True).start()
            while host.is_up and news.get() != "enter":
                pass
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second must not stop the closing
            return 0
        if not host.is_up:
            print(f"ostap-parallel: {host.name} is lost", file=sys.stderr)
        return int(not host.is_up)


def _opened(host: Host, args: argparse.Namespace) -> str:
    """Open the tunnel; return what leads where."""
    if args.reverse:
        there = host.reverse_tunnel(args.port)
        return f"localhost:{there} of {host.name} leads to localhost:{args.port}"
    port = args.port or host.python(listening.free_port)
    return f"localhost:{host.tunnel(port)} leads to localhost:{port} of {host.name}"


def _wait_for_enter(news: queue.SimpleQueue[str]) -> None:
    if sys.stdin is not None and sys.stdin.readline():  # else there is nobody to press it
        news.put("enter")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"a port is wanted, not {text!r}")
    return int(text)

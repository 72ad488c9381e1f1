"""ROOT begins: in a worker without its handlers of signals, its windows, and its crash reports."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
from collections.abc import Iterator
from typing import Any

from ostap_parallel.root.crash import CODE


def ready() -> Any:
    """Return ROOT, initialised.

    To import it is not enough: it begins when it is first asked for something of C++.
    """
    root = importlib.import_module("ROOT")
    root.gROOT.GetName()
    return root


def begin_in_worker() -> Any:
    """Return ROOT for a worker: nothing is drawn, and a crash is told at once and in brief."""
    with _keeping_handlers(), _without_display():
        root = importlib.import_module("ROOT")
        with contextlib.suppress(AttributeError):
            root.PyConfig.StartGUIThread = False  # some releases have one: forks forbid it
        ready()
    root.gROOT.SetBatch(True)
    _report_crashes(root)
    return root


@contextlib.contextmanager
def _without_display() -> Iterator[None]:
    """Have ROOT begin without windows."""
    display = os.environ.pop("DISPLAY", None)
    try:
        yield
    finally:
        if display is not None:
            os.environ["DISPLAY"] = display


# More than `struct sigaction` has on any system.
_SIZE = 512


@contextlib.contextmanager
def _keeping_handlers() -> Iterator[None]:
    """Have all signals handled afterwards as before.

    ROOT takes over most of them: also the alarm that limits the time of an item. Its handler of
    crashes calls a debugger, which takes ten seconds, and ends with an exit status of its own.
    """
    libc = ctypes.CDLL(None)
    actions = {}
    for number in map(int, signal.valid_signals()):
        action = ctypes.create_string_buffer(_SIZE)
        if libc.sigaction(number, None, action) == 0:
            actions[number] = action
    try:
        yield
    finally:
        for number, action in actions.items():
            libc.sigaction(number, action, None)


def _report_crashes(root: Any) -> None:
    """Have a crash tell where it was in C++ and in Python, and end the process by its signal."""
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2, all_threads=False)
    if root.gInterpreter.Declare(CODE):  # the last that is set is the first that is called
        root.ostap_parallel_crash.install()

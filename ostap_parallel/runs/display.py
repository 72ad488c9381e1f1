"""What a notebook and a prompt show of objects and of interrupts."""

from __future__ import annotations

import contextlib
import functools
import html
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ostap_parallel.supply.source import HostStatus
from ostap_parallel.views.page import hosts_table
from ostap_parallel.worker.calls import spread

_PACKAGE = Path(__file__).parents[1]


class Shown:
    """Shows its text: in a notebook as it is, and by rich without markup."""

    def _repr_html_(self) -> str:
        # not all notebooks, and none of nbconvert's, have columns of one width by themselves
        return f"<pre style='font-family: monospace'>{html.escape(str(self))}</pre>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __rich__(self) -> str:
        # rich takes what is in brackets for markup
        return str(self).replace("[", r"\[")


class HostList(list[HostStatus]):
    """Hosts; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        return hosts_table(self)


def show_as(error: BaseException, text: str) -> None:
    """Have IPython show a text in place of an exception's traceback."""
    with contextlib.suppress(AttributeError):  # one with slots
        error._render_traceback_ = functools.partial(list, [text])  # type: ignore[attr-defined]


def caller() -> str:
    """Return where the program has called this package."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame = frame.f_back
    return "" if frame is None else f"line {frame.f_lineno} of {frame.f_code.co_filename}"


def title_of(function: Any) -> str:
    """Return a name for a function, a task or whatever is called, also for a lambda."""
    while isinstance(function, functools.partial):
        spreads = function.func is spread and function.args
        function = function.args[0] if spreads else function.func
    name = str(getattr(function, "__name__", type(function).__name__))
    code = getattr(function, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    file = Path(code.co_filename)
    # what is typed at a prompt has no file, or one that tells nothing
    where = f"{file.name}:" if file.is_file() and "ipykernel" not in code.co_filename else "line "
    return f"lambda at {where}{code.co_firstlineno}"

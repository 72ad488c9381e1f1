"""What runs are doing, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ostap_parallel.views.words import duration, named, printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

# Items that run, the longest first, that are shown of each run.
MOST = 15
NOTHING = "No run of yours is going on here, or none that has taken more than a second."

Run = Mapping[str, Any]


def text_of(run: Run) -> str:
    """Return in lines what a run is doing."""
    lines = [f"{run['title']}: {summary_of(run)}"]
    lines += (f"  {note}" for note in run.get("notes", ()))
    for host in run.get("hosts", ()):
        lines.append(f"  {host['host']}: {state_of(host)}")
    running = run.get("running", ())
    for one in running[:MOST]:
        lines.append(f"  running: {item_of(one)} on {one['host']} for {duration(one['seconds'])}")
    if len(running) > MOST:
        lines.append(f"  ... and {len(running) - MOST} more")
    return printable("\n".join(lines))


def summary_of(run: Run) -> str:
    """Return one line: how far it is, how fast, and how long it will take."""
    total = "" if run.get("total") is None else f"/{run['total']}"
    parts = [f"{run['done']}{total} items in {duration(run['seconds'])}"]
    if rate := run.get("rate"):
        parts.append(f"{rate:.3g}/s" if rate >= 0.1 else f"{duration(1 / rate)}/item")
    if run.get("left"):
        parts.append(f"{duration(run['left'])} left")
    parts += [f"{run[name]} {name}" for name in ("failed", "retried") if run.get(name)]
    if run.get("load") is not None:
        parts.append(f"load here {run['load']:.1f}")
    return ", ".join(parts)


def state_of(host: Mapping[str, Any]) -> str:
    """Return in a few words what a host is doing."""
    if host["state"] == "up":
        text = f"{host['busy']} of {host['workers']} workers busy"
        text += "".join(f", {words}" for words in filter(None, used_by(host)))
    else:
        text = _since(host)
    text += f", lost {host['lost']} x" if host["lost"] else ""
    return f"{text}: {host['reason']}" if host["reason"] else text


def used_by(host: Mapping[str, Any]) -> tuple[str, str]:
    """Return a host's load, and the memory of its workers, in words, where they are known."""
    load, memory = host.get("load"), host.get("memory")
    return ("" if load is None else f"load {load:.1f}"), (
        f"{memory / 1e6:.0f} MB" if memory else ""
    )


def _since(host: Mapping[str, Any]) -> str:
    """Return a host's state, what it is at, and for how long, in whole seconds."""
    step = f" ({host['step']})" if host.get("step") else ""
    return f"{host['state']}{step} for {duration(max(1, round(host['for'])))}"


def item_of(one: Mapping[str, Any]) -> str:
    """Return which item runs."""
    if one["count"] > 1:
        return f"one of {one['count']} items from {one['index']} on"
    return named(one["index"], one["item"])


def screen_of(runs: Sequence[Run]) -> Group:
    """Return all of it for rich."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for run in runs:
        where = f"  process {run['process']}" if "process" in run else ""
        title = Text(printable(run["title"]), "bold")
        parts += [title + Text(where, "dim"), Text(summary_of(run))]
        if run.get("total"):
            bar = Table.grid(expand=True)  # by itself it does not end its line
            bar.add_row(ProgressBar(run["total"], run["done"]))
            parts.append(bar)
        parts += (Text(printable(note)) for note in run.get("notes", ()))
        if run.get("hosts"):
            parts += [_hosts(run["hosts"]), *_reasons(run["hosts"])]
        if run.get("running"):
            parts.append(_running(run["running"]))
        parts.append(Text())
    return Group(*(parts or [Text(NOTHING)]))


def _hosts(hosts: Sequence[Mapping[str, Any]]) -> Table:
    from rich.text import Text

    table = _table("host", "state", ">workers", ">busy", ">load", ">memory", ">lost")
    for host in hosts:
        is_up = host["state"] == "up"
        state = Text("up", "green") if is_up else Text(_since(host))
        state.stylize("yellow" if host["state"] in ("starting", "queued", "resting") else "")
        state.stylize("red" if host["state"] in ("lost", "failed") else "")
        load, memory = used_by(host)
        counts = str(host["workers"]), str(host["busy"])
        used = load.removeprefix("load "), memory, str(host["lost"])
        table.add_row(Text(printable(host["host"])), state, *counts, *used)
    return table


def _reasons(hosts: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Return a line for each host that is not up for a reason that is known."""
    from rich.text import Text

    lines = (f"{host['host']}: {host['reason']}" for host in hosts if host["reason"])
    return [
        Text(printable(" ".join(line.split())), "dim", overflow="ellipsis", no_wrap=True)
        for line in lines
    ]


def _running(running: Sequence[Mapping[str, Any]]) -> Table:
    from rich.text import Text

    table = _table("host", ">process", "item", ">for", ">memory")
    for one in running[:MOST]:
        memory = f"{one['memory'] / 1e6:.0f} MB" if one.get("memory") else ""
        pid = str(one["pid"] or "")
        texts = Text(printable(one["host"])), Text(pid), Text(printable(item_of(one)))
        table.add_row(*texts, duration(one["seconds"]), memory)
    if len(running) > MOST:
        table.add_row("", "", f"... and {len(running) - MOST} more", "", "")
    return table


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        justify: Any = "right" if title.startswith(">") else "left"
        table.add_column(title.removeprefix(">"), justify=justify, no_wrap=bool(title))
    return table

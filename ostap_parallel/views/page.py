"""One page about a run, which opens from a file: all that it needs is in it."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ostap_parallel.views.groups import Group, groups_of
from ostap_parallel.views.picture import Picture
from ostap_parallel.views.plots import Plots, plots_of
from ostap_parallel.views.words import duration, named

# Failures that are shown with their traceback, and characters of it.
FAILURES = 200
LENGTH = 8000
FEW = 10  # that are listed at once

NO_PLOTS = "The plots need Bokeh: pip install 'ostap_parallel[plots]'"
NO_TIMES = "There is no timeline: when each item ran was not kept."

# Bars of the timeline, about.
BARS = 8_000

_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "host": ("host", str),
    "state": ("state", str),
    "start": ("start", lambda value: "" if value is None else duration(value)),
    "jobs": ("items", str),
    "failed": ("failed", str),
    "seconds": ("total time", duration),
    "shortest": ("shortest", lambda value: "" if value is None else duration(value)),
    "median": ("median", lambda value: "" if value is None else duration(value)),
    "longest": ("longest", lambda value: "" if value is None else duration(value)),
    "lost": ("lost", str),
    "memory": ("memory", lambda value: f"{value / 1e6:.0f} MB" if value else ""),
    "note": ("note", str),
    "error": ("error", str),
}
_TEXTS = {"host", "state", "note", "error"}


@dataclass
class Facts:
    """What a page tells.

    Attributes
    ----------
    title
        What was run.
    numbers
        Names and values, as they are shown.
    hosts
        A row for each, with the columns of `Report.save` to CSV; ``memory`` in bytes.
    failures
        As `Failure.as_dict`.
    slowest, running, stragglers, notes
        Lines.
    picture
        The timeline, if there is one.
    """

    title: str
    numbers: dict[str, str]
    hosts: Sequence[Mapping[str, Any]] = ()
    failures: Sequence[Mapping[str, Any]] = ()
    slowest: Sequence[str] = ()
    running: Sequence[str] = ()
    stragglers: Sequence[str] = ()
    notes: Sequence[str] = ()
    groups: Sequence[Group] = field(default_factory=list)
    picture: Picture | None = None
    number_of_failures: int = 0

    def __post_init__(self) -> None:
        self.groups = self.groups or groups_of(self.failures)
        self.number_of_failures = max(self.number_of_failures, len(self.failures))


def page_of(facts: Facts) -> str:
    """Return a page in HTML. Whatever comes from the user in it is text there, not markup."""
    plots = plots_of(facts.picture) if facts.picture is not None and facts.picture.bars else None
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{_text(facts.title)}</title>",
        f"<style>{_STYLE}</style>",
        plots.head if plots else "",
        "</head><body>",
        *_body(facts, plots),
        *((plots.script, f"<script>{_HIDING}</script>") if plots else ()),
        "</body></html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _body(facts: Facts, plots: Plots | None) -> Iterator[str]:
    yield f"<header><h1>{_text(facts.title)}</h1>"
    if facts.picture is not None and facts.picture.start:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.picture.start))
        yield f"<p>began {began}</p>"
    yield "</header><main><section class='tiles'>"
    for name, value in facts.numbers.items():
        kind = " bad" if name in ("failed", "unfinished") and value != "0" else ""
        shown = f"<b data-name='{_text(name)}'>{_text(value)}</b>"
        yield f"<div class='tile{kind}'>{shown}<span>{_text(name)}</span></div>"
    yield "</section>"
    for note in facts.notes:
        yield f"<p class='note'>{_text(note)}</p>"
    yield from _failures(facts)
    yield from _drawn(facts, plots)
    yield from _hosts(facts)
    for title, lines in (
        ("Took far longer than others", facts.stragglers),
        ("Slowest items", facts.slowest),
        ("Running", facts.running),
    ):
        if lines:
            rows = "".join(f"<li>{_text(line)}</li>" for line in lines)
            yield f"<section><h2>{title}</h2><ul>{rows}</ul></section>"
    yield "</main>"


def _failures(facts: Facts) -> Iterator[str]:
    if not facts.failures:
        return
    yield f"<section id='failures'><h2>Failures ({facts.number_of_failures})</h2>"
    rows = [
        (group.count, group.name, group.place, group.index, group.host, group.reason)
        for group in facts.groups[:FAILURES]
    ]
    titles = ["items", "raised", "in", "first item", "on", "of which it says"]
    yield _table(titles, rows, numeric={0, 3})
    shown = _shown(facts)
    is_open = " open" if len(shown) <= FEW else ""
    yield f"<details{is_open}><summary>One by one</summary><div class='inner'>"
    for failure in shown:
        where = f"{failure['host']}" + (f", pid {failure['pid']}" if failure.get("pid") else "")
        head = f"{named(failure['index'], failure['item'])} on {where}: {failure['error']}"
        yield f"<details><summary>{_text(_cut(head, 400))}</summary>"
        yield f"<pre class='traceback'>{_text(_cut(failure['traceback'], LENGTH))}</pre>"
        if failure.get("output"):
            yield "<p>Its worker had printed, last:</p>"
            yield f"<pre class='output'>{_text(failure['output'])}</pre>"
        yield "</details>"
    if more := facts.number_of_failures - len(shown):
        yield f"<p class='note'>{more} more failures are not shown.</p>"
    yield "</div></details></section>"


def _shown(facts: Facts) -> list[Mapping[str, Any]]:
    """Return the failures that are shown: the first of each group before others."""
    first = {group.index for group in facts.groups}
    ordered = sorted(facts.failures, key=lambda one: (one["index"] not in first, one["index"]))
    return sorted(ordered[:FAILURES], key=lambda one: int(one["index"]))


def _drawn(facts: Facts, plots: Plots | None) -> Iterator[str]:
    picture = facts.picture
    if picture is None or not picture.bars:
        yield f"<p class='note'>{_text(NO_TIMES)}</p>"
        return
    yield "<section id='timeline'><h2>Timeline</h2>"
    if plots is None:
        yield f"<p class='note'>{_text(NO_PLOTS)}</p></section>"
        return
    yield "<p>A lane for each worker. Wheel: zoom; drag: move; a name: hide what has its colour."
    yield f"{_text(_sampled(picture))}</p>"
    yield f"{_keys(plots, 'timeline')}{plots.places['timeline']}"
    yield f"<h3>Throughput</h3>{plots.places['throughput']}</section>"
    if "times" in plots.places:
        drawn = f"{_keys(plots, 'times')}{plots.places['times']}"
        yield f"<section id='times'><h2>Times of items</h2>{drawn}</section>"


def _keys(plots: Plots, name: str) -> str:
    """Return the legend of a plot."""
    buttons = (
        f"<button data-name='{_text(key.name)}'><i style='background: {key.colour}'></i>"
        f"{_text(key.label)}</button>"
        for key in plots.keys[name]
    )
    return f"<div class='keys'>{''.join(buttons)}</div>"


def _sampled(picture: Picture) -> str:
    """Return what of the timeline is not drawn as it was, if anything."""
    text = ""
    if picture.is_binned and picture.least:
        bars = sum(1 for bar in picture.bars if bar.items)
        text = (
            f" {picture.items} runs of items are drawn as {bars} bars: neighbours that together "
        )
        text += f"take less than {duration(picture.least)} and ended alike are one bar."
    if picture.beyond:
        text += f" {picture.beyond} more items, the last ones, are not drawn."
    return text


def _hosts(facts: Facts) -> Iterator[str]:
    if facts.hosts:
        names = [name for name in _COLUMNS if any(row.get(name) for row in facts.hosts)]
        rows = [[_COLUMNS[name][1](row.get(name)) for name in names] for row in facts.hosts]
        numeric = {n for n, name in enumerate(names) if name not in _TEXTS}
        titles = [_COLUMNS[name][0] for name in names]
        yield f"<section id='hosts'><h2>Hosts</h2>{_table(titles, rows, numeric)}"
        events = facts.picture.events if facts.picture else []
        if events:
            told = [(duration(max(0.0, e.seconds)), e.host, e.state, e.reason) for e in events]
            yield "<h3>What became of them</h3>"
            yield _table(["after", "host", "state", "reason"], told[-1000:], {0})
        yield "</section>"


def hosts_table(hosts: Sequence[Any]) -> str:
    """Return a table for a notebook of hosts and their states; empty if there are none."""
    if not hosts:
        return ""
    rows = []
    for host in hosts:
        start = "" if host.seconds is None else duration(host.seconds)
        reason = host.reason or (str(host.error) if host.error and host.state != "up" else "")
        state = f"{host.state} ({host.step})" if host.step else host.state
        rows.append((host.name, state, host.workers, start, host.lost, reason))
    return _table(["host", "state", "workers", "start", "lost", "reason"], rows, {2, 3, 4})


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]], numeric: set[int]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        kinds = [" class='n'" if n in numeric else "" for n in range(len(cells))]
        made = (
            f"<{tag}{kind}>{_text(str(cell))}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class='wide'><table>{line('th', titles)}{body}</table></div>"


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters]\n{text[-half:]}"


def _text(text: str) -> str:
    return html.escape(text.replace("\0", "\N{REPLACEMENT CHARACTER}"))


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; color: #1c2733; background: #f4f6f8; }
header { background: #22384f; color: #fff; padding: 14px 28px; }
header h1 { font-size: 21px; margin: 0; overflow-wrap: anywhere; }
header p { margin: 2px 0 0; color: #c6d3df; }
main { max-width: 1500px; margin: 0 auto; padding: 16px 28px 40px; }
section { background: #fff; border: 1px solid #dfe4e9; border-radius: 6px; padding: 12px 18px;
  margin: 0 0 16px; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px 34px; }
.tile b { display: block; font-size: 22px; } .tile span { color: #5c6b7a; }
.tile.bad b { color: #c0202b; }
h2 { font-size: 17px; margin: 2px 0 8px; } h3 { font-size: 15px; margin: 14px 0 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th { text-align: left; color: #5c6b7a; font-weight: 600; white-space: nowrap; }
th, td { padding: 3px 16px 3px 0; border-bottom: 1px solid #e8ecef; vertical-align: top; }
td { overflow-wrap: break-word; max-width: 60em; }
.n { text-align: right; white-space: nowrap; }
pre { background: #f4f6f8; padding: 10px; overflow-x: auto; font-size: 13px; margin: 6px 0; }
details { margin: 6px 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
.note { background: #fff7e0; border: 1px solid #f0dfa8; border-radius: 6px; padding: 6px 12px; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0; }
.keys button { font: inherit; border: 0; padding: 0; background: none; cursor: pointer;
  text-align: left; overflow-wrap: anywhere; }
.keys i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; }
.keys .off { opacity: 0.35; text-decoration: line-through; }
.inner { padding-left: 16px; }
ul { margin: 4px 0; padding-left: 20px; overflow-wrap: anywhere; }
"""

# What is named in a legend is hidden and shown by a click on it.
_HIDING = """
for (const key of document.querySelectorAll(".keys button")) key.onclick = () => {
  const glyph = Bokeh.documents[0].get_model_by_name(key.dataset.name)
  glyph.visible = !glyph.visible
  key.classList.toggle("off", !glyph.visible)
}
"""

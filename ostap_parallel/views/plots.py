"""The plots of a page, by Bokeh: what a browser needs for them is part of the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from ostap_parallel.views.picture import CLASSES, Bar, Fate, Picture
from ostap_parallel.views.words import duration

# Colours of functions, and of hosts where these are compared; those that are left share the last.
PALETTE = (
    *("#3b75af", "#519e3e", "#8d69b8", "#84584e"),
    *("#d57dbe", "#57b8cb", "#b8b34a", "#7f7f7f"),
)
COLOURS = {
    Fate.FAILED: "#d62728",
    Fate.RETRIED: "#ff9f1c",
    Fate.LOST: "#111111",
    Fate.STOPPED: "#6a3d9a",
    Fate.WAITING: "#c9c9c9",
}

# What is drawn last is seen best.
ORDER = (Fate.WAITING, Fate.OK, Fate.STOPPED, Fate.LOST, Fate.RETRIED, Fate.FAILED)

PARTS = 200  # of the time, in the plot of throughput, at most
STEPS = 40  # of the plot of times, about
_LANE, _LEAST, _MOST = 18, 120, 900  # pixels: of a lane, and of all lanes
_GAP = 0.6  # lanes between two hosts
_POWERS = 5  # of ten, of which times other than 1 have a tick, too
_LONG = 600  # seconds, from which on times are written as hours, minutes and seconds


# How a browser puts in words what is pointed at; times as `duration` does.
CLOCK = """
const all = Math.round(Math.abs(tick)), two = (n) => String(n).padStart(2, "0")
const sign = tick < 0 ? "-" : ""
return `${sign}${Math.floor(all / 3600)}:${two(Math.floor(all / 60) % 60)}:${two(all % 60)}`
"""
NAMES = "return names[value]"
ITEMS = """
const items = source.data.items[special_vars.index]
return items == 1 ? `${value}` : `${items} items from ${value} on`
"""
SECONDS = (
    """
const seconds = source.data.right[special_vars.index] - value
const short = (number) => Number(number.toPrecision(3))
if (seconds < 1e-3) return `${Math.round(seconds * 1e6)} us`
if (seconds < 0.9995) return `${short(seconds * 1e3)} ms`
if (seconds < 99.95) return `${short(seconds)} s`
const tick = seconds"""
    + CLOCK
)


class Key(NamedTuple):
    """What a colour stands for, and the name of the glyphs that have it.

    Bokeh's own legend is laid out after all is drawn, and then all is drawn once more.
    """

    colour: str
    label: str
    name: str


class Plots(NamedTuple):
    """What goes into a page: a script for its head, one for its end, and the places of plots.

    `keys` has the legend of each plot that has one.
    """

    head: str
    script: str
    places: dict[str, str]
    keys: dict[str, list[Key]]


def plots_of(picture: Picture) -> Plots | None:
    """Return the plots of a run; ``None`` if Bokeh is not installed."""
    try:
        from bokeh.embed import components
        from bokeh.models import Range1d
        from bokeh.resources import Resources
    except ImportError:
        return None
    margin = 0.01 * picture.end or 0.01
    bounds: Any = (-10 * margin, picture.end * 1.1 + 1)
    range_ = Range1d(-margin, picture.end + margin, bounds=bounds)
    plots: dict[str, Any] = {}
    keys: dict[str, list[Key]] = {}
    plots["timeline"], keys["timeline"] = _timeline(picture, range_)
    plots["throughput"] = _throughput(picture, range_)
    if any(picture.times.values()):
        plots["times"], keys["times"] = _times(picture)
    script, places = components(plots)
    head = Resources(mode="inline", components=["bokeh"]).render()
    return Plots(head, script, places, keys)


def _timeline(picture: Picture, range_: Any) -> tuple[Any, list[Key]]:
    from bokeh.models import BoxAnnotation, FixedTicker, Range1d

    heights, bands = heights_of(picture)
    lanes = max(len(heights), 1)
    pixels = max(_LEAST, min(_MOST, _LANE * lanes + 40))
    plot = _figure(range_, pixels + 90, "", tools="xwheel_zoom,xpan,xbox_zoom,reset,save")
    plot.y_range = Range1d(max((last for _, last in bands.values()), default=0) + 0.8, -0.8)
    for number, (first, last) in enumerate(bands.values()):
        colour = "#f4f6f8" if number % 2 else "#ffffff"
        box = BoxAnnotation(bottom=first - 0.5, top=last + 0.5, fill_color=colour, level="image")
        plot.add_layout(box)
    middles = {(first + last) / 2: host for host, (first, last) in bands.items()}
    plot.yaxis.ticker = FixedTicker(ticks=list(middles))
    plot.yaxis.major_label_overrides = dict(middles)
    plot.ygrid.visible = False
    groups: dict[tuple[Fate, int], list[Bar]] = {}
    for bar in picture.bars:
        is_ok = bar.fate is Fate.OK
        kind = min(bar.function, len(PALETTE) - 1) if is_ok else 0
        groups.setdefault((bar.fate, kind), []).append(bar)
    keys = {
        (fate, kind): _draw(plot, picture, groups[fate, kind], heights)
        for fate, kind in sorted(groups, key=lambda key: (ORDER.index(key[0]), key[1]))
    }
    told = [
        keys[fate, kind] for fate in Fate for kind in range(len(PALETTE)) if (fate, kind) in keys
    ]
    return plot, [*told, *_draw_events(plot, picture, bands)]


def heights_of(picture: Picture) -> tuple[dict[int, float], dict[str, tuple[float, float]]]:
    """Return where each lane is drawn, and from where to where each host is."""
    heights: dict[int, float] = {}
    bands: dict[str, tuple[float, float]] = {}
    now = 0.0
    for lane in picture.order():
        host = picture.lanes[lane].host
        if bands and host not in bands:
            now += _GAP
        heights[lane] = now
        bands[host] = (bands.get(host, (now, now))[0], now)
        now += 1
    for host in sorted({event.host for event in picture.events} - bands.keys()):
        now += _GAP
        bands[host] = (now, now)
        now += 1
    return heights, bands


def _draw(plot: Any, picture: Picture, bars: list[Bar], heights: dict[int, float]) -> Key:
    """Draw bars of one colour; return what it stands for."""
    import numpy as np
    from bokeh.models import ColumnDataSource

    fate, function = bars[0].fate, min(bars[0].function, len(PALETTE) - 1)
    colour = COLOURS.get(fate, PALETTE[function])
    label = fate.value
    if fate is Fate.OK:
        others = len(picture.functions) > len(PALETTE) and function == len(PALETTE) - 1
        label = "others" if others else (picture.functions[function] or "item")
    columns = {
        "y": np.array([heights[bar.lane] for bar in bars], "f4"),
        "left": np.array([bar.begin for bar in bars], "f8"),
        "right": np.array([bar.end for bar in bars], "f8"),
        "lane": np.array([bar.lane for bar in bars], "i4"),
        "first": np.array([bar.first for bar in bars], "f8"),
        "items": np.array([bar.items for bar in bars], "i4"),
        "function": np.array([bar.function for bar in bars], "i4"),
    }
    glyph = plot.hbar(
        y="y",
        left="left",
        right="right",
        height=0.25 if fate is Fate.WAITING else 0.84,
        source=ColumnDataSource(data=columns),
        fill_color=colour,
        fill_alpha=0.75,
        line_color=colour,  # so that what is narrower than a pixel is seen
        line_width=1,
        name=f"{fate.name} {function}",
    )
    plot.add_tools(_hover(picture, glyph, fate))
    return Key(colour, label, glyph.name)


def _hover(picture: Picture, glyph: Any, fate: Fate) -> Any:
    """Return what tells of a bar.

    That is put in words when it is pointed at: texts for each of thousands take a browser longer
    than to draw them.
    """
    from bokeh.models import CustomJSHover, HoverTool

    tooltips = [("seconds", "@left{custom}"), ("worker", "@lane{custom}")]
    if fate is Fate.WAITING:
        tooltips = [("", fate.value), *tooltips]
    else:
        item = ("item", "@first{custom}"), ("function", "@function{custom}")
        tooltips = [*item, ("outcome", fate.value), *tooltips]
    words = {"lane": NAMES, "left": SECONDS, "first": ITEMS, "function": NAMES}
    names = {
        "lane": [f"{lane.host}, {lane.pid_text}" for lane in picture.lanes],
        "function": picture.functions,
    }
    source = glyph.data_source
    formatters = {
        f"@{name}": CustomJSHover(args={"source": source, "names": names.get(name)}, code=code)
        for name, code in words.items()
    }
    return HoverTool(renderers=[glyph], tooltips=tooltips, formatters=formatters, visible=False)


def _draw_events(
    plot: Any, picture: Picture, bands: dict[str, tuple[float, float]]
) -> Iterator[Key]:
    """Mark when hosts came, were lost, and failed; yield what the marks stand for."""
    from bokeh.models import ColumnDataSource, HoverTool

    kinds = {"up": ("triangle", "#2ca02c", "host up"), "lost": ("x", "#d62728", "host lost")}
    for state, (marker, colour, label) in kinds.items():
        events = [event for event in picture.events if event.state == state]
        if not events:
            continue
        source = ColumnDataSource(
            data={
                "x": [max(0.0, event.seconds) for event in events],
                "y": [sum(bands[event.host]) / 2 for event in events],
                "host": [event.host for event in events],
                "reason": [event.reason[:300] for event in events],
            }
        )
        style: dict[str, Any] = {
            "marker": marker,
            "size": 11,
            "line_color": colour,
            "line_width": 3,
            "name": label,
        }
        glyph = plot.scatter("x", "y", source=source, fill_color=colour, **style)
        tooltips = [("host", "@host"), ("", label), ("reason", "@reason")]
        plot.add_tools(HoverTool(renderers=[glyph], tooltips=tooltips, visible=False))
        yield Key(colour, label, glyph.name)


def _throughput(picture: Picture, range_: Any) -> Any:
    plot = _figure(range_, 170, "items per second", tools="xwheel_zoom,xpan")
    parts = max(10, min(PARTS, picture.items // 10))
    rates = picture.rates(parts)
    edges = [picture.end / parts * part for part in range(parts + 1)]
    plot.quad(
        left=edges[:-1],
        right=edges[1:],
        top=rates,
        bottom=0,
        fill_color=PALETTE[0],
        line_color=PALETTE[0],
        fill_alpha=0.5,
        line_alpha=0.5,
    )
    plot.y_range.start = 0
    return plot


def _times(picture: Picture) -> tuple[Any, list[Key]]:
    """Draw how long items took, for each host; return what the colours stand for, too."""
    from bokeh.models import FixedTicker
    from bokeh.plotting import figure

    plot: Any = figure(
        height=260,
        sizing_mode="stretch_width",
        x_axis_type="log",
        x_axis_label="time of an item",
        y_axis_label="items",
        tools="",
        toolbar_location=None,
    )
    _style(plot)
    largest = sorted(picture.times, key=lambda host: -picture.times[host].total())
    shown = largest if len(largest) <= len(PALETTE) else largest[: len(PALETTE) - 1]
    counts = {host: picture.times[host] for host in sorted(shown)}
    others = Counter[int]()
    for host in largest[len(shown) :]:
        others += picture.times[host]
    counts[f"{len(largest) - len(shown)} others"] = others
    classes = [one for found in counts.values() for one in found]
    step = 1 + (max(classes) - min(classes)) // STEPS
    ticks = _ticks(min(classes), max(classes) + step)
    plot.xaxis.ticker = FixedTicker(ticks=ticks)
    plot.xaxis.major_label_overrides = {tick: duration(tick) for tick in ticks}
    keys: list[Key] = []
    for (host, found), colour in zip(counts.items(), PALETTE, strict=False):
        if not found:
            continue
        wide = Counter[int]()
        for one, count in found.items():
            wide[one // step] += count
        numbers = range(min(wide), max(wide) + 1)
        edges = [10 ** (one * step / CLASSES) for one in (*numbers, numbers[-1] + 1)]
        tops = [wide[one] for one in numbers]
        xs, ys = [edges[0]], [0.0]
        for left, right, top in zip(edges, edges[1:], tops, strict=False):
            xs += [left, right]
            ys += [top, top]
        style: dict[str, Any] = {
            "line_color": colour,
            "fill_color": colour,
            "fill_alpha": 0.15,
            "line_width": 2,
        }
        keys.append(Key(colour, host, f"times {len(keys)}"))
        plot.patch([*xs, edges[-1]], [*ys, 0.0], name=keys[-1].name, **style)
    plot.y_range.start = 0
    return plot, keys


def _ticks(first: int, last: int) -> list[float]:
    """Return round times between two classes; fewer of each power of ten if it is many powers."""
    powers = range(math.floor(first / CLASSES), math.ceil(last / CLASSES) + 1)
    digits = (1, 2, 5) if len(powers) <= _POWERS else (1,)
    found = [digit * 10.0**power for power in powers for digit in digits]
    least, most = 10 ** (first / CLASSES - 0.1), 10 ** (last / CLASSES + 0.1)
    return [tick for tick in found if least <= tick <= most]


def _figure(range_: Any, height: int, label: str, tools: str) -> Any:
    from bokeh.models import CustomJSTickFormatter
    from bokeh.plotting import figure

    plot: Any = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=range_,
        x_axis_label="seconds since the run began",
        y_axis_label=label or None,
        tools=tools,
        active_scroll="xwheel_zoom",
        active_drag="xpan",
        toolbar_location="above" if "save" in tools else None,
        output_backend="canvas",
        min_border_left=90,
    )
    if range_.end > _LONG:
        plot.xaxis.axis_label = "hours:minutes:seconds since the run began"
        plot.xaxis.formatter = CustomJSTickFormatter(code=CLOCK)
    _style(plot)
    return plot


def _style(plot: Any) -> None:
    plot.toolbar.logo = None
    plot.outline_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    plot.grid.grid_line_color = "#e5e8eb"

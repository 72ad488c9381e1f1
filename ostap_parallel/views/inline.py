"""A timeline by matplotlib: inline in a notebook, or in a file."""

from __future__ import annotations

import base64
import contextlib
import io
from typing import Any

from ostap_parallel.views.picture import Fate, Picture
from ostap_parallel.views.plots import COLOURS, ORDER, PALETTE, heights_of

# Bars, about: a figure on paper has no zoom.
BARS = 3000

NO_MATPLOTLIB = "a plot needs matplotlib: pip install 'ostap_parallel[plots]'"


def draw(picture: Picture, axes: Any = None) -> Any:
    """Draw a timeline; return the axes, which are those of a new figure unless given.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ImportError(NO_MATPLOTLIB) from exc
    heights, bands = heights_of(picture)
    if axes is None:  # not of pyplot, which would keep the figure, and may want a window
        inches = min(8.0, 1.3 + 0.18 * max(len(heights), 3))
        axes = Figure(figsize=(9, inches), layout="constrained").add_subplot()
    groups: dict[tuple[Fate, int], list[tuple[float, float, float]]] = {}
    for bar in picture.bars:
        function = min(bar.function, len(PALETTE) - 1) if bar.fate is Fate.OK else 0
        place = (heights[bar.lane], bar.begin, bar.end - bar.begin)
        groups.setdefault((bar.fate, function), []).append(place)
    for fate, function in sorted(groups, key=lambda key: (ORDER.index(key[0]), key[1])):
        lanes, begins, widths = zip(*groups[fate, function], strict=True)
        axes.barh(
            lanes,
            widths,
            left=begins,
            height=0.2 if fate is Fate.WAITING else 0.8,
            color=COLOURS.get(fate, PALETTE[function]),
            edgecolor="white" if len(picture.bars) < BARS // 5 else "none",
            linewidth=0.3,
            label=_plain(picture.functions[function] or "item") if fate is Fate.OK else fate.value,
        )
    for state, marker, colour in ("up", "^", "#2ca02c"), ("lost", "x", "#d62728"):
        events = [event for event in picture.events if event.state == state]
        where = [sum(bands[event.host]) / 2 for event in events]
        if events:
            times = [max(0.0, event.seconds) for event in events]
            label = f"host {state}"
            axes.scatter(times, where, marker=marker, color=colour, zorder=3, label=label)
    middles = {(first + last) / 2: host for host, (first, last) in bands.items()}
    axes.set_yticks(list(middles), list(map(_plain, middles.values())))
    axes.set_ylim(max((last for _, last in bands.values()), default=0) + 0.8, -0.8)
    axes.set_xlabel("seconds since the run began")
    axes.set_title(_plain(picture.name))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return axes


def _plain(text: str) -> str:
    """Return a text that matplotlib takes as it is: $ begins a formula there."""
    return text.replace("$", r"\$")


def image_of(picture: Picture) -> str:
    """Return an element for HTML with the timeline; empty without matplotlib, or if it fails."""
    with contextlib.suppress(Exception):  # what is shown besides must be shown
        file = io.BytesIO()
        draw(picture).figure.savefig(file, format="svg")
        data = base64.b64encode(file.getvalue()).decode()
        return f'<img alt="timeline" src="data:image/svg+xml;base64,{data}">'
    return ""

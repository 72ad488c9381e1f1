"""Plots of what was measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Results

MARKERS = "o^s"  # colours come again after ten curves


def plot_cost(results: Results, folder: Path) -> None:
    """Draw the cost of a task against the number of tasks."""
    curves = {
        name: [(int(column.split()[0]), results.median(name, column)) for column in rounds[0]]
        for name, rounds in results.rounds.items()
    }
    draw(curves, folder / "cost.svg", "tasks", "microseconds per task", "Trivial tasks, 2 workers")


def plot_start(results: Results, folder: Path) -> None:
    """Draw the time until hosts compute against their number."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in results.rounds:
        way, _, count = name.rpartition(", ")
        curves.setdefault(way, []).append((int(count.split()[0]), results.median(name, "seconds")))
    title = "Until each of the hosts has given a result"
    draw(curves, folder / "start.svg", "hosts", "seconds", title)


def draw(
    curves: dict[str, list[tuple[int, float]]], file: Path, x: str, y: str, title: str
) -> None:
    """Draw curves with logarithmic axes into an SVG file; the first one stands out."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, points) in enumerate(curves.items()):
        style = {
            "linewidth": 1.2 if number else 3,
            "marker": MARKERS[number // 10],
            "markersize": 5,
        }
        axes.loglog(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel=x, ylabel=y, title=title)
    measured = sorted({number for points in curves.values() for number, _ in points})
    axes.set_xticks(measured, [str(number) for number in measured])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)

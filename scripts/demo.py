"""A toy measurement of a resonance, first on the local cores, then on two ssh hosts.

Each job draws events, a Gaussian peak on a falling background, and fills a histogram. The
histograms are merged as they arrive, and the peak is measured in the sum. The two hosts are
private ssh servers on this machine, started for the demo: nothing needs to be set up, and they
have no package installed.
"""

from __future__ import annotations

import argparse
import math
import operator
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sshd import SshdUnavailable, open_hosts

from ostap_parallel import TaskMerger, WorkManager

LOW, HIGH, BINS = 2.8, 3.4, 60  # GeV
PEAK, WIDTH, FRACTION = 3.097, 0.015, 0.10  # of the resonance
SLOPE = 2.0  # of the background, 1/GeV
EVENTS = 20_000  # per job
SEED = 2026


@dataclass
class Histogram:
    """Counts in equal bins between LOW and HIGH."""

    counts: list[int] = field(default_factory=lambda: [0] * BINS)

    def fill(self, value: float) -> None:
        """Count `value`, unless it is out of range."""
        if LOW <= value < HIGH:
            self.counts[int((value - LOW) / (HIGH - LOW) * BINS)] += 1

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram([a + b for a, b in zip(self.counts, other.counts, strict=True)])

    def points(self) -> list[tuple[float, int]]:
        """Return the centre and the count of each bin."""
        step = (HIGH - LOW) / BINS
        return [(LOW + (i + 0.5) * step, count) for i, count in enumerate(self.counts)]


def draw(events: int) -> Histogram:
    """Draw events and histogram their masses. This is what runs on cores and hosts."""
    histogram = Histogram()
    for _ in range(events):
        if random.random() < FRACTION:
            histogram.fill(random.gauss(PEAK, WIDTH))
        else:
            histogram.fill(LOW + truncated_exponential())
    return histogram


def truncated_exponential() -> float:
    """Draw from the background, between 0 and HIGH - LOW."""
    whole = 1 - math.exp(-SLOPE * (HIGH - LOW))
    return -math.log(1 - random.random() * whole) / SLOPE


@dataclass(frozen=True)
class Peak:
    """What is measured of the resonance: value and error of each."""

    events: tuple[float, float]
    mass: tuple[float, float]
    width: tuple[float, float]


def measure(histogram: Histogram) -> Peak:
    """Subtract the background fitted to the sidebands; take the moments of what is left."""
    a, b = fit_sidebands(histogram)
    window = [(x, n) for x, n in histogram.points() if abs(x - PEAK) <= 4 * WIDTH]
    weights = [(x, n - math.exp(a + b * x), n) for x, n in window]
    signal = sum(w for _, w, _ in weights)
    mass = sum(w * x for x, w, _ in weights) / signal
    variance = sum(w * (x - mass) ** 2 for x, w, _ in weights) / signal
    # Each bin counts with the Poisson error of all that is in it, background included.
    mass_error = math.sqrt(sum(n * (x - mass) ** 2 for x, _, n in weights)) / signal
    spread = math.sqrt(sum(n * ((x - mass) ** 2 - variance) ** 2 for x, _, n in weights)) / signal
    # A bin adds the variance of a flat distribution in it.
    width = math.sqrt(variance - ((HIGH - LOW) / BINS) ** 2 / 12)
    return Peak(
        events=(signal, math.sqrt(sum(n for _, _, n in weights))),
        mass=(mass, mass_error),
        width=(width, spread / (2 * width)),
    )


def fit_sidebands(histogram: Histogram) -> tuple[float, float]:
    """Return a and b of the background exp(a + b x), by least squares of the logarithm."""
    side = [(x, n) for x, n in histogram.points() if n and abs(x - PEAK) > 5 * WIDTH]
    # The error of log(n) is 1 / sqrt(n), so a bin weighs n.
    total = sum(n for _, n in side)
    mean_x = sum(n * x for x, n in side) / total
    mean_y = sum(n * math.log(n) for _, n in side) / total
    covariance = sum(n * (x - mean_x) * (math.log(n) - mean_y) for x, n in side)
    b = covariance / sum(n * (x - mean_x) ** 2 for x, n in side)
    return mean_y - b * mean_x, b


def show(histogram: Histogram, events: int) -> None:
    """Print the histogram, two bins a line, and what was measured beside what is true."""
    points = histogram.points()
    highest = max(n for _, n in points)
    print()
    for (x, n), (_, m) in zip(points[::2], points[1::2], strict=True):
        print(f"  {x:.3f} {n + m:9d} {'#' * round(30 * (n + m) / highest)}")
    peak = measure(histogram)
    truths = FRACTION * events, 1000 * PEAK, 1000 * WIDTH
    rows = ("events", peak.events, 1), ("mass [MeV]", peak.mass, 1000), ("width", peak.width, 1000)
    print(f"\n  {'':12}{'measured':>12}{'error':>10}{'true':>12}")
    for (name, (value, error), unit), truth in zip(rows, truths, strict=True):
        print(f"  {name:12}{value * unit:12.2f}{error * unit:10.2f}{truth:12.2f}")
    print()


def run(jobs: int, **settings: object) -> Histogram:
    """Draw and merge `jobs` histograms by a `WorkManager` made with `settings`."""
    # No configuration files: the demo does not depend on whose machine it is.
    with WorkManager(config=(), silent=True, **settings) as wm:  # type: ignore[arg-type]
        items = [EVENTS] * jobs
        total: Histogram = wm.process(
            draw, items, merger=TaskMerger(operator.add), seed=SEED, progress=True
        )
        print(wm.report)
    return total


def run_on_hosts(jobs: int) -> Histogram | None:
    """`run` on two private ssh hosts; return ``None``, saying why, where there are none."""
    with tempfile.TemporaryDirectory(prefix="demo-") as root:
        try:
            with open_hosts(2, Path(root)) as hosts:
                return run(jobs, ncpus=0, servers=hosts.names, ssh_config=hosts.ssh_config)
        except SshdUnavailable as exc:
            print(f"Left out: {exc}")
            return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return its exit status."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller sample")
    parser.add_argument("--ncpus", type=int, help="local workers (default: all cores)")
    arguments = parser.parse_args(argv)
    jobs = 40 if arguments.quick else 400
    print(f"1. {jobs} jobs of {EVENTS} events on the local cores\n")
    ncpus = "autodetect" if arguments.ncpus is None else arguments.ncpus
    local = run(jobs, ncpus=ncpus)
    show(local, jobs * EVENTS)
    print(f"2. The same {jobs} jobs on two ssh hosts, without local workers\n")
    remote = run_on_hosts(jobs)
    if remote is None:
        return 0
    if remote.counts != local.counts:
        print("\nThe hosts' histogram differs from the local one: this must not be.")
        return 1
    print("\nThe hosts' histogram is the same, bin by bin: each job has its own random seed.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)

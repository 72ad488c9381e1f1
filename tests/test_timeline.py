"""When what ran where: what a run keeps, and its trace."""

from __future__ import annotations

import json
import pickle
import sys
import time
from array import array

import pytest
from helpers import kill, open_manager, server_of

from ostap_parallel import WorkManager
from ostap_parallel.runs.tails import Tails
from ostap_parallel.views.picture import Bar, Fate, Picture, together
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.views.trace import trace_of
from ostap_parallel.worker.chunk import INTERRUPTED, ChunkOutcome, Lost

PATIENCE = 60.0


def outcome(host, pid, seconds, begun=0.0, failed=()):
    done = ChunkOutcome(host, pid, [None] * len(seconds), array("d", seconds), set(failed))
    done.begun = begun
    return done


def bars_of(timeline, fates=frozenset(Fate) - {Fate.WAITING}):
    return [bar for bar in timeline.picture().bars if bar.fate in fates]


class TestTimeline:
    def test_items_of_a_chunk_follow_one_another(self):
        timeline = Timeline("f")
        timeline.start -= 10
        begun = timeline.start + 1
        timeline.add(outcome("h1", 7, [0.5, 0.25], begun), range(10, 12), timeline.start)
        picture = timeline.picture()
        waiting, *bars = picture.bars
        assert waiting.fate is Fate.WAITING
        assert [(bar.first, bar.items, bar.fate) for bar in bars] == [
            (10, 1, Fate.OK),
            (11, 1, Fate.OK),
        ]
        assert [round(bar.end - bar.begin, 6) for bar in bars] == [0.5, 0.25]
        assert bars[0].end == bars[1].begin
        assert (picture.items, picture.lanes[0], picture.functions) == (2, ("h1", 7), ["f"])

    def test_a_worker_that_comes_while_it_is_looked_at(self, monkeypatch):
        timeline = Timeline()
        timeline.add(outcome("h1", 7, [0.5]), [0], timeline.start)

        def make(*args):
            timeline.add(outcome("h2", 8, [0.5]), [1], timeline.start)
            return Picture(*args)

        monkeypatch.setattr("ostap_parallel.views.timeline.Picture", make)
        picture = timeline.picture()
        assert ([lane.host for lane in picture.lanes], picture.items) == (["h1"], 1)

    def test_a_clock_that_is_ahead_is_set_right(self):
        timeline = Timeline()
        timeline.start -= 10
        begun = time.time() + 1000
        timeline.add(outcome("h1", 7, [0.0], begun), [0], timeline.start)
        timeline.add(outcome("h1", 7, [1.0], begun + 1), [1], timeline.start)
        first, second = bars_of(timeline)
        assert second.begin - first.begin == pytest.approx(1.0, abs=1e-3)
        assert first.begin < 100

    def test_what_was_run_again_has_not_failed_for_good(self):
        timeline = Timeline()
        timeline.add(outcome("h1", 7, [1.0] * 3, failed=[0, 2]), [4, 5, 6], timeline.start)
        timeline.add(outcome("h1", 7, [1.0], failed=[0]), [4], timeline.start)
        timeline.add(outcome("h1", 7, [1.0]), [6], timeline.start)
        assert [(bar.first, bar.fate) for bar in bars_of(timeline)] == [
            (4, Fate.RETRIED),
            (5, Fate.OK),
            (6, Fate.RETRIED),
            (4, Fate.FAILED),
            (6, Fate.OK),
        ]

    def test_what_was_lost(self):
        timeline = Timeline()
        timeline.add(Lost("h1", 7, "killed", by_worker=True, index=5), range(9), timeline.start)
        timeline.add(Lost("h1", 0, "no connection"), range(3), timeline.start)
        assert [(bar.first, bar.items, bar.fate) for bar in bars_of(timeline)] == [
            (5, 1, Fate.LOST),
            (0, 3, Fate.LOST),
        ]

    def test_it_is_small(self):
        timeline = Timeline()
        for first in range(0, 100_000, 100):
            timeline.add(outcome("h1", 7, [1e-3] * 100), range(first, first + 100), 0.0)
        assert (len(timeline), timeline.nbytes < 10 * 100_000) == (100_000, True)
        one_by_one = Timeline()
        for index in range(1000):
            one_by_one.add(outcome("h1", 7, [1.0], failed=[0]), [index], 0.0)
        assert one_by_one.nbytes < 60 * 1000

    def test_an_endless_run_does_not_fill_the_memory(self):
        timeline = Timeline(limit=10)
        for first in range(0, 40, 4):
            timeline.add(outcome("h1", 7, [1.0] * 4), range(first, first + 4), 0.0)
        assert (len(timeline), timeline.beyond, timeline.picture().beyond) == (8, 32, 32)

    def test_many_items_are_few_bars(self):
        timeline = Timeline()
        for first in range(0, 50_000, 100):
            failed = [3] if first == 700 else []
            timeline.add(
                outcome("h1", 7, [1e-3] * 100, failed=failed), range(first, first + 100), 0
            )
        picture = timeline.picture(most=1000)
        assert len(picture.bars) < 1100
        assert (picture.items, sum(bar.items for bar in picture.bars)) == (50_000, 50_000)
        assert [(bar.first, bar.items) for bar in picture.bars if bar.fate is Fate.FAILED] == [
            (703, 1)
        ]
        assert picture.is_binned

    def test_only_neighbours_stand_together(self):
        bars = [Bar(n % 2, n, n + 1, n, 1, Fate.FAILED if n == 4 else Fate.OK) for n in range(8)]
        found = sorted(together(bars, 3.5))
        assert [(bar.lane, bar.first, bar.items) for bar in found] == [
            (0, 0, 2),
            (0, 4, 1),
            (0, 6, 1),
            (1, 1, 2),
            (1, 5, 2),
        ]


@pytest.mark.slow
def test_a_run_keeps_when_what_ran(tmp_path):
    def nap(item):
        time.sleep(0.02)
        if item == 5:
            raise ValueError(item)
        return item

    with WorkManager(2, silent=True) as wm:
        before = time.time()
        wm.process(nap, range(12), on_error="collect", chunk_size=2)
        report = wm.report
        picture = pickle.loads(pickle.dumps(report.timeline)).picture()
        assert {lane.pid for lane in picture.lanes} <= set(wm.executor.backend.pids())
    bars = [bar for bar in picture.bars if bar.items]
    assert sorted(bar.first for bar in bars) == list(range(12))
    assert [bar.first for bar in bars if bar.fate is Fate.FAILED] == [5]
    assert all(0.02 <= bar.end - bar.begin < PATIENCE for bar in bars)
    assert picture.name == "nap"
    assert before <= picture.start <= time.time()
    assert picture.end <= report.wall + 0.1


def test_it_can_be_switched_off(tmp_path):
    with WorkManager(1, silent=True, timeline=False) as wm:
        wm.process(abs, range(3))
        assert wm.report.timeline is None
        with pytest.raises(ValueError, match="timeline=False"):
            wm.report.trace(tmp_path / "run.json")


def test_an_executor_of_others_has_one_too():
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as pool, WorkManager(executor=pool, silent=True) as wm:
        wm.process(abs, range(3))
        picture = wm.report.timeline.picture()
    assert sorted(bar.first for bar in picture.bars if bar.items) == [0, 1, 2]
    assert picture.lanes[0].pid


@pytest.mark.slow
def test_hosts_that_come_and_go(own_hosts):
    """A host is lost and comes back: both are noted, and what was lost with it."""

    def nap(item):
        time.sleep(0.05)
        return item

    with open_manager(own_hosts) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        done = 0
        for _ in wm.iexecute(nap, range(10_000), chunk_size=1):
            done += 1
            if done == 3:
                kill([server_of(wm, "h1")])
            states = [one.state for one in wm.report.timeline.events if one.host == "h1"]
            if states == ["up", "lost", "up"]:
                break
        assert done < 10_000
        (lost,) = [one for one in wm.report.timeline.events if one.state == "lost"]
        assert (lost.host, lost.reason[:5]) == ("h1", "run: ")
        fates = {bar.fate for bar in wm.report.timeline.picture().bars}
        assert {Fate.OK, Fate.LOST} <= fates


@pytest.mark.slow
def test_what_failed_items_have_printed(hosts):
    def fail(item):
        print(f"working on {item}")
        if item == 2:
            print("x" * 10_000)
            raise ValueError(item)

    with open_manager(hosts, ncpus=1) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        (*_, failure, _) = wm.process(fail, range(4), on_error="collect", chunk_size=1)
        assert failure is wm.report.failures[0]
    lines = failure.output.split("\n")
    assert "working on 2" in lines
    (long,) = [line for line in lines if set(line) == {"x"}]
    assert len(long) < 1000


class TestTails:
    def test_lines_of_other_times_and_workers_are_not_taken(self):
        tails, heard = Tails(lambda host, event: heard.append(event)), []
        for host, pid, text in ("h1", 7, "old"), ("h1", 8, "of another"), ("h2", 7, "elsewhere"):
            tails.hear(host, {"kind": "stdout", "pid": pid, "text": text})
        tails._lines["h1", 7][0] = (time.time() - 100, "old")
        tail = tails.about("h1", 7, 1.0)
        tails.hear("h1", {"kind": "stderr", "pid": 7, "text": "late"})
        record = {"levelname": "WARNING", "name": "fit", "msg": "no %s", "args": ("way",)}
        tails.hear("h1", {"kind": "log", "pid": 7, "record": record})
        assert (tail.text, tail.closed, len(heard)) == ("", False, 5)
        tails.close()
        assert tail.text == "late\nWARNING fit: no way"

    def test_what_ends_one_does_not_end_the_next(self):
        tails = Tails(lambda host, event: None)
        first, second = tails.about("h1", 7, 1.0), tails.about("h1", 7, 1.0)
        first.end = time.time() - 1e-6
        tails.hear("h1", {"kind": "stdout", "pid": 7, "text": "of the second"})
        assert (first.closed, second.closed) == (True, False)
        tails.close()
        assert (first.text, second.text) == ("", "of the second")

    def test_what_comes_later_does_not_push_lines_out(self):
        tails = Tails(lambda host, event: None)
        tails.hear("h1", {"kind": "stdout", "pid": 7, "text": "mine"})
        tail = tails.about("h1", 7, 1.0)
        tail.end = time.time() - 1e-6
        tail.begin -= 1
        tails._lines["h1", 7][0] = (tail.end - 1e-3, "mine")
        for number in range(100):
            tails.hear("h1", {"kind": "stdout", "pid": 7, "text": str(number)})
        assert tail.text == "mine"


# What the format wants of each kind of event, by
# "Trace Event Format" of the Chromium project.
# What the format asks of each kind of event: keys, and the kinds of their values.
NUMBER = (int, float)
PLACE = {"pid": int, "tid": int, "name": str, "args": dict}
TIMED = {**PLACE, "ts": NUMBER, "cat": str}
PHASES = {"X": {**TIMED, "dur": NUMBER, "cname": str}, "M": PLACE, "i": {**TIMED, "s": str}}
METADATA = {"process_name", "thread_name"}
COLOURS = {"good", "bad", "terrible", "black", "yellow", "grey"}  # that chrome://tracing knows


def read_trace(text):
    """Return a trace in the JSON object format; fail unless it is a strict one."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    trace = json.loads(text, parse_constant=refuse)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named, used, before = {}, {}, 0.0
    for event in trace["traceEvents"]:
        kinds = PHASES[event["ph"]]
        assert event.keys() == kinds.keys() | {"ph"}
        for key, kind in kinds.items():
            assert isinstance(event[key], kind), (key, event)
            assert not isinstance(event[key], bool)
        where = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert event["name"] in METADATA
            assert not used, "names come first"
            assert (event["name"], where) not in named
            named[event["name"], where] = event["args"]["name"]
            assert isinstance(event["args"]["name"], str)
            continue
        assert event["ts"] >= before
        before = event["ts"]
        end = used.setdefault(where, 0.0)
        if event["ph"] == "X":
            assert event["ts"] >= end - 1e-3, "of a thread one follows another"
            used[where] = event["ts"] + event["dur"]
            assert event["dur"] >= 0
            assert event["cname"] in COLOURS
        else:
            assert event["s"] in ("g", "p", "t")
    for pid, tid in used:
        assert named["process_name", (pid, 0)]
        assert named["thread_name", (pid, tid)]
    return trace


def test_a_trace_of_all_that_can_become_of_items():
    timeline = Timeline("f")
    timeline.start -= 10
    begun = timeline.start + 1
    timeline.add(outcome("h1", 7, [0.5, 0.25], begun, failed=[1]), [0, 1], timeline.start)
    timeline.add(Lost("h2", 8, "it was killed"), [2], timeline.start)
    timeline.add(Lost("h2", 9, INTERRUPTED), [3], timeline.start)
    for item in 4, 5, 6:  # at the same time, by nobody knows which workers
        timeline.add(Lost("h2", 0, "the host was lost"), [item], timeline.start + item)
    timeline.note("h3", "up")
    timeline.start += 5  # as if its clock had been set meanwhile
    trace = read_trace(json.dumps(trace_of(timeline.picture())))
    shown = {event["cat"] for event in trace["traceEvents"] if event["ph"] != "M"}
    assert shown >= {"ok", "failed", "lost", "stopped", "host"}


@pytest.mark.slow
def test_the_trace_of_a_run_on_hosts(hosts, tmp_path):
    def nap(item):
        time.sleep(0.05)
        return 1 / item

    with open_manager(hosts) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        wm.process(nap, range(12), on_error="collect", chunk_size=1)
        wm.report.trace(tmp_path / "run.json")
    trace = read_trace((tmp_path / "run.json").read_text())
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert set(names.values()) == {"nap", "h1", "h2"}
    items = [event for event in events if event["ph"] == "X" and "item" in event["args"]]
    outcomes = [(event["args"]["item"], event["args"]["outcome"]) for event in items]
    # an item that fails is tried on another host, too, before it is the item's fault
    tries = [(0, "failed, run again"), (0, "failed")]
    assert sorted(outcomes) == sorted([*tries, *((n, "ok") for n in range(1, 12))])
    assert all(names[event["pid"]] == event["args"]["host"] for event in items)
    assert all(event["dur"] >= 50_000 for event in items)
    # of one thread, none begins before the last has ended
    by_thread = {}
    for event in sorted(items, key=lambda event: event["ts"]):
        thread = event["pid"], event["tid"]
        assert event["ts"] >= by_thread.get(thread, 0.0) - 1e-3
        by_thread[thread] = event["ts"] + event["dur"]
    states = [event["name"] for event in events if event["ph"] == "i"]
    assert {"h1: up", "h2: up"} <= set(states)


@pytest.mark.slow
def test_a_plot(tmp_path):
    with WorkManager(2, silent=True) as wm:
        wm.process(lambda item: 1 / item, range(40), on_error="collect", description="f $x")
        axes = wm.report.plot()
        assert wm.report.plot(axes) is axes
        axes.figure.savefig(tmp_path / "run.svg")
        shown = wm.report._repr_html_()
        widths = [patch.get_width() for bars in axes.containers for patch in bars]
    assert len(widths) >= 2 * 40  # twice on the same axes
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {r"f \$x", "failed"} <= labels
    assert [label.get_text() for label in axes.get_yticklabels()] == ["local"]
    assert "<svg" in (tmp_path / "run.svg").read_text()
    assert shown.startswith("<pre style='font-family: monospace'>")
    assert 'src="data:image/svg+xml;base64,' in shown


def test_without_matplotlib_there_is_no_plot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with WorkManager(1, silent=True) as wm:
        with pytest.raises(ValueError, match="no run yet"):
            wm.report.plot()
        wm.process(abs, range(10))
        with pytest.raises(ImportError, match=r"ostap_parallel\[plots\]"):
            wm.report.plot()
        assert "<img" not in wm.report._repr_html_()

"""The page of a run, as a browser shows it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from browser import numbers, opened
from helpers import open_manager

from ostap_parallel import WorkManager
from ostap_parallel.cli import main
from ostap_parallel.commands import logfacts
from ostap_parallel.runs import past
from ostap_parallel.views.page import BARS, Facts, page_of
from ostap_parallel.views.picture import Fate, Lane
from ostap_parallel.views.plots import SECONDS
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.views.words import duration
from ostap_parallel.worker.chunk import ChunkOutcome

PATIENCE = 60.0
EVIL = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&lt;\"'`${1}"


@pytest.mark.slow
def test_the_numbers_on_the_page_are_those_of_the_report(hosts, tmp_path, browser):
    def fails(item):
        time.sleep(0.01)
        print(f"working on {item}")
        if item % 10 == 3:
            raise ValueError(f"bad <{item}>")
        return 1 / (item - 7)

    with open_manager(hosts) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        wm.process(fails, range(40), on_error="collect", chunk_size=1)
        report = wm.report
        report.save(tmp_path / "run.html")
    with opened(browser, tmp_path / "run.html") as page:
        assert numbers(page) == {
            "submitted": "40",
            "merged": "35",
            "failed": "5",
            "retried": str(report.retried),
            "from the checkpoint": "0",
            "time": duration(report.wall),
            "gain": f"{report.gain:.2f}",
            "items per second": f"{report.stats.njobs / report.wall:.4g}",
        }
        rows = page.locator("#hosts table").first.locator("tr").all()
        titles, *cells = [row.locator("th, td").all_inner_texts() for row in rows]
        found = [dict(zip(titles, row, strict=True)) for row in cells]
        for row in found:
            stat, times = report.stats.merged[row["host"]], report.times[row["host"]]
            assert row["items"] == str(stat.njobs)
            assert row["median"] == duration(times.median)
            assert row["total time"] == duration(stat.time)
        assert {row["host"] for row in found} == {"h1", "h2"}
        groups = page.locator("#failures table tr").all()
        assert [row.locator("td").all_inner_texts()[:4] for row in groups[1:]] == [
            [str(group.count), group.name, group.place, str(group.index)]
            for group in report.groups
        ]
        assert [group.count for group in report.groups] == [4, 1]
        first = page.locator("#failures details details").first
        assert "item 3 (3)" in first.locator("summary").inner_text()
        assert not first.locator("pre.traceback").is_visible()
        first.locator("summary").click()
        assert "in fails\n" in first.locator("pre.traceback").inner_text()
        assert "working on 3" in first.locator("pre.output").inner_text().split("\n")
        assert page.locator("canvas").count() >= 3


def one_bar(host="h1", name="f", pid=7):
    """Return the timeline of one item, which took all of the time."""
    timeline = Timeline(name)
    timeline.start -= 10
    done = ChunkOutcome(host, pid, [None], array("d", [10.0]))
    done.begun = timeline.start
    timeline.add(done, [12], timeline.start)
    return timeline


def point_at_the_middle(page):
    """Move the mouse to the middle of the first plot; return the text of the tooltip there."""
    box = page.locator(".bk-CartesianFrame, .bk-Canvas").first.bounding_box()
    frame = page.evaluate(
        """() => {
            const view = Object.values(Bokeh.index).length
                ? Object.values(Bokeh.index)[0]
                : [...Bokeh.index][0]
            const {left, top, width, height} = view.frame.bbox
            return {left, top, width, height}
        }"""
    )
    x = box["x"] + frame["left"] + frame["width"] / 2
    page.mouse.move(x, box["y"] + frame["top"] + 3)
    page.mouse.move(x, box["y"] + frame["top"] + frame["height"] / 2, steps=3)
    tooltips = page.locator(".bk-Tooltip")
    tooltips.first.wait_for(state="visible", timeout=60_000)
    return tooltips.evaluate_all("all => all.map(one => one.shadowRoot.textContent).join(' ')")


@pytest.mark.slow
def test_a_bar_tells_what_it_is(tmp_path, browser):
    facts = Facts("f", {}, picture=one_bar().picture())
    (tmp_path / "run.html").write_text(page_of(facts))
    with opened(browser, tmp_path / "run.html") as page:
        text = point_at_the_middle(page)
        assert "12" in text
        assert "10 s" in text
        assert "h1, pid 7" in text
        assert "ok" in text
        before = page.evaluate("Bokeh.documents[0].roots()[0].x_range.start")
        page.mouse.wheel(0, -500)
        page.wait_for_function(
            f"() => Bokeh.documents[0].roots()[0].x_range.start > {before}", timeout=60_000
        )


@pytest.mark.slow
def test_a_name_in_the_legend_hides_what_has_its_colour(tmp_path, browser):
    timeline = one_bar()
    timeline.note("h1", "lost", "gone")
    (tmp_path / "run.html").write_text(page_of(Facts("f", {}, picture=timeline.picture())))
    with opened(browser, tmp_path / "run.html") as page:
        keys = page.locator("#timeline .keys button")
        assert keys.all_inner_texts() == ["f", "waiting for work", "host lost"]
        assert page.locator("#times .keys button").all_inner_texts() == ["h1"]
        visible = "name => Bokeh.documents[0].get_model_by_name(name).visible"
        names = [key.get_attribute("data-name") for key in keys.all()]
        for shown in (False, True):
            keys.first.click()
            assert [page.evaluate(visible, name) for name in names] == [shown, True, True]
            assert keys.first.evaluate("key => key.classList.contains('off')") is not shown


@pytest.mark.parametrize(
    "seconds", [0.0, 4e-7, 2.34e-5, 9.99e-4, 0.0123456, 0.9991, 0.9997, 1.0, 99.9, 100.0, 4000.4]
)
def test_a_tooltip_tells_times_as_the_report_does(seconds, browser):
    page = browser.new_page()
    asked = f"(source, value, special_vars) => {{ {SECONDS} }}"
    source = {"data": {"right": [seconds]}}
    said = page.evaluate(f"source => ({asked})(source, 0, {{index: 0}})", source)
    page.close()
    assert said == duration(seconds)


@pytest.mark.slow
def test_what_comes_from_users_is_text(tmp_path, browser):
    timeline = one_bar(host=EVIL, name=EVIL)
    timeline.note(EVIL, "lost", EVIL)
    row = {"host": EVIL, "state": EVIL, "note": EVIL, "error": EVIL, "jobs": 1, "failed": 1}
    row |= {"seconds": 1.0, "lost": 1}
    failure = {"index": 3, "item": EVIL, "error": f"{EVIL}: {EVIL}", "traceback": EVIL}
    failure |= {"host": EVIL, "pid": 7, "attempts": 1, "output": EVIL}
    facts = Facts(
        EVIL,
        {EVIL: EVIL},
        hosts=[row],
        failures=[failure],
        slowest=[EVIL],
        running=[EVIL],
        notes=[EVIL],
        picture=timeline.picture(),
    )
    (tmp_path / "run.html").write_text(page_of(facts))
    with opened(browser, tmp_path / "run.html") as page:
        page.locator("#failures summary").first.click()
        assert page.locator("h1").inner_text() == EVIL
        assert page.title() == EVIL
        assert page.locator("pre.traceback").text_content() == EVIL
        assert page.locator("pre.output").text_content() == EVIL
        assert EVIL in point_at_the_middle(page)
        assert page.evaluate("window.hacked === undefined")
        assert page.locator("img").count() == 0


@pytest.mark.slow
def test_a_hundred_thousand_items_are_few_bars(tmp_path, browser):
    timeline = Timeline("f")
    timeline.start -= 100
    for number in range(1000):
        failed = {5} if number % 100 == 0 else set()
        done = ChunkOutcome("h1", number % 8 + 1, [None] * 100, array("d", [0.008] * 100), failed)
        done.begun = timeline.start + number // 8 * 0.8
        timeline.add(done, range(100 * number, 100 * number + 100), timeline.start)
    facts = Facts("f", {}, picture=timeline.picture(BARS))
    (tmp_path / "run.html").write_text(page_of(facts))
    assert (tmp_path / "run.html").stat().st_size < 2.5e6
    with opened(browser, tmp_path / "run.html", script=COUNTING) as page:
        assert "100000 runs of items are drawn as " in page.locator("#timeline").inner_text()
        # a legend of Bokeh's would have each bar drawn twice before the page is at rest
        assert 0.9 < page.evaluate("window.rectangles") / len(facts.picture.bars) < 1.3


COUNTING = """
const kind = CanvasRenderingContext2D.prototype, draw = kind.rect
window.rectangles = 0
kind.rect = function (...where) { window.rectangles += 1; return draw.apply(this, where) }
"""


@pytest.mark.slow
def test_without_bokeh_there_are_no_plots(tmp_path, browser, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with WorkManager(1, silent=True) as wm:
        wm.process(abs, range(10))
        wm.report.save(tmp_path / "run.html")
    with opened(browser, tmp_path / "run.html", has_plots=False) as page:
        assert "pip install 'ostap_parallel[plots]'" in page.locator("#timeline").inner_text()
        assert numbers(page)["merged"] == "10"


@pytest.mark.slow
def test_without_a_timeline_the_page_says_so(tmp_path, browser):
    with WorkManager(1, silent=True, timeline=False) as wm:
        wm.process(abs, range(10))
        wm.report.save(tmp_path / "run.htm")
    with opened(browser, tmp_path / "run.htm", has_plots=False) as page:
        assert "when each item ran was not kept" in page.locator("main").inner_text()


def test_a_report_without_a_run_has_a_page(tmp_path):
    with WorkManager(1, silent=True) as wm:
        wm.report.save(tmp_path / "run.html")
        assert "<h1>A run (not complete)</h1>" in (tmp_path / "run.html").read_text()
        wm.process(abs, range(3))
        facts = wm.report.facts()
    assert replace(facts, failures=[]).numbers["merged"] == "3"


@pytest.mark.parametrize("most", [0, 10])
def test_rates_count_each_item_once(most):
    timeline = Timeline()
    timeline.start -= 10
    done = ChunkOutcome("h1", 7, [None] * 100, array("d", [0.1] * 100))
    done.begun = timeline.start
    timeline.add(done, range(100), timeline.start)
    picture = timeline.picture(most)
    rates = picture.rates(10)
    assert sum(rate * picture.end / 10 for rate in rates) == pytest.approx(100)
    assert max(rates) < 12


def slowly(item):
    time.sleep(0.02)
    if item == 30:
        raise ValueError(f"a bad: item ({item})")
    return item


@pytest.mark.slow
def test_the_page_of_a_checkpoint_shows_all_of_its_runs(tmp_path, browser, capsys):
    file = tmp_path / "run.db"
    with WorkManager(2, silent=True) as wm:
        with contextlib.closing(wm.iexecute(slowly, range(40), checkpoint=file)) as results:
            for _ in zip(range(12), results, strict=False):
                pass
        assert main(["report", str(file), "--html"]) == 1
        with opened(browser, Path(f"{file}.html")) as page:
            before = numbers(page)
        wm.process(slowly, range(40), checkpoint=file, on_error="collect")
        resumed = wm.report.resumed
    assert before["merged"] == str(resumed)
    assert int(before["unfinished"]) == 40 - resumed
    target = tmp_path / "both.html"
    assert main(["report", str(file), "--html", str(target)]) == 1
    assert capsys.readouterr().out == f"{file}.html\n{target}\n"
    with opened(browser, target) as page:
        found = numbers(page)
        assert (found["submitted"], found["merged"], found["failed"]) == ("40", "39", "1")
        assert found["runs"] == "2"
        row = page.locator("#failures table tr").nth(1).locator("td").all_inner_texts()
        assert row == ["1", "ValueError", f"test_page.py:{RAISES}", "30", "local", REASON]
        assert "2 runs, drawn one behind the other" in page.locator("main").inner_text()
    picture = past.picture_of(file, 0)
    done = [bar.first for bar in picture.bars if bar.fate is Fate.OK]
    assert set(done) == {*range(40)} - {30}
    assert len({lane.pid for lane in picture.lanes}) == 2


RAISES = slowly.__code__.co_firstlineno + 3
REASON = "a bad: item (30)"


def test_a_checkpoint_of_before_has_a_page_without_times(tmp_path, capsys):
    file = tmp_path / "run.db"
    with WorkManager(1, silent=True, timeline=False) as wm:
        wm.process(abs, range(10), checkpoint=file)
    assert past.picture_of(file) is None
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("DROP TABLE timeline")
        database.commit()
    assert past.picture_of(file) is None
    assert main(["report", str(file), "--html"]) == 0
    assert "when each item ran was not kept" in Path(f"{file}.html").read_text()


def test_a_damaged_timeline_harms_nothing_else(tmp_path):
    file = tmp_path / "run.db"
    with WorkManager(1, silent=True) as wm:
        wm.process(abs, range(10), checkpoint=file)
    assert past.picture_of(file, 0).items == 10
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE timeline SET data = x'00112233'")
        database.commit()
    assert past.picture_of(file) is None
    assert past.facts_of(file).numbers["merged"] == "10"


LOG = """\
Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand
1\t:\t100.000\t     2.000\t0\t0\t0\t0\tgzip a
2\th1\t100.000\t     4.000\t0\t0\t2\t0\t/usr/bin/false <b>
3\t:\t101.000\t     2.000\t0\t0\t0\t0\tgzip c
4\t:\t102.000\t     3.000\t0\t0\t0\t9\tsleep 'x
5\th1\t104.000\t     1.000\t0\t0\t2\t0\tfalse
"""


@pytest.mark.slow
def test_the_page_of_a_job_log(tmp_path, browser, capsys):
    file = tmp_path / "jobs.log"
    file.write_text(LOG)
    assert main(["report", str(file)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "5 ended, 3 failed, 5 s time, 2.40 gain, 1 commands per second",
        "2 x exit status 2, first item 2 on h1",
        "1 x signal 9, first item 4 on local",
        "h1: 2 commands, shortest 1 s, median 2.5 s, longest 4 s",
        "local: 3 commands, shortest 2 s, median 2 s, longest 3 s",
    ]
    assert main(["report", str(file), "--html"]) == 1
    with opened(browser, Path(f"{file}.html")) as page:
        assert numbers(page)["failed"] == "3"
        assert "item 2 (/usr/bin/false <b>)" in page.locator("#failures").inner_text()
    picture = logfacts.facts_of(file).picture
    assert picture.lanes == [Lane("h1", -1), Lane("local", -1), Lane("local", -2)]
    assert picture.functions == ["gzip", "false", "sleep"]
    fates = {bar.first: (bar.begin, bar.end, bar.fate) for bar in picture.bars}
    assert fates[4] == (2.0, 5.0, Fate.FAILED)
    assert {bar.lane for bar in picture.bars if bar.first in (1, 4)} == {1}


def test_a_report_steers_no_terminal(tmp_path, capsys):
    def fail(item):
        raise ValueError("\x1b[2J\tw\udc80")

    with WorkManager(1, silent=True) as wm:
        wm.process(fail, [1], on_error="collect", checkpoint=tmp_path / "run.db")
    log = tmp_path / "jobs.log"
    log.write_bytes(LOG.encode().replace(b"h1", b"\x1b]0;h\x07\xff"))
    for file, told in (tmp_path / "run.db", "?[2J\tw"), (log, "?]0;h??"):
        assert main(["report", str(file)]) == 1
        out = capsys.readouterr().out
        assert all(char.isprintable() or char in "\n\t" for char in out)
        assert told in out


def test_a_page_that_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "jobs.log"
    file.write_text(LOG)
    assert main(["report", str(file), "--html", str(file)]) == 2
    assert main(["report", str(file), "--html", str(tmp_path / "no" / "run.html")]) == 2
    assert main(["report", str(tmp_path / "none.db"), "--html"]) == 2
    error = capsys.readouterr().err
    assert "name another one" in error
    assert "No such file" in error
    file.write_text(LOG.splitlines()[0] + "\n")
    assert main(["report", str(file), "--html"]) == 2
    assert "no command has ended yet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_notebook_shows_the_hosts_of_a_manager(hosts):
    with open_manager(hosts) as wm:
        assert wm.wait_for_hosts(PATIENCE)
        wm.executor.hosts[1].reason = "<b>"
        shown = wm._repr_html_()
    assert "'>&lt;WorkManager h1: 1, h2: 1&gt;</pre>" in shown
    assert "<td>h1</td><td>up</td><td class='n'>1</td>" in shown
    assert "&lt;b&gt;" in shown
    with WorkManager(1, silent=True) as wm:
        assert "<table>" not in wm._repr_html_()

"""Hosts that fail where others do not: their items run elsewhere, and they are left out."""

from __future__ import annotations

import importlib
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import hosts_or_skip
from helpers import importable, open_manager, wait_until
from sshd import HostOptions

from ostap_parallel import HostRules, Task
from ostap_parallel.engine.backend import Backend
from ostap_parallel.errors import TaskTimeout
from ostap_parallel.runs import trust as trust_module
from ostap_parallel.runs.chunking import Item
from ostap_parallel.runs.outcome import Outcome
from ostap_parallel.runs.trust import Trust
from ostap_parallel.supply.source import HostStatus

PATIENCE = 60


class Three(Backend):
    """Three hosts that are up, or others."""

    workers = None

    def __init__(self, workers=None, hosts=None):
        self.workers = workers or {"h1": 1, "h2": 1, "h3": 1}
        self.hosts = hosts or [HostStatus(name, "up", 1) for name in self.workers]

    def open(self, call):
        raise AssertionError("nothing runs here")


def failed(item, host, error=None):
    return Outcome(item.index, None, error=error or ValueError("no"), host=host)


def fail(trust, item, host, of_host=False):
    """Have an item fail; return whether others are asked."""
    doubted = trust.may_be_the_hosts(item, failed(item, host), of_host)
    trust.count_failed(item, host, "no", of_host)
    if doubted:
        item.doubted += 1
    else:
        trust.count_given_up(item)
    return doubted


@pytest.fixture
def trust():
    return Trust(Three(), HostRules(), collects=True)


class TestTheRule:
    def test_a_run_without_failures_has_no_places(self, trust):
        trust.count_done("h1", 100)
        assert trust.places() is None
        assert (trust.workers(), trust.window()) == (3, 6)

    def test_what_failed_goes_to_others_as_long_as_there_are_some(self, trust):
        item = Item(0, None)
        trust.count_failed(item, "h2", "no")
        assert trust.places(item.tried) == {"h1", "h3"}
        trust.count_failed(item, "h1", "no")
        assert trust.places(item.tried) == {"h3"}
        trust.count_failed(item, "h3", "no")
        assert trust.places(item.tried) is None

    def test_who_has_never_succeeded_is_doubted_and_others_are_not(self, trust):
        trust.count_done("h1", 1)
        assert not fail(trust, Item(0, None), "h1")
        assert fail(trust, Item(1, None), "h2")

    def test_who_fails_again_and_again_is_doubted(self, trust):
        trust.count_done("h1", 10)
        assert [fail(trust, Item(n, None), "h1") for n in range(5)] == [False] * 3 + [True] * 2

    def test_who_wants_to_know_of_the_first_failure_is_told_at_once(self, trust):
        trust.collects = False
        assert not fail(trust, Item(0, None), "h1")
        assert fail(trust, Item(0, None), "h1", of_host=True)

    def test_what_fails_everywhere_is_the_items(self, trust):
        item = Item(0, None)
        assert [fail(trust, item, host) for host in ("h2", "h1", "h3")] == [True, True, False]
        assert not any(fail(trust, Item(1, None), host) for host in ("h2", "h1", "h3"))
        assert trust.left_out == {}

    def test_what_took_too_long_is_not_tried_elsewhere(self, trust):
        late = failed(Item(0, None), "h1", TaskTimeout(0, "h1", 1.0))
        assert not trust.may_be_the_hosts(Item(0, None), late, False)

    def test_a_host_with_open_questions_gets_nothing_new(self, trust):
        for n in range(3):
            assert trust.places() is None
            assert fail(trust, Item(n, None), "h2")
        assert trust.places() == {"h1", "h3"}

    def test_a_host_is_left_out_when_others_can(self, trust, caplog):
        trust.count_done("h1", 40)
        items = [Item(n, None) for n in range(6)]
        for item in items:
            assert fail(trust, item, "h2")
        trust.count_done("h3", 6, items)
        assert list(trust.left_out) == ["h2"]
        (record,) = caplog.records
        assert record.getMessage().startswith("h2 is not used any more in this run: ")
        assert trust.places() == {"h1", "h3"}
        assert (trust.workers(), trust.window()) == (2, 4)

    def test_a_few_are_enough_for_a_missing_module(self, trust):
        items = [Item(n, None) for n in range(3)]
        for item in items:
            assert fail(trust, item, "h2", of_host=True)
        trust.count_done("h3", 3, items)
        assert list(trust.left_out) == ["h2"]

    def test_tasks_that_fail_by_chance_leave_all_hosts_in(self, trust):
        """Every second item fails at first, on each host; it succeeds elsewhere."""
        for n in range(2000):
            host = f"h{1 + n % 3}"
            if (n * 7919) % 101 % 2:
                trust.count_done(host, 1)
            else:
                item = Item(n, None)
                trust.count_failed(item, host, "no")
                trust.count_done("h1" if host == "h2" else "h2", 1, [item])
        assert trust.left_out == {}

    def test_one_host_alone_is_never_doubted(self):
        backend = Three({"local": 2})
        trust = Trust(backend, HostRules(), collects=True)
        for n in range(20):
            assert not fail(trust, Item(n, None), "local", of_host=True)
        assert trust.places(frozenset({"local"})) is None

    def test_a_host_that_is_starting_is_waited_for_but_not_by_this_one(self):
        hosts = [HostStatus("h1", "up", 1), HostStatus("h2", "starting")]
        trust = Trust(Three({"local": 1, "h1": 1}, hosts), HostRules(), collects=True)
        there = Trust(Three({"h1": 1}, hosts), HostRules(), collects=True)
        assert fail(there, item := Item(0, None), "h1")
        assert there.places(item.tried, may_wait=True) == {"h2"}
        assert there.places(item.tried) is None  # a retry does not wait
        here = Trust(Three({"local": 1}, hosts[1:]), HostRules(), collects=True)
        assert not fail(here, Item(0, None), "local")
        one, two = Future(), Future()
        pinned = {one: frozenset({"h3"}), two: frozenset({"h2"})}
        assert trust.stranded(pinned) == [one]

    def test_who_wants_to_know_of_the_first_failure_waits_for_a_while_only(self):
        hosts = [HostStatus("h1", "up", 1), HostStatus("h2", "starting")]
        trust = Trust(Three({"h1": 1}, hosts), HostRules(patience=0.2))
        assert fail(trust, Item(0, None), "h1", of_host=True)
        assert 0 < trust.time_left() <= 0.2
        wait_until(lambda: trust.time_left() == 0, 5, "the time is over")
        assert trust.stranded({(waiting := Future()): frozenset({"h2"})}) == [waiting]
        assert not fail(trust, Item(1, None), "h1", of_host=True)

    def test_a_host_that_was_left_out_is_better_than_none(self, trust, monkeypatch):
        items = [Item(n, None) for n in range(3)]
        assert all(fail(trust, item, "h2", of_host=True) for item in items)
        trust.count_done("h3", 3, items)
        assert (trust.workers(), trust.window(), trust.time_alone()) == (2, 4, None)
        trust.backend.workers = {"h2": 1}
        for host in trust.backend.hosts:
            host.state = "up" if host.name == "h2" else "lost"
        assert (trust.workers(), trust.window()) == (1, 0)  # the others may come back
        assert 0 < trust.time_alone() <= 60
        monkeypatch.setattr(trust_module, "ALONE", 0.0)
        assert (trust.workers(), trust.window(), trust.time_alone()) == (1, 2, None)
        monkeypatch.undo()
        for host in trust.backend.hosts[:1] + trust.backend.hosts[2:]:
            host.state = "failed"
        assert trust.window() == 2

    def test_the_rule_can_be_switched_off(self):
        trust = Trust(Three(), HostRules(opinions=0), collects=True)
        assert not fail(trust, Item(0, None), "h2", of_host=True)

    @pytest.mark.parametrize("given", [{"opinions": -1}, {"strikes": 0}, {"chance": 2}])
    def test_numbers_are_checked(self, given):
        with pytest.raises(ValueError, match=next(iter(given))):
            HostRules(**given)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three hosts; the second one lacks a module and a file that the others have."""
    with hosts_or_skip(3, tmp_path_factory.mktemp("three"), HostOptions()) as hosts:
        importable(hosts)
        for name in ("h1", "h3"):
            (hosts[name].home / "library" / "only_some.py").write_text("VALUE = 1\n")
            (hosts[name].home / "data").write_text("1")
        yield hosts


@pytest.fixture
def wm(three):
    given = {"environment": 'export PYTHONPATH="$HOME/library"'}
    with open_manager(three, "h1*1 h2*1 h3*1", **given) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        yield manager


def make(what):
    """Return a function that is sent as it is."""

    def imports(item):
        value = importlib.import_module("only_some").VALUE
        time.sleep(0.01)
        return value + item

    def reads(item):
        value = int((Path.home() / "data").read_text())
        time.sleep(0.01)
        return value + item

    class Prepares(Task):
        def worker_init(self):
            (Path.home() / "data").read_text()

        def initialize_local(self):
            self.all = []

        def process(self, jobid, item):
            time.sleep(0.01)
            return item + 1

        def merge_results(self, result, jobid=-1):
            self.all.append(result)

        def results(self):
            return sorted(self.all)

    return {"imports": imports, "reads": reads, "prepares": Prepares()}[what]


@pytest.mark.parametrize("what", ["imports", "reads", "prepares"])
def test_a_black_hole_among_three_hosts_loses_nothing(wm, what, caplog):
    items = range(60)
    assert wm.process(make(what), items, on_error="collect") == [n + 1 for n in items]
    report = wm.report
    assert (report.merged, report.failed, report.complete) == (60, 0, True)
    assert list(report.left_out) == ["h2"]
    assert "h2 (left out: " in str(report)
    assert sum("h2 is not used any more" in one.getMessage() for one in caplog.records) == 1
    assert report.retried < 30  # of sixty: a host that fails at once would take most of them


@pytest.mark.parametrize("what", ["imports", "prepares"])
def test_nor_does_it_stop_a_run_that_raises(wm, what):
    assert wm.process(make(what), range(60)) == [n + 1 for n in range(60)]


def test_retries_go_to_other_hosts_first(wm):
    assert wm.process(make("reads"), range(60), retries=1) == [n + 1 for n in range(60)]


def test_what_fails_everywhere_is_told_of_once(wm):
    def fails(item):
        raise ZeroDivisionError(item)

    wm.process(fails, range(40), on_error="collect")
    report = wm.report
    assert [failure.index for failure in sorted(report.failures, key=lambda f: f.index)]
    assert (report.failed, report.left_out) == (40, {})
    assert {type(failure.error) for failure in report.failures} == {ZeroDivisionError}


def test_failures_are_told_of_in_a_line_though_all_else_is_silent(wm, capfd):
    def fails(item):
        if item % 2:
            raise ZeroDivisionError(item)
        time.sleep(0.02)

    wm.process(fails, range(20), on_error="collect")
    host = min(wm.report.failures, key=lambda failure: failure.index).host
    line = f"10 of 20 items FAILED; first: item 1 on {host}: ZeroDivisionError: 1\n"
    assert capfd.readouterr() == ("", line)
    by_host = {host: stat.nfailed for host, stat in wm.report.stats if stat.nfailed}
    assert sum(by_host.values()) == 10
    assert "#failed" in str(wm.report)


def test_a_host_that_came_too_late_is_in_the_table(three, capsys):
    given = {"environment": "sleep 5", "silent": False, "progress": False}
    with open_manager(three, "h1*1", ncpus=1, **given) as manager:
        manager.process(abs, range(4))
    assert "h1 (still starting when the run ended)" in capsys.readouterr().out


def test_the_next_run_uses_the_host_again(wm):
    wm.process(make("reads"), range(40), on_error="collect")
    assert list(wm.report.left_out) == ["h2"]
    wm.process(lambda item: time.sleep(0.02), range(40))
    assert {host for host, _ in wm.report.stats} == {"h1", "h2", "h3"}
    assert wm.report.left_out == {}


@pytest.mark.slow
def test_an_error_does_not_wait_for_a_host_that_takes_long_to_start(three, tmp_path):
    config = tmp_path / "rc"
    config.write_text("[Parallel:h3]\nenvironment = sleep 60\n")
    config.chmod(0o600)
    given = {"config": config, "host_rules": HostRules(patience=1)}
    with open_manager(three, "h2*1 h3*1", **given) as manager:
        begin = time.monotonic()
        with pytest.raises(ModuleNotFoundError, match="only_some"):
            manager.process(make("imports"), range(4))
        assert time.monotonic() - begin < 50


def test_items_do_not_wait_for_hosts_that_were_removed(wm):
    """What is to run on others does, also when those have gone meanwhile."""
    supervisor = wm.executor.backend._supervisor

    def reads_or_waits(item):
        (Path.home() / "data").read_text()
        time.sleep(0.05)
        return item

    done = []
    for value in wm.iexecute(reads_or_waits, range(30), retries=3, chunk_size=1):
        done.append(value)
        if len(done) == 6:
            supervisor.remove("h3")
    assert sorted(done) == list(range(30))

"""Items that have hosts: each runs where its data are, or nearly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from helpers import crash

from ostap_parallel import HostError, TaskMerger, WorkManager

PATIENCE = 60


@pytest.fixture(scope="module")
def wm(own_hosts):
    settings = {"ssh_config": own_hosts.ssh_config, "config": (), "silent": True}
    with WorkManager(0, "h1*1 h2*1", **settings) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        yield manager


def make_here(pause=0.0):
    """Return a function that tells which host it runs on."""

    def here(item):
        time.sleep(pause)
        return Path(os.environ["PRIVATE_SSHD"]).name

    return here


def test_each_runs_on_its_host(wm):
    wanted = [f"h{1 + n % 2}" for n in range(50)]
    assert wm.process(make_here(), wanted, where=lambda item: item) == wanted
    assert wm.report.complete


def test_none_is_for_any(wm):
    wanted = ["h2", None, "h2", None]
    found = wm.process(make_here(), wanted, where=lambda item: item)
    assert found[0::2] == ["h2", "h2"]
    assert set(found) <= {"h1", "h2"}


def test_what_is_merged_is_whole(wm):
    where = lambda item: "h1" if item < 90 else "h2"  # noqa: E731
    assert wm.process(lambda x: x, range(100), where=where, merger=TaskMerger()) == 4950


def test_others_help_when_they_may(wm):
    here, where = make_here(0.02), lambda item: "h1"
    assert set(wm.process(here, range(60), where=where)) == {"h1"}
    assert set(wm.process(here, range(60), where=where, strict=False)) == {"h1", "h2"}


def test_a_host_that_is_unknown(wm):
    with pytest.raises(HostError, match="h9: run: it is not among the hosts"):
        wm.process(make_here(), ["h1", "h9"], where=lambda item: item)
    found = wm.process(make_here(), ["h1", "h9"], where=lambda i: i, on_error="collect")
    assert found[0] == "h1"
    assert isinstance(found[1].error, HostError)
    assert set(wm.process(make_here(), ["h9"], where=lambda i: i, strict=False)) <= {"h1", "h2"}


@pytest.mark.slow
def test_a_host_that_cannot_be_had(own_hosts):
    settings = {"ssh_config": own_hosts.ssh_config, "config": (), "silent": True}
    with WorkManager(0, "h1*1 h8*1", **settings) as manager:
        found = manager.process(
            make_here(), ["h1", "h8", "h1"], where=lambda i: i, on_error="collect"
        )
        assert found[0::2] == ["h1", "h1"]
        assert isinstance(found[1].error, HostError)


@pytest.mark.slow
def test_a_host_that_is_lost(make_hosts):
    stays, lost = made = make_hosts(2)
    settings = {"ssh_config": made.ssh_config, "config": (), "silent": True}
    with WorkManager(0, "h1*1 h2*1", **settings) as manager:
        assert manager.wait_for_hosts(PATIENCE)

        def collect(seen, result):
            if not seen:
                crash(lost)
            return [*seen, result]

        where = lambda item: "h2"  # noqa: E731
        options = {"where": where, "strict": False, "merger": collect, "init": []}
        seen = manager.process(make_here(0.1), range(30), **options)
        assert len(seen) == 30
        assert stays.name in seen


def test_what_it_needs(wm):
    with pytest.raises(TypeError, match="list"):
        wm.process(make_here(), iter([1]), where=lambda item: "h1")


@pytest.mark.slow
def test_a_lost_host_is_waited_for_with_patience(make_hosts):
    _, lost = made = make_hosts(2)
    settings = {"ssh_config": made.ssh_config, "config": (), "silent": True, "patience": 1}
    with WorkManager(0, "h1*1 h2*1", **settings) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        crash(lost)
        wanted = ["h1", "h2"] * 5
        found = manager.process(
            make_here(0.05), wanted, where=lambda i: i, on_error="collect", retries=0
        )
        assert found[0::2] == ["h1"] * 5
        assert all(isinstance(failure.error, HostError) for failure in found[1::2])

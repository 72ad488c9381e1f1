"""What allocations do where nothing answers as it should, without a batch system."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from ostap_parallel.config.batch import BatchConfig
from ostap_parallel.errors import HostError, SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import Done
from ostap_parallel.schedulers.sge import Sge
from ostap_parallel.supply import site as site_
from ostap_parallel.supply.allocations import Allocations, Claim, Held
from ostap_parallel.supply.site import Guard, Here
from ostap_parallel.supply.source import TryLater

PATIENCE = 60.0  # seconds


class Quiet(Here):
    """A site without a batch system."""

    def __init__(self):
        self.is_reached = threading.Event()
        self.error = None
        self.closed = 0

    def guard(self, kind):
        if self.error is not None:
            raise self.error
        assert self.is_reached.wait(PATIENCE)
        return Guard(["bash", "-c", "cat >/dev/null"], kind)  # cancels nothing

    def close(self):
        self.closed += 1


@pytest.fixture
def site():
    return Quiet()


def make(site, **given):
    scheduler = Sge(lambda *_: Done(0, "", ""))
    return Allocations("gpu", BatchConfig(batch="sge", **given), site, scheduler, "")


def test_options_of_sessions_beside_those_that_they_have_no_use_for(site):
    jobs = make(site, options='-cwd -q "my queue" -j y -l a=1')
    argv = jobs.session_argv(Held("gpu-1", "", "", None))
    assert argv[argv.index("-q") :][:4] == ["-q", "my queue", "-l", "a=1"]
    assert argv[-2:] == ["bash", "-s"]
    assert not {"-cwd", "-j", "-wd", "-o", "-S", "y"} & set(argv)


def test_others_need_not_wait_while_a_login_host_is_reached(site):
    jobs = make(site)
    entering = threading.Thread(target=jobs.enter)
    entering.start()
    other = threading.Thread(target=jobs.abandon, args=[Claim("gpu/1", None)])
    other.start()
    other.join(PATIENCE / 3)
    assert not other.is_alive()
    site.is_reached.set()
    entering.join(PATIENCE)
    (held,) = jobs._held.values()
    jobs.release(held)


def test_a_session_of_which_more_is_known_is_still_the_same(site):
    jobs = make(site)
    site.is_reached.set()
    jobs.release(replace(jobs.enter(), number="7", ends=1.0))
    assert not jobs._held
    assert site.closed == 1


def test_a_login_host_that_is_away_is_tried_later_and_keeps_nothing(site):
    jobs = make(site)
    site.error = SchedulerUnavailable("ssh", "the connection was lost")
    with pytest.raises(TryLater, match="was lost"):
        jobs.enter()
    assert not jobs._held
    assert site.closed == 1


def test_who_is_closed_before_it_waits_asks_for_nothing(site):
    jobs, claim = make(site), Claim("gpu/1", None)
    jobs.abandon(claim)
    with pytest.raises(HostError, match="closed while it was starting"):
        jobs.claim(claim)
    assert jobs._thread is None


# Leads to a bash, once there is a file.
WAITS = 'until [ -e "$GO" ]; do sleep 0.05; done; exec bash "$@"'


def test_a_guard_that_is_far_away_knows_before_anything_is_submitted(tmp_path, monkeypatch):
    """Who is cut off right behind a submission could not tell it any more."""
    monkeypatch.setitem(site_._CANCEL, "slurm", ["true"])
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    guard = Guard(["bash", "-c", WAITS, "bash"], "slurm", is_far=True)
    telling = threading.Thread(target=guard.expect, args=["gpu-1"])
    telling.start()
    telling.join(0.5)
    assert telling.is_alive()
    (tmp_path / "go").touch()
    telling.join(PATIENCE)
    assert not telling.is_alive()
    guard.add("gpu-1")
    guard.dismiss()
    assert not guard.is_there()


def test_nothing_is_submitted_without_a_guard(monkeypatch):
    lost = Guard(["false"], "sge", is_far=True)
    with pytest.raises(SchedulerUnavailable, match="connection was lost"):
        lost.expect("gpu-1")
    lost.dismiss()

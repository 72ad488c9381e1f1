"""Calls and hosts where the initializer fails: others do them."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from ostap_parallel import Executor, InitializerError

PATIENCE = 60


@pytest.fixture
def executor(hosts):
    """An executor whose initializer fails on the second host."""
    for host in hosts:
        (host.home / "mark").unlink(missing_ok=True)
    (hosts["h1"].home / "mark").touch()

    def initializer():
        if not (Path.home() / "mark").exists():
            raise OSError("no mark")

    given = {"ssh_config": hosts.ssh_config, "config": (), "initializer": initializer}
    with Executor(0, "h1*1 h2*1", **given) as executor:
        assert executor.wait_for_hosts(PATIENCE)
        yield executor
    (hosts["h1"].home / "mark").unlink()


@pytest.fixture
def slowly():
    def slowly(item):
        time.sleep(0.02)
        return item

    return slowly


def test_others_do_what_such_a_host_cannot(executor, slowly, caplog):
    caplog.set_level(logging.WARNING)
    futures = [executor.submit(slowly, n) for n in range(60)]
    assert [future.result(PATIENCE) for future in futures] == list(range(60))
    (record,) = caplog.records
    text = "h2 gets no calls while others are up, as its workers cannot be prepared"
    assert text in record.getMessage()
    assert "no mark" in record.getMessage()
    assert list(executor.map(slowly, range(20))) == list(range(20))


def test_what_fails_on_all_hosts_is_an_error(executor, hosts, slowly):
    (hosts["h1"].home / "mark").unlink()
    with pytest.raises(InitializerError, match="no mark"):
        executor.submit(slowly, 1).result(PATIENCE)
    (hosts["h1"].home / "mark").touch()


def test_a_call_does_not_wait_for_a_host_that_has_gone(executor, hosts, slowly):
    """Once the good host has gone, calls that wait for it end with the error of the other."""

    def waits(item):
        deadline = time.monotonic() + PATIENCE
        while not (Path.home() / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    first = [executor.submit(slowly, n) for n in range(10)]
    assert [future.result(PATIENCE) for future in first] == list(range(10))
    running = executor.submit(waits, 0)
    waiting = [executor.submit(slowly, n) for n in range(5)]
    dropping = threading.Thread(target=executor.drop_host, args=["h1"])
    dropping.start()
    for future in waiting:
        with pytest.raises(InitializerError):
            future.result(PATIENCE)
    dropping.join(PATIENCE)
    with pytest.raises(InitializerError):
        running.result(PATIENCE)

"""Whatever dies while a run goes on: each item is merged once, and nothing is left."""

from __future__ import annotations

import logging

import pytest

from benchmarks.chaos import play


@pytest.mark.slow
@pytest.mark.parametrize("ncpus", [2, 0])
def test_a_monkey_kills_what_the_run_depends_on(make_hosts, capfd, caplog, ncpus):
    result = play(make_hosts(3), items=1000, seed=1, ncpus=ncpus, kills=8)
    assert result.problems == []
    assert result.report.merged >= 1000
    assert result.report.retried >= 1
    assert sum(host.lost for host in result.report.hosts) >= 1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "Traceback" not in capfd.readouterr().err

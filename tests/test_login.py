"""A login host that does not answer."""

from __future__ import annotations

import os
import threading

import pytest
from helpers import wait_until

from ostap_parallel import HostError
from ostap_parallel.config import HostConfig
from ostap_parallel.errors import SchedulerUnavailable
from ostap_parallel.supply import login as login_
from ostap_parallel.supply.ssh import ssh_version

PATIENCE = 60.0  # seconds


def test_who_closes_it_does_not_wait_until_it_is_reached(tmp_path, monkeypatch):
    ssh_version()  # of the real one
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\necho > {tmp_path}/is-there\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(login_, "PATIENCE", 10 * PATIENCE)
    login = login_.Login(HostConfig(name="nowhere"))
    errors = []

    def reach():
        try:
            login.run(["true"])
        except (HostError, SchedulerUnavailable) as exc:
            errors.append(exc)

    reaching = threading.Thread(target=reach)
    reaching.start()
    wait_until((tmp_path / "is-there").exists, PATIENCE, "it is being reached")
    closing = threading.Thread(target=login.close)
    closing.start()
    for thread in (closing, reaching):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    with pytest.raises((HostError, SchedulerUnavailable), match="nowhere"):
        raise errors[0]

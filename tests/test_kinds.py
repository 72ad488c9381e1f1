"""Kinds of what scripts define, see kinds.py: on local workers, and on a host."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from functions import run_python
from kinds import KINDS, NEEDS, RECENT, program

pytestmark = pytest.mark.slow

SYNCED = ["generic bases", "closures of modules"]


def run_kind(name, folder, **how):
    if sys.version_info < RECENT.get(name, (3,)):
        pytest.skip("this Python does not have it")
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    (folder / "script.py").write_text(program(KINDS[name], **how))
    assert run_python("script.py", cwd=folder).endswith("ok\n")


def at_host(ssh_config, more=""):
    return (
        f"WorkManager(0, 'h1*1', ssh_config={str(ssh_config)!r}, config=(), silent=True, {more})"
    )


@pytest.mark.parametrize("name", KINDS)
def test_on_local_workers(tmp_path, name):
    run_kind(name, tmp_path)


# What a host has not is a module beside the script: that is for sync.
@pytest.mark.parametrize("name", [name for name in KINDS if name not in {*SYNCED, *NEEDS}])
def test_on_a_host(tmp_path, ssh_config, name):
    run_kind(name, tmp_path, manager=at_host(ssh_config))


@pytest.mark.parametrize("name", SYNCED)
def test_on_a_host_with_the_modules_of_the_script(tmp_path, ssh_config, name):
    run_kind(name, tmp_path, manager=at_host(ssh_config, "sync=[D]"))

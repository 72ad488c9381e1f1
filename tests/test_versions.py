"""Hosts with another version of Python: no function crosses as byte code, names do."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import functions
import pytest
from helpers import importable, open_manager, wait_until

from ostap_parallel import SerializeError
from ostap_parallel.commands import run
from ostap_parallel.hosts import Host
from ostap_parallel.objects import byvalue, serialize

PATIENCE = 60
VERSION = ".".join(map(str, sys.version_info[:2]))


def others():
    """Return interpreters of other minor versions, those from 3.10 on and older ones."""
    good, old = {}, {}
    for path in sorted(Path(sys.base_prefix).parent.glob("*/bin/python[23].*")):
        version = path.name.removeprefix("python")
        if version.count(".") == 1 and version[2:].isdigit():
            major, minor = map(int, version.split("."))
            (good if (major, minor) >= (3, 10) else old)[version] = str(path)
    good.pop(VERSION, None)
    return good, old


OTHERS, OLD = others()

# What gave something else, without an error, as byte code of another version.
KINDS = {
    "choice": lambda x: "big" if x > 2 else "small",
    "call": lambda x: dict(a=x, b=2),
    "loop": lambda x: [n for n in range(x) if n % 2],
}


@pytest.fixture
def manage(hosts):
    def manage(servers, version, config=(), **given):
        given |= {"python_mismatch": "allow", "environment": importable(hosts)}
        return open_manager(hosts, servers, config=config, **given)

    return manage


@pytest.mark.slow
@pytest.mark.parametrize("version", OTHERS)
def test_names_cross_and_functions_are_refused_by_name(manage, version):
    with manage("h1*1", version, python=OTHERS[version]) as wm:
        assert wm.wait_for_hosts(PATIENCE), wm.executor.hosts
        assert wm.executor.hosts[0].about["python"].startswith(version)
        assert wm.process(math.factorial, range(5)) == [1, 1, 2, 6, 24]
        assert wm.process(functions.square, range(3)) == [0, 1, 4]
        for function in KINDS.values():
            with pytest.raises(SerializeError) as caught:
                wm.process(function, range(4))
            text = str(caught.value)
            assert "the function <lambda> cannot be sent" in text
            assert f"Python {VERSION}" in text
            assert "python=" in text
        with pytest.raises(SerializeError, match="the function <lambda>"):
            wm.process(functions.call_it, [lambda: 1])  # as an item, too


@pytest.mark.slow
def test_others_do_what_such_a_host_cannot(hosts, manage, tmp_path):
    if not OTHERS:
        pytest.skip("this machine has one Python version only")
    config = tmp_path / "rc"
    config.write_text(f"[Parallel:h2]\npython = {list(OTHERS.values())[-1]}\n")
    config.chmod(0o600)
    with manage("h1*1 h2*1", "", config=config) as wm:
        assert wm.wait_for_hosts(PATIENCE), wm.executor.hosts
        many = [lambda n=n: n for n in range(40)]
        runs = [
            (KINDS["choice"], range(60), ["small"] * 3 + ["big"] * 57),
            (functions.call_it, many, list(range(40))),
        ]
        for function, items, wanted in runs:

            def is_left_out(function=function, items=items, wanted=wanted):
                assert wm.process(function, items, chunk_size=1) == wanted
                return list(wm.report.left_out) == ["h2"]  # else h1 was quick enough for all

            wait_until(is_left_out, PATIENCE, "h2 is left out")


@pytest.mark.slow
def test_the_message_lists_what_there_is(hosts):
    if not OTHERS:
        pytest.skip("this machine has one Python version only")
    folder = hosts["h1"].home / ".pyenv" / "versions" / "mine" / "bin"
    folder.mkdir(parents=True)
    for name in (f"python{VERSION}", "python3.19"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    with open_manager(hosts, "h1*1", python=next(iter(OTHERS.values()))) as wm:
        assert not wm.wait_for_hosts(PATIENCE)
        reason = wm.executor.hosts[0].error.reason
        where = hosts["h1"].inside(folder)
        assert "give the host another interpreter with python=...: set python = /" in reason
        assert f"/python{VERSION} (there are /" in reason
        assert f"{where}/python{VERSION}, {where}/python3.19" in reason


@pytest.mark.slow
@pytest.mark.parametrize("version", OTHERS)
def test_commands_run_with_any(hosts, version):
    settings = {"ssh_config": hosts.ssh_config, "config": (), "python": OTHERS[version]}
    (done,) = run([["echo", "here"]], servers="h1*1", **settings)
    assert (done.host, done.stdout) == ("h1", b"here\n")
    with Host("h1", **settings) as host:
        assert host.run(["echo", "there"]).stdout == b"there\n"
        with pytest.raises(SerializeError, match="the function <lambda>"):
            host.python(lambda: 1)


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD)
def test_one_that_is_too_old(hosts, version):
    with open_manager(hosts, "h1*1", python=OLD[version], python_mismatch="allow") as wm:
        assert not wm.wait_for_hosts(PATIENCE)
        error = wm.executor.hosts[0].error
        assert error.step == "python"
        assert f"is Python {version}, and 3.10 is the oldest that will do" in error.reason


@pytest.mark.slow
def test_modules_that_there_are(hosts):
    if not OTHERS:
        pytest.skip("this machine has one Python version only")
    folder = hosts["h1"].home / "modules" / "Python"
    folder.mkdir(parents=True)
    for name in "2.7.18", f"{VERSION}.3-GCCcore.lua", "3.19.0", "common":
        (folder / name).touch()
    environment = f"MODULEPATH=/nowhere:{hosts['h1'].inside(folder.parent)}; export MODULEPATH"
    python = next(iter(OTHERS.values()))
    with open_manager(hosts, "h1*1", python=python, environment=environment) as wm:
        assert not wm.wait_for_hosts(PATIENCE)
        reason = wm.executor.hosts[0].error.reason
        assert "; modules: Python/" in reason
        assert f"Python/{VERSION}.3-GCCcore" in reason
        assert "Python/3.19.0" in reason
        assert "common" not in reason.partition("modules:")[2]


def test_a_function_says_what_version_it_is_of(monkeypatch):
    data = serialize.dumps(KINDS["choice"])
    assert serialize.loads(data)(3) == "big"
    byvalue._load_code.cache_clear()
    monkeypatch.setattr(byvalue, "_VERSION", b"3.99")
    with pytest.raises(SerializeError, match=f"byte code of Python {VERSION}.*3.99"):
        serialize.loads(data)
    byvalue._load_code.cache_clear()

"""`ostap_parallel.Executor` is a `concurrent.futures.Executor`."""

from __future__ import annotations

import os
from concurrent.futures import BrokenExecutor

import pytest
from functions import run_python

from ostap_parallel import Executor, InitializerError, SerializeError, ServersUnavailable

SETTING = """
import os
from ostap_parallel import Executor, WorkManager

chosen, table, untouched = None, {}, ["mine"]

def set_up(value):
    global chosen
    chosen = value
    table[value] = os.getpid()
    untouched

def look(item):
    return chosen, table == {chosen: os.getpid()}, untouched, helper()

def helper():
    return chosen

class Looking:
    def __call__(self, item):
        return look(item)

if __name__ == "__main__":
    with Executor(2, initializer=set_up, initargs=("it",)) as executor:
        untouched.append("too")
        wanted = "it", True, ["mine"], "it"
        assert executor.submit(look, 0).result() == wanted
        manager = WorkManager(executor=executor, silent=True)
        assert manager.process(look, range(9)) == [wanted] * 9
        assert manager.process(Looking(), range(9)) == [wanted] * 9
        assert chosen is None and not table
"""


def test_functions_of_a_script_see_what_the_initializer_has_set(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SETTING)
    run_python(script, cwd=tmp_path)


def test_the_initializer_runs_once_per_process_and_what_it_has_set_up_stays(hosts, ssh_config):
    def set_up():
        os.environ["NUMBER"] = str(int(os.environ.get("NUMBER", 0)) + 1)

    with Executor(1, "h1*1", ssh_config=ssh_config, config=(), initializer=set_up) as executor:
        assert executor.wait_for_hosts(30)
        futures = [executor.submit(os.getenv, "NUMBER") for _ in range(20)]
        assert {future.result(30) for future in futures} == {"1"}


def test_an_initializer_that_fails_breaks_the_executor():
    def fail():
        raise LookupError("not here")

    with Executor(1, initializer=fail) as executor:
        for _ in range(2):
            with pytest.raises(InitializerError, match="LookupError: not here") as info:
                executor.submit(abs, 1).result(30)
            assert isinstance(info.value, BrokenExecutor)


@pytest.mark.parametrize(
    ("initializer", "initargs", "error"),
    [(1, (), TypeError), (print, [(x for x in ())], SerializeError)],
)
def test_an_initializer_that_cannot_be_sent(initializer, initargs, error):
    with pytest.raises(error, match="initializer"):
        Executor(1, initializer=initializer, initargs=initargs)


def test_without_any_worker_it_is_broken():
    with Executor(0) as executor, pytest.raises(ServersUnavailable) as info:
        executor.submit(abs, 1)
    assert isinstance(info.value, BrokenExecutor)


def test_a_setting_that_there_is_not():
    with pytest.raises(TypeError, match="pyhton"):
        Executor(1, pyhton="python3")

"""What starts workers: it imports for all of them, forks them, and may die."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from functions import PATIENCE, square
from helpers import open_manager, processes_with, wait_until
from sshd import descendants

from ostap_parallel import ConfigError, WorkerLost, WorkManager
from ostap_parallel.machine import templates as templates_


def open_here(request, where, **given):
    if where == "local":
        return WorkManager(2, silent=True, **given)
    return open_manager(request.getfixturevalue("hosts"), "h1*2", **given)


def parent_of(pid):
    """Return the pid of a process' parent, and whether that has our name for what forks."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    parent = int(stat[1])
    return parent, Path(f"/proc/{parent}/comm").read_text() == "pptemplate\n"


def templates():
    return [pid for pid in descendants(os.getpid()) if parent_of(pid)[1]]


@pytest.mark.parametrize("where", ["local", "host"])
class TestPreload:
    def test_it_is_imported_once(self, where, request):
        def look(item):
            name = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
            return "colorsys" in sys.modules, name

        for preload, expected in ("colorsys", True), ("", False):
            with open_here(request, where, preload=preload) as manager:
                assert set(manager.process(look, range(8))) == {(expected, "pptemplate")}

    def test_without_forks(self, where, request):
        def look(item):
            return "colorsys" in sys.modules, Path("/proc/self/cmdline").read_text()

        with open_here(request, where, preload="colorsys", start="spawn") as manager:
            found = set(manager.process(look, range(8)))
        assert {loaded for loaded, _ in found} == {False}
        assert all("worker.process" in command for _, command in found)


class TestForks:
    def test_they_differ_where_they_must(self):
        def draw(item):
            return os.getpid(), random.random()

        with WorkManager(4, silent=True) as manager:
            first = {}
            for pid, number in manager.iexecute(draw, range(200), chunk_size=1):
                first.setdefault(pid, number)
            assert len(set(first.values())) == len(first) >= 2

    def test_a_module_that_starts_a_thread(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "threaded_module.py").write_text(
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=[600], daemon=True).start()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with (
            caplog.at_level(logging.WARNING),
            WorkManager(2, silent=True, preload="threaded_module") as manager,
        ):
            look = lambda item: ("threaded_module" in sys.modules, item)  # noqa: E731
            assert manager.process(look, range(3)) == [(False, n) for n in range(3)]
        assert "importing threaded_module has started a thread" in caplog.text

    def test_a_module_that_is_not_there(self, caplog):
        with (
            caplog.at_level(logging.WARNING),
            WorkManager(1, silent=True, preload=["no_such_module_here"]) as manager,
        ):
            assert manager.process(square, [3]) == [9]
        assert "no_such_module_here cannot be imported: ModuleNotFoundError" in caplog.text

    @pytest.mark.parametrize("wrong", ["a b-c", ["x", "1y"], [3], 3])
    def test_a_name_that_is_none(self, wrong):
        with pytest.raises(ConfigError, match=r"preload: not the names? of (a )?module"):
            WorkManager(1, preload=wrong)

    @pytest.mark.parametrize(
        ("text", "how"),
        [
            ("os._exit(3)", "ended with exit status 3"),
            ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ],
    )
    def test_modules_that_end_the_process(self, tmp_path, monkeypatch, caplog, text, how):
        names = [f"ending_module_{n}" for n in range(4)]
        for name in names:
            (tmp_path / f"{name}.py").write_text(f"import os, signal\n{text}\n")
        monkeypatch.syspath_prepend(tmp_path)
        with (
            caplog.at_level(logging.WARNING),
            WorkManager(2, silent=True, preload=[*names, "colorsys"]) as manager,
        ):
            look = lambda item: "colorsys" in sys.modules  # noqa: E731
            assert manager.process(look, range(3)) == [True] * 3
        for name in names:
            assert f"{how} as it imported {name}, a module of preload" in caplog.text

    def test_another_way_to_start(self):
        with pytest.raises(ConfigError, match="start: neither 'fork' nor 'spawn'"):
            WorkManager(1, start="thread")


FORKED = """\
import os, sys, threading
from ostap_parallel.engine.core import Core
from ostap_parallel.engine.backend import pack_function
from ostap_parallel.machine import forked
from ostap_parallel.machine.jobs import Job
from ostap_parallel.worker.chunk import Writer, draw_id, pack_chunk, unpack_result
from ostap_parallel.worker.execute import Call

def begun():
    words = open(f"/proc/{pid}/comm").read(), open(f"/proc/{pid}/cmdline").read()
    return words == ("pptemplate\\n", open("/proc/self/cmdline").read())

secret = "of the program"
print("before", flush=True)  # so that the file has a place
forked.begin()
if sys.argv[1] == "unused":
    sys.exit()
done, printed = threading.Event(), []
core = Core(1, lambda host, event: printed.append(event.get("text")), fresh=sys.argv[1] == "fresh")
(pid,) = core._crew.own_processes()
code = "import sys; print(hasattr(sys.modules['__main__'], 'secret'), sys.stdin.read())"
chunk = pack_chunk([0], [Writer(together=False).add(code, "code")], None, draw_id(goes_on=False))
core.add(Job(pack_function(Call(exec)), chunk, lambda result: done.set()))
done.wait(60)
core.hand_on_output()
print(begun(), printed, os.path.exists(f"/proc/{pid}"))
core.close()
print(os.path.exists(f"/proc/{pid}"))
"""


class TestFork:
    """One that is a fork of a program of ours, which has imported the same."""

    @pytest.mark.parametrize(
        ("how", "said"),
        {
            "used": ["before", "True ['False '] True", "False"],
            "fresh": ["before", "False ['False '] True", "False"],
            "unused": ["before"],
        }.items(),
    )
    def test_it_is_as_an_interpreter_of_its_own(self, how, said, tmp_path):
        program, output = tmp_path / "program.py", tmp_path / "output"
        program.write_text(FORKED)
        with output.open("wb") as file:
            argv = [sys.executable, str(program), how]
            subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=file, check=True, timeout=PATIENCE
            )
        assert output.read_text().splitlines() == said
        assert not processes_with(tmp_path)

    def test_hosts_have_it(self, hosts):
        """No interpreter is started but the server's."""

        def commands(item):
            parent = os.getppid()
            above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
            paths = (Path(f"/proc/{pid}/cmdline") for pid in (os.getpid(), parent, above))
            return tuple(path.read_text() for path in paths)

        with open_manager(hosts, "h1*1") as manager:
            ((worker, template, server),) = set(manager.process(commands, range(2)))
        assert "ppserver" in server
        assert worker == template == server


class TestItsDeath:
    def test_workers_go_on_and_are_replaced(self):
        with WorkManager(2, silent=True) as manager:
            pids = manager.executor.backend.pids()
            (template,) = {parent_of(pid)[0] for pid in pids}
            os.kill(template, signal.SIGKILL)
            assert manager.process(square, range(50)) == [n * n for n in range(50)]
            assert manager.executor.backend.pids() == pids
            os.kill(pids[0], signal.SIGKILL)
            others = lambda: {*manager.executor.backend.pids()} - {*pids}  # noqa: E731
            (new,) = wait_until(others, PATIENCE, "another worker")
            assert parent_of(new)[1]
            assert parent_of(new)[0] != template
            assert manager.process(square, range(50)) == [n * n for n in range(50)]

    def test_while_an_item_ends_its_worker(self):
        def work(item):
            if item == 1:
                parent = os.getppid()
                os.kill(parent, signal.SIGKILL)
                os._exit(3)
            return item

        with WorkManager(1, silent=True) as manager:
            with pytest.raises(WorkerLost):
                manager.process(work, [0, 1], lost_retries=1, chunk_size=1)
            assert manager.process(square, [4]) == [16]

    def test_nothing_of_it_remains(self):
        before = set(descendants(os.getpid()))
        manager = WorkManager(2, silent=True)
        assert len(templates()) >= 1
        manager.close()
        assert set(descendants(os.getpid())) == before

    @pytest.mark.parametrize("how", ["close", "kill"])
    def test_what_its_modules_have_started_ends_with_it(self, how, tmp_path, monkeypatch):
        (tmp_path / "starting_module.py").write_text(
            "import os, subprocess\n"
            "first = subprocess.Popen(['sleep', '3600'])\n"
            "second = subprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
            f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{first.pid}} {{second.pid}}')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        manager = WorkManager(1, silent=True, preload="starting_module")
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(map(is_alive, pids))
        if how == "kill":
            os.kill(pids.pop(), signal.SIGKILL)  # in a session of its own: nobody knows of it
            for pid in templates():
                os.kill(pid, signal.SIGKILL)
        else:
            manager.close()
        wait_until(lambda: not any(map(is_alive, pids)), PATIENCE, "they have ended")
        manager.close()


def is_alive(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


class TestStopped:
    """By SIGSTOP, without a time limit."""

    def test_a_worker_is_noticed(self, tmp_path):
        def work(item):
            marker = tmp_path / "stopped"
            if item == 3 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return item

        with WorkManager(2, silent=True) as manager:
            assert manager.process(work, range(6), chunk_size=1) == list(range(6))
            assert manager.report.retried == 1
            assert manager.workers == {"local": 2}


def test_who_wants_a_template_does_not_wait_for_one_that_is_told_to_wait(monkeypatch):
    is_told, may_go = threading.Event(), threading.Event()

    def send(connection, message):
        is_told.set()
        assert may_go.wait(PATIENCE)

    monkeypatch.setattr(templates_, "_waiting", [])
    monkeypatch.setattr(templates_.control, "send", send)  # a template that reads nothing
    ends = os.pipe()
    parked = types.SimpleNamespace(printed=ends, control=None)
    parking = threading.Thread(target=templates_.park, args=[parked])
    parking.start()
    assert is_told.wait(PATIENCE)
    taking = threading.Thread(target=templates_.take, args=[{}])
    taking.start()
    taking.join(PATIENCE / 2)
    assert not taking.is_alive()
    may_go.set()
    parking.join(PATIENCE)
    assert templates_._waiting == [parked]
    for descriptor in (*ends, *parked.printed):
        os.close(descriptor)

"""Commands that go to their slot with one message, and what an interrupt leaves of any."""

from __future__ import annotations

import functools
import itertools
import linecache
import os
import signal
import sys

import pytest
from functions import run_python
from helpers import wait_until

from ostap_parallel import Executor
from ostap_parallel.commands import Command, dispatcher, pace, run, run_as_completed, slots
from ostap_parallel.commands.slots import load_of
from ostap_parallel.worker import command as commands

PATIENCE = 60


def be_patient():
    commands.TOGETHER = PATIENCE


def use_no_sessions():
    def refuse(*args, **settings):
        raise NotImplementedError("setsid")

    os.posix_spawnp = refuse


def test_a_variable_without_a_name(tmp_path):
    text = "from ostap_parallel.commands import run; print(run(['printenv B'], ncpus=1)[0].text)"
    assert run_python("-c", text, cwd=tmp_path, B="2", **{"": "1"}) == "2\n\n"


@pytest.fixture
def always_together(monkeypatch):
    """Commands go together, however slow this machine is."""
    monkeypatch.setattr(pace, "TOGETHER", 1e6)


@pytest.fixture
def messages(monkeypatch):
    """The numbers of commands that were sent with one message each."""
    found = []
    submit = dispatcher.Dispatcher._submit

    def counting(self, jobs, *what):
        found.append(len(jobs))
        submit(self, jobs, *what)

    monkeypatch.setattr(dispatcher.Dispatcher, "_submit", counting)
    return found


@pytest.fixture(scope="module")
def one():
    with Executor(1, initializer=be_patient) as executor:
        yield executor


@pytest.fixture(scope="module")
def two():
    with Executor(2) as executor:
        yield executor


class TestTogether:
    def test_short_ones_share_messages(self, one, always_together, messages):
        done = run([f"echo {n}; echo {n} >&2; exit {n % 3}" for n in range(150)], executor=one)
        assert [(each.text, each.stderr, each.status) for each in done] == [
            (f"{n}\n", f"{n}\n".encode(), n % 3) for n in range(150)
        ]
        assert sum(messages) == 150
        assert max(messages) == pace.MOST_TOGETHER
        assert {each.host for each in done} == {"local"}
        assert all(each.attempts == 1 and each.memory for each in done)

    def test_long_output_of_some(self, one, always_together, messages, tmp_path):
        texts = [f"head -c {n % 2 * 3_000_000 + n} /dev/zero" for n in range(20)]
        done = run(texts, executor=one, keep=1000, overflow=tmp_path)
        assert [len(each.stdout) for each in done] == [n % 2 * 3_000_000 + n for n in range(20)]
        assert max(messages) > 1

    def test_one_that_takes_long_holds_up_no_other(self, two, always_together, messages, tmp_path):
        texts = ["true"] * 40
        texts[20:20] = [f"until [ -e {tmp_path}/go ]; do sleep 0.02; done"]
        results = run_as_completed(texts, executor=two)
        others = [next(results) for _ in range(40)]
        assert {each.number for each in others} == {*range(1, 42)} - {21}
        (tmp_path / "go").touch()
        (last,) = results
        assert (last.number, last.status, last.attempts) == (21, 0, 1)
        assert max(messages) > 1

    @pytest.mark.slow
    def test_one_that_takes_long_on_a_host(self, hosts, always_together, messages, tmp_path):
        texts = ["true"] * 40
        texts[20:20] = ["until [ -e ~/go ]; do sleep 0.02; done; rm ~/go"]
        settings = {"ssh_config": hosts.ssh_config, "config": ()}
        with Executor(0, "h1*2", **settings) as executor:
            results = run_as_completed(texts, executor=executor)
            others = [next(results) for _ in range(40)]
            assert {each.number for each in others} == {*range(1, 42)} - {21}
            run(["touch ~/go"], executor=executor)
            (last,) = results
        assert (last.number, last.status, last.attempts) == (21, 0, 1)
        assert max(messages) > 1

    def test_each_runs_once_though_given_back(self, two, always_together, tmp_path):
        texts = [f"echo {n} >> {tmp_path}/ran; sleep 0.{n % 7 // 6}1" for n in range(80)]
        done = run(texts, executor=two)
        assert [each.number for each in done] == [*range(1, 81)]
        assert all(each.succeeded and each.attempts == 1 for each in done)
        ran = (tmp_path / "ran").read_text().split()
        assert sorted(map(int, ran)) == [*range(80)]

    def test_a_c_library_that_begins_no_sessions(self, always_together):
        texts = ["echo one", ["printf", "two"], "no-such-program", "ps -o sid= $$"]
        with Executor(1, initializer=use_no_sessions) as executor:
            done = run([*texts, Command(["env"], environment={"A": "1"})], executor=executor)
        assert [each.text for each in done[:2]] == ["one\n", "two"]
        assert [each.status for each in done] == [0, 0, 127, 0, 0]
        assert int(done[3].text) not in (0, os.getsid(0))
        assert "A=1" in done[4].text.splitlines()

    def test_one_that_ends_what_runs_them(self, one, always_together, messages):
        texts = ["true"] * 40
        texts[20:20] = ["kill -9 $PPID; sleep 60"]
        done = run(texts, executor=one)
        assert "was killed" in done[20].error
        assert [each.status for each in done if each.number != 21] == [0] * 40
        assert max(messages) > 1

    def test_a_time_limit_is_of_each(self, one, always_together):
        texts = [Command("sleep 60" if n == 20 else "sleep 0.01", timeout=0.5) for n in range(40)]
        done = run(texts, executor=one)
        assert [each.timed_out for each in done] == [n == 20 for n in range(40)]

    @pytest.mark.parametrize("settings", [{"halt": "soon,fail=1"}, {"percent": 1e6}])
    def test_none_begins_where_that_of_the_one_before_matters(
        self, settings, one, always_together, messages
    ):
        texts = ["true" if n < 20 else "false" for n in range(40)]
        done = run(texts, executor=one, **settings)
        assert len(done) == (21 if "halt" in settings else 40)
        assert set(messages) == {1}

    def test_what_is_started_ends_before_the_next_begins(self, one, always_together, tmp_path):
        here = tmp_path / "here"
        text = f"[ ! -e {here} ] || exit 1; "
        text += f"(trap 'rm {here}; exit' TERM; touch {here}; sleep 60 & wait) >/dev/null 2>&1 & "
        text += f"until [ -e {here} ]; do sleep 0.01; done"  # before that it ends without a word
        done = run([text] * 10, executor=one)
        assert [each.status for each in done] == [0] * 10


class Interrupter:
    """Sends SIGINT before the n-th line that is run of some modules."""

    def __init__(self, n, modules):
        self.left, self.files = n, {module.__file__ for module in modules}

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename in self.files:
            return functools.partial(self.look, set())
        return None

    def look(self, entered, frame, event, arg):
        if event == "line":
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            # nothing comes between the end of a block and what leaves it
            if frame.f_lineno not in entered or not text.strip().startswith("with "):
                self.left -= 1
            entered.add(frame.f_lineno)
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return functools.partial(self.look, entered)


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_an_interrupt_before_any_line_leaves_nothing(two, interruptible, tmp_path):
    backend = two.backend
    load = load_of(backend)
    for n in itertools.count(1):
        interrupter = Interrupter(n, [dispatcher, slots])
        try:
            sys.settrace(interrupter)
            try:
                run(["true"] * 3, executor=two)
            finally:
                sys.settrace(None)
        except KeyboardInterrupt:
            pass
        else:
            assert interrupter.left > 0, f"line {n}"
            break
        assert load.free("local", 2) == 2, f"line {n}"
        assert not load.listeners, f"line {n}"
        assert not backend._listeners, f"line {n}"
        assert not backend._core.nesting._hearers, f"line {n}"
        wait_until(backend._core.is_idle, PATIENCE, f"line {n}")
    assert n > 100
    assert [each.status for each in run(["true"] * 3, executor=two)] == [0] * 3

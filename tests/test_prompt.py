"""What a prompt and a notebook show."""

from __future__ import annotations

import functools
import io
import pickle
import re
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from ostap_parallel import Report, WorkManager
from ostap_parallel.runs.display import title_of

SESSION = """
from ostap_parallel import WorkManager
import signal
wm = WorkManager(1, silent=True)
inverse = lambda x: 1 / x
wm.process(inverse, [1, 0])
list(wm.iexecute(inverse, [1, 0]))
interrupt = lambda merged, result: signal.raise_signal(signal.SIGINT)
wm.process(abs, range(9), merger=interrupt)
wm
wm.process(abs, [1]); report = wm.report
report
wm.close()
exit
"""


@pytest.fixture
def manager():
    with WorkManager(1, silent=True) as manager:
        yield manager


@pytest.mark.slow
def test_a_session_of_ipython():
    options = ["--simple-prompt", "--colors=NoColor", "--no-banner", "--no-confirm-exit"]
    argv = [sys.executable, "-m", "IPython", *options]
    done = subprocess.run(argv, input=SESSION, capture_output=True, text=True, timeout=60)
    out = done.stdout
    for number in 5, 6:  # of the prompt
        shown = out.partition(f"In [{number}]: ")[2].partition("\n\nIn [")[0].splitlines()
        assert shown[0] == "Traceback (most recent call last):"
        assert shown[-2] == "ZeroDivisionError: division by zero"
        where = r"on local, process \d+, from line 1 of <ipython-input-\d+-\w+>"
        assert re.fullmatch(rf"item 1 \(0\) {where}", shown[-1])
        assert "ostap_parallel" not in "\n".join(shown)
    assert "]: interrupted: " in out
    assert "KeyboardInterrupt" not in out
    assert "<WorkManager local: 1>" in out
    assert "1 submitted = 1 merged + 0 failed" in out


def test_frames_of_ours_are_hidden(manager):
    with pytest.raises(ZeroDivisionError) as caught:
        manager.process(lambda x: 1 / x, [0])
    frames = [entry.frame for entry in caught.traceback]
    ours = [frame for frame in frames if "ostap_parallel" in str(frame.code.path.parent)]
    assert ours
    assert all(frame.raw.f_locals.get("__tracebackhide__") for frame in ours)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_an_exception_that_takes_no_attributes(manager):
    with pytest.raises(KeyError):
        manager.process({}.__getitem__, ["x"])


@pytest.mark.slow
def test_html_and_rich(manager):
    manager.process(abs, [1, 2])
    for shown in manager, manager.report:
        assert shown._repr_html_().startswith("<pre ")
        console = Console(file=io.StringIO(), width=200)
        console.print(shown)
        assert console.file.getvalue().strip() == str(shown).strip()
    assert "&lt;WorkManager local: 1&gt;" in manager._repr_html_()
    assert Report().summary == "0 submitted = 0 merged + 0 failed, 0.0 s, gain 0.00, not complete"


def test_an_interrupt_is_what_it_was(manager):
    with pytest.raises(KeyboardInterrupt) as caught:
        manager.process(abs, range(9), merger=lambda *_: signal.raise_signal(signal.SIGINT))
    assert type(caught.value) is KeyboardInterrupt
    [line] = caught.value._render_traceback_()
    assert line == f"interrupted: {manager.report.summary}"


def test_titles():
    typed = eval(compile("lambda x: x", "<ipython-input-3-abc>", "eval"))
    assert title_of(typed) == "lambda at line 1"
    assert title_of(lambda x: x).startswith("lambda at test_prompt.py:")
    assert title_of(functools.partial(pow, 2)) == "pow"
    assert title_of(title_of) == "title_of"
    assert title_of(Report()) == "Report"

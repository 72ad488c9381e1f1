"""Handlers of the user's that raise cost a line, and no thread, host or time."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import functions
import pytest

from ostap_parallel import Executor, logs
from ostap_parallel.logs import logger_of

PROGRAM = """\
import logging, sys
from ostap_parallel import Executor, WorkManager

class Mine(logging.Handler):
    def emit(self, record):
        raise RuntimeError("mine")

def work(item):
    logging.getLogger("tasks").warning("item %d", item)
    print("printed", item)
    return item

logging.getLogger().addHandler(Mine())
settings = {"ssh_config": sys.argv[1], "config": (), "idle_timeout": 60}
with WorkManager(1, "h1*1 h9*1", silent=True, **settings) as wm:
    wm.wait_for_hosts()
    assert wm.workers == {"local": 1, "h1": 1}
    for _ in range(3):
        assert wm.process(work, range(20), chunk_size=1) == list(range(20))
"""


@pytest.mark.slow
def test_a_handler_of_logging(hosts, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py", str(hosts.ssh_config)],
        cwd=tmp_path,
        env=functions.script_environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("h1: ") for line in done.stdout.splitlines()]
    assert sorted(lines) == sorted(f"printed {n}" for n in range(20) for _ in range(3))
    (notice,) = done.stderr.splitlines()
    assert notice.endswith("has raised RuntimeError: mine; what it should have shown is lost")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "h1"])
def test_a_handler_of_events(hosts, where, caplog):
    seen = []

    def hear(host, event):
        seen.append((host, event.get("text")))
        raise RuntimeError("mine")

    settings = {"ssh_config": hosts.ssh_config, "config": ()} if where == "h1" else {}
    ncpus, servers = (0, "h1*1") if where == "h1" else (1, ())
    with Executor(ncpus, servers, on_event=hear, **settings) as executor:
        for _ in range(2):
            list(executor.map(print, range(10)))
    assert sorted(seen) == sorted((where, str(n)) for n in range(10) for _ in range(2))
    (record,) = caplog.records
    assert "cannot be shown, in part at least" in record.getMessage()


def test_one_notice_for_a_process(capfd, monkeypatch):
    class Mine(logging.Handler):
        def emit(self, record):
            raise KeyError(record.funcName)

    monkeypatch.setattr(logs, "_told", set())
    mine = Mine()
    logger = logger_of("test_logs")
    logger.logger.addHandler(mine)
    try:
        logger.warning("one")
        logger.error("two")
    finally:
        logger.logger.removeHandler(mine)
    text = "KeyError: 'test_one_notice_for_a_process'"  # who has logged
    assert text in capfd.readouterr().err


LEVELS = """\
import logging, sys
from ostap_parallel import Executor, WorkManager
logging.basicConfig(stream=sys.stdout, format="root %(name)s %(message)s")
fit, quiet, own, muted = map(logging.getLogger, ("fit", "fit.quiet", "own", "muted"))
fit.setLevel(logging.DEBUG); quiet.setLevel(logging.ERROR); own.setLevel(logging.INFO)
muted.disabled, own.propagate = True, False
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("own %(name)s %(message)s"))
handler.addFilter(lambda record: "secret" not in record.getMessage())
own.addHandler(handler)

def work(item):
    found = {}
    for name in "fit.minuit", "fit.quiet", "own.part", "muted", "other":
        log = logging.getLogger(name)
        found[name] = [level for level in (10, 20, 30, 40) if log.isEnabledFor(level)]
        log.debug("debug"); log.info("info"); log.info("secret")
    return found

def seen(log): return log.isEnabledFor(logging.CRITICAL)

settings = {"ssh_config": sys.argv[1], "config": ()} if sys.argv[2:] else {}
with WorkManager(*(sys.argv[2:] and (0, "h1*1")) or (1,), silent=True, **settings) as wm:
    assert wm.process(work, [1]) == [work(1)], wm.process(work, [1])
    print("---")
    wm.process(work, [1])
    wm.process(abs, [1])
    print("---")
    logging.disable(logging.CRITICAL)
    assert wm.process(seen, [fit]) == [False]
    logging.disable(logging.NOTSET)
    muted.disabled = False
    assert wm.process(seen, [muted]) == [True]
    executor = wm.executor
    assert executor.submit(fit.isEnabledFor, logging.DEBUG).result() is True
    fit.setLevel(logging.NOTSET)
    assert executor.submit(fit.isEnabledFor, logging.DEBUG).result() is False
    assert wm.process(fit.isEnabledFor, [logging.INFO, logging.WARNING]) == [False, True]
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "h1"])
def test_levels_and_handlers_of_loggers_hold_for_tasks(hosts, where, tmp_path):
    (tmp_path / "program.py").write_text(LEVELS)
    place = ["h1"] * (where == "h1")
    printed = functions.run_python("program.py", str(hosts.ssh_config), *place, cwd=tmp_path)
    here, there = printed.split("---\n")[:2]
    told = ["root fit.minuit debug", "root fit.minuit info", "root fit.minuit secret"]
    told.append("own own.part info")
    assert [line for line in here.splitlines() if where not in line] == told
    for text in here, there:  # of the tasks
        lines = [line.replace(f" {where}.", " ") for line in text.splitlines() if where in line]
        assert lines == told


TALKING = """\
import logging, sys
log = logging.getLogger("talking")
log.setLevel(logging.WARNING)
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("its own: %(message)s"))
log.addHandler(handler)
log.addHandler(logging.NullHandler())

def say(text):
    log.info(text)
    return log.level, log.getEffectiveLevel()
"""

TOLD_SINCE = """\
import logging, sys
import talking
from ostap_parallel import Executor, WorkManager

logging.basicConfig(stream=sys.stdout, format="root: %(message)s", level=logging.WARNING)
talking.log.setLevel(logging.INFO)
file = logging.FileHandler("log")
file.setFormatter(logging.Formatter("file: %(message)s"))
talking.log.addHandler(file)

def ask(text):
    import talking
    return talking.say(text)

def forget(text):
    import talking
    talking.log.setLevel(logging.ERROR)
    return talking.say(text)

assert talking.say("here") == (20, 20)
with Executor(1) as executor:
    assert executor.submit(ask, "submit").result() == (20, 20)
    assert list(executor.map(talking.say, ["map"])) == [(20, 20)]
    assert executor.submit(forget, "").result() == (40, 40)
with WorkManager(1, silent=True) as wm:
    assert wm.process(talking.say, ["process"]) == [(20, 20)]
"""


def test_modules_that_bring_levels_and_handlers(tmp_path):
    """What the script has told them since holds, and what their handlers show is shown once."""
    (tmp_path / "talking.py").write_text(TALKING)
    (tmp_path / "program.py").write_text(TOLD_SINCE)
    printed = functions.run_python("program.py", cwd=tmp_path).splitlines()
    texts = ["here", "submit", "map", "process"]
    for begin in "its own", "root":
        assert [line for line in printed if line.startswith(begin)] == [
            f"{begin}: {text}" for text in texts
        ]
    assert (tmp_path / "log").read_text() == "".join(f"file: {text}\n" for text in texts)


class TestHandingOn:
    """What was logged on a host, and the loggers that have a say in it."""

    @pytest.fixture
    def seen(self, monkeypatch):
        monkeypatch.setattr(logging.Logger, "manager", logging.Manager(logging.root))
        monkeypatch.setattr(logging.root, "manager", logging.Logger.manager)
        monkeypatch.setattr(logging.root, "handlers", [])
        seen = []

        class Noting(logging.Handler):
            def emit(self, record):
                seen.append((self.name, record.name, record.levelno))

        def note(*names):
            for name in names:
                handler = Noting()
                handler.set_name(name)
                logging.getLogger(name).addHandler(handler)

        return SimpleNamespace(list=seen, note=note)

    def hand_on(self, name="fit.a", level=logging.INFO, **more):
        fields = {"name": name, "levelno": level, "msg": "text", **more}
        logs.hand_on("h1.cern.ch", logging.makeLogRecord(fields))

    def test_what_the_logger_here_lets_through_reaches_its_handlers(self, seen):
        seen.note("", "fit")
        self.hand_on()
        assert seen.list == []
        logging.getLogger("fit").setLevel(logging.INFO)
        self.hand_on()
        assert seen.list == [("fit", "h1.cern.ch.fit.a", 20), ("", "h1.cern.ch.fit.a", 20)]

    def test_what_handlers_have_shown_where_it_was_logged_is_not_shown_again(self, seen, tmp_path):
        logging.getLogger("fit.a").addHandler(logging.NullHandler())
        logging.getLogger("fit.a").addHandler(file := logging.FileHandler(tmp_path / "log"))
        file.close()
        seen.note("", "fit", "fit.a", "fit.a")
        record = logging.makeLogRecord({"name": "fit.a", "levelno": logging.ERROR})
        kind = type(logging.getLogger("fit").handlers[0]).__qualname__
        assert logs.shown_by(record, is_near=True)["fit.a"] == ["FileHandler", kind, kind]
        shown = logs.shown_by(record, is_near=False)
        assert shown == {"fit": [kind], "fit.a": [kind, kind]}
        logging.getLogger("fit.a").removeHandler(file)
        shown["fit.a"].pop()
        self.hand_on(level=logging.ERROR, **{logs.SHOWN: shown})
        name = "h1.cern.ch.fit.a"
        assert seen.list == [("fit.a", name, 40), ("", name, 40)]

    @pytest.mark.parametrize("name", ["h1.cern.ch", "h1.cern.ch.fit", "h1.cern.ch.fit.a"])
    def test_loggers_of_the_host_decide(self, seen, name):
        seen.note("fit")
        logging.getLogger(name).setLevel(logging.INFO)
        self.hand_on()
        logging.getLogger("fit").setLevel(logging.DEBUG)
        self.hand_on(level=logging.DEBUG)
        assert seen.list == [("fit", "h1.cern.ch.fit.a", 20)]
        seen.note(name)
        self.hand_on()
        assert seen.list[1:] == [(name, "h1.cern.ch.fit.a", 20)]

    def test_one_that_is_disabled_or_filters_on_the_host_does_so(self, seen):
        seen.note("")
        own = logging.getLogger("h1.cern.ch.fit.a")
        own.addFilter(lambda record: record.levelno > logging.ERROR)
        self.hand_on(level=logging.ERROR)
        self.hand_on(level=logging.CRITICAL)
        own.disabled = True
        self.hand_on(level=logging.CRITICAL)
        assert seen.list == [("", "h1.cern.ch.fit.a", 50)]

"""Checkpoints: what is stored is neither lost nor computed again, however a run ends."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import functions
import pytest
from helpers import wait_until

from ostap_parallel import Checkpoint, CheckpointError, FuncTask, Task, TaskMerger, WorkManager
from ostap_parallel.cli import main
from ostap_parallel.runs import checkpoint
from ostap_parallel.runs.identity import Digester, identity_of
from ostap_parallel.worker.execute import Call

PATIENCE = 60.0


def digest(obj):
    return Digester().digest(obj)


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def wm(threads):
    with WorkManager(executor=threads, silent=True) as wm:
        yield wm


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.db"


class Noting:
    """Squares numbers and notes each call; some raise."""

    def __init__(self, folder, *failing):
        self.folder, self.failing = folder, failing

    def __call__(self, item):
        functions.note(self.folder, item)
        if item in self.failing:
            raise ValueError(item)
        return item * item


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def attempts(folder):
    """Return how often each item was run."""
    return {int(file.name): file.stat().st_size for file in folder.iterdir()}


def stored(file):
    """Return the items with a result in a file that need not be in use."""
    with contextlib.closing(sqlite3.connect(file, timeout=PATIENCE)) as database:
        query = "SELECT item FROM outcome WHERE value IS NOT NULL"
        with contextlib.suppress(sqlite3.OperationalError):  # no table as yet
            return {item for (item,) in database.execute(query)}
    return set()


def run_script(text, *arguments, cwd):
    return functions.run_python("-c", textwrap.dedent(text), *arguments, cwd=cwd)


class TestResume:
    def test_a_second_run_computes_nothing(self, wm, file, folder):
        first = wm.process(Noting(folder), range(50), checkpoint=file)
        report = wm.report
        assert (report.submitted, report.merged, report.resumed) == (50, 50, 0)
        assert wm.process(Noting(folder), range(50), checkpoint=str(file)) == first
        report = wm.report
        assert (report.submitted, report.merged, report.resumed) == (50, 50, 50)
        assert report.complete
        assert "50 from the checkpoint" in str(report)
        assert attempts(folder) == dict.fromkeys(range(50), 1)
        assert [path.name for path in file.parent.glob("run.db*")] == ["run.db"]

    def test_a_longer_input_goes_on(self, wm, file, folder):
        wm.process(Noting(folder), range(10), checkpoint=file)
        longer = wm.process(Noting(folder), iter(range(30)), checkpoint=file)
        assert longer == [x * x for x in range(30)]
        assert (wm.report.resumed, wm.report.merged) == (10, 30)
        assert attempts(folder) == dict.fromkeys(range(30), 1)

    def test_a_shorter_input_gets_its_own_results(self, wm, file):
        wm.process(functions.square, range(10), checkpoint=file)
        assert wm.process(functions.square, range(4), checkpoint=file) == [0, 1, 4, 9]
        assert checkpoint.read_summary(file).done == 4
        assert wm.process(functions.square, range(10), checkpoint=file)[9] == 81
        assert wm.report.resumed == 10

    def test_failures_are_run_again(self, wm, file, folder):
        results = wm.process(Noting(folder, 3, 5), range(8), on_error="collect", checkpoint=file)
        assert [failure.index for failure in wm.report.failures] == [3, 5]
        assert checkpoint.read_summary(file).failed == 2
        again = Checkpoint(file, on_change="keep")
        mended = wm.process(Noting(folder, 5), range(8), on_error="collect", checkpoint=again)
        assert mended[3] == 9
        assert results[:3] == mended[:3] == [0, 1, 4]
        report = wm.report
        assert (report.submitted, report.merged, report.failed, report.resumed) == (8, 7, 1, 6)
        assert attempts(folder) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 2, 6: 1, 7: 1}

    def test_an_item_that_failed_may_change(self, wm, file):
        with pytest.raises(ZeroDivisionError):
            wm.process(functools.partial(divmod, 12), [1, 0, 3], chunk_size=1, checkpoint=file)
        results = wm.process(functools.partial(divmod, 12), [1, 2, 3], checkpoint=file)
        assert results == [(12, 0), (6, 0), (4, 0)]

    def test_a_failure_with_a_text_that_is_no_unicode(self, wm, file):
        def fails(item):
            raise ValueError("\udc80")

        for _ in range(2):
            wm.process(fails, [1], on_error="collect", checkpoint=file)
            assert wm.report.failed == 1
        assert "ValueError: ?" in str(checkpoint.read_summary(file))

    def test_a_result_that_is_too_large_for_the_file(self, wm, file, monkeypatch, caplog):
        monkeypatch.setattr(checkpoint, "MAX_BYTES", 1000)
        assert wm.process(bytes, [999_999, 9], checkpoint=file) == [bytes(999_999), bytes(9)]
        assert "item 0" in caplog.text
        assert stored(file) == {1}

    def test_none_is_a_result(self, wm, file):
        assert wm.process(lambda x: None, range(3), checkpoint=file) == [None] * 3
        assert wm.process(lambda x: None, range(3), checkpoint=file) == [None] * 3
        assert wm.report.resumed == 3

    def test_merging_is_done_anew(self, wm, file):
        total = wm.process(functions.square, range(5), merger=TaskMerger(), checkpoint=file)
        assert total == 30
        assert wm.process(functions.square, range(5), merger=max, checkpoint=file) == 16
        pairs = wm.process(
            functions.square,
            range(5),
            collector=lambda merged, result, jobid: {**merged, jobid: result},
            init={},
            checkpoint=file,
        )
        assert pairs == {x: x * x for x in range(5)}
        assert wm.report.resumed == 5

    def test_the_index_is_that_of_the_input(self, wm, file):
        def fails_at(limit, jobid, item):
            if jobid in (0, 3) and limit:
                raise ValueError
            return jobid, item

        call = dict(jobid=True, on_error="collect", checkpoint=Checkpoint(file, "keep"))
        wm.process(functools.partial(fails_at, True), "abcdef", **call)
        mended = wm.process(functools.partial(fails_at, False), "abcdef", **call)
        assert mended == list(enumerate("abcdef"))
        assert wm.report.resumed == 4

    def test_results_one_by_one(self, wm, file, folder):
        run = wm.iexecute(Noting(folder), itertools.count(), ordered=True, checkpoint=file)
        assert list(itertools.islice(run, 20)) == [x * x for x in range(20)]
        run.close()
        done = stored(file)
        assert done.issuperset(range(20))
        run = wm.iexecute(Noting(folder), itertools.count(), ordered=True, checkpoint=file)
        assert list(itertools.islice(run, 40)) == [x * x for x in range(40)]
        run.close()
        assert all(count == 1 for item, count in attempts(folder).items() if item in done)

    def test_stored_items_do_not_keep_workers_waiting(self, wm, file, tmp_path):
        """All but the first are stored; it waits until the last one, which is new, has run."""
        late = tmp_path / "late"

        def meet(item):
            if item == 0 and late.parent.joinpath("go").exists():
                functions.wait_for(late)
            elif item == 0:
                raise ValueError
            if item == 50:
                late.touch()
            return item

        with contextlib.suppress(ValueError):
            wm.process(meet, range(50), checkpoint=file, on_error="collect")
        tmp_path.joinpath("go").touch()
        assert wm.process(meet, range(51), checkpoint=file, chunk_size=1) == list(range(51))
        assert wm.report.resumed == 49

    @pytest.mark.slow
    def test_own_workers_and_hosts(self, ssh_config, file):
        with WorkManager(1, "h1*1", ssh_config=ssh_config, silent=True) as wm:
            assert wm.wait_for_hosts(PATIENCE)

            def work(item):
                return item, os.getpid(), random.random()

            first = wm.process(work, range(40), chunk_size=2, checkpoint=file)
            assert wm.process(work, range(40), checkpoint=file) == first
            assert wm.report.resumed == 40
        hosts = dict(checkpoint.read_summary(file).stats)
        assert set(hosts) == {"local", "h1"}
        assert sum(stat.njobs for stat in hosts.values()) == 40

    @pytest.mark.slow
    def test_a_process_pool_of_your_own(self, file, folder):
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, spawn) as pool, WorkManager(executor=pool, silent=True) as wm:
            first = wm.process(Noting(folder), range(20), checkpoint=file)
            assert wm.process(Noting(folder), range(20), checkpoint=file) == first
        assert attempts(folder) == dict.fromkeys(range(20), 1)

    def test_tasks(self, wm, file, folder):
        class Sum(Task):
            def __init__(self):
                self.noting = Noting(folder)

            def initialize_local(self):
                self.total = 0

            def process(self, jobid, item):
                return self.noting(item)

            def merge_results(self, result, jobid=-1):
                self.total += result

            def results(self):
                return self.total

        assert wm.process(Sum(), range(10), checkpoint=file) == 285
        assert wm.process(Sum(), range(10), checkpoint=file) == 285
        assert wm.report.resumed == 10
        Sum.results = lambda self: -self.total  # how results are merged may change
        assert wm.process(Sum(), range(10), checkpoint=file) == -285
        assert attempts(folder) == dict.fromkeys(range(10), 1)

    @pytest.mark.parametrize("how", [Checkpoint("x"), "x", Path("x")])
    def test_ways_to_name_the_file(self, wm, tmp_path, monkeypatch, how):
        monkeypatch.chdir(tmp_path)
        assert wm.process(abs, [-1], checkpoint=how) == [1]
        assert (tmp_path / "x").exists()


RESULTS = """
import enum, sys
from ostap_parallel import WorkManager

class Fit:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return type(other) is Fit and self.x == other.x

class Colour(enum.Enum):
    RED = 1

def make(item):
    return [Fit(item), Colour.RED, {item: {"a", "b"}}, lambda: item][item]

if __name__ == "__main__":
    with WorkManager(1, silent=True) as wm:
        fit, red, other, function = wm.process(make, range(4), checkpoint=sys.argv[1])
        assert fit == Fit(0) and red is Colour.RED and other == {2: {"a", "b"}}
        assert function() == 3
        print(wm.report.resumed)
"""


@pytest.mark.slow
def test_stored_results_are_those_that_were_computed(tmp_path, file):
    (tmp_path / "script.py").write_text(RESULTS)
    (tmp_path / "moved.py").write_text("# a comment\n\n" + RESULTS)
    for script, resumed in ("script.py", 0), ("script.py", 4), ("moved.py", 4):
        assert functions.run_python(script, file, cwd=tmp_path) == f"{resumed}\n"


SCRIPT = """
import os, sys, time
from functions import note
from ostap_parallel import WorkManager

folder, file, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

def work(item):
    time.sleep(0.01)
    note(folder, item)
    return item * item

with WorkManager(2, silent=True) as wm:
    results = wm.process(work, range(count), checkpoint=file)
    assert results == [x * x for x in range(count)]
    report = wm.report
    assert report.submitted == report.merged == count and report.complete
    print(report.resumed)
"""


@contextlib.contextmanager
def start(folder, file, count, script=SCRIPT):
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(file), str(count)],
        env=functions.script_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def end(process, number=signal.SIGKILL):
    process.send_signal(number)
    return process.communicate(timeout=PATIENCE)


@pytest.mark.slow
class TestKilled:
    def test_a_run_goes_on_after_sigkill(self, tmp_path, file, folder):
        with start(folder, file, 300) as process:
            wait_until(lambda: len(stored(file)) >= 20, PATIENCE, "results in the file")
            end(process)
        done = stored(file)
        before = attempts(folder)
        assert 20 <= len(done) < 300
        with start(folder, file, 300) as process:
            out, err = process.communicate(timeout=60)
        assert err == ""
        assert int(out) == len(done)
        after = attempts(folder)
        assert sorted(after) == list(range(300))
        assert {item: after[item] for item in done} == {item: before[item] for item in done}

    @pytest.mark.parametrize("seed", range(2))
    def test_killed_again_and_again_until_it_is_complete(self, file, folder, seed):
        chance = random.Random(seed)
        done, kills = set(), 0
        while True:
            before = attempts(folder)
            with start(folder, file, 400) as process:
                began = sum(before.values()) + chance.randrange(1, 120)
                wait_until(
                    lambda process=process, began=began: (
                        process.poll() is not None or sum(attempts(folder).values()) >= began
                    ),
                    PATIENCE,
                    "some more items",
                )
                if process.poll() is None:
                    end(process)
                    kills += 1
                else:
                    out, err = process.communicate()
                    assert (process.returncode, err) == (0, "")
                    break
            after = attempts(folder)
            assert all(after[item] == before[item] for item in done), "computed again"
            now = stored(file)
            assert now >= done
            done = now
            assert kills < 400
        assert kills >= 2
        assert int(out) == len(done)
        assert sorted(attempts(folder)) == list(range(400))
        assert len(stored(file)) == 400

    def test_what_came_in_is_written_while_nothing_else_comes(self, tmp_path, file, folder):
        script = SCRIPT.replace("time.sleep(0.01)", "item == 5 and time.sleep(60)")
        with start(folder, file, 6, script) as process:
            wait_until(lambda: stored(file) == set(range(5)), PATIENCE, "the first five")
            end(process)

    def test_ctrl_c(self, file, folder):
        with start(folder, file, 10_000) as process:
            before = wait_until(lambda: stored(file), PATIENCE, "results")
            _, err = end(process, signal.SIGINT)
        assert "KeyboardInterrupt" in err
        assert stored(file) >= before
        assert [path.name for path in file.parent.glob("run.db*")] == ["run.db"]

    def test_the_first_failure(self, wm, file, folder):
        with pytest.raises(ValueError, match="30"):
            wm.process(Noting(folder, 30), range(60), ordered=True, chunk_size=1, checkpoint=file)
        assert stored(file).issuperset(range(30))
        assert checkpoint.read_summary(file).failed == 1

    def test_a_merger_that_raises(self, wm, file, folder):
        def merger(merged, result):
            if result == 100:
                raise RuntimeError("cannot merge")
            return merged + result

        with pytest.raises(RuntimeError, match="cannot merge"):
            wm.process(Noting(folder), range(11), merger=merger, ordered=True, checkpoint=file)
        assert stored(file) == set(range(11))
        total = wm.process(Noting(folder), range(11), merger=TaskMerger(), checkpoint=file)
        assert total == 385
        assert attempts(folder) == dict.fromkeys(range(11), 1)


def identity_in_new_process(folder, source, name="f", seed=0):
    """Return the identity of a function that a script defines, from a process of its own."""
    (folder / "script.py").write_text(source)
    script = (
        "import json, runpy, sys\n"
        "from ostap_parallel.runs.identity import identity_of\n"
        "from ostap_parallel.worker.execute import Call\n"
        "from ostap_parallel import FuncTask\n"
        "names = runpy.run_path('script.py', run_name='__main__')\n"
        f"print(identity_of(Call(eval({name!r}, {{**globals(), **names}}))))\n"
    )
    return functions.run_python("-c", script, cwd=folder, PYTHONHASHSEED=str(seed))


ORIGINAL = """
import functools
from pathlib import Path
from types import MappingProxyType

SCALE = {"a": 1.5, "b": {"x", "y", "z"}}
FOLDER = Path("/data")

TABLE = MappingProxyType({"t": 21})
VIEW = memoryview(b"bytes")

class Kind(type):
    scale = 4

class Base(metaclass=Kind):
    kinds = frozenset("abc")

class Model(Base):
    def __init__(self, n):
        self.n = n
    def __call__(self, x):
        return helper(x) * self.n
    @property
    def twice(self):
        return 2 * self.n

@functools.lru_cache
def helper(x):
    return len(FOLDER.parts) if x in {"one", "two", "three"} else g(x)

def g(x):
    return helper(x - 1) if x > g.limit else Model(3)

g.limit = 0

def f(x, names={"p", "q", "r"}):
    class Inner:
        value = 7
    numbers = [y * SCALE["a"] for y in range(x)]
    return sum(numbers), helper(x), Inner.value, (lambda: x)(), TABLE["t"], VIEW[0], f.own

f.own = "own"

made = [lambda x: f(x) for _ in range(3)]
"""


@pytest.mark.slow
class TestIdentity:
    @pytest.mark.parametrize(
        "name",
        [
            "f",
            "helper",
            "Model",
            "Model(2)",
            "Model(2).__call__",
            "made[1]",
            "functools.partial(f, names={'u', 'v', 'w'})",
            "FuncTask(f).process",
        ],
    )
    def test_it_is_the_same_in_other_processes(self, tmp_path, name):
        moved = '"""A docstring."""\n# a comment\n\n' + ORIGINAL.replace("\ndef g", "\n\n\ndef g")
        same = {
            identity_in_new_process(tmp_path, source, name, seed)
            for seed, source in enumerate([ORIGINAL, ORIGINAL, moved])
        }
        assert len(same) == 1

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"a": 1.5', '"a": 1.25'),
            ('{"x", "y", "z"}', '{"x", "y"}'),
            ("/data", "/other"),
            ("value = 7", "value = 8"),
            ("x - 1", "x - 2"),
            ('"three"', '"four"'),
            ('names={"p"', 'names={"s"'),
            ("Model(3)", "Model(4)"),
            ("self.n = n", "self.n = -n"),
            ("range(x)", "range(1, x)"),
            ('frozenset("abc")', 'frozenset("ab")'),
            ("return 2 * self.n", "return self.n"),
            ("(lambda: x)", "(lambda: -x)"),
            ('"t": 21', '"t": 22'),
            ('b"bytes"', 'b"other"'),
            ("scale = 4", "scale = 5"),
            ("g.limit = 0", "g.limit = 1"),
            ('f.own = "own"', 'f.own = "other"'),
        ],
    )
    def test_changes_are_noticed(self, old, new):
        assert ORIGINAL.count(old) == 1
        before, after = ({"__name__": "__main__"} for _ in range(2))
        exec(compile(ORIGINAL, "In[1]", "exec"), before)
        exec(compile(ORIGINAL.replace(old, new), "In[1]", "exec"), after)
        assert identity_of(Call(before["f"])) != identity_of(Call(after["f"]))

    def test_a_redefinition_at_a_prompt_is_the_same(self):
        cells = [{"__name__": "__main__"} for _ in range(2)]
        for number, cell in enumerate(cells):
            exec(compile("\n" * number + ORIGINAL, f"<ipython-input-{number}>", "exec"), cell)
        assert identity_of(Call(cells[0]["f"])) == identity_of(Call(cells[1]["f"]))

    @pytest.mark.parametrize("init", [True, False], ids=["package", "directory"])
    def test_a_module_of_a_package_of_the_users(self, tmp_path, monkeypatch, init):
        package = tmp_path / "users_package"
        (package / "inner").mkdir(parents=True)
        (package / "inner" / "deep.py").write_text("LIMIT = 5\ndef within(x): return x < LIMIT\n")
        if init:
            (package / "__init__.py").touch()
            (package / "inner" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        names = {"__name__": "__main__"}
        exec("import users_package.inner.deep as deep, users_package", names)
        exec("def f(x): return users_package.inner.deep.within(x)", names)
        before = identity_of(Call(names["f"]))
        monkeypatch.setattr(names["deep"], "LIMIT", 6)
        after = identity_of(Call(names["f"]))
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"users_package.inner.deep.within"}
        for name in [name for name in sys.modules if name.startswith("users_package")]:
            sys.modules.pop(name)

    def test_modules_that_import_each_other(self, tmp_path, monkeypatch):
        names = [f"ring{i}" for i in range(12)]
        for name in names:
            (tmp_path / f"{name}.py").write_text(f"import {', '.join(names)}\n")
        monkeypatch.syspath_prepend(tmp_path)
        space = {"__name__": "__main__"}
        exec(f"import {', '.join(names)}", space)
        exec(f"def f(x): return {' + '.join(f'{name}.x' for name in names)}", space)
        identity = identity_of(Call(space["f"]))
        assert {f"global {name}" for name in names} <= identity.keys()
        for name in names:
            sys.modules.pop(name)

    def test_a_module_of_the_users(self, tmp_path, monkeypatch):
        (tmp_path / "users_module.py").write_text("LIMIT = 5\ndef within(x): return x < LIMIT\n")
        monkeypatch.syspath_prepend(tmp_path)
        import users_module

        names = {"__name__": "__main__", "users_module": users_module}
        exec("def through_the_module(x): return users_module.within(x)", names)
        calls = Call(users_module.within), Call(names["through_the_module"])
        before = [identity_of(call) for call in calls]
        monkeypatch.setattr(users_module, "LIMIT", 6)
        after = [identity_of(call) for call in calls]
        changed = [
            {name for name in old if old[name] != new[name]}
            for old, new in zip(before, after, strict=True)
        ]
        assert changed == [{"global LIMIT"}, {"users_module.within"}]
        sys.modules.pop("users_module")

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            (1, 1.0),
            (1, True),
            ("1", b"1"),
            ([1, 2], (1, 2)),
            ([1, [2]], [[1], 2]),
            ([1, 2], [2, 1]),
            ({1: 2}, {2: 1}),
            (0.0, -0.0),
            (Path("a"), Path("b")),
            (Counter("ab"), Counter("abb")),
            (len, abs),
            ([].append, [1].append),
            (functions.square, functions.same),
            (range(3), range(4)),
            ([10**5000], [10**5000 + 1]),  # more digits than Python turns into text
            ([10**5000, "a"], [10**5000, "b"]),
            (b"a", b"b"),
        ],
    )
    def test_different_objects_differ(self, one, two):
        assert digest(one) != digest(two)
        assert digest(one) == digest(pickle.loads(pickle.dumps(one)))

    def test_arrays(self):
        numpy = pytest.importorskip("numpy")
        array = numpy.arange(6.0)
        assert digest(array) == digest(array.copy())
        assert len({digest(each) for each in (array, -array, array.reshape(2, 3))}) == 3

    def test_a_long_chain_of_functions(self, tmp_path, monkeypatch):
        """Nothing is too deep: a program may have thousands of functions."""
        source = "\n".join(f"def f{i}(x): return f{i + 1}(x)" for i in range(3000))
        (tmp_path / "long_chain.py").write_text(f"def f3000(x): return x\n{source}")
        monkeypatch.syspath_prepend(tmp_path)
        import long_chain

        before = identity_of(Call(long_chain.f0))
        monkeypatch.setattr(long_chain, "f2999", lambda x: 5)
        after = identity_of(Call(long_chain.f0))
        changed = {name for name in before if before[name] != after.get(name)}
        assert changed == {"long_chain.f2998", "long_chain.f2999", "long_chain.f3000"}
        sys.modules.pop("long_chain")

    def test_classes_of_items(self, monkeypatch):
        before = digest([Noting(1)])
        assert digest([Noting(1)]) == before != digest([Noting(2)])
        monkeypatch.setattr(Noting, "__call__", lambda self, item: item)
        assert digest([Noting(1)]) != before

    def test_deep_objects(self):
        def nested(depth):
            item = [depth]
            for _ in range(depth):
                item = [item, {}]
            return item

        assert digest(nested(300)) == digest(nested(300)) != digest(nested(301))
        assert digest(nested(100_000)) == digest(nested(99_999))  # could not be sent either

    def test_objects_that_contain_themselves_or_nothing_to_see(self):
        loop: list = [{1, 2}]
        loop.append(loop)
        other: list = [{2, 1}]
        other.append(other)
        assert digest(loop) == digest(other)
        assert digest(threading.Lock()) == digest(threading.Lock())
        assert digest(x for x in "a") == digest(x for x in "b")


class TestChanges:
    def test_a_changed_function(self, wm, file, folder):
        def process(power, on_change="refuse"):
            return wm.process(
                lambda x: (functions.note(folder, x), x**power)[1],
                range(3),
                checkpoint=Checkpoint(file, on_change),
            )

        assert process(2) == [0, 1, 4]
        with pytest.raises(CheckpointError, match=r"the function .*: variable power; ") as caught:
            process(3)
        assert caught.value.path == str(file)
        assert "on_change='rerun'" in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert process(2) == [0, 1, 4]  # the refusal has changed nothing
        assert attempts(folder) == dict.fromkeys(range(3), 1)
        assert process(3, "keep") == [0, 1, 4]
        assert process(3) == [0, 1, 4]  # that was agreed to
        assert process(4, "rerun") == [0, 1, 16]
        assert process(4) == [0, 1, 16]
        assert attempts(folder) == dict.fromkeys(range(3), 2)

    @pytest.mark.parametrize(
        ("before", "after", "changed"),
        [
            ({"seed": 1}, {"seed": 2}, "seed"),
            ({"jobid": True}, {}, "jobid"),
            ({"shared": {"end": "."}}, {"shared": {"end": "!"}}, "argument end"),
        ],
    )
    def test_changed_options(self, wm, file, before, after, changed):
        def text(*args, end=""):
            return f"{args}{end}"

        wm.process(text, [1], checkpoint=file, **before)
        with pytest.raises(CheckpointError, match=f": {changed}; "):
            wm.process(text, [1], checkpoint=file, **after)

    def test_a_changed_task(self, wm, file):
        def task(**state):
            return FuncTask(functions.square, environment=state)

        assert wm.process(task(A="1"), [2], checkpoint=file) == 4
        with pytest.raises(CheckpointError, match="attribute environment"):
            wm.process(task(A="2"), [2], checkpoint=file)

    def test_changed_items(self, wm, file, folder):
        wm.process(Noting(folder), [0, 1, 2, 3], checkpoint=file)
        with pytest.raises(CheckpointError, match=r"item 2, 7, is not the one that it was; "):
            wm.process(Noting(folder), iter([0, 1, 7, 3]), checkpoint=file)
        assert wm.report.merged <= 2
        kept = wm.process(Noting(folder), [0, 1, 7, 3], checkpoint=Checkpoint(file, "keep"))
        assert kept == [0, 1, 4, 9]
        assert wm.process(Noting(folder), [0, 1, 7, 3], checkpoint=file) == [0, 1, 4, 9]
        rerun = wm.process(Noting(folder), [5, 1, 7, 3], checkpoint=Checkpoint(file, "rerun"))
        assert rerun == [25, 1, 4, 9]
        assert attempts(folder) == {0: 1, 1: 1, 2: 1, 3: 1, 5: 1}

    @pytest.mark.slow
    def test_a_function_that_it_calls(self, file, tmp_path):
        script = """
            import sys
            from ostap_parallel import CheckpointError, WorkManager

            def helper(x): return x + 1
            def work(x): return helper(x)

            with WorkManager(1, silent=True) as wm:
                try:
                    print(wm.process(work, [1, 2], checkpoint=sys.argv[1]))
                except CheckpointError as error:
                    print(error.reason)
        """
        for _ in range(2):
            assert run_script(script, file, cwd=tmp_path) == "[2, 3]\n"
        out = run_script(script.replace("x + 1", "x + 2"), file, cwd=tmp_path)
        assert "is not the one that it was: __main__.helper; " in out

    def test_an_error_of_the_input_is_its_own(self, wm, file):
        def items():
            yield 1
            raise sqlite3.OperationalError("theirs")

        with pytest.raises(sqlite3.OperationalError, match="theirs"):
            wm.process(abs, items(), checkpoint=file)

    def test_on_change_is_checked(self):
        with pytest.raises(ValueError, match="on_change"):
            Checkpoint("x", "reruns")
        for path in (5, b"bytes"):
            with pytest.raises(TypeError):
                Checkpoint(path)


class OnlyOnce:
    """Reaches us, and does not let itself be pickled again."""

    def __init__(self, arrived=False):
        self.arrived = arrived

    def __reduce__(self):
        if self.arrived:
            raise TypeError("not again")
        return OnlyOnce, (True,)


class TestFiles:
    @pytest.mark.slow
    def test_two_runs_at_once(self, wm, file, tmp_path):
        go = tmp_path / "go"
        with ThreadPoolExecutor(1) as other:
            first = other.submit(wm.process, functions.wait_for, [go], checkpoint=file)
            wait_until(lambda: Path(f"{file}-lock").exists(), PATIENCE, "a run")
            script = """
                import sys
                from ostap_parallel import CheckpointError, WorkManager
                with WorkManager(1, silent=True) as wm:
                    try:
                        wm.process(abs, [1], checkpoint=sys.argv[1])
                    except CheckpointError as error:
                        print(error)
            """
            assert "another run is using it" in run_script(script, file, cwd=tmp_path)
            with pytest.raises(CheckpointError, match="another run"):  # in the same process, too
                wm.process(abs, [1], checkpoint=file)
            assert main(["report", str(file)]) == 1
            go.touch()
            assert first.result(PATIENCE) == [None]
        assert not Path(f"{file}-lock").exists()

    @pytest.mark.slow
    def test_one_run_at_a_time_whatever_others_do(self, file, tmp_path):
        """Runs that begin while another one ends, which removes the file that keeps them out."""
        script = """
            import os, sys, time
            from pathlib import Path
            from ostap_parallel import CheckpointError
            from ostap_parallel.runs.checkpoint import _only_writer

            end = time.monotonic() + 3
            times = 0
            while time.monotonic() < end:
                try:
                    with _only_writer(Path(sys.argv[1])):
                        mine = os.open(sys.argv[1] + "-mine", os.O_CREAT | os.O_EXCL)
                        os.close(mine)
                        os.unlink(sys.argv[1] + "-mine")
                        times += 1
                except CheckpointError as error:
                    assert "another run" in str(error), error
            print(times)
        """
        with ThreadPoolExecutor(3) as pool:
            ran = [pool.submit(run_script, script, file, cwd=tmp_path) for _ in range(3)]
            assert all(int(one.result()) > 0 for one in ran)
        assert os.listdir(tmp_path) == []  # noqa: PTH208

    def test_a_fork_does_not_keep_the_lock(self, wm, file):
        results = wm.iexecute(abs, range(100), checkpoint=file)
        next(results)
        pid = os.fork()
        if pid == 0:
            signal.pause()
        try:
            results.close()
            assert len(wm.process(abs, range(100), checkpoint=file)) == 100
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def test_a_fork_that_leaves_takes_nothing_along(self, wm, file):
        results = wm.iexecute(abs, range(100), checkpoint=file)
        next(results)
        names = [f"{file}{suffix}" for suffix in ("", "-lock", "-shm", "-wal")]
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                results.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert all(Path(name).exists() for name in names)
        assert len(list(results)) == 99
        assert stored(file) == set(range(100))

    def test_a_foreign_file(self, wm, file):
        file.write_text("not mine " * 1000)
        with pytest.raises(CheckpointError, match="not a database"):
            wm.process(abs, [1], checkpoint=file)
        assert file.read_text() == "not mine " * 1000

    def test_a_foreign_data_base(self, wm, file):
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE theirs (x)")
        before = file.read_bytes()
        with pytest.raises(CheckpointError, match="is no checkpoint"):
            wm.process(abs, [1], checkpoint=file)
        assert file.read_bytes() == before

    def test_another_version(self, wm, file):
        wm.process(abs, [1], checkpoint=file)
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA user_version = 99")
        with pytest.raises(CheckpointError, match="version 99"):
            wm.process(abs, [1], checkpoint=file)

    def test_an_empty_file_is_a_new_one(self, wm, file):
        file.touch()
        assert wm.process(abs, [-1], checkpoint=file) == [1]

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no/such/run.db", r"unable to open .*writable\?"),
            ("/proc/run.db", r"unable to open .*writable\?"),
            (".", "no regular file"),
            ("pipe", "it is no regular file"),
            ("loop", "(?i)loop|symbolic links"),
            ("~no-such-user/run.db", "home directory"),
            ("a\0b", "null byte"),
            ("x" * 300, "unable to open"),
            ("in-use", "in-use-lock is not empty"),
            ("linked", "unable to open"),
        ],
    )
    def test_a_place_that_cannot_be_written(self, wm, tmp_path, monkeypatch, name, reason):
        monkeypatch.chdir(tmp_path)
        os.mkfifo("pipe")
        Path("loop").symlink_to("loop")
        Path("in-use-lock").write_text("precious")
        Path("linked-lock").symlink_to("elsewhere")
        ran = []
        with pytest.raises(CheckpointError, match=reason):
            wm.process(ran.append, [1], checkpoint=name)
        assert ran == []
        assert Path("in-use-lock").read_text() == "precious"
        assert not Path("elsewhere").exists()

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
    def test_what_others_can_write_is_refused(self, wm, file, suffix):
        """Unpickling what they have written would run it."""
        wm.process(abs, [-1], checkpoint=file)
        one = Path(f"{file}{suffix}")
        one.touch()
        before = one.read_bytes()
        one.chmod(0o646)
        match = f"{re.escape(str(one))}: it is not used, for it could run .*: everybody can write"
        with pytest.raises(CheckpointError, match=match):
            wm.process(abs, [-1], checkpoint=file)
        assert one.read_bytes() == before
        one.chmod(0o644)
        assert wm.process(abs, [-1], checkpoint=file) == [1]
        assert wm.report.resumed == 1

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
    @pytest.mark.parametrize("suffix", ["", "-wal"])
    def test_what_belongs_to_others_is_refused(self, wm, file, suffix):
        wm.process(abs, [-1], checkpoint=file)
        one = Path(f"{file}{suffix}")
        one.touch()
        os.chown(one, 12345, -1)
        with pytest.raises(CheckpointError, match=r"belongs to another user \(uid 12345\)"):
            wm.process(abs, [-1], checkpoint=file)

    def test_a_link_beside_it_is_refused(self, wm, file, tmp_path):
        wm.process(abs, [-1], checkpoint=file)
        Path(f"{file}-wal").symlink_to(tmp_path / "precious")
        with pytest.raises(CheckpointError, match="no regular file"):
            wm.process(abs, [-1], checkpoint=file)
        assert not (tmp_path / "precious").exists()

    def test_a_file_that_is_put_beside_it_meanwhile(self, wm, file, monkeypatch):
        connect = checkpoint._connect

        def quicker(path, *args, **named):
            if path == file:
                Path(f"{file}-wal").touch()
                Path(f"{file}-wal").chmod(0o666)
            return connect(path, *args, **named)

        wm.process(abs, [-1], checkpoint=file)
        monkeypatch.setattr(checkpoint, "_connect", quicker)
        with pytest.raises(CheckpointError, match="everybody can write it"):
            wm.process(abs, [-1], checkpoint=file)

    @pytest.mark.slow
    def test_a_full_disk(self, wm, file, folder):
        """A limit on the size of files has the same effect."""

        def big(item):
            return functions.note(folder, item), os.urandom(100_000)

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"full|I/O"):
                wm.process(big, range(1000), checkpoint=file, merger=lambda a, b: b)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert 0 < wm.report.merged < 1000
        done = stored(file)
        wm.process(big, range(300), checkpoint=file, merger=lambda a, b: b)
        assert wm.report.resumed == len(done & set(range(300))) > 0

    def test_results_that_cannot_be_stored_are_computed_again(self, wm, file, folder, caplog):
        def odd(item):
            functions.note(folder, item)
            return OnlyOnce() if item == 1 else item

        call = dict(merger=lambda a, b: None, checkpoint=file)
        wm.process(odd, range(3), **call)
        assert "item 1" in caplog.text
        wm.process(odd, range(3), **call)
        assert attempts(folder) == {0: 1, 1: 2, 2: 1}

    @pytest.mark.slow
    def test_memory_does_not_grow(self, tmp_path, file):
        script = """
            import resource, sys
            from ostap_parallel import WorkManager

            def run(file):
                results = wm.iexecute(
                    lambda x: bytes(4000), range(25_000), checkpoint=file, chunk_size=100
                )
                assert sum(len(result) for result in results) == 100_000_000
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

            with WorkManager(1, silent=True) as wm:
                before = run(None)
                print(run(sys.argv[1]) - before, run(sys.argv[1]) - before)
        """
        kilobytes = [int(word) for word in run_script(script, file, cwd=tmp_path).split()]
        assert max(kilobytes) < 40_000


class TestReport:
    def test_a_complete_run(self, wm, file, capsys):
        wm.process(functions.square, range(10), checkpoint=file)
        assert main(["report", str(file)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"square, first started [\d-]{10} [\d:]{8}, .* (s|ms|us)", lines[0])
        assert lines[1] == "10 submitted = 10 done + 0 failed, 0 of 10 remain"
        assert lines[2].split() == ["#jobs", "%", "total", "time", "time/job", "server"]
        assert lines[3].split()[:2] == ["10", "100.0"]

    def test_failures(self, wm, file, capsys):
        with contextlib.suppress(ZeroDivisionError):
            wm.process(lambda x: 1 // x, iter([1, 0]), checkpoint=file, chunk_size=1)
        wm.process(lambda x: 1 // x, [1, 0, 2], checkpoint=file, on_error="collect")
        assert main(["report", str(file)]) == 1
        out = capsys.readouterr().out
        assert ", 2 runs, the last " in out
        assert "3 submitted = 2 done + 1 failed, 0 of 3 remain\n" in out
        assert re.search(r"^item 1 \(0\) on .*: ZeroDivisionError: .*zero$", out, re.MULTILINE)
        assert re.search(r"^      File .*, line \d+, in <lambda>$", out, re.MULTILINE)

    def test_a_run_that_never_began(self, file, capsys):
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
            checkpoint._prepare(file, database)  # it was killed right after that
        assert main(["report", str(file)]) == 1
        assert capsys.readouterr().out == "no run has begun\n"

    def test_a_run_that_was_stopped(self, wm, file, capsys):
        for _ in zip(wm.iexecute(abs, iter(range(9)), checkpoint=file), range(3), strict=False):
            pass
        assert main(["report", str(file)]) == 1
        assert ", of an unknown number\n" in capsys.readouterr().out

    @pytest.mark.slow
    def test_while_a_run_goes_on_and_after_it_was_killed(self, file, folder, capsys):
        with start(folder, file, 10_000) as process:
            wait_until(lambda: len(stored(file)) > 20, PATIENCE, "results")
            for _ in range(20):
                assert main(["report", str(file)]) == 1
            before = len(stored(file))
            wait_until(lambda: len(stored(file)) > before, PATIENCE, "the run goes on")
            end(process)
        assert main(["report", str(file)]) == 1
        assert " of 10000 remain\n" in capsys.readouterr().out

    def test_no_checkpoint(self, tmp_path, capsys):
        (tmp_path / "text").write_text("text" * 1000)
        (tmp_path / "empty").touch()
        for name, text in (
            ("nothing", "no such file"),
            ("text", "not a database"),
            ("empty", "no checkpoint"),
        ):
            assert main(["report", str(tmp_path / name)]) == 2
            assert text in capsys.readouterr().err
        assert main(["report", str(tmp_path / "text" / "run.db")]) == 2
        assert main(["report", "x" * 300]) == 2
        assert not (tmp_path / "nothing").exists()


class TestCirclesThroughSets:
    class Node:
        def __init__(self, name):
            self.name, self.beside = name, set()

    def graph(self, order, last=19):
        """Return nodes that refer to one another, made, and put together, in some order."""
        made = {n: self.Node(last if n == 19 else n % 5) for n in order}
        nodes = [made[n] for n in range(20)]
        for n in order:
            for other in sorted((n - 1, n - 7, 3), key=lambda m: order.index(m % 20)):
                nodes[n].beside.add(nodes[other % 20])
        return nodes

    def test_the_order_in_which_they_come_does_not_matter(self):
        orders = list(range(20)), list(range(19, -1, -1)), [(7 * n) % 20 for n in range(20)]
        graphs = [self.graph(order) for order in orders]  # at once: addresses decide the order
        assert len({digest(nodes) for nodes in graphs}) == 1
        assert len({digest(nodes[0]) for nodes in graphs}) == 1

    def test_what_is_far_away_does(self):
        order = list(range(20))
        assert digest(self.graph(order)[0]) != digest(self.graph(order, last=-1)[0])

    def test_what_was_seen_before_does_not(self):
        nodes = self.graph(list(range(20)))
        assert digest([nodes[3], nodes[8]]) == digest([nodes[3], nodes[8]])
        assert digest([nodes[3], 1, nodes]) != digest([nodes[4], 1, nodes])

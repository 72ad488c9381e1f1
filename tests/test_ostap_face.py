"""Callers as Ostap has them, over its face and over our own."""

from __future__ import annotations

import itertools
import operator
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import ostap_callers as callers
import pytest

import ostap_parallel
from ostap_parallel import ostap
from ostap_parallel.config.load import HostArguments
from ostap_parallel.faces import manager as our_manager
from ostap_parallel.ostap.options import count_cpus, executor_of, manager_options, tell_unknown
from ostap_parallel.worker.copies import copier_of
from ostap_parallel.worker.modes import modes_of

FACES = {"ours": ostap_parallel.WorkManager, "ostap": ostap.WorkManager}


@pytest.fixture(scope="module", params=["local", "host"])
def where(request, one_host):
    servers = {"ncpus": 0, "ppservers": "h1*2", "ssh_config": one_host.ssh_config}
    servers["sync"] = callers
    return {"ncpus": 2} if request.param == "local" else servers


@pytest.fixture(scope="module", params=FACES)
def wm(request, where):
    with FACES[request.param](**where, silent=True, progress=False) as manager:
        yield manager


@pytest.fixture(scope="module")
def face():
    with ostap.WorkManager(ncpus=2, progress=False) as manager:
        yield manager


def serially(task, items):
    """Return what a run gives where each item has the task as it was in the beginning."""
    manager = Serial(ncpus=1)
    return manager.process(task, items)


class Serial(ostap.TaskManager):
    """A manager by the means of Ostap's: `iexecute` and little else."""

    def iexecute(self, job, jobs_args, progress=False, **kwargs):
        self.left = kwargs
        for item in jobs_args:
            yield job((copier_of(item[0])(), *item[1:]))

    def get_pp_stat(self):
        return None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class TestCallers:
    """Each gives what it gives serially, here and on a host."""

    def test_a_task_that_adds_to_its_members(self, wm):
        items = [10] * 10 + [3] * 5
        found = wm.process(callers.Toys(), items, chunk_size=4)
        assert found == serially(callers.Toys(), items)
        assert sum(len(toys) for toys, _ in found) == sum(items)

    def test_a_task_that_keeps_its_output_among_its_members(self, wm):
        items = [(n, n + 50) for n in range(0, 1000, 50)]
        expected = [value for value in range(1000) if value % 7 == 0]
        found = wm.process(callers.Statistic(7), items, chunk_size=5)
        assert found == (len(expected), sum(expected)) == serially(callers.Statistic(7), items)

    def test_a_task_by_its_shape(self, wm):
        task = callers.Bare()
        assert wm.process(task, "abcd", chunk_size=2) == [
            (n, (n, letter)) for n, letter in enumerate("abcd")
        ]
        assert task.ended

    def test_a_merger_by_its_shape(self, wm):
        merger = callers.OldMerger(operator.add, init=100)
        keywords = {} if isinstance(wm, ostap.WorkManager) else {"jobid": True}
        found = wm.process(lambda jobid, x: x, range(10), merger=merger, **keywords)
        assert found == merger.result == 145

    def test_members_of_worker_init_and_such_as_cannot_be_copied(self, wm):
        found = wm.process(callers.Holder(), range(20), chunk_size=10)
        assert sorted(numbers for numbers, _ in found) == [[n] for n in range(20)]
        assert max(count for _, count in found) > 1  # the workers' own, for all items

    def test_a_task_that_keeps_its_state(self, wm):
        class Keeping(callers.Toys):
            keeps_state = True

        found = wm.process(Keeping(), [1] * 10, chunk_size=10)
        assert len(found[-1][0]) == 10

    @pytest.mark.parametrize("kind", FACES)
    def test_copying_files(self, kind, tmp_path):
        pairs = []
        for name in ("a", "b c", "d\ne"):
            (tmp_path / name).write_text(name)
            pairs.append((tmp_path / name, tmp_path / "to" / name))
        with FACES[kind](2, silent=True, progress=False) as manager:
            task = callers.CopyFiles(callers.copy_file)
            assert manager.process(task, [pairs[:2], pairs[2:]]) == sorted(pairs)
        assert [target.read_text() for _, target in pairs] == ["a", "b c", "d\ne"]

    def test_the_bare_interface(self, wm):
        jobs = ((callers.Toys(), n, 2) for n in range(5))
        found = sorted(wm.iexecute(ostap.task_executor, jobs), key=lambda each: each[0])
        assert [(jobid, result[0]) for jobid, result, _ in found] == [
            (n, (n, n)) for n in range(5)
        ]
        assert all(stat.njobs == 1 and stat.time >= 0 and stat.host for *_, stat in found)
        jobs = ((callers.times, n, 2) for n in range(3))
        found = sorted(wm.iexecute(ostap.func_executor, jobs), key=lambda each: each[0])
        assert [(jobid, result) for jobid, result, _ in found] == [(0, [0]), (1, [2]), (2, [4])]


class TestFunctions:
    def test_a_merger_has_the_old_value_first(self, face):
        found = face.process(callers.times, range(6), merger=callers.join)
        assert sorted(found) == [0, 1, 4, 9, 16, 25]
        merger = lambda old, new: (old or 0) * 0 + new[0]  # noqa: E731
        assert face.process(callers.times, [7], merger=merger) == 0

    def test_merging_starts_from_init_itself(self, face):
        init = [-1]
        found = face.process(callers.times, range(3), init=init, merger=callers.join)
        assert found is init
        assert init[0] == -1
        assert sorted(init) == [-1, 0, 1, 4]

    def test_a_collector_knows_the_jobid(self, face):
        def collect(old, new, jobid):
            return {**(old or {}), jobid: new}

        assert face.process(callers.times, [5, 6, 7], collector=collect) == {
            0: [0],
            1: [6],
            2: [14],
        }

    def test_task_mergers(self, face):
        assert face.process(lambda jobid, x: x, range(5), merger=ostap.TaskMerger()) == 10
        merger = ostap.TaskMerger(lambda old, new: [*old, new], init=[])
        assert sorted(face.process(lambda jobid, x: x, range(5), merger=merger)) == [0, 1, 2, 3, 4]
        assert merger.result == []

    def test_without_a_merger_nothing_is_lost(self, face, caplog):
        assert face.process(lambda jobid, x: x, range(5)) == [0, 1, 2, 3, 4]
        assert "neither a merger nor a collector" in caplog.text

    def test_an_object_that_is_called_is_fresh_for_each_item(self, face):
        class Adding:
            def __init__(self):
                self.seen = []

            def __call__(self, jobid, x):
                self.seen.append(x)
                return [tuple(self.seen)]

        found = face.process(Adding(), range(4), merger=callers.join, chunk_size=4)
        assert sorted(found) == [(0,), (1,), (2,), (3,)]

    def test_generic_tasks(self, face):
        task = ostap.GenericTask(callers.times, merger=callers.join)
        assert sorted(face.process(task, range(4))) == [0, 1, 4, 9] == sorted(task.output)
        assert task.initializer is tuple
        assert (task.processor, task.merger, task.cleanup) == (callers.times, callers.join, True)
        added = ostap.GenericTask(lambda jobid, x: (x,))
        assert sorted(face.process(added, [1, 2])) == [1, 2]
        collecting = ostap.GenericTask(
            callers.times, collector=lambda old, new, jobid: (*old, jobid), cleanup=False
        )
        assert sorted(face.process(collecting, [5, 5])) == [0, 1]
        assert not collecting.cleanup

    def test_func_tasks(self, face):
        assert sorted(face.process(ostap.FuncTask(callers.times), [1, 2])) == [[0], [2]]
        summing = ostap.FuncTask(lambda jobid, x: x, operator.add, int)
        assert face.process(summing, range(4)) == 6


class TestKeywords:
    @pytest.mark.parametrize("size", [-1, 0, None, 3, "auto"])
    @pytest.mark.parametrize("name", ["chunk_size", "batch_size", "ChunkSize"])
    def test_size_of_chunks(self, face, name, size):
        assert face.process(callers.Toys(), [1] * 7, **{name: size}) == [
            ((n,), [0, 1]) for n in range(7)
        ]

    @pytest.mark.parametrize("name", ["njobs", "max_value", "max_jobs", "total_jobs", "NJobs"])
    def test_length_of_an_input_that_does_not_tell(self, face, monkeypatch, name):
        totals = watch_progress(monkeypatch)
        face.process(callers.times, iter(range(5)), merger=callers.join, **{name: 5})
        face.process(callers.times, range(4), merger=callers.join, **{name: 5})  # it does tell
        assert [total for _, total in totals] == [5, 4]

    def test_a_window(self, face):
        read = itertools.count()
        items = (next(read) for _ in range(50))
        results = face.iexecute(lambda x: x, items, chunk_size=1, block_size=1)
        assert next(results) == 0
        results.close()
        assert next(read) == 1

    @pytest.mark.slow
    def test_imports(self, where):
        def seen(jobid, x):
            return sorted({"wave", "colorsys"} & sys.modules.keys())

        with ostap.WorkManager(**where, imports="colorsys") as manager:
            for more, names in ({}, ["colorsys"]), ({"imports": ["wave", "sys"]}, ["wave"]):
                found = manager.process(seen, [1], merger=callers.join, **more)
                assert set(names) <= set(found)
            with pytest.raises(ModuleNotFoundError, match="no_such_module"):
                manager.process(callers.Toys(), [1], imports=["no_such_module"])

    def test_progress_does_not_depend_on_silent(self, monkeypatch):
        shown = watch_progress(monkeypatch)
        with ostap.WorkManager(ncpus=1, silent=True, progress=True) as manager:
            manager.process(callers.Toys(), [1])
            manager.process(callers.Toys(), [1], progress=False)
            assert list(manager.iexecute(abs, [-1])) == [1]
            assert list(manager.iexecute(abs, [-1], progress=True)) == [1]
        assert [enabled for enabled, _ in shown] == [True, False, False, True]

    def test_silent_is_about_the_table(self, capsys):
        with ostap.WorkManager(ncpus=1, silent=False, progress=False) as manager:
            manager.process(callers.Toys(), [1])
            assert "#jobs" in capsys.readouterr().out
            manager.process(callers.Toys(), [1], silent=True)
            assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("name", ["pp", "PP", "Parallel", "parallel"])
    def test_kinds_of_pools_mean_nothing(self, name, caplog):
        assert ostap.WorkManager(1, **{name: True}).params == {}
        assert caplog.text == ""

    def test_unknown_ones_are_told_once(self, caplog):
        tell_unknown.cache_clear()
        for _ in range(2):
            manager = ostap.WorkManager(1, progres=True, prorgess=True, entirely_else=3)
        assert [record.getMessage().split(";")[0] for record in caplog.records] == [
            "there is no keyword 'progres': did you mean 'progress'?",
            "there is no keyword 'prorgess': did you mean 'progress'?",
            "there is no keyword 'entirely_else'",
        ]
        caplog.clear()
        assert manager.process(callers.Toys(), [1], chunksise=2) == [((0,), [0, 1])]
        assert "did you mean 'chunk_size'" in caplog.text

    def test_all_settings_of_hosts_are_known(self):
        known = {name: "x" for name in HostArguments.__annotations__}
        assert manager_options(known)[0].keys() == known.keys()

    def test_ours_stays_strict(self):
        with ostap_parallel.WorkManager(1, silent=True) as manager, pytest.raises(TypeError):
            manager.process(abs, [1], chunksise=2)


def watch_progress(monkeypatch):
    """Return a list that gets whether progress is shown, and the total, for each run."""
    seen = []
    original = our_manager.open_progress

    def watch(enabled, total, *args, **keywords):
        seen.append((enabled, total))
        return original(False, total, *args, **keywords)

    monkeypatch.setattr(our_manager, "open_progress", watch)
    return seen


class TestModes:
    def test_attributes(self):
        task = callers.Modes()
        assert (task.batch_set, task.build_set, task.implicitMT_set) == (False, False, False)
        assert (task.batch, task.build, task.implicitMT, task.cleanup) == (None, None, True, True)
        task.batch, task.build, task.implicitMT, task.cleanup = 1, Path("/b"), 4, False
        assert (task.batch, task.build, task.implicitMT, task.cleanup) == (True, "/b", 4, False)
        assert (task.batch_set, task.build_set, task.implicitMT_set) == (True, True, True)

    def test_they_hold_on_workers(self, wm, tmp_path):
        task = callers.Modes()
        assert wm.process(task, [1]) == {"batch": False, "threads": 0, "build": "/old"}
        task.batch, task.build, task.implicitMT = True, "/tmp", 3
        assert wm.process(task, [1]) == {"batch": True, "threads": 3, "build": "/tmp"}
        task.build, task.implicitMT = None, True
        found = wm.process(task, [1])
        assert found["threads"] == 64
        assert "build-" in found["build"]

    def test_what_was_comes_back(self, monkeypatch):
        root = callers.fake_root(batch=True, threads=2)
        monkeypatch.setitem(sys.modules, "ROOT", root)
        with modes_of({"batch": False, "implicit_mt": False, "build": None}):
            made = root.state["build"]
            assert Path(made).is_dir()
            assert (root.state["batch"], root.state["threads"]) == (False, 0)
        assert root.state == {"batch": True, "threads": 2, "build": "/old"}
        assert not Path(made).exists()
        with modes_of({"implicit_mt": 2}), modes_of({"implicit_mt": 5}):
            assert root.state["threads"] == 5
        assert root.state["threads"] == 2

    def test_functions_draw_nothing_where_root_is_loaded(self):
        def look(jobid, x):
            found = sys.modules["ROOT"].state["batch"] if "ROOT" in sys.modules else None
            sys.modules["ROOT"] = callers.fake_root()
            return [found]

        with ostap.WorkManager(1, progress=False) as manager:
            found = manager.process(look, range(4), merger=callers.join, ordered=True)
        assert found == [None, True, True, True]

    def test_temporary_files_of_ostap_are_removed(self, monkeypatch):
        module, removed = ModuleType("ostap.utils.cleanup"), []
        module.base_tmp_pid_dirs = {os.getpid(): "mine", -1: "another's"}
        module.CleanUp = SimpleNamespace(remove_dir=removed.append)
        with modes_of({"cleanup": True}):
            monkeypatch.setitem(sys.modules, "ostap.utils.cleanup", module)  # by the task
            assert removed == []
        assert removed == ["mine"]
        assert module.base_tmp_pid_dirs == {-1: "another's"}
        with modes_of({"cleanup": True}), modes_of({"cleanup": False}):
            pass
        assert callers.Toys().surroundings["modes"] == {"cleanup": True}
        assert removed == ["mine"]

    def test_surroundings(self, wm, tmp_path):
        class Here(callers.Modes):
            def process(self, jobid, item):
                return str(Path.cwd()), os.environ["KIND"], os.environ["PATH"].split(":")[0]

        task = Here()
        task.directory, task.environment = "/tmp", {"KIND": "toy"}
        task.prepend_to["PATH"] = "/first"
        assert wm.process(task, [1]) == ("/tmp", "toy", "/first")
        task.directory = "/no/such/directory"  # goes there if it is there
        assert wm.process(task, [1])[0] not in ("/tmp", task.directory)


class TestManager:
    def test_settings(self):
        manager = ostap.WorkManager(3, block_size=7, hyper_block_size=1000, chunk_size=2)
        assert (manager.silent, manager.progress, manager.ncpus) == (True, True, 3)
        assert (manager.block_size, manager.hyper_block_size) == (7, 1000)
        assert (manager.dump_dbase, manager.dump_jobs, manager.dump_freq) == (None, 0, 0)
        assert manager.params == {"chunk_size": 2}
        assert manager.config["chunk_size"] == 2
        assert manager.config["ncpus"] == 3
        assert "hyper_block_size  int  " in manager.table(title="Title", prefix="> ")
        assert all(line.startswith("> ") for line in manager.table(prefix="> ").splitlines())
        assert manager.table(prefix="") == str(manager) == repr(manager)
        assert manager.chunksize_guess(range(160)) == manager.chunksize_guess(None, 160) == 10
        assert manager.chunksize_guess(iter("ab")) == 1

    @pytest.mark.parametrize("ncpus", ["autodetect", None, 0, -1, True])
    def test_all_cpus_but_one(self, ncpus, monkeypatch):
        monkeypatch.delenv("OSTAP_NCPUS", raising=False)
        assert ostap.WorkManager(ncpus).ncpus == max(1, count_cpus() - 1)

    def test_the_limit_of_cpus(self):
        assert count_cpus({"OSTAP_NCPUS": "1"}) == 1
        assert (
            count_cpus({"OSTAP_NCPUS": "100000"})
            == count_cpus({})
            == count_cpus({"OSTAP_NCPUS": "x"})
        )
        assert ostap.WorkManager(0, ppservers="h1").ncpus == 0

    def test_the_kind_of_workers(self, monkeypatch, caplog):
        assert executor_of(2, {}) is executor_of(2, {"OSTAP_PARALLEL": "pathos"}) is None
        monkeypatch.setenv("OSTAP_PARALLEL", "futures")
        with ostap.WorkManager(1, progress=False) as manager:
            assert manager.process(callers.Toys(), [1, 1]) == [((n,), [0, 1]) for n in range(2)]
            assert type(manager.pool).__name__ == "ProcessPoolExecutor"
            manager.pool.shutdown()
        assert (
            executor_of(2, {"OSTAP_PARALLEL": "IPYPARALLEL"}) is None
            or "ipyparallel" in sys.modules
        )

    @pytest.mark.slow
    def test_hosts(self, one_host):
        settings = {"ppservers": "h1*1", "ssh_config": one_host.ssh_config, "sync": callers}
        with ostap.WorkManager(ncpus=1, **settings, progress=False) as manager:
            assert manager.manager.wait_for_hosts(30)
            assert manager.ppservers == manager.remotes == ("h1",)
            [near] = manager.locals
            assert near.startswith("localhost:")
            manager.process(callers.Toys(), [1] * 4)
            assert manager.get_pp_stat().njobs == 4
            assert "#jobs" in manager.get_pp_stat().table(title="Jobs", prefix="# ")
            assert manager.pool.map(abs, [-1, -2]) == [1, 2]

    @pytest.mark.slow
    def test_hosts_of_the_configuration(self, one_host, tmp_path):
        file = tmp_path / "ostaprc"
        file.write_text("[Pathos]\nworkers = h1*1\n")
        settings = {"ssh_config": one_host.ssh_config, "config": file, "sync": callers}
        with ostap.WorkManager(0, ppservers="auto", **settings, progress=False) as manager:
            assert manager.ncpus == 0
            assert manager.process(callers.Toys(), [1]) == [((0,), [0, 1])]
            assert [host for host, _ in manager.get_pp_stat()] == ["h1"]

    def test_it_can_be_used_again_after_with(self, face):
        with ostap.WorkManager(1, progress=False) as manager:
            assert manager.process(callers.Toys(), [1]) == [((0,), [0, 1])]
        assert manager.process(callers.Toys(), [1]) == [((0,), [0, 1])]
        manager.close()

    def test_one_that_is_dropped_ends_its_workers(self):
        manager = ostap.WorkManager(1, progress=False)
        [pid] = manager.process(lambda jobid, x: [os.getpid()], [1], merger=callers.join)
        del manager
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_arguments_of_no_use(self, face, caplog):
        face.extra_arguments(1, two=2)
        assert "1, two=2" in caplog.text
        caplog.clear()
        assert face.process(callers.Toys(), [1], merger=callers.join) == [((0,), [0, 1])]
        assert "merger" in caplog.text

    def test_dumps(self, tmp_path):
        class Base(dict):
            def __setitem__(self, key, value):
                super().__setitem__(key, value)
                counts.append(value[0] if key == "merged" else key)

        counts = []
        with ostap.WorkManager(1, dump_dbase=Base(), dump_freq=4, progress=False) as manager:
            manager.process(callers.times, range(8), merger=callers.join)
            assert counts == [4, 8, 8, "TOTAL_jobs", "FINAL_results"]
            counts.clear()
            manager.process(callers.times, range(8), merger=callers.join, hyper_block_size=3)
            assert counts == [3, 6, 8, "TOTAL_jobs", "FINAL_results"]

    def test_a_temporary_dump(self, caplog):
        manager = ostap.WorkManager(1, dump_jobs=1, progress=False)
        assert str(manager.dump_dbase) in caplog.text
        with manager:
            manager.process(callers.times, [1], merger=callers.join)
        assert any(manager.dump_dbase.parent.iterdir())

    def test_statistics(self):
        with ostap.Statistics("h1") as stat:
            pass
        merged, other = ostap.StatMerger(), ostap.StatMerger()
        merged += stat
        other += ostap.Statistics("h2", 2.0, 3)
        other += stat
        merged += other
        assert (len(merged), merged.njobs) == (2, 5)
        assert {host: each.njobs for host, each in merged} == {"h1": 2, "h2": 3}
        assert "h2" in merged.table(title="t", prefix="# ")

    def test_printing_statistics(self, capsys):
        manager = ostap.WorkManager(1, silent=False)
        by_server, by_job = ostap.StatMerger(), ostap.StatMerger()
        by_job += ostap.Statistics("local", 1.0, 3)
        manager.print_statistics(by_server, by_job, 0.5)
        assert "local" in (out := capsys.readouterr().out)
        assert "gain: 2.00" in out
        by_server += ostap.Statistics("server", 1.0, 3)
        manager.print_statistics(by_server, by_job)
        assert "server" in capsys.readouterr().out

    def test_a_manager_with_an_iexecute_of_its_own(self):
        manager = Serial(2)
        assert manager.process(callers.times, range(4), merger=callers.join, njobs=4) == [
            0,
            1,
            4,
            9,
        ]
        assert manager.left == {"njobs": 4}


class TestInterrupt:
    def test_what_is_merged_is_returned(self, face, caplog):
        def merge(old, new):
            if len(old) == 3:
                signal.raise_signal(signal.SIGINT)
            return [*old, *new]

        found = face.process(callers.times, range(1000), init=[], merger=merge, chunk_size=1)
        assert len(found) == 3
        assert "Keyboard interrupt: 3 jobs only" in caplog.text
        assert face.process(callers.Toys(), [1]) == [((0,), [0, 1])]  # goes on as before

    def test_a_task_is_finalized(self, face, caplog):
        class Interrupted(callers.Bare):
            def merge_results(self, result, jobid=-1):
                super().merge_results(result, jobid)
                signal.raise_signal(signal.SIGINT)

        task = Interrupted()
        assert len(face.process(task, range(10))) == 1
        assert task.ended

    def test_ours_raises(self):
        def merge(old, new):
            signal.raise_signal(signal.SIGINT)

        with ostap_parallel.WorkManager(1, silent=True) as manager:
            with pytest.raises(KeyboardInterrupt):
                manager.process(abs, range(10), merger=merge)
            assert manager.report.result == 0


class TestRest:
    def test_random_numbers(self, face):
        def draw(jobid, x):
            import random

            ostap.random_random(jobid)
            return [random.random()]

        assert len(set(face.process(draw, range(20), merger=callers.join))) == 20

    def test_the_checker(self):
        checker = ostap.Checker()
        assert checker.pickles(1, [lambda: 1], {"a": callers.Toys()})
        assert not checker.pickles(1, (n for n in []))
        assert checker.pickles_all(1, x=2)
        assert not checker.pickles_all(1, x=(n for n in []))
        assert checker.pickles_process(lambda: 1)
        assert checker.pickles_process_all(sum, x=range(3))
        assert not checker.known(callers.Toys)
        checker.add(callers.Toys)
        assert checker.known(callers.Toys, int)
        checker.add_nonpickleable(callers.Holder)
        assert checker.notgood(callers.Holder)
        assert not checker.pickles(callers.Holder())
        assert "Holder" in checker.table_nonpickleable()
        assert "Toys" in checker.table_pickleable(prefix="# ")
        assert "generator" in checker.pickling_table(1, x=(n for n in []))

    def test_dill(self):
        assert ostap.has_dill

    def test_hosts_need_no_manager_to_import_it(self):
        script = (
            "import sys, ostap_parallel.ostap; print(sorted({'pathos', 'rich'} & {*sys.modules}))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == ("[]", "")


class TestCopies:
    def test_nothing_of_a_copy_is_left_for_the_next(self):
        class Thing:
            pass

        thing = Thing()
        thing.me, thing.nested, thing.same = thing, {"a": [{1}, [2]]}, []
        thing.again, thing.method, thing.text = thing.same, thing.same.append, "x" * 1000
        copy = copier_of(thing)
        first = copy()
        first.nested["a"][0].add(5)
        first.method(1)
        first.new = 1
        second = copy()
        assert vars(second).keys() == vars(thing).keys()
        assert second.nested == {"a": [{1}, [2]]}
        assert second.me is second
        assert second.same is second.again is not thing.same
        assert (second.same, first.same) == ([], [1])
        assert second.text is thing.text

    def test_flat_ones(self):
        class Thing:
            def __init__(self):
                self.numbers, self.kinds, self.function = [1], {"a": 1}, len

        thing = Thing()
        copy = copier_of(thing)
        thing.numbers.append(2)
        copy().numbers.append(3)
        assert (copy().numbers, copy().kinds, copy().function) == ([1], {"a": 1}, len)

    def test_members_that_share_are_not_flat(self):
        thing = callers.Bare()
        thing.one = thing.two = []
        found = copier_of(thing)()
        assert found.one is found.two is not thing.one

    def test_large_arrays(self):
        thing = callers.Bare()
        thing.large, thing.small = numpy.zeros(1 << 20), numpy.zeros(3)
        thing.fixed = numpy.frombuffer(bytes(1 << 20), dtype="u1")
        copy = copier_of(thing)
        first, second = copy(), copy()
        first.large[0] = first.small[0] = 1
        assert second.large[0] == second.small[0] == thing.large[0] == copy().large[0] == 0
        assert second.large.flags.writeable
        assert not second.fixed.flags.writeable

    def test_what_cannot_be_copied_is_the_same(self):
        thing = callers.Bare()
        thing.stuck, thing.free, thing.me = (n for n in []), [[]], thing
        first = copier_of(thing)()
        assert first.stuck is thing.stuck
        assert first.free is not thing.free
        assert first.me is first
        stuck = (n for n in [])
        assert copier_of(stuck)() is stuck

    def test_classes_with_ways_of_their_own(self):
        class Slots:
            __slots__ = ("numbers",)

        class Made:
            def __init__(self, count):
                self.count = count

            def __reduce__(self):
                return Made, (self.count + 1,)

        slots = Slots()
        slots.numbers = [1]
        copy = copier_of(slots)
        copy().numbers.append(2)
        assert copy().numbers == [1]
        assert copier_of(Made(1))().count == 2

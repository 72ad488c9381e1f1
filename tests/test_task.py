"""Tasks and mergers."""

from __future__ import annotations

import operator
import pickle
from collections import deque
from pathlib import Path

import numpy
import pytest

from ostap_parallel.runs.task import FuncTask, GenericTask, Task, TaskMerger


class Forgetful(Task):
    """As users write them: no ``super().__init__()``."""

    def __init__(self, factor):
        self.factor = factor
        self.total = None
        self.calls = 0

    def initialize_local(self):
        self.calls += 1

    def process(self, jobid, item):
        return self.factor * item

    def merge_results(self, result, jobid=-1):
        self.total = result if self.total is None else self.total + result

    def results(self):
        return self.total


class Declared(Forgetful):
    directory = Path("/tmp")
    environment = {"N": 4}  # noqa: RUF012


def twice(item):
    return 2 * item


def labelled(jobid, item):
    return f"{jobid}:{item}"


def run(task, items):
    task.initialize_local()
    for jobid, item in enumerate(items):
        task.merge_results(task.process(jobid, item), jobid)
    task.finalize()
    return task.results()


class TestTaskMerger:
    def test_adds_by_default(self):
        merger = TaskMerger()
        for value in 1, 2, 3:
            merger += value
        assert (merger.result, merger.nmerged, len(merger)) == (6, 3, 3)

    def test_an_empty_one_is_true(self):
        assert len(TaskMerger()) == 0
        assert TaskMerger()
        assert TaskMerger(init=[])

    def test_a_call_merges_two_values_and_leaves_it_alone(self):
        merger = TaskMerger(init=100)
        assert merger(1, 2) == 3
        assert (merger.result, merger.nmerged) == (100, 0)

    def test_init_is_copied_for_every_start(self):
        mine = []
        first = TaskMerger(None, init=mine)
        second = first.fresh()
        mine.append("mine")
        assert first.merge([1]).result == [1]
        assert second.merge([2]).result == [2]
        first.reset()
        assert (first.result, first.nmerged) == ([], 0)
        assert mine == ["mine"]

    def test_fresh_keeps_the_rule_and_forgets_the_results(self):
        used = TaskMerger(operator.mul, init=2).merge(5)
        assert used.fresh().merge(3).result == 6
        assert used.result == 10

    @pytest.mark.parametrize("results", [[None, None], [None, 1], [1, None]])
    def test_none_is_a_result(self, results):
        merger = TaskMerger(lambda merged, result: [merged, result])
        for result in results:
            merger.merge(result)
        assert merger.result == results

    def test_a_single_none_counts(self):
        merger = TaskMerger().merge(None)
        assert (merger.result, merger.nmerged) == (None, 1)

    @pytest.mark.parametrize(
        ("init", "results", "expected"),
        [
            (1, [2, 3], 6),
            ((), [(1,), (2,)], (1, 2)),
            ([], [[1], [2, 3]], [1, 2, 3]),
            ([], [1, 2], [1, 2]),
            (set(), [1, 2, 1], {1, 2}),
            (deque(), [1, 2], deque([1, 2])),
        ],
    )
    def test_without_a_rule_values_merge_themselves(self, init, results, expected):
        merger = TaskMerger(None, init)
        for result in results:
            merger.merge(result)
        assert merger.result == expected

    def test_what_refuses_to_change_itself_is_added(self):
        merged = TaskMerger(None, numpy.zeros(2, int)).merge([0.5, 1.5]).result
        assert list(merged) == [0.5, 1.5]

    def test_what_cannot_be_merged_names_both_types(self):
        with pytest.raises(TypeError, match="int into dict"):
            TaskMerger(None, {}).merge(1)

    def test_a_failed_merge_is_not_counted(self):
        merger = TaskMerger().merge(1)
        with pytest.raises(TypeError):
            merger.merge("x")
        assert (merger.result, merger.nmerged) == (1, 1)

    def test_the_rule_must_be_callable(self):
        with pytest.raises(TypeError, match="merger must be callable, not list"):
            TaskMerger([])

    def test_pickles_with_what_it_merged(self):
        merger = pickle.loads(pickle.dumps(TaskMerger(init=1).merge(2)))
        assert merger.merge(3).result == 6


class TestTask:
    def test_works_without_super_init(self):
        task = Forgetful(3)
        assert task.surroundings == {
            "directory": None,
            "environment": {},
            "prepend_to": {},
            "append_to": {},
            "dot_in_path": False,
        }
        assert run(task, [1, 2]) == 9
        assert task.output == 9
        assert task(0, 5) == 15

    def test_assigning_updates_and_instances_do_not_share(self):
        task, other = Forgetful(1), Forgetful(1)
        task.environment = {"A": "1"}
        task.environment = {"B": 2}
        task.environment["C"] = Path("/c")
        task.prepend_to = {"PATH": "/first"}
        task.append_to = {"PATH": Path("/last")}
        surroundings = task.surroundings
        assert surroundings["environment"] == {"A": "1", "B": "2", "C": "/c"}
        assert surroundings["prepend_to"] == {"PATH": "/first"}
        assert surroundings["append_to"] == {"PATH": "/last"}
        assert other.environment == {}

    def test_class_attributes_count(self):
        surroundings = Declared(1).surroundings
        assert (surroundings["directory"], surroundings["environment"]) == ("/tmp", {"N": "4"})

    @pytest.mark.parametrize("values", [None, ["A"], {"A": None}, {1: "a"}])
    def test_bad_variables_are_refused_at_once(self, values):
        with pytest.raises(TypeError, match="environment"):
            Forgetful(1).environment = values

    def test_attributes_travel(self):
        task = Forgetful(2)
        task.directory, task.dot_in_path = "/tmp", True
        task.environment = {"A": "1"}
        there = pickle.loads(pickle.dumps(task))
        assert there.surroundings == task.surroundings
        assert there.process(0, 4) == 8

    def test_remote_initialisation_is_the_local_one_by_default(self):
        task = Forgetful(1)
        task.initialize_remote(7)
        task.worker_init()
        assert task.calls == 1

    def test_is_abstract(self):
        with pytest.raises(TypeError, match="abstract"):
            Task()


class TestFunctionTasks:
    def test_adds_by_default(self):
        assert run(GenericTask(labelled), "ab") == "0:a1:b"
        assert run(FuncTask(twice), [1, 2, 3]) == 12

    def test_no_items_give_the_initial_value(self):
        assert run(FuncTask(twice), []) is None
        assert run(FuncTask(twice, initializer=list), []) == []

    def test_the_merger_is_not_called_with_a_none_of_ours(self):
        seen = []
        run(FuncTask(twice, merger=lambda a, b: seen.append((a, b)) or b), [1, 2])
        assert seen == [(2, 4)]

    def test_initial_value(self):
        task = FuncTask(twice, merger=lambda a, b: [*a, b], initializer=list)
        assert run(task, [1, 2]) == [2, 4]
        assert run(task, [3]) == [6]  # each run starts anew

    def test_a_task_merger_brings_its_initial_value(self):
        merger = TaskMerger(None, init=[]).merge("before")
        task = FuncTask(twice, merger=merger)
        assert run(task, [1, 2]) == [2, 4]
        assert run(task, [3]) == [6]
        assert merger.result == ["before"]

    def test_collector(self):
        def collect(merged, result, jobid):
            return {**(merged or {}), jobid: result}

        assert run(FuncTask(twice, collector=collect), [5, 6]) == {0: 10, 1: 12}
        task = GenericTask(labelled, collector=collect, initializer=dict)
        assert run(task, "a") == {0: "0:a"}

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda: GenericTask(1), "processor"),
            (lambda: FuncTask(None), "processor"),
            (lambda: FuncTask(twice, merger=1), "merger"),
            (lambda: FuncTask(twice, collector=1), "collector"),
            (lambda: FuncTask(twice, initializer=[]), "initializer"),
        ],
    )
    def test_what_is_not_callable_is_named(self, make, name):
        with pytest.raises(TypeError, match=f"^{name} must be callable"):
            make()

    def test_merger_and_collector_exclude_each_other(self):
        with pytest.raises(ValueError, match="either merger or collector"):
            GenericTask(labelled, merger=operator.add, collector=lambda a, b, c: a)

    def test_results_do_not_travel(self):
        task = FuncTask(twice, merger=operator.add, directory="/tmp", environment={"A": 1})
        assert run(task, ["x" * 100_000]) == "x" * 200_000
        sent = pickle.dumps(task)
        assert len(sent) < 1000
        there = pickle.loads(sent)
        assert there.process(0, 4) == 8
        assert there.surroundings == task.surroundings
        assert run(there, [1, 2]) == 6
        assert len(task.results()) == 200_000

    def test_remote_initialisation_makes_no_initial_value(self):
        made = []
        task = FuncTask(twice, initializer=lambda: made.append(1))
        task.initialize_remote(0)
        assert made == []

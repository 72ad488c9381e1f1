"""Callers as Ostap has them; workers know these by value or by name, as they do those of users."""

from __future__ import annotations

import shutil
import sys
import threading
import types
from pathlib import Path

from ostap_parallel import ostap


class Bare:
    """A task by its shape only: of no class of ours."""

    def __init__(self):
        self.seen = []

    def initialize_local(self):
        self.total = []

    def initialize_remote(self, jobid=-1):
        self.prepared = jobid

    def process(self, jobid, *params):
        self.seen += [self.prepared, *params]
        return self.seen

    def merge_results(self, result, jobid=-1):
        self.total = [*self.total, (jobid, tuple(result))]

    def results(self):
        return sorted(self.total)

    def finalize(self):
        self.ended = True


class Toys(ostap.Task):
    """Each item adds toys to what the task has, and returns all of that."""

    def __init__(self):
        self.toys = []
        self.sums = {"by": {"kind": [0, 0]}}
        self.all = ()

    def initialize_local(self):
        self.all = ()

    def initialize_remote(self, jobid=-1):
        """Leave the task as it is."""

    def process(self, jobid, n):
        self.toys += [jobid] * n
        self.sums["by"]["kind"][n % 2] += n
        return tuple(self.toys), [*self.sums["by"]["kind"]]

    def merge_results(self, result, jobid=-1):
        self.all = (*self.all, result) if self.all else (result,)

    def results(self):
        return sorted(self.all)


class Counter:
    """What a statistics object of Ostap's can do."""

    def __init__(self, count=0, total=0.0):
        self.count, self.total = count, total

    def __iadd__(self, other):
        self.count += other.count
        self.total += other.total
        return self

    def __bool__(self):
        return self.count > 0


class Statistic(ostap.Task):
    """Keeps what it has computed among its members, and merges by ``+=``."""

    def __init__(self, cut):
        self.cut = cut
        self.output_ = None

    def initialize_local(self):
        self.output_ = None

    def process(self, jobid, item):
        first, last = item
        counter = Counter()
        for value in range(first, last):
            if value % self.cut == 0:
                counter += Counter(1, value)
        if self.output_ is not None:
            raise AssertionError(f"left by another item: {self.output_.count}")
        self.output_ = counter
        return self.output_

    def merge_results(self, result, jobid=-1):
        if not self.output_:
            self.output_ = result
        else:
            self.output_ += result

    def results(self):
        return self.output_.count, self.output_.total


class CopyFiles(ostap.Task):
    """Copies files in bunches."""

    def __init__(self, copier):
        self.copier, self.done = copier, ()

    def initialize_local(self):
        self.done = ()

    def process(self, jobid, pairs):
        for source, target in pairs:
            self.done = (*self.done, (source, self.copier(source, target, progress=False)))
        return self.done

    def merge_results(self, result, jobid=-1):
        self.done += result

    def results(self):
        return sorted(self.done)


def copy_file(source, target, progress=True):
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(source, target)


class Holder(ostap.Task):
    """Has members that cannot be copied, and some that `worker_init` has made."""

    def __init__(self):
        self.numbers = []

    def initialize_remote(self, jobid=-1):
        """Leave the task as it is."""

    def worker_init(self):
        self.lock = threading.Lock()
        self.table = [0]

    def process(self, jobid, item):
        with self.lock:
            self.numbers.append(item)
            self.table[0] += 1
        return list(self.numbers), self.table[0]

    def initialize_local(self):
        self.all = []

    def merge_results(self, result, jobid=-1):
        self.all.append(result)

    def results(self):
        return self.all


def fake_root(batch=False, threads=0):
    """Return a module with as much of ROOT as the modes of tasks need."""
    root = types.ModuleType("ROOT")
    state = {"batch": batch, "threads": threads, "build": "/old"}

    def set_to(name):
        return lambda value=0: state.__setitem__(name, value)

    root.gROOT = types.SimpleNamespace(IsBatch=lambda: state["batch"], SetBatch=set_to("batch"))
    root.gSystem = types.SimpleNamespace(
        GetBuildDir=lambda: state["build"], SetBuildDir=set_to("build")
    )
    root.ROOT = types.SimpleNamespace(
        IsImplicitMTEnabled=lambda: state["threads"] > 0,
        GetThreadPoolSize=lambda: state["threads"],
        EnableImplicitMT=lambda count=0: state.__setitem__("threads", count or 64),
        DisableImplicitMT=set_to("threads"),
    )
    root.state = state
    return root


class Modes(ostap.Task):
    """Tells the modes that it runs in."""

    def worker_init(self):
        sys.modules["ROOT"] = fake_root()

    def initialize_local(self):
        self.found = None

    def process(self, jobid, item):
        return dict(sys.modules["ROOT"].state)

    def merge_results(self, result, jobid=-1):
        self.found = result

    def results(self):
        return self.found


class OldMerger:
    """As Ostap's TaskMerger: it cannot be called, and is false while it is empty."""

    def __init__(self, merger, init=None):
        self.merger, self.result, self.count = merger, init, 0

    def merge(self, result):
        self.result = result if self.result is None else self.merger(self.result, result)
        self.count += 1
        return self

    def __len__(self):
        return self.count


def times(jobid, x):
    return [jobid * x]


def join(old, new):
    """Merge with what there is, which is nothing at first."""
    if not old:
        return new
    old.extend(new)
    return old

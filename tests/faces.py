"""Every way into this package, under one interface: what the contract is about."""

from __future__ import annotations

import joblib

from ostap_parallel import Executor, Pool, WorkManager, futures
from ostap_parallel.joblib import register
from ostap_parallel.pools import ParallelPool

register()


class Manager:
    """`WorkManager`."""

    closed = RuntimeError  # is raised after `close`
    interrupts = True  # leaving a stream ends what runs

    def __init__(self, executor=None):
        self.manager = WorkManager(0 if executor else 1, executor=executor, silent=True)
        self.close = self.manager.close

    def map(self, function, items):
        return self.manager.process(function, items)

    def call(self, function, item, /, **keywords):
        return self.manager.process(function, [item], shared=keywords)[0]

    def stream(self, function, items):
        """Iterate in order, reading the items as results are taken."""
        return self.manager.iexecute(function, items, ordered=True)

    def leave(self, stream):
        stream.close()


class MultiprocessingPool(Manager):
    """`Pool`."""

    closed = ValueError

    def __init__(self, executor=None):
        self.pool = Pool(executor=executor) if executor else Pool(1)
        self.close = self.pool.terminate

    def map(self, function, items):
        return self.pool.map(function, items)

    def call(self, function, item, /, **keywords):
        return self.pool.apply(function, (item,), keywords)

    def stream(self, function, items):
        return self.pool.imap(function, items)

    def leave(self, stream):
        stream.cancel()


class PathosPool(MultiprocessingPool):
    """`pools.ParallelPool`."""

    def __init__(self, executor=None):
        self.pool = ParallelPool(executor=executor) if executor else ParallelPool(1, id="contract")
        self.close = self.pool.terminate

    def call(self, function, item, /, **keywords):
        return self.pool.pipe(function, item, **keywords)


class FuturesExecutor(Manager):
    """`Executor`."""

    interrupts = False  # as the standard library has it

    def __init__(self, executor=None):
        self.executor = executor or Executor(1)
        self.close = (lambda: None) if executor else self.executor.shutdown

    def map(self, function, items):
        return list(self.executor.map(function, items))

    def call(self, function, item, /, **keywords):
        return self.executor.submit(function, item, **keywords).result()

    def stream(self, function, items):
        return self.executor.map(function, items, buffersize=8)


class Scoop(FuturesExecutor):
    """`futures`."""

    stream = None  # reads all items at once

    def __init__(self, executor):
        futures.use(executor)
        self.executor = futures
        self.close = lambda: futures.use(None)


class Joblib(Manager):
    """`joblib.Parallel`."""

    def __init__(self, executor):
        self.executor = executor
        self.close = lambda: None

    def run(self, calls, **options):
        with joblib.parallel_config("ostap", executor=self.executor):
            return joblib.Parallel(**options)(calls)

    def map(self, function, items):
        return self.run(joblib.delayed(function)(item) for item in items)

    def call(self, function, item, /, **keywords):
        return self.run([joblib.delayed(function)(item, **keywords)])[0]

    def stream(self, function, items):
        calls = (joblib.delayed(function)(item) for item in items)
        return self.run(calls, return_as="generator")


FACES = {
    "manager": Manager,
    "pool": MultiprocessingPool,
    "pathos": PathosPool,
    "executor": FuturesExecutor,
    "scoop": Scoop,
    "joblib": Joblib,
}

# On executors of somebody else's, and with workers of their own.
ON_FOREIGN = ["manager", "pool", "scoop"]
OWNING = ["manager", "pool", "pathos", "executor"]

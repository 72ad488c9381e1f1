"""What makes no sense is refused by an error that names it, before anything starts."""

from __future__ import annotations

import numpy
import pytest

from ostap_parallel import ConfigError, Executor, Pool, WorkManager, futures
from ostap_parallel.engine.engine import Engine
from ostap_parallel.pools import ParallelPool

WRONG = [
    ({"servers": 3.5}, ConfigError, "servers"),
    ({"servers": b"h1"}, ConfigError, "servers"),
    ({"servers": {"h1": 2}}, ConfigError, "servers"),
    ({"config": 3, "servers": "h1"}, ConfigError, "config"),
    ({"secret": 3}, ConfigError, "secret"),
    ({"sync": 3}, ConfigError, "sync"),
    ({"on_event": 3}, TypeError, "on_event"),
    ({"nice": "much"}, ConfigError, "nice"),
    ({"environment": {"A": 1}}, ConfigError, "environment"),
    ({"tmpdir": 3}, ConfigError, "tmpdir"),
    ({"tasks_per_worker": True}, ConfigError, "tasks_per_worker"),
    ({"initializer": print, "initargs": 3}, TypeError, "initargs"),
    ({"initializer": "print"}, TypeError, "initializer"),
]


@pytest.fixture
def nothing_starts(monkeypatch):
    """Have an engine that is made be a failure."""

    def fail(*what, **more):
        raise AssertionError("it has started")

    monkeypatch.setattr(Engine, "__init__", fail)


@pytest.mark.parametrize("face", [Executor, Pool, WorkManager, ParallelPool])
@pytest.mark.parametrize(("given", "error", "name"), WRONG)
def test_settings(nothing_starts, face, given, error, name):
    with pytest.raises(error, match=name):
        face(1, **given)


def test_settings_of_a_manager_alone(nothing_starts):
    with pytest.raises(ConfigError, match="host_rules"):
        WorkManager(1, host_rules=3)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"seed": 1.5}, "seed"),
        ({"seed": [1]}, "seed"),
        ({"where": "h1"}, "where"),
        ({"checkpoint": 3}, "checkpoint"),
    ],
)
def test_options_of_a_run(given, name):
    with WorkManager(1, silent=True) as wm:
        with pytest.raises(TypeError, match=name):
            wm.process(abs, [-1], **given)
        assert wm.process(abs, [-1]) == [1]
        assert wm.process(abs, [-1], seed=numpy.int64(3)) == [1]


def test_callbacks():
    with Pool(1, maxtasksperchild=numpy.int64(5)) as pool:
        for options in {"callback": 3}, {"error_callback": "print"}:
            with pytest.raises(TypeError, match=next(iter(options))):
                pool.apply_async(abs, (-1,), **options)
            with pytest.raises(TypeError, match=next(iter(options))):
                pool.map_async(abs, [-1], **options)
        assert pool.map(abs, [-1]) == [1]


def test_executors_of_futures():
    with pytest.raises(TypeError, match="executor"):
        futures.use(3)

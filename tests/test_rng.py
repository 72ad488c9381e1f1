"""The random generator of an item."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

import ostap_parallel
from ostap_parallel import WorkManager, rng
from ostap_parallel.engine import unseeded

numpy = pytest.importorskip("numpy")


def throw(item):
    first = rng().integers(1 << 62)
    return int(first), int(ostap_parallel.rng().integers(1 << 62)), rng() is rng()


def results(workers, seed, count=20, **options):
    with WorkManager(workers, silent=True) as wm:
        return wm.process(throw, range(count), seed=seed, **options)


@pytest.mark.slow
def test_the_seed_and_the_position_decide():
    one = results(1, 7, chunk_size=7)
    assert one == results(2, 7, chunk_size=1)
    assert all(same and first != second for first, second, same in one)
    assert len({first for first, _, _ in one}) == 20
    assert one != results(1, 8)
    with ThreadPoolExecutor(3) as threads, WorkManager(executor=threads, silent=True) as wm:
        assert wm.process(throw, range(20), seed=7) == one


@pytest.mark.slow
def test_no_seed_is_left_behind_by_a_run_that_had_one():
    with WorkManager(1, silent=True) as wm:
        seeded = wm.process(throw, range(3), seed=7)
        first, second = (wm.process(throw, range(3)) for _ in range(2))
    numbers = {one for result in (seeded, first, second) for one in result}
    assert len(numbers) == 9


def fresh(item):
    return numpy.random.default_rng().random()


def seeded(item):
    rng = numpy.random.default_rng(item)
    return rng.random() + numpy.random.default_rng(seed=item).random()


class Model:
    def draw(self, item):
        return [numpy.random.Generator(numpy.random.PCG64()).random() for _ in range(item)]


def by_another(item):
    return fresh(item) + len(Model().draw(item))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (fresh, ["fresh calls default_rng()"]),
        (lambda x: fresh(x), ["fresh calls default_rng()"]),
        (functools.partial(fresh), ["fresh calls default_rng()"]),
        (Model().draw, ["draw", "calls PCG64()"]),
        (by_another, ["fresh calls default_rng()", "calls PCG64()"]),
        (seeded, []),
        (throw, []),
        (numpy.random.default_rng, []),
    ],
)
def test_a_generator_that_the_seed_does_not_reach_is_noted(caplog, function, told):
    unseeded.tell.cache_clear()
    with WorkManager(1, silent=True) as wm:
        wm.process(function, [1])
        assert not caplog.messages
        for _ in range(2):  # it is said once
            wm.process(function, [1], seed=7)
    text = " ".join(caplog.messages)
    assert all(one in text for one in told)
    assert text.count("without a seed") == (2 if function is by_another else bool(told))


@pytest.mark.slow
def test_on_hosts(hosts):
    def throw(item):
        try:
            return int(rng().integers(1 << 62))
        except ModuleNotFoundError:  # a bare host
            return None

    assert throw(0) is not None  # outside of tasks there is one, too
    servers = {"servers": "h1*1", "ssh_config": hosts.ssh_config, "config": ()}
    with WorkManager(0, silent=True, **servers) as wm:
        found = wm.process(throw, range(5), seed=7)
    with WorkManager(1, silent=True) as wm:
        assert found in (wm.process(throw, range(5), seed=7), [None] * 5)

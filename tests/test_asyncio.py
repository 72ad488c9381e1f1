"""Runs in an event loop, which goes on meanwhile."""

from __future__ import annotations

import asyncio
import gc
import itertools
import operator
import threading
from functools import partial

import functions
import pytest
from helpers import wait_until

from ostap_parallel import Pool, TaskMerger, WorkManager


@pytest.fixture(scope="module")
def manager():
    with WorkManager(2, silent=True) as manager:
        yield manager


def late(folder, item):
    functions.note(folder, "begun")
    if item:
        functions.wait_for(folder / "go")
    return item


def is_idle():
    return not any(thread.name == "results" for thread in threading.enumerate())


def test_async_for(manager):
    async def main():
        async for result in manager.iexecute(functions.square, range(100), ordered=True):
            yield result

    async def collect():
        return [result async for result in main()]

    assert asyncio.run(collect()) == [x * x for x in range(100)]


@pytest.mark.slow
def test_the_loop_goes_on_meanwhile(manager, tmp_path):
    async def main():
        results = aiter(manager.iexecute(partial(late, tmp_path), [0, 1], ordered=True))
        assert await anext(results) == 0
        second = asyncio.ensure_future(anext(results))
        awaited = asyncio.ensure_future(manager.aprocess(functions.square, range(5)))
        done, _ = await asyncio.wait([second, awaited], return_when=asyncio.FIRST_COMPLETED)
        assert done == {awaited}
        (tmp_path / "go").touch()
        assert await second == 1
        with pytest.raises(StopAsyncIteration):
            await anext(results)
        return await awaited

    assert asyncio.run(main()) == [0, 1, 4, 9, 16]


def test_an_error_is_raised_in_the_loop(manager):
    async def main(found):
        async for result in manager.iexecute(partial(operator.floordiv, 6), [3, 2, 0, 1]):
            found.append(result)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main([]))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(manager.aprocess(partial(operator.floordiv, 6), [3, 0]))


def test_leaving_the_loop_ends_the_run(manager):
    async def main():
        async for result in manager.iexecute(functions.same, itertools.count()):
            if result > 100:
                break

    asyncio.run(main())
    wait_until(is_idle, functions.PATIENCE, "the run to end")
    assert not manager.report.complete


@pytest.mark.parametrize("face", ["iexecute", "aprocess"])
def test_cancelling_ends_the_run(manager, tmp_path, face):
    async def iterate():
        async for _ in manager.iexecute(partial(late, tmp_path), itertools.repeat(1)):
            raise AssertionError

    async def merge():
        await manager.aprocess(partial(late, tmp_path), [1] * 1000, merger=TaskMerger())

    async def main():
        task = asyncio.ensure_future(iterate() if face == "iexecute" else merge())
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(is_idle, functions.PATIENCE, "the run to end")
    assert manager.process(functions.square, [2]) == [4]
    assert not (tmp_path / "go").exists()


def test_async_with_closes():
    async def main():
        async with WorkManager(1, silent=True) as manager:
            assert await manager.aprocess(functions.square, [3]) == [9]
        return manager

    manager = asyncio.run(main())
    with pytest.raises(RuntimeError, match="shut down"):
        manager.process(functions.square, [1])


def test_cancelling_an_asynchronous_result_leaves_nothing_behind(caplog, tmp_path):
    async def main():
        with Pool(1) as pool:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pool.map_async(partial(late, tmp_path), [1]), 0.3)
            pool.terminate()
            pool.join()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_who_awaits_a_pool_that_is_terminated_is_cancelled(tmp_path):
    async def main():
        async def awaiting(result):
            return await result

        with Pool(1) as pool:
            awaited = asyncio.ensure_future(awaiting(pool.map_async(partial(late, tmp_path), [1])))
            await asyncio.sleep(0)
            pool.terminate()
            with pytest.raises(asyncio.CancelledError):
                await awaited

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "results = manager.iexecute(abs, range(5)); next(results)",
        "results = zip(manager.iexecute(abs, range(5)), manager.iexecute(abs, range(50)))\n"
        "next(results)",
    ],
)
@pytest.mark.parametrize("is_closed", [True, False])
def test_a_program_that_ends_in_the_middle_says_nothing(tmp_path, text, is_closed):
    script = tmp_path / "script.py"
    script.write_text(
        "from ostap_parallel import WorkManager\n"
        f"manager = WorkManager(1, silent=True)\n{text}\n{'manager.close()' * is_closed}\n"
    )
    done = functions.run_to_its_end("-X", "dev", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

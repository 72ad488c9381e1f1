"""The peers, each as a pool that maps functions and makes single calls in its own way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

Map = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Pool:
    """A peer that is up.

    Attributes
    ----------
    map
        Its bulk map: all results, in any order.
    call
        One call and its result.
    unordered
        Its map for items of uneven length; `map` where it has no other.
    """

    map: Map
    call: Callable[[Callable[[Any], Any], Any], Any]
    unordered: Map | None = None


@contextmanager
def ours(workers: int, **options: Any) -> Iterator[Pool]:
    from ostap_parallel import WorkManager

    with WorkManager(workers, config=(), silent=True, **options) as manager:
        manager.wait_for_hosts()

        def call(function: Callable[[Any], Any], item: Any) -> Any:
            return manager.executor.submit(function, item).result()

        yield Pool(manager.iexecute, call)


@contextmanager
def multiprocessing_pool(workers: int) -> Iterator[Pool]:
    import multiprocessing

    with multiprocessing.Pool(workers) as pool:
        yield Pool(pool.map, lambda f, x: pool.apply(f, (x,)), pool.imap_unordered)


@contextmanager
def pathos_process_pool(workers: int) -> Iterator[Pool]:
    from pathos.pools import ProcessPool

    pool = ProcessPool(workers)
    yield Pool(pool.map, pool.pipe, pool.uimap)
    pool.close()
    pool.join()


@contextmanager
def pathos_parallel_pool(workers: int) -> Iterator[Pool]:
    from pathos.pools import ParallelPool

    pool = ParallelPool(workers)
    yield Pool(pool.map, pool.pipe)
    pool.close()
    pool.join()


@contextmanager
def ppft_server(workers: int) -> Iterator[Pool]:
    import ppft

    server = ppft.Server(workers)

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Any:
        jobs = [server.submit(function, (item,)) for item in items]
        return [job() for job in jobs]

    yield Pool(run, lambda f, x: server.submit(f, (x,))())
    server.destroy()


@contextmanager
def concurrent_futures(workers: int, chunksize: int = 1) -> Iterator[Pool]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as executor:
        chunked = functools.partial(executor.map, chunksize=chunksize)
        yield Pool(chunked, lambda f, x: executor.submit(f, x).result())


@contextmanager
def loky(workers: int) -> Iterator[Pool]:
    from loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=workers)
    yield Pool(executor.map, lambda f, x: executor.submit(f, x).result())
    executor.shutdown()


@contextmanager
def joblib(workers: int) -> Iterator[Pool]:
    from joblib import Parallel, delayed

    with Parallel(workers) as parallel:

        def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Any:
            return parallel(delayed(function)(item) for item in items)

        yield Pool(run, lambda f, x: run(f, [x])[0])


@contextmanager
def dask(workers: int) -> Iterator[Pool]:
    from distributed import Client

    with Client(n_workers=workers, threads_per_worker=1, dashboard_address=None) as client:

        def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Any:
            return client.gather(client.map(function, list(items), pure=False))

        yield Pool(run, lambda f, x: client.submit(f, x, pure=False).result())


@contextmanager
def ray(workers: int) -> Iterator[Pool]:
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Any:
        remote = ray.remote(function)
        return ray.get([remote.remote(item) for item in items])

    remote = functools.cache(ray.remote)
    yield Pool(run, lambda f, x: ray.get(remote(f).remote(x)))
    ray.shutdown()


@contextmanager
def scoop(workers: int) -> Iterator[Pool]:
    """SCOOP, which has started its workers before us."""
    from scoop import futures

    yield Pool(futures.map, lambda f, x: futures.submit(f, x).result())


@contextmanager
def ipyparallel(workers: int, balanced: bool = True) -> Iterator[Pool]:
    import ipyparallel

    with ipyparallel.Cluster(n=workers, log_level=40) as client:
        client.wait_for_engines(workers, timeout=60)
        view = client.load_balanced_view() if balanced else client[:]
        yield Pool(view.map_sync, lambda f, x: view.apply_sync(f, x))


@dataclass(frozen=True)
class Peer:
    """A way to compute, and the package that it takes.

    Attributes
    ----------
    most
        Tasks that it gets at most, so that a measurement takes seconds; 0: any number.
    """

    open: Callable[[int], AbstractContextManager[Pool]]
    needs: str = "ostap_parallel"
    most: int = 0


OURS = "ostap_parallel"
PEERS = {
    OURS: Peer(ours),
    "multiprocessing.Pool": Peer(multiprocessing_pool),
    "concurrent.futures": Peer(concurrent_futures, most=20_000),
    "concurrent.futures, chunksize 100": Peer(
        functools.partial(concurrent_futures, chunksize=100)
    ),
    "joblib": Peer(joblib, "joblib"),
    "loky": Peer(loky, "loky", most=5000),
    "pathos ProcessPool": Peer(pathos_process_pool),
    "pathos ParallelPool": Peer(pathos_parallel_pool, most=5000),
    "ppft": Peer(ppft_server, most=5000),
    "dask.distributed": Peer(dask, "distributed", most=1000),
    "Ray": Peer(ray, "ray", most=5000),
    "SCOOP": Peer(scoop, "scoop", most=5000),
    "ipyparallel, direct": Peer(functools.partial(ipyparallel, balanced=False), "ipyparallel"),
    "ipyparallel, load-balanced": Peer(ipyparallel, "ipyparallel", most=1000),
}

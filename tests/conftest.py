"""Real ssh hosts for the tests, and the checks that nothing is left behind.

Fixtures
--------
hosts
    Two private ssh servers, ``h1`` and ``h2``, for the whole session.
ssh_config
    The file that reaches them.
one_host
    Another one, for one file.
browser
    A real browser.
make_hosts
    A function that starts special ones for one test.
slurm, sge
    Real batch systems of four slots, for the whole session; see `clusters`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import open_browser
from clusters import Cluster, Unavailable, open_sge, open_slurm
from roomy import temporary_root
from sshd import (
    Host,
    HostOptions,
    Hosts,
    NotPrivate,
    SshdUnavailable,
    descendants,
    describe,
    open_hosts,
)

LEAK_PATIENCE = 60.0  # seconds until a host must be as it was before a test
CLUSTER_PATIENCE = 90.0  # the same of a batch system, whose daemons take their time

# Helpers of Python's and of MPI's, which these keep until the interpreter exits.
KEPT_TO_THE_END = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "mpiexec",
    "hydra_pmi_proxy",
)

# Files that take long, the longest first: were one of them begun last, the machine would do little
# else meanwhile. Those of batch systems mostly wait, so that others are between them.
LONG = """
root allocations batch_arrays checkpoint hosts batch_lost allocations_elsewhere launcher do nested
processes lost_hosts gnu backend faults batch_schedulers commands run sources cleanup trust manual
batch_submitting sync hostile chaos security interrupt program live cli contract page mp_pool
"""

MakeHosts = Callable[..., Hosts]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the tests marked slow")
    parser.addoption("--all", action="store_true", help="run also the tests marked heavy")


def pytest_configure(config: pytest.Config) -> None:
    # What tests start must not ignore signals as this process may, by nohup or in the background
    # of a shell; who has a handler passes on the default.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(temporary_root()))
    text = "slow: computes for half a second or more, or waits long; left out by --quick"
    config.addinivalue_line("markers", text)
    config.addinivalue_line("markers", "heavy: needs the extra `faces`; run by --all only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    for item in items:
        if {"slurm", "sge", "cluster"}.intersection(item.fixturenames):
            item.add_marker("slow")  # it waits for a scheduler
    left_out = ["slow"] * config.getoption("--quick") + ["heavy"] * (not config.getoption("--all"))
    out = [item for item in items if any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
    places = {f"test_{name}": place for place, name in enumerate(LONG.split())}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@contextmanager
def hosts_or_skip(
    count: int, root: Path, options: HostOptions | list[HostOptions]
) -> Iterator[Hosts]:
    """`open_hosts`, but skip where hosts cannot be had. In CI they must be: fail there.

    Name spaces are another matter: most containers forbid them. But whoever may administer
    networks shall have those.
    """
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(open_hosts(count, root, options))
        except SshdUnavailable as exc:
            if os.environ.get("CI") and not isinstance(exc, NotPrivate):
                pytest.fail(str(exc))
            pytest.skip(str(exc))
        yield hosts


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two bare hosts, ``h1`` and ``h2``, with sshd's default limits and ``/bin/sh``."""
    with hosts_or_skip(2, tmp_path_factory.mktemp("hosts"), HostOptions()) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A host of a file's own, ``h1``, whose workers may come and go from test to test."""
    with hosts_or_skip(1, tmp_path_factory.mktemp("own"), HostOptions()) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def own_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts of a file's own, whose workers may come and go from test to test."""
    with hosts_or_skip(2, tmp_path_factory.mktemp("own"), HostOptions()) as hosts:
        yield hosts
        check_hosts(hosts, {})


@pytest.fixture(scope="session")
def ssh_config(hosts: Hosts) -> Path:
    """The ``ssh_config`` that reaches `hosts`."""
    return hosts.ssh_config


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, for one file."""
    with open_browser() as browser:
        yield browser


@pytest.fixture
def make_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeHosts]:
    """``make_hosts(count=1, *, each=None, **options)`` starts hosts that end with the test.

    `options` are those of `HostOptions`, for all of them; `each` is a list of one `HostOptions`
    per host. They are held to the same checks as `hosts`.
    """
    with ExitStack() as stack:
        made: list[Host] = []

        def make(count: int = 1, *, each: list[HostOptions] | None = None, **options: object):
            kinds = each or [HostOptions(**options)] * count  # type: ignore[arg-type]
            root = tmp_path_factory.mktemp("hosts")
            started = stack.enter_context(hosts_or_skip(len(kinds), root, kinds))
            made.extend(started)
            return started

        yield make
        check_hosts(made, {})


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A SLURM of two virtual nodes of two cores, with slurmdbd."""
    with cluster_or_skip(open_slurm()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def sge() -> Iterator[Cluster]:
    """A cell of SGE with four slots."""
    with cluster_or_skip(open_sge()) as cluster:
        yield cluster


@contextmanager
def cluster_or_skip(opening: AbstractContextManager[Cluster]) -> Iterator[Cluster]:
    """Open a batch system, but skip where it cannot be had. In CI, as root, it must be."""
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(opening)
        except Unavailable as exc:
            if os.environ.get("CI") and os.geteuid() == 0:
                pytest.fail(str(exc))
            pytest.skip(str(exc))
        yield cluster


@pytest.fixture(params=["slurm", "sge"])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Each of the batch systems in turn, whose commands this process may use in the test."""
    found: Cluster = request.getfixturevalue(request.param)
    for name, value in found.environ.items():
        monkeypatch.setenv(name, value)
    yield found
    check_cluster(found)


@pytest.fixture(autouse=True)
def _nothing_left_in_batch_systems(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test `slurm` and `sge` have no job, and all their nodes take jobs."""
    names = [name for name in ("slurm", "sge") if name in request.fixturenames]
    clusters = [request.getfixturevalue(name) for name in names]
    yield
    for cluster in clusters:
        check_cluster(cluster)


def check_cluster(cluster: Cluster) -> None:
    """Fail, listing what there is, unless a batch system gets to be as new in time."""
    deadline = time.monotonic() + CLUSTER_PATIENCE
    while left := [*cluster.jobs(), *cluster.unfit()]:
        if time.monotonic() > deadline:
            cluster.cancel_all()  # so that the next test does not find it
            cluster.resume()
            pytest.fail("left in the batch system:\n  " + "\n  ".join(left))
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _nothing_left_on_hosts(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test `hosts` run no more processes, and hold no more files, than before."""
    if "hosts" not in request.fixturenames:
        yield
        return
    hosts = request.getfixturevalue("hosts")
    before = {host: snapshot(host) for host in hosts}
    yield
    check_hosts(hosts, before)


def snapshot(host: Host) -> tuple[set[int], set[str]]:
    """Return a host's processes and the names in its /tmp."""
    return set(host.processes()), {path.name for path in host.tmp.iterdir()}


def check_hosts(hosts: Iterable[Host], before: dict[Host, tuple[set[int], set[str]]]) -> None:
    """Fail, listing what there is, unless the hosts get back to `before` in time."""
    deadline = time.monotonic() + LEAK_PATIENCE
    for host in hosts:
        old_pids, old_names = before.get(host, (set(), set()))
        while True:
            pids, names = snapshot(host)
            left = [describe(pid) for pid in sorted(pids - old_pids)]
            left += sorted(f"/tmp/{name}" for name in names - old_names)
            if not left:
                break
            if time.monotonic() > deadline:
                pytest.fail(f"left on {host.name}:\n  " + "\n  ".join(left))
            time.sleep(0.02)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end no child process, temporary file of ours or non-daemon thread is left.

    The session has a temporary directory of its own, so that another program's files are not
    taken for ours. It is short: a control socket's path may have some hundred characters.
    """
    tmp_path_factory.getbasetemp()  # pytest's own stays where it was
    threads = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        private = tempfile.mkdtemp(prefix="op-", dir=temporary_root())
        patch.setenv("TMPDIR", private)
        patch.setattr(tempfile, "tempdir", private)
        # What the developer has at home or in the environment must not change a test, nor tests
        # write there.
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        for name in [name for name in os.environ if name.startswith("OSTAP_")]:
            patch.delenv(name)
        # Thousands of processes are started: they need not compile the package each.
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        try:
            yield
            deadline = time.monotonic() + LEAK_PATIENCE
            while left := list(itertools.chain(child_lines(), files_in(private), others(threads))):
                if time.monotonic() > deadline:
                    pytest.fail("left at the end:\n  " + "\n  ".join(left))
                time.sleep(0.05)
        finally:
            shutil.rmtree(private, ignore_errors=True)


def child_lines() -> list[str]:
    """Describe the processes below this one."""
    lines = [f"process {describe(pid)}" for pid in descendants(os.getpid())]
    return [line for line in lines if not any(name in line for name in KEPT_TO_THE_END)]


def files_in(folder: str) -> list[str]:
    """Name what this package left in a temporary directory."""
    return sorted(map(str, Path(folder).glob("ostap-parallel-*")))


def others(threads: set[threading.Thread]) -> list[str]:
    """Name the threads that would keep the interpreter from exiting."""
    new = set(threading.enumerate()) - threads
    return [f"thread {thread.name}" for thread in new if not thread.daemon]

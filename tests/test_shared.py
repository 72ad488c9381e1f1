"""Shared objects: sent to each host once, mapped by its workers, and gone when they must be."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import functions
import pytest
import sharers
from helpers import (
    core_of,
    importable,
    kill,
    open_manager,
    server_of,
    ssh_of,
    wait_until,
    workers_of,
)
from servers import open_server
from sshd import HostOptions

from ostap_parallel import (
    CheckpointError,
    HostError,
    SerializeError,
    ServersUnavailable,
    WorkManager,
    shared,
)
from ostap_parallel.worker.shared import KEPT, SMALL

numpy = pytest.importorskip("numpy")

PATIENCE = 60  # seconds; only a hang takes that long
SIZE = 8_000_000


def buffer(seed=0, size=SIZE):
    """Return bytes that pickle sends out of band, without numpy, which hosts do not have."""
    return pickle.PickleBuffer(numpy.random.default_rng(seed).bytes(size))


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


def open_there(hosts, count=1):
    manager = open_manager(hosts, f"h1*{count}", environment=importable(hosts))
    assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
    return manager


@pytest.fixture(scope="module", params=["local", "h1"])
def wm(request):
    """A manager with two workers, here or on a host."""
    if request.param == "local":
        with WorkManager(2, silent=True) as manager:
            yield manager
    else:
        with open_there(request.getfixturevalue("one_host"), 2) as manager:
            yield manager


class TestWhatAFunctionGets:
    @pytest.mark.parametrize("size", [100, 100_000], ids=["small", "large"])
    def test_keyword_arguments(self, wm, size):
        table = {"table": [10 * n for n in range(size)]}
        items = [0, 1, size - 1]
        expected = [10 * n for n in items]
        assert wm.process(sharers.look_up, items, shared=table) == expected
        assert wm.process(sharers.look_up_deeper, items, shared=table) == expected

    def test_one_object(self, wm):
        assert wm.process(sharers.add_shared, range(50), shared=1000) == list(range(1000, 1050))
        assert wm.process(sharers.add_shared, range(3), shared=0.5) == [0.5, 1.5, 2.5]

    @pytest.mark.parametrize("padding", ["", SIZE * "x"], ids=["small", "large"])
    def test_a_task(self, wm, padding):
        shared = {"factor": 3, "padding": padding}
        assert wm.process(sharers.Scale(), range(5), shared=shared) == [0, 3, 6, 9, 12]

    def test_the_next_run_does_not_find_it(self, wm):
        wm.process(sharers.add_shared, [1], shared=1)
        with pytest.raises(LookupError, match="nothing is shared here"):
            wm.process(sharers.add_shared, [1])

    @pytest.mark.parametrize("size", [100, SIZE], ids=["small", "large"])
    def test_it_cannot_be_written(self, wm, size):
        with pytest.raises(TypeError, match="read-only"):
            wm.process(sharers.overwrite, [1], shared={"data": buffer(size=size)})

    def test_arrays_are_used_where_they_are_mapped(self):
        with WorkManager(1, silent=True) as manager:

            def look(item, array, frozen):
                try:
                    array[0] = 1
                except ValueError as error:
                    return array.sum(), frozen["a"].flags.writeable, str(error)

            array = numpy.arange(100_000.0)
            given = {"array": array, "frozen": {"a": array[:10]}}
            (found,) = manager.process(look, [0], shared=given)
        assert found == (array.sum(), False, "assignment destination is read-only")

    def test_here_nothing_is_shared(self):
        with pytest.raises(LookupError, match="call shared"):
            shared()

    def test_names_are_strings(self):
        with (
            WorkManager(1, silent=True) as manager,
            pytest.raises(TypeError, match="3 is not the"),
        ):
            manager.process(sharers.look_up, [1], shared={3: 4})

    def test_what_cannot_be_sent(self, wm):
        with pytest.raises(SerializeError, match="the shared object cannot be sent"):
            wm.process(sharers.add_shared, [1], shared=functions.Unsendable())

    @pytest.mark.parametrize("size", [1, SIZE], ids=["small", "large"])
    def test_what_cannot_be_read_there(self, wm, size):
        broken = [functions.Unreadable(), bytes(size)]
        assert wm.process(sharers.add_shared, range(6), shared=broken, on_error="collect")
        assert wm.report.failed == 6
        assert {type(failure.error) for failure in wm.report.failures} == {ValueError}

    def test_it_may_change_here_meanwhile(self, wm, tmp_path):
        array = numpy.zeros(SIZE, dtype=numpy.uint8)
        expected, data = digest_of(array), pickle.PickleBuffer(array)
        found = []
        for digest in wm.iexecute(sharers.digest_later, range(60), shared=data):
            array += 1
            found.append(digest)
        assert found == [expected] * 60


@pytest.mark.slow
class TestOnceForEachHost:
    def test_workers_share_its_pages(self, wm):
        data = buffer(size=3 * SIZE)
        found = wm.process(sharers.pages, range(2), shared=data, chunk_size=1)
        assert len({pid for pid, _, _ in found}) == 2
        for _, resident, proportional in found:
            assert resident * 1024 >= 3 * SIZE
            assert proportional < 0.6 * resident

    def test_what_goes_through_the_connection(self, hosts):
        with open_manager(hosts, "h2*2", environment=importable(hosts)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            ssh = Path(f"/proc/{ssh_of('h2')}/io")

            def sent():
                return int(ssh.read_text().split()[1])  # what ssh has read

            before = sent()
            for _ in range(2):
                found = manager.process(sharers.digest, range(8), shared=buffer(), chunk_size=1)
                assert {digest for _, digest in found} == {digest_of(buffer())}
            given = {"data": buffer()}
            assert manager.process(lambda n, data: len(data), [0, 1], shared=given) == 2 * [SIZE]
            assert SIZE < sent() - before < 2.2 * SIZE  # two objects, thrice used by two workers

    def test_old_ones_are_dropped(self, hosts):
        old = blobs(os.getpid())  # of another manager
        with open_there(hosts) as manager:
            server = server_of(manager, "h1")
            for seed in range(KEPT + 3):
                data = buffer(seed, 2 * SMALL)
                ((_, digest),) = manager.process(sharers.digest, [0], shared=data)
                assert digest == digest_of(data)
                (count,) = manager.process(sharers.mapped, [0])
                assert count <= KEPT + 1  # and what shows the worker's place
            wait_until(lambda: len(blobs(server)) <= KEPT, 5, "old ones are dropped")
            assert len(blobs(os.getpid()) - old) <= KEPT
            ((_, digest),) = manager.process(sharers.digest, [0], shared=buffer(0, 2 * SMALL))
            assert digest == digest_of(buffer(0, 2 * SMALL))
        assert blobs(os.getpid()) <= old

    def test_no_file_has_a_name(self, hosts):
        old = blobs(os.getpid())
        with open_there(hosts) as manager:
            before = set(os.listdir(tempfile.gettempdir()))  # noqa: PTH208
            manager.process(sharers.digest, range(3), shared=buffer())
            assert len(blobs(os.getpid()) - old) == len(blobs(server_of(manager, "h1"))) == 1
            assert set(os.listdir(tempfile.gettempdir())) == before  # noqa: PTH208
            large = [file for file in hosts["h1"].tmp.rglob("*") if file.stat().st_size >= SIZE]
            assert large == []

    def test_runs_at_the_same_time(self, hosts):
        with open_manager(hosts, "h1*2 h2*1", ncpus=1, environment=importable(hosts)) as manager:
            found = {}

            def run(seed):
                results = manager.iexecute(
                    sharers.digest_later, range(40), shared=buffer(seed), chunk_size=1
                )
                found[seed] = set(results)

            threads = [threading.Thread(target=run, args=[seed]) for seed in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            assert found == {seed: {digest_of(buffer(seed))} for seed in range(3)}


def blobs(pid):
    """Return the blobs that this process, or a server on a host, has open."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.exists()]  # noqa: PTH115
    mine = tempfile.gettempdir() if pid == os.getpid() else "/tmp/ostap-parallel."
    return {link for link in links if link.startswith(mine) and link.endswith("(deleted)")}


@pytest.mark.slow
class TestTrouble:
    def test_a_server_that_is_killed_gets_it_again(self, hosts):
        data = buffer()
        with open_manager(hosts, "h1*1", environment=importable(hosts)) as manager:
            done = []
            for digest in manager.iexecute(
                sharers.digest_later, range(60), shared=data, chunk_size=1
            ):
                done.append(digest)
                if len(done) == 10:
                    kill([server_of(manager, "h1")])
            assert done == [digest_of(data)] * 60
            assert manager.report.hosts[0].lost == 1

    def test_a_worker_that_is_killed(self, wm):
        def die_once(item):
            if item == 5 and len(shared()) == SIZE:
                os._exit(3)
            return item

        found = wm.process(die_once, range(20), shared=buffer(), on_error="collect")
        assert [n for n in found if isinstance(n, int)] == [n for n in range(20) if n != 5]

    def test_a_full_disk(self, make_hosts):
        hosts = make_hosts(each=[HostOptions(tmp_size="12M"), HostOptions()])
        data = buffer(size=2 * SIZE)
        with open_manager(hosts, "h1*2 h2*1", environment=importable(hosts)) as manager:
            assert manager.wait_for_hosts(PATIENCE)
            found = manager.process(sharers.digest, range(40), shared=data, chunk_size=1)
            assert {digest for _, digest in found} == {digest_of(data)}
            assert {pid for pid, _ in found} == set(workers_of(manager, "h2"))
            bad, good = manager.report.hosts
            assert (bad.state, good.state) == ("failed", "up")
            assert isinstance(bad.error, HostError)
            assert bad.error.step == "shared"
            assert "No space left on device: 16000128 bytes" in bad.error.reason
            assert manager.process(functions.square, range(5)) == [0, 1, 4, 9, 16]

    def test_nowhere_is_room(self, make_hosts):
        hosts = make_hosts(tmp_size="12M")
        with open_manager(hosts, "h1*2", environment=importable(hosts)) as manager:
            with pytest.raises(ServersUnavailable, match="shared: No space left"):  # as it joins
                manager.process(sharers.digest, range(4), shared=buffer(size=2 * SIZE))
            (status,) = manager.executor.hosts
            assert (status.state, status.workers) == ("failed", 0)

    def test_no_room_here(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "import resource\n"
            "from ostap_parallel import SerializeError, WorkManager\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
            "with WorkManager(1, silent=True) as manager:\n"
            "    try:\n"
            "        manager.process(abs, [1], shared=bytes(1 << 21))\n"
            "    except SerializeError as error:\n"
            "        print(error)\n"
        )
        printed = functions.run_python(script, cwd=tmp_path)
        assert "File too large: 2097" in printed
        assert "set TMPDIR" in printed

    def test_a_run_that_is_stopped_does_not_wait_for_a_delivery(self, hosts):
        with open_there(hosts) as manager:
            server = server_of(manager, "h1")
            os.kill(server, signal.SIGSTOP)
            errors = []

            def run():
                try:
                    manager.process(sharers.digest, range(4), shared=buffer())
                except BaseException as error:
                    errors.append(error)

            running = threading.Thread(target=run)
            running.start()
            (link,) = core_of(manager).links()
            wait_until(lambda: list(link._deliveries), PATIENCE, "a delivery has begun")
            manager.executor.backend.give_up()
            os.kill(server, signal.SIGCONT)
            running.join(PATIENCE)  # it was run again
            assert not running.is_alive()
            assert errors == []
            assert manager.report.hosts[0].lost == 0
            assert manager.report.retried > 0


def spawning(count):
    """Return an executor of processes; one that forks would, with threads, not be safe."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


class TestOtherWays:
    @pytest.mark.parametrize("executor", [ThreadPoolExecutor, spawning])
    def test_an_executor_of_somebody_else(self, executor):
        data = buffer()
        with executor(2) as workers, WorkManager(executor=workers, silent=True) as manager:
            found = manager.process(sharers.digest, range(20), shared=data)
            assert {digest for _, digest in found} == {digest_of(data)}
            assert manager.process(sharers.add_shared, [1, 2], shared=5) == [6, 7]
            with pytest.raises(LookupError):
                manager.process(sharers.add_shared, [1])

    def test_a_server_that_runs_already(self):
        data = buffer()
        with (
            open_server("secret", path=[Path(__file__).parent]) as port,
            WorkManager(0, port, secret="secret", silent=True, config=()) as one,
            WorkManager(0, port, secret="secret", silent=True, config=()) as other,
        ):
            for manager in one, other, one:
                found = manager.process(sharers.digest, range(4), shared=data)
                assert {digest for _, digest in found} == {digest_of(data)}

    def test_a_checkpoint_knows_it(self, tmp_path):
        file = tmp_path / "run.db"
        with WorkManager(1, silent=True) as manager:
            data = bytes(buffer())
            for resumed in 0, 3:
                found = manager.process(sharers.digest, range(3), shared=data, checkpoint=file)
                assert {digest for _, digest in found} == {digest_of(data)}
                assert manager.report.resumed == resumed
            with pytest.raises(CheckpointError, match="shared object"):
                manager.process(sharers.digest, range(3), shared=data[1:], checkpoint=file)

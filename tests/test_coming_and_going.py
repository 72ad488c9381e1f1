"""Hosts that are added and dropped, and what is asked of them when they start."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import importable, open_manager, wait_until

from ostap_parallel import ConfigError, ServersUnavailable, WorkManager
from ostap_parallel.config import load_settings

PATIENCE = 60


@pytest.fixture
def slow():
    """A function that is sent as it is."""

    def function(item):
        time.sleep(0.02)
        return item

    return function


class TestWhileARunGoesOn:
    @pytest.mark.slow
    def test_one_more_and_one_less(self, hosts, slow):
        with open_manager(hosts, "h1*1") as wm:
            wm.wait_for_hosts(PATIENCE)
            done = []
            for number in wm.iexecute(slow, iter(range(10**6)), chunk_size=1):
                done.append(number)
                if len(done) == 10:
                    (status,) = wm.add_hosts("h2*1")
                    assert status.name == "h2"
                both = wm.report.stats.merged.keys() == {"h1", "h2"}
                if both and set(wm.workers) == {"h1", "h2"}:
                    wm.drop_host("h1")
                    dropped = len(done)
                if set(wm.workers) == {"h2"} and len(done) > dropped + 50:
                    break
            assert sorted(done)[:dropped] == list(range(dropped))
            assert wm.report.failed == 0
            assert [host.name for host in wm.report.hosts] == ["h2"]

    @pytest.mark.slow
    def test_a_manager_without_any(self, hosts, slow):
        with open_manager(hosts, ()) as wm:
            with pytest.raises(ServersUnavailable):
                wm.process(slow, range(3))
            wm.add_hosts(["h1*1"])
            assert wm.process(slow, range(3)) == [0, 1, 2]
            wm.drop_host("h1")
            assert wm.workers == {}
            with pytest.raises(ServersUnavailable):
                wm.process(slow, range(3))
            wm.add_hosts(["h1*1"])  # again
            assert wm.process(slow, range(3)) == [0, 1, 2]

    @pytest.mark.slow
    def test_fewer_workers_of_a_host(self, hosts):
        def most_at_once(spans):
            points = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
            now = most = 0
            for _, step in points:
                now += step
                most = max(most, now)
            return most

        def work(_):
            start = time.monotonic()
            time.sleep(0.05)
            return start, time.monotonic()

        with open_manager(hosts, "h1*3") as wm:
            wm.limit_host("h1", 1)  # also before it is up
            wm.wait_for_hosts(PATIENCE)
            assert wm.workers == {"h1": 1}
            assert most_at_once(wm.process(work, range(8), chunk_size=1)) == 1
            wm.limit_host("h1", 2)
            assert most_at_once(wm.process(work, range(12), chunk_size=1)) == 2
            results = wm.iexecute(work, range(60), chunk_size=1)
            found = [next(results)]
            wm.limit_host("h1", None)  # while a run goes on
            assert wm.workers == {"h1": 3}
            found += results
            assert most_at_once(found) == 3
            for wrong in (("h9", 1), ("h1", 0), ("h1", 1.5)):
                with pytest.raises(ValueError, match=r"no host|from 1 on"):
                    wm.limit_host(*wrong)
        with WorkManager(3, silent=True) as wm:
            wm.limit_host("local", 1)
            assert most_at_once(wm.process(work, range(6), chunk_size=1)) == 1

    def test_mistakes(self, hosts):
        with open_manager(hosts, "h1*1") as wm:
            with pytest.raises(ConfigError, match="h1 is among the hosts already"):
                wm.add_hosts("h2 h1")
            with pytest.raises(ValueError, match="no host 'h3': known are h1"):
                wm.drop_host("h3")
            assert [host.name for host in wm.executor.hosts] == ["h1"]
        with ThreadPoolExecutor(1) as one, WorkManager(executor=one) as own:
            for call in (lambda: own.add_hosts("h1"), lambda: own.drop_host("h1")):
                with pytest.raises(TypeError, match="executor of your own"):
                    call()


class TestWhatHostsAreAskedFor:
    @pytest.mark.slow
    def test_nice(self, hosts):
        with open_manager(hosts, "h1*1", nice=7) as wm:
            before = os.nice(0)
            assert wm.process(lambda _: os.nice(0), [0]) == [min(19, before + 7)]
        with open_manager(hosts, "h1*1~5", nice=7) as wm:  # the entry says more
            assert wm.process(lambda _: os.nice(0), [0]) == [min(19, before + 5)]

    @pytest.mark.slow
    def test_modules_that_are_there(self, hosts):
        environment = importable(hosts)
        with open_manager(hosts, "h1*1", environment=environment, requires="json, faults") as wm:
            assert wm.wait_for_hosts(PATIENCE)

    def test_a_module_that_is_missing(self, hosts, caplog):
        with open_manager(hosts, "h1*1", requires=["json", "no_such_module"]) as wm:
            (status,) = wm.executor.hosts
            wait_until(lambda: status.state == "failed", PATIENCE, "it fails")
            assert status.error.step == "requires"
            assert "No module named 'no_such_module'" in status.error.reason
            assert "cannot import all of json, no_such_module" in status.error.reason

    @pytest.mark.slow
    def test_environment_that_is_added(self, hosts, tmp_path):
        config = tmp_path / "rc"
        config.write_text(
            "[Parallel]\nenvironment = export A=1 B=1\n"
            "[Parallel:h2]\nenvironment += export B=2\n    export C=3\n"
        )
        config.chmod(0o600)

        def seen(_):
            time.sleep(0.1)
            return tuple(os.environ.get(name) for name in "ABC")

        with open_manager(hosts, "h1*1 h2*1", config=config) as wm:
            wm.wait_for_hosts(PATIENCE)
            found = set(wm.process(seen, range(10), chunk_size=1))
        assert found == {("1", "1", None), ("1", "2", "3")}


class TestConfiguration:
    @pytest.fixture
    def load(self, tmp_path):
        def load(text, **arguments):
            (tmp_path / "rc").write_text(text)
            (host,) = load_settings(
                "h2.cern.ch", config=tmp_path / "rc", environ={}, **arguments
            ).hosts
            return host

        return load

    def test_all_that_is_added_adds_up_from_the_general_to_the_special(self, load, tmp_path):
        text = (
            "[Parallel]\nenvironment = a\n[Parallel:cern.ch]\nenvironment_more = b\n"
            "[Parallel:h2.cern.ch]\nenvironment += c\n"
        )
        host = load(text, environment_more="d")
        assert host.environment == "a\nb\nc\nd"
        rc = tmp_path / "rc"
        assert host.origins["environment"] == (
            f"{rc} [Parallel] + {rc} [Parallel:cern.ch] + {rc} [Parallel:h2.cern.ch] + argument"
        )

    def test_a_special_one_replaces_what_is_more_general(self, load):
        text = (
            "[Parallel]\nenvironment = a\n[Parallel:cern.ch]\nenvironment_more = b\n"
            "[Parallel:h2.cern.ch]\nenvironment = c\n"
        )
        assert load(text).environment == "c"
        assert load(text, environment_more="d").environment == "c\nd"
        assert load("[Parallel]\nenvironment += b\n").environment == "b"

    @pytest.mark.parametrize(
        ("key", "value", "wanted"),
        [("nice", "10", 10), ("requires", "numpy, ROOT.a  x", ("numpy", "ROOT.a", "x"))],
    )
    def test_values(self, load, key, value, wanted):
        assert getattr(load(f"[Parallel]\n{key} = {value}\n"), key) == wanted
        assert getattr(load("", **{key: value}), key) == wanted

    @pytest.mark.parametrize(
        ("key", "value"), [("nice", 0), ("nice", 20), ("requires", "a;b"), ("requires", [7])]
    )
    def test_bad_values(self, load, key, value):
        with pytest.raises(ConfigError, match=key):
            load("", **{key: value})

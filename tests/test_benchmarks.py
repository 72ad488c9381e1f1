"""What the benchmarks are measured and written with."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import harness, local, remote, tasks
from benchmarks.harness import Benchmark, Case, Results
from benchmarks.peers import PEERS


def two(seed):
    return {"seconds": 2.0 + seed, "count": 1}


def four():
    return {"seconds": 4.0}


def broken():
    print("on the way")
    raise OSError("no such thing")


BENCHMARK = Benchmark(
    "Numbers",
    "Some.",
    [Case("two", two), Case("four", four), Case("broken", broken), Case("no", four, needs="nix")],
    "half",
    lambda results: f"{results.ratio('seconds', 'two', 'four'):.2f}",
    rounds=3,
)


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where cases find this module
        yield harness.run(BENCHMARK)


def test_each_case_is_measured_in_turn(results):
    assert results.rounds["two"] == [{"seconds": 2.0 + n, "count": 1} for n in range(3)]
    assert results.rounds["four"] == [{"seconds": 4.0}] * 3
    assert results.failures == {
        "broken": "ends with status 1: OSError: no such thing",
        "no": "absent: nix is not installed",
    }


def test_the_table(results):
    assert harness.table(BENCHMARK, results).splitlines() == [
        "Some.",
        "",
        "|  | seconds | count |",
        "| --- | ---: | ---: |",
        "| two | 3 (2 to 4) | 1 |",
        "| four | 4 |  |",
        "| broken | ends with status 1: OSError: no such thing |  |",
        "| no | absent: nix is not installed |  |",
        "",
        "Wanted: half. Measured: 0.75.",
    ]


def test_what_was_not_measured_is_no_number():
    assert math.isnan(Results().ratio("seconds", "two", "four"))
    assert math.isnan(Results().median("two", "seconds"))


def test_sections_that_were_not_asked_for_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "FILE", tmp_path / "results.md")
    one, two = (command.BENCHMARKS[name].title for name in ("one", "idle"))
    command.write(two, "second\n\nWanted: 1. Measured: 2.\n")
    command.write(one, "first\n")
    command.write(two, "third\n\nWanted: 1. Measured: 3.\n")
    text = command.FILE.read_text()
    assert text.index("first") < text.index("third")
    assert "second" not in text
    assert f"| {two} | 1 | 3 |" in text


def test_an_unknown_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nix"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no benchmark nix; there are trivial, one," in capsys.readouterr().err


def squares_of(name):
    with PEERS[name].open(2) as pool:
        found = sorted(pool.map(tasks.square, range(5)))
        return {"sum": sum(found), "largest": max(found), "called": pool.call(tasks.square, 3)}


@pytest.mark.parametrize("name", ["ostap_parallel", "multiprocessing.Pool", "ppft"])
def test_peers_do_the_same_work(name, monkeypatch):
    """In a process of its own, as whenever it is measured: some of them fork it as it is."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    squares = Benchmark("Squares", "Some.", [Case(name, squares_of, {"name": name})])
    results = harness.run(squares, rounds=1)
    assert results.failures == {}
    assert results.rounds[name] == [{"sum": 30, "largest": 16, "called": 9}]


def test_the_bound_of_uneven_tasks():
    assert local.uneven_in_turn(1)["of the bound"] >= 1
    assert remote.UNEVEN_HOSTS.hosts

"""What lies beside a script, and where it looks for modules by now: workers find it, too."""

from __future__ import annotations

import multiprocessing

import pytest
from functions import run_python

from ostap_parallel import Executor, Pool

LATER = """
import os, sys
from ostap_parallel import Executor, Pool, WorkManager
def use(x):
    return first.value + second.value + x
def late(x):
    import third
    return third.value + x
def add(x):
    sys.path.insert(0, "/nowhere")
    return len(sys.path)
with WorkManager(1, silent=True) as wm, Executor(1) as executor, Pool(1) as pool:
    runs = [wm.process, pool.map, lambda f, items: [executor.submit(f, x).result() for x in items]]
    for run in runs:
        assert run(abs, [-1]) == [1]
    sys.path.insert(0, "one")
    import first
    sys.path.append(os.path.abspath("two"))
    import second
    for run in runs:
        assert run(use, [1]) == [112]
    os.chdir("/")
    for run in runs:
        assert run(use, [1]) == [112]
        assert run(add, [1, 2]) == [len(sys.path) + 1] * 2  # that is not kept
    os.chdir(os.path.dirname(os.path.abspath(sys.argv[1])))
    sys.path.insert(1, "three")
    for run in runs:
        assert run(late, [1]) == [1001]
print("ok")
"""


@pytest.mark.slow
def test_modules_from_directories_that_come_later(tmp_path):
    for name, module, value in [
        ("one", "first", 1),
        ("two", "second", 110),
        ("three", "third", 1000),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{module}.py").write_text(f"value = {value}\n")
    (tmp_path / "script.py").write_text(LATER)
    assert run_python("script.py", tmp_path / "script.py", cwd=tmp_path) == "ok\n"


SHADOWED = """
import profile, statistics
from ostap_parallel import Executor, Pool, WorkManager
def use(x):
    return profile.bins + statistics.events + x
with WorkManager(2) as wm:
    assert wm.process(use, range(3)) == [3, 4, 5]
    assert "3" in str(wm.report)
with Pool(1) as pool:
    assert pool.map(use, [0]) == [3]
"""


@pytest.mark.slow
def test_files_of_the_user_s_that_have_names_of_the_library_s(tmp_path):
    (tmp_path / "profile.py").write_text("bins = 1\n")
    (tmp_path / "statistics.py").write_text("events = 2\n")
    (tmp_path / "script.py").write_text(SHADOWED)
    run_python("script.py", cwd=tmp_path)


def test_what_stands_in_the_way_of_a_public_name_is_told(tmp_path):
    (tmp_path / "selectors.py").write_text("")
    script = "try: from ostap_parallel import WorkManager\nexcept ImportError as exc: print(exc)"
    (tmp_path / "script.py").write_text(script)
    assert "'selectors' has no attribute" in run_python("script.py", cwd=tmp_path)


def parent(_):
    one = multiprocessing.parent_process()
    return one is not None and one.is_alive() and one.pid != multiprocessing.current_process().pid


def test_a_worker_has_a_parent():
    assert multiprocessing.parent_process() is None
    with Pool(1) as pool:
        assert pool.map(parent, [1]) == [True]
    with Executor(1) as executor:
        assert executor.submit(parent, 1).result() is True

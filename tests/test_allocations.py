"""Allocations of real batch systems as hosts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import wait_until

import ostap_parallel

PATIENCE = 60  # seconds; only a hang takes that long

PACKAGE_PARENT = Path(ostap_parallel.__file__).parents[1]

PROGRAM = """\
import collections, os
from ostap_parallel import futures

def where(number):
    return number * number, os.environ.get("SLURMD_NODENAME"), os.environ.get("SLURM_STEP_ID")

if __name__ == "__main__":
    from ostap_parallel.faces import scoop
    executor = scoop._executor()
    executor.wait_for_hosts()
    found = list(futures.map(where, range(500)))
    print("sum", sum(value for value, _, _ in found))
    print("workers", sorted(executor.workers.values()))
    print("nodes", len({node for _, node, _ in found}), [h.state for h in executor.hosts])
"""


@pytest.fixture
def within(slurm, tmp_path, monkeypatch):
    """A function that runs text as a job on both nodes; returns what it printed."""
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)

    def run(text, *options):
        output = tmp_path / "output"
        script = f"#!/bin/bash\nexport PYTHONPATH={PACKAGE_PARENT}\n{text}\necho over $?\n"
        slurm.run("sbatch", f"--output={output}", *options, data=script)
        try:
            wait_until(lambda: output.exists() and "over" in output.read_text(), PATIENCE, text)
        except AssertionError:
            raise AssertionError(output.read_text()) from None
        wait_until(lambda: not slurm.jobs(), PATIENCE, "the job has ended")
        return output.read_text()

    return run


def test_a_program_in_a_job_reaches_its_nodes_by_srun(within, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = f"{sys.executable} -m ostap_parallel run --python {sys.executable}"
    # what the job asks for contradicts the options of a step, in part
    options = ["-N2", "-n4", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem-per-cpu=100M"]
    said = within(f"{launch} {tmp_path}/program.py", *options)
    assert said.splitlines()[-4:-1] == [
        f"sum {sum(n * n for n in range(500))}",
        "workers [2, 2]",
        "nodes 2 ['up']",
    ], said
    assert said.endswith("over 0\n"), said


def test_a_manager_in_a_job(within, tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from ostap_parallel import WorkManager\n"
        "with WorkManager(0, sys.argv[1:], way='srun', silent=True, python=sys.executable) as m:\n"
        "    m.wait_for_hosts()\n"
        "    print([(h.name, h.state, str(h.error)) for h in m.executor.hosts])\n"
        "    print(m.process(abs, [-1]))\n"
    )
    run = f"{sys.executable} {tmp_path}/program.py"
    names = f"export names=$(scontrol show hostnames $SLURM_JOB_NODELIST); {run} $names nowhere"
    said = within(names, "-N2", "-n2")
    assert "'nowhere', 'failed', 'nowhere: connect:" in said
    assert said.count("'up'") == 2
    assert said.endswith("[1]\nover 0\n"), said

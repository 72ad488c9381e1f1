"""The examples as a user runs them: with local workers and with two hosts that are configured."""

from __future__ import annotations

import site
from pathlib import Path

import functions
import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

EXAMPLES = functions.PROJECT / "examples"


@pytest.fixture
def home(hosts, tmp_path, monkeypatch) -> Path:
    """A home directory whose settings name two hosts, which find what is installed here."""
    installed = ":".join(site.getsitepackages())
    (tmp_path / ".ostaprc").write_text(
        "[Parallel]\nppservers = h1*1 h2*1\n"
        f"ssh_options = -F {hosts.ssh_config}\nenvironment = export PYTHONPATH={installed}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# what each prints last
PRINTED = {
    "tqdm_progress.py": "303 primes",
    "scipy_minimise.py": "minimum at 1.0 1.0 1.0",
    "sklearn_select.py": "best C 100.0, score 0.97",
    "emcee_sample.py": "mean 3.0, width 0.5",
}
HEAVY = {*PRINTED} - {"tqdm_progress.py"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n in HEAVY)) for n in PRINTED]
)
def test_script(name, home):
    assert functions.run_python(EXAMPLES / name, cwd=home).splitlines()[-1] == PRINTED[name]


def test_notebook(home):
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output["data"]["text/plain"] for output in outputs] == ["3.14", "4"]


@pytest.mark.heavy
def test_roofit(home, monkeypatch):
    pytest.importorskip("ROOT", reason="the wheel is had by: pip install --pre root")
    monkeypatch.chdir(home)
    notebook = nbformat.read(EXAMPLES / "roofit_toys.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output["data"] for output in outputs if output.output_type == "execute_result"]
    assert [data["text/plain"] for data in shown[:2]] == ["400", "(True, True)"]
    assert "image/png" in shown[2]


def test_every_example_is_tested():
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {*PRINTED, "deviations.py", "notebook.ipynb", "roofit_toys.ipynb"}


@pytest.mark.parametrize("kind", ["multiprocessing", "hosts", "slurm", "sge"])
def test_any_pool(kind, home, request):
    environ = {}
    if kind in ("slurm", "sge"):
        environ = request.getfixturevalue(kind).environ
    script = EXAMPLES / "deviations.py"
    printed = functions.run_python(script, kind, cwd=home, **environ)
    assert printed.splitlines()[-1] == "22.28, 73 events"
    assert not (home / ".ostap_parallel_jobs").exists()

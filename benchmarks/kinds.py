"""What dill, cloudpickle and this package make of each kind of what scripts define.

    python -m benchmarks.kinds

The programs are those of tests/kinds.py. Each of their lines that sends something is tried by
itself: the function and its item go to another interpreter, which has an empty `__main__`, and
the result comes back. Writes kinds.md.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PICKLERS = ("dill", "cloudpickle", "ostap_parallel")

# Seconds that one line may take: what takes longer hangs.
PATIENCE = 15

HEADER = """\
# Kinds of what scripts define

Written by `python -m benchmarks.kinds`. Each program of `tests/kinds.py` defines things of one
kind in a script, and sends them, line by line, to a process that cannot import the script: as
functions, within them, as items and as results. Given is how many of its lines had the right
outcome. dill and cloudpickle are taken as they are, with their own `dumps` and `loads` at both
ends (dill with `recurse`); a line that hangs counts as wrong.
"""

WORKER = """
import importlib, sys
pickler = importlib.import_module(sys.argv[1])
read, write = sys.stdin.buffer, sys.stdout.buffer
sys.stdout = sys.stderr
while size := read.read(8):
    try:
        function, item = pickler.loads(read.read(int.from_bytes(size, "big")))
        answer = pickler.dumps((True, function(item)))
    except BaseException as exc:
        try: answer = pickler.dumps((False, exc))
        except Exception: answer = pickler.dumps((False, RuntimeError(repr(exc))))
    write.write(len(answer).to_bytes(8, "big") + answer)
    write.flush()
"""


class Through:
    """A manager, as far as the programs need one, whose worker gets what a pickler makes."""

    def __init__(self, name: str) -> None:
        self._pickler: Any = importlib.import_module(name)
        if name == "dill":  # otherwise no global variable of the script travels
            self._pickler.settings["recurse"] = True
        self._words = [sys.executable, "-c", WORKER, name]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Through:
        return self

    def __reduce__(self) -> Any:
        return str, ("the manager",)  # dill sends all global variables

    def __exit__(self, *error: object) -> None:
        self.stop()

    def process(self, function: Any, items: Any, **more: Any) -> list[Any]:
        """Return what a worker makes of the items."""
        return [self._call(function, item) for item in items]

    def _call(self, function: Any, item: Any) -> Any:
        data = self._pickler.dumps((function, item))
        if self._process is None:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        write, read = self._process.stdin, self._process.stdout
        assert write is not None
        assert read is not None
        write.write(len(data).to_bytes(8, "big") + data)
        write.flush()
        size = read.read(8)
        ok, value = self._pickler.loads(read.read(int.from_bytes(size, "big")))
        if not ok:
            raise value
        return value

    def stop(self) -> None:
        """End the worker; the next call starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def manager_for(pickler: str) -> Any:
    """Return what takes the part of the manager in a program."""
    if pickler == "ostap_parallel":
        from ostap_parallel import WorkManager

        return WorkManager(1, silent=True)
    return Through(pickler)


def _is_over(*_: object) -> None:
    raise TimeoutError


def run_lines(text: str, names: dict[str, Any], manager: Any) -> tuple[int, int]:
    """Run a program; return how many of its lines that send something went well, and of how many.

    Called by the program itself, in its `__main__`.
    """
    good, count = 0, 0
    signal.signal(signal.SIGALRM, _is_over)
    with manager as names["wm"]:
        for line in ast.parse(text).body:
            sends = any(isinstance(one, ast.Name) and one.id == "wm" for one in ast.walk(line))
            signal.alarm(PATIENCE)
            try:
                exec(compile(ast.Module([line], []), "<line>", "exec"), names)
                good += sends
            except BaseException:
                if "-v" in sys.argv:
                    print(ast.unparse(line), file=sys.stderr)
                    traceback.print_exc()
                if isinstance(manager, Through):
                    manager.stop()
            finally:
                signal.alarm(0)
            count += sends
    return good, count


SCRIPT = """
{preamble}
{head}
if __name__ == "__main__":
    from benchmarks.kinds import manager_for, run_lines
    print("of", *run_lines({rest!r}, globals(), manager_for({pickler!r})), flush=True)
"""


def measure(kinds: Any, name: str, pickler: str) -> tuple[int, int] | None:
    """Return what `run_lines` returns for a kind; ``None`` if the program itself fails."""
    head, _, rest = textwrap.dedent(kinds.KINDS[name]).partition("# run\n")
    words = {"preamble": kinds.PREAMBLE, "head": head, "rest": rest}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(SCRIPT.format(pickler=pickler, **words))
        environ = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(
            [sys.executable, script, *sys.argv[1:]],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=None if "-v" in sys.argv else subprocess.DEVNULL,
            text=True,
            timeout=300,
        )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("of ")]
    return (int(lines[-1][1]), int(lines[-1][2])) if lines else None


def main() -> None:
    """Measure all kinds, and write the table."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    kinds: Any = importlib.import_module("kinds")
    rows, wholes = [], dict.fromkeys(PICKLERS, 0)
    skipped = {name for name, since in kinds.RECENT.items() if sys.version_info < since}
    skipped |= {k for k, module in kinds.NEEDS.items() if not importlib.util.find_spec(module)}
    names = [name for name in kinds.KINDS if name not in skipped | {kinds.WITH_POOL}]
    for name in names:
        found = {pickler: measure(kinds, name, pickler) for pickler in PICKLERS}
        cells = []
        for pickler, result in found.items():
            good, count = result or (0, 0)
            is_whole = bool(count) and good == count
            wholes[pickler] += is_whole
            cells.append("all" if is_whole else f"{good} of {count}" if result else "none")
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    titles = [f"{pickler} {version(pickler)}" for pickler in PICKLERS[:2]] + ["ostap_parallel"]
    table = [f"| kind | {' | '.join(titles)} |", "|---|" + "---|" * len(titles), *rows]
    totals = " | ".join(map(str, wholes.values()))
    table.append(f"| kinds as a whole, of {len(names)} | {totals} |")
    where = f"Python {platform.python_version()}."
    (HERE / "kinds.md").write_text("\n".join([HEADER, where, "", *table, ""]))


if __name__ == "__main__":
    main()

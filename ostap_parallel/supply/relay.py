"""The way through a relay: all streams to a machine over one program that leads to bash there.

That program is srun, qrsh, or ssh to where these are; for both ends see `near` and `worker.far`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import ostap_parallel
from ostap_parallel.errors import HostError
from ostap_parallel.supply import near
from ostap_parallel.supply.private import control_directory
from ostap_parallel.supply.processes import Done
from ostap_parallel.supply.ways import LOOPBACK, SPARE_LINES, Verdict, pack, unpack
from ostap_parallel.worker import far, mux

# Seconds that a control message may take.
PATIENCE = 30.0

# Has bash become the far end, by whatever Python there is. It is one command: all else that bash
# has not read yet is the far end's.
_BOOTSTRAP = """\
{{ for op_python in {pythons}; do
  type -P -- "$op_python" >/dev/null && exec "$op_python" -I -S -c {code} {keepalive} {tag}
done
echo "no python3 there, which is needed before the user's scripts have run; PATH is $PATH" >&2
exit 127; }}
"""

Tell = Callable[[str], str]


class Relay:
    """One program with many streams, see `ways.Way`.

    Parameters
    ----------
    label
        The machine, as errors name it.
    directory
        A private one, short enough for a socket.
    program
        Leads to bash on the machine.
    keepalive
        Seconds of silence after which the far end ends.
    tag
        A word in the far end's command line.
    python
        What the far end is run by if it is there, before others.
    judge
        What the words of the program mean when it has failed.
    queued
        Why the machine has to be waited for, if a line tells.
    """

    def __init__(
        self,
        label: str,
        directory: Path,
        program: Sequence[str],
        *,
        keepalive: float,
        python: str = "python3",
        tag: str = "",
        judge: Callable[[str], Verdict] = lambda words: "failed",
        queued: Tell = lambda line: "",
    ) -> None:
        self.label = label
        self.directory = directory
        self.program = list(program)
        self.keepalive = keepalive
        self.python = python
        self.tag = tag
        self.queued = queued
        self._judge = judge

    def argv(self) -> list[str]:
        """Return the near end, which starts the program."""
        pythons = [self.python, "python3", "/usr/bin/python3"]
        text = _BOOTSTRAP.format(
            pythons=" ".join(map(shlex.quote, dict.fromkeys(pythons))),
            code=shlex.quote(text_of(mux, far)),
            keepalive=self.keepalive,
            tag=shlex.quote(self.tag),
        )
        (self.directory / "far").write_text(SPARE_LINES + text)
        (self.directory / "near").write_text(text_of(mux, near))
        return [*self._near(), str(self.directory), str(self.keepalive), *self.program]

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return what runs a program there, as a program here."""
        return [*self._near(), "exec", str(self.directory / "relay"), *argv]

    def _near(self) -> list[str]:
        # a program of its own: what importing this package takes would delay each of them
        return [sys.executable, "-I", "-S", str(self.directory / "near")]

    def run(self, argv: Sequence[str], data: bytes = b"", timeout: float | None = None) -> Done:
        """Run a program there; raises subprocess.TimeoutExpired.

        As `command` does, but without a process for it here.
        """
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(data)
            files[0].seek(0)
            status = self._run(argv, [file.fileno() for file in files], timeout)
            for file in files[1:]:
                file.seek(0)
            return Done(status, files[1].read(), files[2].read())

    def _run(self, argv: Sequence[str], descriptors: list[int], timeout: float | None) -> int:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(timeout)
            try:
                near.order(control, str(self.directory / "relay"), list(argv), descriptors)
                return near.status_of(control)
            except TimeoutError:
                raise subprocess.TimeoutExpired(argv, timeout or 0.0) from None
            except OSError:  # it has ended, and says why
                return mux.FAILED

    def copy(self, files: Mapping[str, bytes], directory: str, timeout: float) -> None:
        """Write files into a directory there."""
        data = unpack(directory).encode() + pack(files)
        try:
            done = self.run(["bash", "-s"], data, timeout)
        except subprocess.TimeoutExpired as exc:
            raise HostError(self.label, "copy", f"not done after {timeout:.0f} s") from exc
        words = done.words
        if done.status or (done.status is None and words):
            reason = words or f"copying ended with exit status {done.status}"
            raise HostError(self.label, "copy", reason)

    def forward(self, port: int, wanted: int = 0, to: str = LOOPBACK) -> tuple[str, int]:
        """Return an address here that leads to a port of loopback there."""
        if to != LOOPBACK:
            raise HostError(self.label, "tunnel", f"it leads to loopback there, not to {to}")
        return LOOPBACK, self._ask({"do": "forward", "port": port, "wanted": wanted})

    def withdraw(self, port: int) -> None:
        """Leave it: it ends with the session."""

    def backward(self, port: int) -> int:
        """Return a port of loopback there that leads to a port here."""
        return self._ask({"do": "backward", "port": port})

    def judge(self, status: int | None, words: str) -> Verdict:
        """Say what the end of the near end means."""
        return self._judge(words) if status in (mux.FAILED, None) else "ended"

    def answers(self) -> bool:
        """Return whether bash, with nothing to read, comes and goes there."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return self.run(["bash", "-s"], timeout=5).status in (0, None)
        return False

    def _ask(self, order: Mapping[str, object]) -> int:
        try:
            with socket.socket(socket.AF_UNIX) as control:
                control.settimeout(PATIENCE)
                control.connect(str(self.directory / "relay"))
                control.sendall(json.dumps(order).encode() + b"\n")
                answer = control.recv(64)
        except OSError as exc:
            raise HostError(self.label, "tunnel", f"the relay does not answer: {exc}") from exc
        if not answer:
            raise HostError(self.label, "tunnel", "the relay has ended")
        return int(answer)


@contextmanager
def open_relay(
    label: str,
    program: Sequence[str],
    *,
    keepalive: float,
    python: str = "python3",
    tag: str = "",
    judge: Callable[[str], Verdict] = lambda words: "failed",
    queued: Tell = lambda line: "",
) -> Iterator[Relay]:
    """Make a way whose control socket is in a private directory; the parameters are `Relay`'s."""
    with control_directory() as directory:
        yield Relay(
            label,
            directory,
            program,
            keepalive=keepalive,
            python=python,
            tag=tag,
            judge=judge,
            queued=queued,
        )


def make_texts() -> None:
    """Make the texts of both ends; who needs them finds them."""
    for end in far, near:
        text_of(mux, end)


_making = threading.Lock()


def text_of(*modules: ModuleType) -> str:
    """Return modules as one program, without what old Pythons do not know."""
    with _making:  # Python 3.11 mixes up what threads parse at the same time
        return _make(*modules)


@functools.cache
def _make(*modules: ModuleType) -> str:
    texts = []
    for module in modules:
        tree = _Plain().visit(ast.parse(Path(str(module.__file__)).read_text()))
        texts.append(ast.unparse(ast.fix_missing_locations(tree)))
    return "\n".join(texts)


class _Plain(ast.NodeTransformer):
    """Leaves out annotations, docstrings, and imports from ``__future__`` and of our own."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        name = str(node.module).partition(".")[0]
        return None if name in ("__future__", ostap_parallel.__name__) else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return node.value and ast.Assign([node.target], node.value)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        self.generic_visit(node)
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

"""How a machine is reached: what differs between ssh, srun and the like, and nothing else."""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

Verdict = Literal["dropped", "passing", "failed", "ended"]
"""Of a session that has ended: ``"dropped"`` is worth another try at once, ``"passing"`` one
later, ``"failed"`` none; in the case of ``"ended"`` the way was good, and bash has ended."""


# How a machine sees itself.
LOOPBACK = "127.0.0.1"

# How often a way is tried that was dropped.
TRIES = 8

# In the time that makes a silent host a lost one, each side can be heard this often.
BEATS = 3

# Where a start-up file reads a line or a few that are meant for bash, it shall get these.
SPARE_LINES = "\n" * 16


class Way(Protocol):
    """One connection to a machine.

    Attributes
    ----------
    label
        The machine, as errors name it.
    directory
        A private one, for what leads there.
    """

    label: str
    directory: Path

    def argv(self) -> list[str]:
        """Return the program whose standard input and output lead to bash on the machine."""

    def copy(self, files: Mapping[str, bytes], directory: str, timeout: float) -> None:
        """Write files into a directory there, once the session is up; raises HostError."""

    def forward(self, port: int, wanted: int = 0, to: str = LOOPBACK) -> tuple[str, int]:
        """Return an address here that leads to a port of loopback there; raises HostError.

        It is good until the session ends, or until `withdraw`. If `wanted` is free, it is to be
        the port here. With `to` it leads to that machine, as the one there sees it.
        """

    def withdraw(self, port: int) -> None:
        """Have a port here lead nowhere that `forward` has returned."""

    def backward(self, port: int) -> int:
        """Return a port of loopback there that leads to a port here; raises HostError."""

    def judge(self, status: int | None, words: str) -> Verdict:
        """Say what the exit status of the program and its last words mean."""

    def queued(self, line: str) -> str:
        """Return why the machine has still to be waited for, if a line of its errors tells."""

    def answers(self) -> bool:
        """Return whether a program that reads nothing, started on the session's way, has ended.

        If so, and bash says nothing, a start-up file there reads what is meant for bash.
        """


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return files as an archive that `unpack` writes; only their owner can read them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)  # of nobody: there root would make it ours
            entry.size, entry.mode = len(data), 0o600
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def unpack(directory: str) -> str:
    """Return the bash text that writes the archive which follows it into a directory."""
    return f"{SPARE_LINES}exec tar -x -f - -C {shlex.quote(directory)}\n"


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files that only we can read."""
    for name, data in files.items():
        path = directory / name
        path.touch(mode=0o600)
        path.write_bytes(data)

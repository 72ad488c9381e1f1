"""What the processes of this machine are told when they are started, and where a worker is."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import pickle
import socket
import struct
from typing import Any

START = (
    "import sys; sys.path[:] = {path!r}; "
    "from ostap_parallel.worker.{module} import main; main({arguments!r})"
)

SIZE = struct.Struct("!Q")  # precedes each message
DESCRIPTORS = 6  # of a worker: see `process.main`, and standard output and error


def command(path: list[str], module: str, arguments: object) -> list[str]:
    """Return the words behind the interpreter that call the `main` of a module of this room.

    It gets the module search path as an argument, not in the environment, where the programs that
    tasks start would find it too.
    """
    return ["-c", START.format(path=path, module=module, arguments=arguments)]


def receive(control: socket.socket, descriptors: list[int]) -> Any:
    """Return the next message, ``None`` at the end; add the descriptors that come with it."""
    data, ancillary, _, _ = control.recvmsg(
        SIZE.size, socket.CMSG_LEN(DESCRIPTORS * array.array("i").itemsize)
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            descriptors.extend(numbers)
    data = _receive_all(control, data, SIZE.size)
    if len(data) < SIZE.size:
        return None
    (size,) = SIZE.unpack(data)
    body = _receive_all(control, b"", size)
    return pickle.loads(body) if len(body) == size else None


def _receive_all(control: socket.socket, data: bytes, size: int) -> bytes:
    while len(data) < size and (part := control.recv(min(size - len(data), 1 << 16))):
        data += part
    return data


def send(control: socket.socket, message: Any, descriptors: list[int] | None = None) -> None:
    """Send a message, with descriptors."""
    body = pickle.dumps(message)
    head = SIZE.pack(len(body))
    if descriptors:
        rights = array.array("i", descriptors)
        control.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        control.sendall(body)
    else:
        control.sendall(head + body)


# What a worker shares with its server, see `Executing.position`: three integers.
POSITION = struct.Struct("qqq")


def open_position() -> int:
    """Return the descriptor of memory for a worker's position, at no item."""
    # os.memfd_create is not in all builds of Python: conda's and uv's support older systems.
    descriptor: int = ctypes.CDLL(None, use_errno=True).memfd_create(b"position", 1)  # CLOEXEC
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "memfd_create failed")
    os.write(descriptor, POSITION.pack(-1, 0, -1))
    return descriptor


def set_name(name: str) -> None:
    """Have the system show a name for this process."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME

"""A client and a server prove to each other that they know a key, before anything else is read.

The server says what it is, with a nonce; the client answers with a nonce of its own and its proof;
the server with its own proof. Every message has a fixed size. A proof is an HMAC of the role, of
both nonces and of all that was said, so that none is of use a second time or in the other role.

Servers that share a secret do not share a key. It is made of the secret and of the port by which
clients reach the server: whoever listens on another port cannot pass a client on to that server,
and a server cannot pass for another one.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time

from ppft.transport import version

# Seconds that a greeting may take.
TIMEOUT = 20.0

_MAGIC = b"ostap-parallel/3"
_VERSION_SIZE = 32
_NONCE_SIZE = _PROOF_SIZE = 32


class GreetingError(Exception):
    """The other end is not the one that it has to be."""


def derive_key(secret: str, port: int) -> bytes:
    """Return the key of the server that clients reach by a local port."""
    text = secret.encode("utf-8", "surrogatepass")
    return hmac.digest(text, b"%s server on port %d" % (_MAGIC, port), "sha256")


def greet_client(peer: socket.socket, key: bytes) -> None:
    """Greet as a server; the peer has proved that it knows the key when this returns.

    Raises GreetingError, or OSError if the connection ends or the time is up.
    """
    deadline = time.monotonic() + TIMEOUT
    hello = _MAGIC + _version_field() + secrets.token_bytes(_NONCE_SIZE)
    peer.sendall(hello)
    nonce = _receive(peer, _NONCE_SIZE, deadline)
    if not _is_proof(_receive(peer, _PROOF_SIZE, deadline), key, b"client", hello + nonce):
        raise GreetingError("the client does not know our secret")
    peer.sendall(_prove(key, b"server", hello + nonce))
    peer.settimeout(None)


def greet_server(peer: socket.socket, key: bytes) -> None:
    """Greet as a client; the peer has proved that it knows the key when this returns.

    Raises GreetingError, or OSError if the connection ends or the time is up.
    """
    deadline = time.monotonic() + TIMEOUT
    hello = _receive(peer, len(_MAGIC), deadline)
    if hello != _MAGIC and hello.startswith(_MAGIC[:-1]):
        theirs_text, ours = hello.decode("ascii", "backslashreplace"), _MAGIC.decode()
        raise GreetingError(
            f"it speaks {theirs_text}, the caller {ours}: install the same version of both"
        )
    if hello != _MAGIC:
        raise GreetingError(
            "what answers is no server of ours, and cannot prove to be one (a ppserver of ppft "
            "cannot): start servers by ostap-parallel launch"
        )
    hello += (theirs := _receive(peer, _VERSION_SIZE, deadline))
    if theirs != _version_field():
        name = theirs.rstrip(b"\0").decode("ascii", "backslashreplace")
        raise GreetingError(
            f"it runs ppft {name!r}, the caller ppft {version!r}: install the same version"
        )
    hello += _receive(peer, _NONCE_SIZE, deadline)
    nonce = secrets.token_bytes(_NONCE_SIZE)
    peer.sendall(nonce + _prove(key, b"client", hello + nonce))
    try:
        proof = _receive(peer, _PROOF_SIZE, deadline)
    except ConnectionError as exc:
        raise GreetingError("the server does not accept our secret") from exc
    if not _is_proof(proof, key, b"server", hello + nonce):
        raise GreetingError(
            "what answers does not know our secret: it is not the server that was started, "
            "another program has taken its port"
        )


def _version_field() -> bytes:
    return str(version).encode().ljust(_VERSION_SIZE, b"\0")[:_VERSION_SIZE]


def _prove(key: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.digest(key, role + transcript, "sha256")


def _is_proof(proof: bytes, key: bytes, role: bytes, transcript: bytes) -> bool:
    return hmac.compare_digest(proof, _prove(key, role, transcript))


def _receive(peer: socket.socket, size: int, deadline: float) -> bytes:
    """Return exactly `size` bytes, whatever time each takes by itself."""
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the greeting took too long")
        peer.settimeout(left)
        part = peer.recv(size - len(data))
        if not part:
            raise ConnectionError("the connection was closed")
        data += part
    return data

"""How processes find each other for their first meeting: sockets that listen, and those that come and say HELLO.

A listener takes whoever knows the secret beside its address, once for each number that it expects.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection

import attrs

from exec_core.errors import WorkerStartupError
from exec_torchrun._env import LauncherEnv
from exec_torchrun._frames import Connection, Frame, Kind, wait_readable

HELLO_S = 10.0  # for a connected process to say HELLO
RETRY_S = 0.005
_WARNING_S = 0.2  # how often a listener asks for a warning

Problem = tuple[int, str] | bytes | None  # a rank and what about it, or an error of its own, pickled


@attrs.frozen
class Address:
    """Where a process listens.

    Attributes:
        places: alternatives: host and port, or the name of a socket of this machine.
        secret: proves to it that one was told the address.
    """

    places: tuple[tuple[str, int] | bytes, ...]
    secret: bytes


def listen(env: LauncherEnv, stack: contextlib.ExitStack) -> tuple[socket.socket, Address]:
    """A listening socket: one of this machine alone when all ranks are here, otherwise on every interface."""
    places: tuple[tuple[str, int] | bytes, ...]
    if env.is_one_machine:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")  # the kernel finds a name, which is in no directory
        listener.listen()
        places = (listener.getsockname(),)
    else:
        dual = socket.has_dualstack_ipv6()
        listener = socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        )
        port, own = listener.getsockname()[1], _address_towards(env.master_addr, env.master_port)
        # Rank 0 is where MASTER_ADDR leads, by a name that all ranks can use, but not always: a restarted job may keep it.
        places = ((env.master_addr, port), (own, port)) if env.rank == 0 else ((own, port),)
    stack.callback(listener.close)
    return listener, Address(places, secrets.token_bytes(16))


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to ``host``. Nothing is sent: connecting a datagram socket only chooses a route."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0])


def accept(
    listener: socket.socket,
    secret: bytes,
    expected: Collection[int],
    deadline: float,
    warning: Callable[[], bytes | None] = lambda: None,
) -> tuple[dict[int, tuple[Connection, Frame]], Problem]:
    """Connections of the ``expected`` with their HELLO, and what went wrong; ``warning`` is asked while there is time.

    Args:
        secret: what a visitor must know; who does not is sent away.
        deadline: until when to wait for them (monotonic).
        warning: says, when there is one, why somebody cannot come.
    """
    came: dict[int, tuple[Connection, Frame]] = {}
    while len(came) < len(expected):
        if not wait_readable(listener, min(_WARNING_S, deadline - time.monotonic())):
            if (said := warning()) is not None:
                return came, said
            if time.monotonic() < deadline:
                continue
            missing = [number for number in expected if number not in came]
            return came, (missing[0], f"has not come to the ranks' first meeting; missing: {missing}")
        connection = Connection(listener.accept()[0])
        hello = connection.receive(time.monotonic() + HELLO_S)
        if hello is None or hello.kind is not Kind.HELLO or hello.parts[0][1] != secret or hello.turn not in expected:
            connection.close()
        elif hello.turn in came:
            connection.close()
            return came, (hello.turn, "has come twice: two processes have the same RANK")
        else:
            came[hello.turn] = connection, hello
    return came, None


def try_connect(address: Address, number: int, body: bytes) -> Connection | None:
    """A connection to ``address`` on which ``number`` has said HELLO with ``body``; None when nobody is there."""
    for place in address.places:
        with contextlib.suppress(OSError):
            connection = Connection(_connected(place))
            connection.send(Frame(Kind.HELLO, number, ((os.getpid(), address.secret), (number, body))))
            return connection
    return None


def _connected(place: tuple[str, int] | bytes) -> socket.socket:
    if isinstance(place, tuple):
        return socket.create_connection(place, timeout=HELLO_S)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(place)
    except OSError:
        sock.close()
        raise
    return sock


def connect(address: Address, number: int, body: bytes, deadline: float) -> Connection:
    """`try_connect` until somebody is there.

    Raises:
        WorkerStartupError: nobody is, by ``deadline`` (monotonic).
    """
    while (connection := try_connect(address, number, body)) is None:
        pause(deadline, 0)
    return connection


def pause(deadline: float, rank: int) -> None:
    """A moment, before ``rank`` is looked for again.

    Raises:
        WorkerStartupError: it is past ``deadline`` (monotonic).
    """
    if time.monotonic() >= deadline:
        raise WorkerStartupError(rank, "launch", "cannot be reached for the ranks' first meeting")
    time.sleep(RETRY_S)


def remaining(deadline: float) -> datetime.timedelta:
    """What is left until ``deadline`` (monotonic), as torch's stores take it: never nothing, never for ever."""
    return datetime.timedelta(seconds=min(max(0.001, deadline - time.monotonic()), 10**8))

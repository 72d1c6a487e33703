"""How processes find each other for their first meeting: sockets that listen, and those that come and say HELLO.

A listener takes whoever knows the secret beside its address, once for each number that it expects.
"""

from __future__ import annotations

import contextlib
import datetime
import math
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
_LOOK_S = 0.1  # how often who waits looks whether it is to give up, or has been warned
_PROBE_S = 0.5  # for somebody who listens to take a connection
GAVE_UP = "was shut down while the ranks were meeting"

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


class Patience:
    """Until when a rank waits for the others, unless another thread has it give up before.

    Args:
        deadline: when it ends (monotonic).
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self.given_up = False

    def give_up(self) -> None:
        """Ends it now. No lock: it may be called in a signal handler, above the thread that waits."""
        self.given_up = True

    @property
    def left_s(self) -> float:
        """What is left of it, in seconds; 0 when it has ended."""
        return 0.0 if self.given_up else max(0.0, self._deadline - time.monotonic())

    @property
    def left(self) -> datetime.timedelta:
        """The same as torch's stores take it: never nothing, never for ever."""
        return datetime.timedelta(seconds=min(max(0.001, self.left_s), 10**8))

    def check(self, rank: int) -> None:
        """Raises `WorkerStartupError` of ``rank``, which waits, if it has been given up."""
        if self.given_up:
            raise WorkerStartupError(rank, "launch", GAVE_UP)


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
    patience: Patience,
    warning: Callable[[], bytes | None] = lambda: None,
) -> tuple[dict[int, tuple[Connection, Frame]], Problem]:
    """Connections of the ``expected`` with their HELLO, and what went wrong; ``warning`` is asked while there is time.

    Args:
        secret: what a visitor must know; who does not is sent away.
        patience: how long to wait for them. Given up, it is the listener itself, number 0, that something is wrong with.
        warning: says, when there is one, why somebody cannot come.
    """
    came: dict[int, tuple[Connection, Frame]] = {}
    while len(came) < len(expected):
        if not wait_readable(listener, min(_LOOK_S, patience.left_s)):
            if (said := warning()) is not None:
                return came, said
            if patience.left_s:
                continue
            if patience.given_up:
                return came, (0, GAVE_UP)
            missing = [number for number in expected if number not in came]
            return came, (missing[0], f"has not come to the ranks' first meeting; missing: {missing}")
        connection = Connection(listener.accept()[0])
        hello = receive(connection, patience, HELLO_S)
        if hello is None or hello.kind is not Kind.HELLO or hello.parts[0][1] != secret or hello.turn not in expected:
            connection.close()
        elif hello.turn in came:
            connection.close()
            return came, (hello.turn, "has come twice: two processes have the same RANK")
        else:
            came[hello.turn] = connection, hello
    return came, None


def receive(connection: Connection, patience: Patience, at_most_s: float = math.inf) -> Frame | None:
    """The next frame; None when patience ends before it comes, after ``at_most_s`` seconds, or when no more will come."""
    until = time.monotonic() + at_most_s
    while (frame := connection.receive(0.0)) is None and not connection.ended:  # looks for a while all the same
        if not patience.left_s or time.monotonic() >= until:
            break
    return frame


def receive_descriptor(connection: Connection, patience: Patience) -> int | None:
    """What `Connection.send_descriptor` sent; None when patience ends before it comes."""
    while not wait_readable(connection.sock, min(_LOOK_S, patience.left_s)):
        if not patience.left_s:
            return None
    return connection.receive_descriptor()


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


def is_answered(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError, OverflowError):
        socket.create_connection((host, port), timeout=_PROBE_S).close()
        return True
    return False

"""What the driver and its fork server say to each other: pickled records over Unix sockets that keep their bounds.

driver --Open + socket--> server                       one session for each group of workers
driver <=Fork, Signal / Opened, Forked, Refused, Exited=> server   over that session's socket
"""

from __future__ import annotations

import signal
from typing import NamedTuple

MAX_BYTES = 1 << 16  # of a record; whatever may be larger travels in a memfd
MAX_FDS = 16
STACK_SIGNAL = (
    signal.SIGRTMAX - 3
)  # asks a worker for its stack, see `exec_mp._stacks`; by default it would end the process


class Open(NamedTuple):
    """Starts a session; the socket for it comes along."""

    preload: tuple[str, ...]
    sys_path: list[str]
    private_root: str


class Opened(NamedTuple):
    """The session is open, the modules are imported."""


class Refused(NamedTuple):
    """What was asked for last has failed."""

    why: str


class Fork(NamedTuple):
    """Start a worker. Descriptors come along: its boot record (a memfd), stdout, stderr, then those it finds after the record.

    ``execs`` runs a fresh interpreter in it. The kernel drops descriptors beyond a limit without a word, hence their number.
    """

    rank: int
    execs: bool
    descriptors: int


class Forked(NamedTuple):
    """The worker runs; its pidfd comes along, opened before anybody could have reaped it."""

    rank: int
    pid: int


class Signal(NamedTuple):
    """Send a signal to the process groups of all workers of the session."""

    number: int


class Exited(NamedTuple):
    """A worker has ended; ``code`` is the exit code, or ``-signal``, or None when nobody could tell."""

    rank: int
    pid: int
    code: int | None

"""What the driver and the workers of one generation share, and what a group tells its executor."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from exec_core import private
from exec_core.asynchronous import Room
from exec_mp._driver_channel import DriverChannel
from exec_mp._launcher import Session
from exec_mp._layout import Geometry
from exec_mp._output import WorkerOutput
from exec_mp._processes import Process
from exec_mp._stacks import Stacks

_END_S = 1.0  # for workers to end that the fork server kills


@attrs.frozen(kw_only=True)
class Hooks:
    """What a group tells its executor.

    Attributes:
        failed: ``fn(error, fail_pending)`` when a worker has died unasked.
        progress: ``fn(rank, done, total, what)``.
        room: told when a call has ended.
        log: the executor's logger.
    """

    failed: Callable[[BaseException, Callable[[], None]], None]
    progress: Callable[[int, int, int, str], None]
    room: Room
    log: Any


class Parts:
    """What the workers of one generation share with the driver; made before they are forked, closed after they have ended.

    Attributes:
        pids: process of each rank, entered as they are forked; of rank 0 this one, when it runs inline.
        processes: of the ranks that are not inline, likewise.
        rendezvous: memfd in which the ranks meet to build process groups.

    Raises:
        OSError, ExecutorError: when the system refuses something; then nothing is left.
    """

    def __init__(
        self,
        session: Session,
        geometry: Geometry,
        ranks: Sequence[int],
        output: Callable[[int], WorkerOutput],
        private_root: str,
    ) -> None:
        self.session = session
        self._private_root = private_root
        self.pids: dict[int, int] = {} if 0 in ranks else {0: os.getpid()}
        self.processes: dict[int, Process] = {}
        self.output: dict[int, WorkerOutput] = {}
        with contextlib.ExitStack() as made:
            self.channel = DriverChannel(geometry, ranks)
            made.callback(self.channel.close)
            self.rendezvous = os.memfd_create("exec-mp-rendezvous", os.MFD_CLOEXEC)
            made.callback(os.close, self.rendezvous)
            self.stacks = Stacks(ranks, self.channel.stacks)
            made.callback(self.stacks.close)
            for rank in ranks:
                self.output[rank] = output(rank)
                made.callback(self.output[rank].close)
            self._made = made.pop_all()

    def started(self, rank: int, pid: int, pidfd: int) -> None:
        """The process of ``rank`` runs. Takes ``pidfd`` over."""
        self.pids[rank] = pid
        self.processes[rank] = Process(pid, pidfd, self.output[rank].tail)
        self.output[rank].started(pid)

    def close(self) -> None:
        """First the workers end, should any still run, then what they use is taken away."""
        self.session.close()
        self._await_ends()
        private.sweep(self._private_root)  # a fork server that was killed could not
        self._made.close()
        while self.processes:  # last: a stack report may be sending a signal until `Stacks.close`
            os.close(self.processes.popitem()[1].pidfd)

    def _await_ends(self) -> None:
        poll, until = select.poll(), time.monotonic() + _END_S
        left = {process.pidfd for process in self.processes.values()}
        for pidfd in left:
            poll.register(pidfd, select.POLLIN)
        while left and time.monotonic() < until:
            for pidfd, _ in poll.poll(max(0.0, until - time.monotonic()) * 1e3):
                poll.unregister(pidfd)
                left.discard(pidfd)

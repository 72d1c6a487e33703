"""The worker processes of one generation: who is alive, how one ended, how the others are stopped.

    kernel --pidfd-------------> Processes          that a worker has ended
    fork server --Exited-------> Processes          with which exit code: only its parent is told
    Processes --Signal, pidfd--> workers            directly, so that it works while the server is busy; their groups by the server

Written by the receiver's background thread, where the handlers run; other threads read single attributes.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from exec_core.errors import WorkerDiedError
from exec_mp import _proc
from exec_mp._calls import DEATH_GRACE_S
from exec_mp._launcher import Session, end_groups
from exec_mp._oom import OomWatch
from exec_mp._protocol import Exited

_CODE_GRACE_S = 0.05  # the exit code follows the end itself; without the server's word it stays unknown
_KILL_GRACE_S = 1.0  # beyond the deadline of a shutdown, for the kernel to free what killed workers hold


@attrs.frozen
class Process:
    """A worker's process.

    Attributes:
        pidfd: readable when it has ended; belongs to `exec_mp._parts.Parts`.
        last_lines: what it has written last.
    """

    pid: int
    pidfd: int
    last_lines: Callable[[], Sequence[str]]


class Processes:
    """Watches the processes of the remote ranks.

    Args:
        call_of: method and number of the call that a rank is in.
        died: told of the first one that ends unasked, when the others are being stopped already.
    """

    def __init__(
        self,
        session: Session,
        processes: Mapping[int, Process],
        call_of: Callable[[int], tuple[str | None, int | None]],
        died: Callable[[BaseException], None],
    ) -> None:
        self._session, self._processes = session, dict(processes)
        self._call_of, self._died = call_of, died
        self._oom = OomWatch()
        self.alive = frozenset(processes)
        self.ended = threading.Event()  # none is alive
        self.leaving = False  # their ends are expected, or the first has been reported

    def handlers(self) -> dict[int, Callable[[], bool]]:
        """What to call when a descriptor has something to read; see `exec_mp._poller`."""
        ends = {p.pidfd: functools.partial(self._process_event, rank) for rank, p in self._processes.items()}
        return {self._session.fileno(): self.session_event, **ends}

    def session_event(self) -> bool:
        """The fork server has something to say, or is gone."""
        ends = self._session.exits()
        if ends is None:
            self._server_gone()
            return False
        self._take(ends)
        return True

    def _process_event(self, rank: int) -> bool:
        """The kernel says that the process of ``rank`` has ended."""
        until = time.monotonic() + _CODE_GRACE_S
        while rank in self.alive and self._session.wait(until - time.monotonic()):
            self.session_event()
        if rank in self.alive:  # the server is stopped or busy
            self._take([Exited(rank, self._processes[rank].pid, None)])
        return False

    def _take(self, ends: list[Exited]) -> None:
        ends = [end for end in ends if end.rank in self.alive]
        if not ends:
            return
        self.alive -= {end.rank for end in ends}
        try:
            if not self.leaving:
                ends += self._dying_too()
                # One that a signal has ended goes first: another may have left because it lost that one.
                self._report(min(ends, key=lambda end: end.code is None or end.code >= 0), ends)
        finally:
            if not self.alive:
                self.ended.set()

    def _dying_too(self) -> list[Exited]:
        """Others that were ending at the same moment: which was first cannot be told before all are reported."""
        until, ends = time.monotonic() + DEATH_GRACE_S, list[Exited]()
        while self.is_exiting(self.alive) and self._session.wait(until - time.monotonic()):
            more = self._session.exits()
            if more is None:
                break
            ends += (end for end in more if end.rank in self.alive)
            self.alive -= {end.rank for end in more}
        return ends

    def is_exiting(self, ranks: frozenset[int]) -> bool:
        """Whether the kernel is taking one of ``ranks`` down without having reported its end."""
        stats = (_proc.stat(self._processes[rank].pid) for rank in ranks if rank in self._processes)
        return any(stat is not None and stat.exiting for stat in stats)

    def _report(self, end: Exited, ends: Sequence[Exited]) -> None:
        code, killed_by = (end.code, None) if end.code is None or end.code >= 0 else (None, signal_name(-end.code))
        method, request_id = self._call_of(end.rank)
        error = WorkerDiedError(
            end.rank, end.pid, exit_code=code, signal_name=killed_by, method=method, request_id=request_id,
            last_log_lines=self._processes[end.rank].last_lines(), why=self._oom.hint() if killed_by == "SIGKILL" else "",
        )  # fmt: skip
        for other in ends:
            if other is not end:
                how = "an unknown exit code" if other.code is None else f"exit code {other.code}"
                error.add_note(f"at the same moment rank {other.rank} (pid {other.pid}) ended with {how}")
        self.abandon(error)

    def abandon(self, error: BaseException) -> None:
        """Ends all that are left, without asking: they may be stuck in a collective with one that is dead."""
        self.leaving = True
        self.signal(signal.SIGKILL)
        self._died(error)

    def _server_gone(self) -> None:
        end_groups([self._processes[rank].pid for rank in self.alive])
        self.alive = frozenset()
        try:
            if not self.leaving:
                why = f"{self._session.how_it_ended}, and the workers with it"
                hint = self._oom.hint()
                why = f"{why}: {hint}" if hint else why
                self.abandon(WorkerDiedError(None, None, why=why, last_log_lines=self._session.last_lines()))
        finally:
            self.ended.set()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Sends ``number`` to the process of ``rank``, or to all workers and their process groups."""
        for target in self.alive if rank is None else (rank,):
            try:
                signal.pidfd_send_signal(self._processes[target].pidfd, number)
            except OSError:  # it has ended
                continue
        if rank is None:
            self._session.signal(number)

    def stop(self, deadline: float, wait_ended: Callable[[float], bool], log: Any) -> None:
        """They have been asked to leave: TERM at half the time that is left, then KILL, then reaped."""
        now = time.monotonic()
        left = max(0.0, deadline - now)
        for share, number in ((0.5, signal.SIGTERM), (0.8, signal.SIGKILL)):
            if wait_ended(now + left * share):
                return
            self.signal(number)
        if not wait_ended(max(deadline, time.monotonic()) + _KILL_GRACE_S):
            log.error("workers outlive SIGKILL; the kernel still holds them", ranks=sorted(self.alive))


def signal_name(number: int) -> str:
    """Such as ``SIGKILL``; real-time signals have no names of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

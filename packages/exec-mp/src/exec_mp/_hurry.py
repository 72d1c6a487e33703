"""Helps a thread that stands in line for a processor while another one is idle, where there are few of them.

A waiter wakes up, or has given way, on a processor that somebody else has just begun to use, perhaps for milliseconds inside
the kernel. The scheduler sees that another processor is idle with its next tick, which comes after up to 4 ms; a step of
decoding is late by that. But who has sent what the thread waits for is awake, elsewhere, and about to sleep. So it looks after
a while whether it was taken, and if not, lends its own processor.

A thread is moved by binding it to a processor and freeing it at once. In between it must not get on with its work: what it
starts there, a thread or a process, would stay bound. So

    who waits    says so in a word of its own, and, when it has what it waited for, takes that back, then looks at the mover's word
    who moves    says so in a word of its own, then looks whether the other still waits, and moves it only then

and who sees that it is being moved waits until that is over.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from os import sched_yield
from time import monotonic

from exec_mp import _layout
from exec_mp._layout import MAY_USE_WORDS, Shared
from exec_mp._spread import processor

REQUEST_LATE_S = 250e-6  # a rank has begun by then, be it from a nap
ANSWER_LATE_S = 150e-6  # the driver has seen by then what has come: one thread, which was called last
_MOVED_WITHIN_S = 0.02  # else who moves has been stopped or killed on the way
_PROCESSOR = 35  # field of /proc/.../stat after the state


def scarce(world_size: int) -> bool:
    """Whether the calling thread may use hardly more processors than there are driver and ranks, but several."""
    return 1 < len(os.sched_getaffinity(0)) <= world_size + 1


def hurry(pid: int, tid: int, waits: Callable[[set[int]], bool]) -> bool:
    """Moves thread ``tid`` of process ``pid`` here if it stands in line elsewhere, and leaves it as free as it was.

    Args:
        waits: whether it still does, asked last; told which processors the thread may use. An OverflowError says that there is
            no way to note that, and nothing is done.

    Returns:
        Whether it was moved. Not if it sleeps, may not run here or is gone, or if the system refuses.
    """
    here = processor()
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
        if state != b"R" or int(fields[_PROCESSOR]) == here:
            return False
        allowed = os.sched_getaffinity(tid)
        if len(allowed) < 2 or here not in allowed or not waits(allowed):  # bound by somebody, perhaps for a moment
            return False
        # Both at once: no signal handler comes in between, so nobody is left with one processor.
        list(map(os.sched_setaffinity, (tid, tid), ({here}, allowed)))
    except (OSError, OverflowError):
        return False
    return True


class DriverLine:
    """What the driver knows of who stands in line.

    Attributes:
        scarce: whether there are so few processors that anybody does while one is idle.
    """

    def __init__(self, shared: Shared, remote_ranks: Sequence[int]) -> None:
        self.scarce = scarce(shared.geometry.world_size)
        self._shared, self._words = shared, shared.words
        self._places = [
            (rank, shared.word(_layout.IN_LINE, rank), shared.word(_layout.REQUESTS_READ, rank))
            for rank in remote_ranks
        ]
        watch = min(remote_ranks, default=0)  # one rank is enough to watch, and must be alone in that
        self._waiter, self._moves, self._may_use = (
            shared.word(row, watch) for row in (_layout.WAITER, _layout.MOVES, _layout.MAY_USE)
        )
        self._in_order = threading.Lock()  # taken for the locked instruction alone

    def waits(self, tid: int) -> None:
        """Thread ``tid`` of this process waits for answers, and may be moved."""
        self._words[self._waiter] = os.getpid() << 32 | tid

    def goes_on(self, tid: int) -> None:
        """It waits no longer; returns when nobody moves it."""
        self._words[self._waiter] = 0
        with self._in_order:
            pass
        if self._words[self._moves]:
            until = monotonic() + _MOVED_WITHIN_S
            while self._words[self._moves]:
                if monotonic() > until:
                    self._free(tid)
                    return
                sched_yield()

    def _free(self, tid: int) -> None:
        """Undoes what a rank has begun and not ended."""
        mask = int.from_bytes(self._words[self._may_use : self._may_use + MAY_USE_WORDS].tobytes(), "little")
        with contextlib.suppress(OSError):
            os.sched_setaffinity(tid, {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1})

    def late(self, ranks: Sequence[int], sent: int) -> list[int]:
        """Those of ``ranks`` that wait although there are requests, ``sent`` in all, that they have not read."""
        words = self._words
        return [rank for rank, in_line, read in self._places if words[in_line] and words[read] < sent and rank in ranks]

    def hurry(self, rank: int, pid: int) -> None:
        """Moves ``rank``, which is process ``pid``, if it stands in line."""
        hurried, in_line = self._shared.word(_layout.HURRIED, rank), self._shared.word(_layout.IN_LINE, rank)

        def waits(_: set[int]) -> bool:
            self._words[hurried] = 1
            with self._in_order:
                pass
            return bool(self._words[in_line] != 0)

        try:
            hurry(pid, pid, waits)
        finally:
            self._words[hurried] = 0


class RankLine:
    """What a rank can do for the driver's thread that waits for it, and says of itself."""

    def __init__(self, shared: Shared, rank: int) -> None:
        self._scarce = scarce(shared.geometry.world_size)
        self._view, self._words = shared.view, shared.words
        self._waiter, self._moves, self._may_use, self._in_line, self._hurried = (
            shared.word(row, rank)
            for row in (_layout.WAITER, _layout.MOVES, _layout.MAY_USE, _layout.IN_LINE, _layout.HURRIED)
        )
        self._in_order = threading.Lock()  # taken for the locked instruction alone

    def waits(self) -> None:
        """This rank waits, and may be moved."""
        if self._scarce:
            self._words[self._in_line] = 1

    def goes_on(self) -> None:
        """It waits no longer; returns when nobody moves it."""
        if self._scarce:
            self._words[self._in_line] = 0
            with self._in_order:
                pass
            while self._words[self._hurried]:
                sched_yield()

    def is_watched(self) -> bool:
        """Whether somebody waits, and this is the rank to look after him."""
        return self._scarce and self._words[self._waiter] != 0

    def hurry_driver(self) -> None:
        """Moves who still waits, if he stands in line: he has not taken what was answered some time ago."""
        words = self._words
        pid, tid = divmod(words[self._waiter], 1 << 32)
        if tid:
            try:
                hurry(pid, tid, lambda free: self._still_waits(pid, tid, free))
            finally:
                words[self._moves] = 0

    def _still_waits(self, pid: int, tid: int, free: set[int]) -> bool:
        mask = sum(1 << cpu for cpu in free).to_bytes(8 * MAY_USE_WORDS, "little")
        self._view[8 * self._may_use : 8 * self._may_use + len(mask)] = mask
        self._words[self._moves] = tid
        with self._in_order:
            pass
        return bool(self._words[self._waiter] == pid << 32 | tid)

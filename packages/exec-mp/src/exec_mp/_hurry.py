"""Helps a thread that stands in line for a processor while another one is idle, where there are few of them.

A waiter wakes up, or has given way, on a processor that somebody else has just begun to use, perhaps for milliseconds inside
the kernel. The scheduler sees that another processor is idle with its next tick, which comes after up to 4 ms; a step of
decoding is late by that. But who has sent what the thread waits for is awake, elsewhere, and about to sleep. So it looks after
a while whether it was taken, and if not, lends its own processor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from exec_mp import _layout
from exec_mp._layout import MAY_USE_WORDS, Shared
from exec_mp._spread import processor

REQUEST_LATE_S = 250e-6  # a rank has begun by then, be it from a nap
ANSWER_LATE_S = 150e-6  # the driver has seen by then what has come: one thread, which was called last
_PROCESSOR = 35  # field of /proc/.../stat after the state


def scarce(world_size: int) -> bool:
    """Whether the calling thread may use hardly more processors than there are driver and ranks, but several."""
    return 1 < len(os.sched_getaffinity(0)) <= world_size + 1


def hurry(pid: int, tid: int, moving: Callable[[set[int]], None] | None = None) -> bool:
    """Moves thread ``tid`` of process ``pid`` here if it stands in line elsewhere, and leaves it as free as it was.

    Args:
        moving: told before that which processors the thread may use, in case the caller does not live to leave it free;
            an OverflowError says that there is no way to note that, and nothing is done.

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
        if here not in allowed:
            return False
        if moving is not None:
            moving(allowed)
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
        self._shared, self._words, self._ranks = shared, shared.words, frozenset(remote_ranks)
        self._waiter = shared.word(_layout.WAITER, min(remote_ranks, default=0))  # one rank is enough to watch

    def waits(self, tid: int) -> None:
        """Thread ``tid`` of this process waits for answers, and may be hurried; 0: none does."""
        self._words[self._waiter] = tid and os.getpid() << 32 | tid

    def late(self, ranks: Sequence[int], sent: int) -> list[int]:
        """Those of ``ranks`` that do nothing although there are requests, ``sent`` in all, that they have not read."""
        words, word = self._words, self._shared.word
        return [
            rank
            for rank in ranks
            if rank in self._ranks
            and words[word(_layout.REQUESTS_READ, rank)] < sent
            and words[word(_layout.CURRENT_CALL, rank)] <= words[word(_layout.ACKS, rank)]
        ]

    def free_moved(self) -> None:
        """Lets a thread of this process use all its processors again if a rank died while it was moving it."""
        for rank in self._ranks:
            tid = self._words[self._shared.word(_layout.MOVES, rank)]
            at = self._shared.word(_layout.MAY_USE, rank)
            if tid:
                mask = int.from_bytes(self._words[at : at + MAY_USE_WORDS].tobytes(), "little")
                with contextlib.suppress(OSError):  # the thread has ended
                    os.sched_setaffinity(tid, {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1})


class RankLine:
    """What a rank can do for the driver's thread that waits for it."""

    def __init__(self, shared: Shared, rank: int) -> None:
        self._scarce = scarce(shared.geometry.world_size)
        self._view, self._words = shared.view, shared.words
        self._waiter, self._moves, self._may_use = (
            shared.word(row, rank) for row in (_layout.WAITER, _layout.MOVES, _layout.MAY_USE)
        )

    def is_watched(self) -> bool:
        """Whether somebody waits, and this is the rank to look after him."""
        return self._scarce and self._words[self._waiter] != 0

    def hurry_driver(self) -> None:
        """Moves who still waits, if he stands in line: he has not taken what this rank has answered some time ago."""
        pid, tid = divmod(self._words[self._waiter], 1 << 32)
        if tid:
            hurry(pid, tid, lambda free: self._note(tid, free))
            self._words[self._moves] = 0

    def _note(self, tid: int, free: set[int]) -> None:
        mask = sum(1 << cpu for cpu in free).to_bytes(8 * MAY_USE_WORDS, "little")
        self._view[8 * self._may_use : 8 * self._may_use + len(mask)] = mask
        self._words[self._moves] = tid

"""Memory that the ranks of a replica share when all of them are on one machine: they meet in it without a system call.

    every rank   its digest and its value, then `said`, by one aligned 8-byte store
    the hub      sees that all have said the same, then stores `agreed`, which every rank waits for

Only what goes well goes this way. For all else (an error, a difference, a rank that is late, a large value) the hub gives the
page up for this turn, and the ranks use their connections, see `exec_torchrun._link`. The hub alone decides, so a turn ends
one way for all. A rank overwrites what it has said only after the verdict that needed it, and its value only after one more.

Waiting is by yielding. Waking four ranks that share two cores, twice a call, takes ten times as long; a rank that yields takes
next to nothing from one that computes.

This code assumes that stores become visible in their order, as on x86-64; elsewhere there is no page. A rank that stops
yielding says so (`asleep`) and looks at `agreed` once more, with a fence between; the hub does both the other way round. So
either the rank sees the verdict, or the hub sees that it has to be sent.
"""

from __future__ import annotations

import mmap
import os
import platform
import struct
import threading
import time

from exec_torchrun._frames import Frame, Kind, Part

SPIN_S = 500e-6  # how long ranks wait by yielding
HAS_PAGE = platform.machine() in ("x86_64", "AMD64")
_VALUE_BYTES = 1 << 16  # of each rank; what is larger travels by connection
_AGREED, _GIVEN_UP = 0, 8  # words, each on a cache line of its own
_ARRAYS = 128
_BEGIN, _END = 0, 1
_OTHER = 2  # said on the connection

_fence = threading.Lock()


class Page:
    """One rank's view of the page.

    Args:
        fd: from `create`, on all ranks the same memory. It may be closed afterwards.
        size: ranks of the replica.
        index: this one; 0 is the hub.
    """

    # Unmapped with the object, and not by a method: a call that outlives its executor may still come back to it.

    def __init__(self, fd: int, size: int, index: int) -> None:
        self._size, self._index = size, index
        line = -(-size // 8) * 64  # an 8-byte word for each rank
        self._said, self._lengths, self._asleep, self._digests = (_ARRAYS + n * line for n in range(4))
        self._values = -(-(self._digests + 2 * line) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(fd, self._values + size * _VALUE_BYTES)
        self._words = memoryview(self._memory).cast("Q")
        self._unpack = struct.Struct(f"<{size}Q").unpack
        self._mine = self._said // 8 + index
        self._length = 0  # of this rank's value, as the page has it
        self._no_values = bytes(8 * size)

    @staticmethod
    def create(size: int) -> int:
        """A descriptor of empty memory for ``size`` ranks."""
        fd = os.memfd_create("exec-torchrun", os.MFD_CLOEXEC)
        os.ftruncate(fd, 2 * mmap.PAGESIZE + size * (_VALUE_BYTES + 40))
        return fd

    # What every rank does

    def meet(self, word: Frame) -> Frame | None:
        """For a rank that is not the hub: says ``word``; the verdict, or None for one that comes by connection."""
        code = self._say(word)
        if not self._is_plain(code):
            return None
        words, turn = self._words, word.turn + 1
        os.sched_yield()  # before all else: whoever shares the core may be the one that is waited for
        until = time.monotonic() + min(SPIN_S, word.limit_s)
        while words[_AGREED] != code:
            if words[_GIVEN_UP] == turn or time.monotonic() >= until:
                words[self._asleep // 8 + self._index] = code
                with _fence:
                    pass
                if words[_AGREED] != code:
                    return None
            else:
                os.sched_yield()
        return self._verdict(word)

    @property
    def may_be_told_twice(self) -> bool:
        """Whether the verdict that `meet` has just returned may come by connection as well."""
        return self._words[self._asleep // 8 + self._index] == self._words[_AGREED]

    def _say(self, word: Frame) -> int:
        """Puts ``word`` into the page, as far as it fits."""
        how = _OTHER
        if word.kind is Kind.BEGIN:
            how = _BEGIN
            at = self._digests + 16 * self._index
            self._memory[at : at + 16] = word.digest
        elif word.kind is Kind.END and self._put_value(word.parts):
            how = _END
        code = 4 * (word.turn + 1) + how
        self._words[self._mine] = code
        return code

    def _put_value(self, parts: tuple[Part, ...]) -> bool:
        """Puts this rank's value, which others may want, into its place; False if it is too large."""
        length = 0
        if parts:
            value = parts[0][1]
            length = len(value) + 1
            if length > _VALUE_BYTES:
                return False
            at = self._values + self._index * _VALUE_BYTES
            self._memory[at : at + len(value)] = value
        if length != self._length:
            self._length = self._words[self._lengths // 8 + self._index] = length
        return True

    @staticmethod
    def _is_plain(code: int) -> bool:
        return code & 3 != _OTHER

    def _verdict(self, word: Frame) -> Frame:
        if word.kind is Kind.BEGIN:
            return Frame(Kind.GO, word.turn)
        parts = []
        lengths = self._memory[self._lengths : self._lengths + 8 * self._size]
        if lengths != self._no_values:
            for index, length in enumerate(self._unpack(lengths)):
                if length:
                    at = self._values + index * _VALUE_BYTES
                    parts.append((index, self._memory[at : at + length - 1]))
        return Frame(Kind.DONE, word.turn, tuple(parts))

    # What the hub does

    def decide(self, word: Frame) -> Frame | None:
        """Says ``word`` and waits for all others to say the same; the verdict, or None with the page given up."""
        code = self._say(word)
        if self._is_plain(code) and self._all_say(code, word, min(SPIN_S, word.limit_s)):
            self._words[_AGREED] = code  # first: the others wait for it; their values stay until the next call's end
            return self._verdict(word)
        self.give_up(word.turn)
        return None

    def _all_say(self, code: int, word: Frame, limit_s: float) -> bool:
        memory, start, end = self._memory, self._said, self._said + 8 * self._size
        expected = struct.pack("<Q", code) * self._size
        if memory[start:end] != expected:
            os.sched_yield()
            until = time.monotonic() + limit_s
            while (said := memory[start:end]) != expected:
                if max(self._unpack(said)) > code or time.monotonic() >= until:
                    return False
                os.sched_yield()
        if word.kind is not Kind.BEGIN:
            return True
        return memory[self._digests : self._digests + 16 * self._size] == word.digest * self._size

    def give_up(self, turn: int) -> None:
        """Ranks that wait for this turn are to use their connections."""
        self._words[_GIVEN_UP] = turn + 1

    def sleepers(self) -> list[int]:
        """Ranks that may not see what was agreed just now."""
        with _fence:
            pass
        agreed = self._words[_AGREED]
        asleep = self._unpack(self._memory[self._asleep : self._asleep + 8 * self._size])
        return [index for index, code in enumerate(asleep) if code == agreed]

"""Memory that the ranks of a replica share when all of them are on one machine: they meet in it without a system call.

    every rank   its digest and its value, then `said`, by one aligned 8-byte store
    the hub      sees that all have said the same, then stores `agreed`, which every rank waits for

Only what goes well goes this way. For all else (an error, a difference, a rank that is late, a large value) the hub gives the
page up for this turn, and the ranks use their connections, see `exec_torchrun._link`. The hub alone decides, so a turn ends
one way for all. A rank overwrites what it has said only after the verdict that needed it, and its value only after one more.

Waiting is by yielding. Waking four ranks that share two cores, twice a call, takes ten times as long; a rank that yields takes
next to nothing from one that computes. Not so from one in a collective, whose threads sleep and wake many times: where ranks
share cores, those that have waited for a while nap, or a gloo all_reduce of the others would take 1 to 2 ms longer.

This code assumes that stores become visible in their order, as on x86-64; elsewhere there is no page. A rank that stops
looking says so (`asleep`) and looks at `agreed` once more, with a fence between; the hub does both the other way round. So
either the rank sees the verdict, or the hub sees that it has to be sent.
"""

from __future__ import annotations

import mmap
import os
import platform
import struct
import threading
import time

from exec_torchrun._frames import HAS_CORES, Part

_YIELDING_S = 500e-6 if HAS_CORES else 100e-6  # how long ranks wait by yielding
_NAP_S = 20e-6  # with the kernel's timer slack 75 us
SPIN_S = 500e-6 if HAS_CORES else 1500e-6  # how long they wait here at all
HAS_PAGE = platform.machine() in ("x86_64", "AMD64")
_VALUE_BYTES = 1 << 16  # of each rank; what is larger travels by connection
_AGREED, _GIVEN_UP = 0, 8  # words, each on a cache line of its own
_ARRAYS = 128
_BEGIN, _END, _OTHER = 1, 2, 3  # of a turn's four codes; what is said by connection is OTHER

_fence = threading.Lock()


def _pause(waited_s: float) -> None:
    """Lets others run, for a moment."""
    if waited_s < _YIELDING_S:
        os.sched_yield()
    else:
        time.sleep(_NAP_S)


class Page:
    """One rank's view of the page. Its methods say a word of ``turn``: BEGIN with a digest, END with a value or without.

    Few objects and calls: after the worker's method none of this code is in the processor's caches.

    Args:
        fd: from `create`, on all ranks the same memory. It may be closed afterwards.
        size: ranks of the replica.
        index: this one; 0 is the hub.
    """

    # Unmapped with the object, and not by a method: a call that outlives its executor may still come back to it.

    def __init__(self, fd: int, size: int, index: int) -> None:
        self._size, self._index = size, index
        line = -(-size // 8) * 64  # an 8-byte word for each rank
        said, lengths, asleep, digests = (_ARRAYS + n * line for n in range(4))
        self._values = -(-(digests + 2 * line) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(fd, self._values + size * _VALUE_BYTES)
        self._words = memoryview(self._memory).cast("Q")
        self._unpack = struct.Struct(f"<{size}Q").unpack
        self._all_said, self._all_lengths, self._all_asleep = (
            slice(at, at + 8 * size) for at in (said, lengths, asleep)
        )
        self._all_digests = slice(digests, digests + 16 * size)
        self._said, self._own_length, self._asleep = (at // 8 + index for at in (said, lengths, asleep))
        self._digest = slice(digests + 16 * index, digests + 16 * (index + 1))
        self._length = 0  # of this rank's value, as the page has it
        self._was_asleep = False
        self._nobody = bytes(8 * size)

    @staticmethod
    def create(size: int) -> int:
        """A descriptor of empty memory for ``size`` ranks."""
        fd = os.memfd_create("exec-torchrun", os.MFD_CLOEXEC)
        os.ftruncate(fd, 2 * mmap.PAGESIZE + size * (_VALUE_BYTES + 40))
        return fd

    # What every rank does

    def follow(self, turn: int, deadline: float, digest: bytes | None, value: bytes | None) -> bool:
        """For a rank that is not the hub: whether all have said the same. If not so far, the verdict comes by connection."""
        words = self._words
        if digest is not None:
            self._memory[self._digest] = digest
            code = 4 * turn + _BEGIN
        else:
            code = 4 * turn + _END
            if (value is not None or self._length) and not self._put(value):
                self.refuse(turn)
                return False
        words[self._said] = code
        os.sched_yield()  # before all else: whoever shares the core may be the one that is waited for
        return words[_AGREED] == code or self._wait(turn, code, deadline)

    def _wait(self, turn: int, code: int, deadline: float) -> bool:
        words, given_up, began = self._words, 4 * turn + _OTHER, time.monotonic()
        until = min(began + SPIN_S, deadline)
        if self._was_asleep:
            self._was_asleep, words[self._asleep] = False, 0
        while words[_AGREED] != code:
            if words[_GIVEN_UP] == given_up or (now := time.monotonic()) >= until:
                self._was_asleep, words[self._asleep] = True, code
                with _fence:
                    pass
                return words[_AGREED] == code
            _pause(now - began)
        return True

    @property
    def may_be_told_twice(self) -> bool:
        """Whether the verdict that `follow` has just returned may come by connection as well."""
        return self._was_asleep and self._words[self._asleep] == self._words[_AGREED]

    def refuse(self, turn: int) -> None:
        """Says something that is not for the page."""
        self._words[self._said] = 4 * turn + _OTHER

    def _put(self, value: bytes | None) -> bool:
        """Puts this rank's value, which others may want, into its place, or none; False if it is too large."""
        length = 0
        if value is not None:
            length = len(value) + 1
            if length > _VALUE_BYTES:
                return False
            at = self._values + self._index * _VALUE_BYTES
            self._memory[at : at + len(value)] = value
        if length != self._length:
            self._length = self._words[self._own_length] = length
        return True

    def values(self) -> tuple[Part, ...]:
        """The values of the END that has just been agreed, each with its rank."""
        parts = []
        for index, length in enumerate(self._unpack(self._memory[self._all_lengths])):
            if length:
                at = self._values + index * _VALUE_BYTES
                parts.append((index, self._memory[at : at + length - 1]))
        return tuple(parts)

    # What the hub does

    def lead(self, turn: int, deadline: float, digest: bytes | None, value: bytes | None) -> bool:
        """Waits for all others to say the same, and tells them; or gives the page up for this turn."""
        code = 4 * turn + (_END if digest is None else _BEGIN)
        if digest is not None:
            self._memory[self._digest] = digest
        elif (value is not None or self._length) and not self._put(value):
            self.give_up(turn)
            return False
        self._words[self._said] = code
        if self._all_say(code, deadline) and (digest is None or self._memory[self._all_digests] == digest * self._size):
            self._words[_AGREED] = code  # their values stay until the next call's end
            return True
        self.give_up(turn)
        return False

    def _all_say(self, code: int, deadline: float) -> bool:
        memory, all_said, expected = self._memory, self._all_said, code.to_bytes(8, "little") * self._size
        if memory[all_said] == expected:
            return True
        os.sched_yield()
        began = time.monotonic()
        until = min(began + SPIN_S, deadline)
        while (said := memory[all_said]) != expected:
            if max(self._unpack(said)) > code or (now := time.monotonic()) >= until:
                return False
            _pause(now - began)
        return True

    def give_up(self, turn: int) -> None:
        """Ranks that wait for this turn are to use their connections."""
        self._words[_GIVEN_UP] = 4 * turn + _OTHER

    def sleepers(self) -> list[int]:
        """Ranks that may not see what was agreed just now."""
        with _fence:
            pass
        asleep = self._memory[self._all_asleep]
        if asleep == self._nobody:
            return []
        agreed = self._words[_AGREED]
        return [index for index, code in enumerate(self._unpack(asleep)) if code == agreed]

"""A page of memory that the ranks of one machine share: their words, and the hub's verdict, without a system call for either.

    [verdict][hub sleeps] | slot of rank 0 | slot of rank 1 | ...            slot: [turn + 1][kind][nbytes] wait_s limit_s
                                                                             digest, body of an even turn, body of an odd turn

What a word or a verdict needs more than this has room for goes through the connection instead, and so does everything once
somebody has waited for longer than `SPIN_S`.

Who writes what: a rank its own slot, the hub the first two words. What a slot holds is written first, then its turn: one
aligned 8-byte store through a memoryview cast to ``Q``, a single instruction in CPython. On x86-64 stores become visible in
order; elsewhere there is no page. A body stays until the turn after the next, which comes when all ranks have said their next
word, so all have read it. A rank that dies between its stores has not said the word.
"""

from __future__ import annotations

import mmap
import os
import platform
import time

from exec_torchrun._frames import Frame, Kind, Part

SPIN_S = 300e-6  # how long a rank looks for the verdict before it sleeps: about as far as ranks of one step are apart
_BODY_BYTES = 16 << 10
_SLOT_BYTES = 128 + 2 * _BODY_BYTES
_FIRST = 128  # where the slots begin
_VERDICTS = (Kind.GO, Kind.DONE)


def is_supported() -> bool:
    """Whether stores become visible in order here."""
    return platform.machine() in {"x86_64", "AMD64"}


class Page:
    """One rank's view of the page.

    Args:
        size: ranks of the replica.
        fd: of the page, which is the caller's; None makes one.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        self._size = size
        nbytes = _FIRST + size * _SLOT_BYTES
        if fd is None:
            fd = os.memfd_create("exec-torchrun", os.MFD_CLOEXEC)
            os.ftruncate(fd, nbytes)
        self.fd = fd
        self._mapping = mmap.mmap(fd, nbytes)
        self._view = memoryview(self._mapping)
        self._words, self._floats = self._view.cast("Q"), self._view.cast("d")
        self._turns = [(_FIRST + rank * _SLOT_BYTES) // 8 for rank in range(size)]  # indices into _words

    def say(self, rank: int, frame: Frame) -> bool:
        """Says ``frame`` for ``rank``, if there is room for it."""
        begins = frame.kind is Kind.BEGIN
        body = frame.parts[0][1] if frame.parts and not begins else b""  # the hub knows a call by its digest
        if len(body) > _BODY_BYTES or len(frame.parts) > 1 or not (begins or frame.kind is Kind.END):
            return False
        slot, words = self._turns[rank], self._words
        words[slot + 1] = frame.kind
        words[slot + 2] = len(body) + 1 if frame.parts and not begins else 0
        self._floats[slot + 3], self._floats[slot + 4] = frame.wait_s, frame.limit_s
        start = 8 * slot + 64
        self._view[start : start + 16] = frame.digest
        if body:
            start = self._body(slot, frame.turn)
            self._view[start : start + len(body)] = body
        words[slot] = frame.turn + 1
        return True

    def heard(self, rank: int, turn: int) -> Frame | None:
        """What ``rank`` says in ``turn``, if it has said it here."""
        slot, words = self._turns[rank], self._words
        if words[slot] != turn + 1:
            return None
        start = 8 * slot + 64
        kind = Kind.BEGIN if words[slot + 1] == Kind.BEGIN else Kind.END
        digest = bytes(self._view[start : start + 16])
        return Frame(kind, turn, self._parts(rank, turn), digest, self._floats[slot + 3], self._floats[slot + 4])

    def all_said(self, turn: int) -> bool:
        """Whether all ranks have said their words of ``turn`` here."""
        words = self._words
        return all([words[slot] == turn + 1 for slot in self._turns])  # noqa: C419 # a list is faster than a generator

    def publish(self, verdict: Frame) -> None:
        """Tells whoever is looking; for the hub, when all have said their words here."""
        self._words[0] = (verdict.turn + 1) << 8 | verdict.kind

    def verdict(self, turn: int) -> Frame | None:
        """What the hub has published for ``turn``."""
        word = self._words[0]
        if word >> 8 != turn + 1:
            return None
        kind = Kind.GO if word & 0xFF == Kind.GO else Kind.DONE
        return Frame(kind, turn, tuple([part for rank in range(self._size) for part in self._parts(rank, turn)]))

    def wait(self, turn: int) -> Frame | None:
        """The verdict of ``turn``; None when it does not come soon, or the hub is asleep."""
        until = time.monotonic() + SPIN_S
        while (verdict := self.verdict(turn)) is None:
            if self._words[1] or time.monotonic() >= until:
                return None
            os.sched_yield()
        return verdict

    def sleep(self, *, asleep: bool) -> None:
        """The hub looks at the connections only, from now on or no longer."""
        self._words[1] = asleep

    def _parts(self, rank: int, turn: int) -> tuple[Part, ...]:
        slot = self._turns[rank]
        nbytes = self._words[slot + 2]
        if not nbytes:
            return ()
        start = self._body(slot, turn)
        return ((rank, bytes(self._view[start : start + nbytes - 1])),)

    @staticmethod
    def _body(slot: int, turn: int) -> int:
        return 8 * slot + 128 + turn % 2 * _BODY_BYTES

    def close(self) -> None:
        """Lets go of the page; it is gone with the last rank that does."""
        for view in (self._words, self._floats, self._view):
            view.release()
        self._mapping.close()
        os.close(self.fd)

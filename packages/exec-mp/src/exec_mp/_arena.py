"""Where large messages lie in the shared mapping: lowest place first, so that pages that exist are used again.

A block stays until every reader has let go of it. For each block and reader there is one *hold* byte in the mapping:
the writer sets it before it publishes the message, the reader clears it when it has copied the message out or when the
last tensor that looks into the block is gone. A reader's death drops its holds with its whole group.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable

from exec_core.errors import ExecutorError

BLOCKS = 256  # in use at a time, per arena
_PAGE = mmap.PAGESIZE
_KEEP_BYTES = 256 << 20  # pages below this stay after use: faulting them in again costs 40 times the copy
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: fails with an error where touching the page would kill the process


class Arena:
    """Allocates blocks in ``[start, start + nbytes)`` of ``mapping``, for its one writer.

    A block's pages exist before it is handed out: without memory for them the writer gets an error, not a SIGBUS.

    Args:
        holds: one byte for each block and reader.
        readers: how many readers there are.
    """

    def __init__(self, mapping: mmap.mmap, start: int, nbytes: int, holds: memoryview, readers: int) -> None:
        self.limit = nbytes
        self._mapping, self._start, self._nbytes = mapping, start, nbytes
        self._holds, self._readers, self._free_of = holds, readers, bytes(readers)
        self._blocks: list[tuple[int, int, int]] = []  # (begin, end, index) in use, sorted
        self._unused = list(range(BLOCKS))
        self._populated = start  # pages below exist

    def allocate(self, nbytes: int, readers: Iterable[int]) -> tuple[int, int] | None:
        """Position and index of a new block that ``readers`` hold, or None while there is no room.

        Raises:
            ExecutorError: when the system has no memory for it.
        """
        self.reclaim()
        size = -(-nbytes // _PAGE) * _PAGE
        position, place = self._start, 0
        for begin, end, _ in self._blocks:
            if begin - position >= size:
                break
            position, place = end, place + 1
        if position + size > self._start + self._nbytes or not self._unused:
            return None
        self._populate(position + size)
        index = self._unused.pop()
        self._blocks.insert(place, (position, position + size, index))
        for reader in readers:
            self._holds[index * self._readers + reader] = 1
        return position, index

    def _populate(self, end: int) -> None:
        if end <= self._populated:
            return
        try:
            self._mapping.madvise(_POPULATE_WRITE, self._populated, end - self._populated)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14 does not know it; then pages come as they are touched
                raise ExecutorError(
                    f"no memory for a message of {end - self._start} bytes ({error.strerror}); "
                    "send smaller messages, or raise the memory limit"
                ) from error
        self._populated = end

    def reclaim(self) -> None:
        """Takes back the blocks that nobody holds, and gives their pages back when they were many."""
        if not self._blocks:
            return
        readers = self._readers
        for block in [b for b in self._blocks if self._holds[b[2] * readers : (b[2] + 1) * readers] == self._free_of]:
            self._blocks.remove(block)
            self._unused.append(block[2])
        top = self._blocks[-1][1] if self._blocks else self._start
        keep = max(top, self._start + _KEEP_BYTES)
        if self._populated > keep:
            self._mapping.madvise(mmap.MADV_REMOVE, keep, self._populated - keep)
            self._populated = keep

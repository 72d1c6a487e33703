"""Where large messages lie in the shared mapping: lowest place first, so that pages that exist are used again."""

from __future__ import annotations

import bisect
import mmap

from exec_core.errors import ExecutorError

_PAGE = mmap.PAGESIZE
_KEEP_BYTES = 256 << 20  # pages below this stay after use: faulting them in again costs 40 times the copy
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: fails with an error where touching the page would kill the process


class Arena:
    """Allocates blocks in ``[start, start + nbytes)`` of ``mapping``, for one writer.

    Only the writing side has one. A block's pages exist before it is handed out: without memory for them the writer gets an
    error, not a SIGBUS.
    """

    def __init__(self, mapping: mmap.mmap, start: int, nbytes: int) -> None:
        self._mapping, self._start, self._nbytes = mapping, start, nbytes
        self._blocks: list[tuple[int, int]] = []  # (begin, end) in use, sorted
        self._populated = start  # pages below exist
        self.limit = nbytes

    def allocate(self, nbytes: int) -> int | None:
        """Position of a new block, or None while there is no room.

        Raises:
            ExecutorError: when the system has no memory for it.
        """
        size = -(-nbytes // _PAGE) * _PAGE
        position = self._start
        for begin, end in self._blocks:
            if begin - position >= size:
                break
            position = end
        if position + size > self._start + self._nbytes:
            return None
        self._populate(position + size)
        bisect.insort(self._blocks, (position, position + size))
        return position

    def _populate(self, end: int) -> None:
        if end <= self._populated:
            return
        try:
            self._mapping.madvise(_POPULATE_WRITE, self._populated, end - self._populated)
        except OSError as error:
            if error.errno != 22:  # EINVAL: Linux before 5.14 does not know it; then the pages come as they are touched
                raise ExecutorError(
                    f"no memory for a message of {end - self._start} bytes ({error.strerror}); "
                    "send smaller messages, or raise the memory limit"
                ) from error
        self._populated = end

    def free(self, position: int) -> None:
        """Gives the block at ``position`` back, and its pages too when much memory was in use."""
        index = bisect.bisect_left(self._blocks, (position, 0))
        del self._blocks[index]
        top = self._blocks[-1][1] if self._blocks else self._start
        keep = max(top, self._start + _KEEP_BYTES)
        if self._populated > keep:
            self._mapping.madvise(mmap.MADV_REMOVE, keep, self._populated - keep)
            self._populated = keep

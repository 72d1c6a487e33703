"""The shared mapping: what lies where in it, and who writes what.

One anonymous memfd holds everything::

    control words | holds | request ring | reply ring of rank 0, 1, ... | request arena | reply arena of rank 0, 1, ...

Control words are 8 bytes each. Each has one writer: the driver for ``REPLIES_READ``, ``GATE``, ``REJOIN``, ``DRIVER_SLEEPS`` and
``DRIVER_CPU`` (the last two are one word for all), the rank for the others. ``ACKS`` and ``REPLIES`` of all ranks lie side by side,
so that the driver looks at one slice to see all. What a rank writes with each call and the driver seldom reads lies in a place of
the rank's own: two processors that write to one cache line take it from each other, which takes 30 to 170 ns each time. For the
same reason a request without a body is one line.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import struct
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs

from exec_core.errors import ExecutorError
from exec_core.messages import NAME_BYTES, Part
from exec_mp._arena import BLOCKS

# Rows with one word per rank.
ACKS, REPLIES, SLEEPS, REPLIES_READ, GATE, DRIVER_SLEEPS, DRIVER_CPU, REJOIN = range(8)
# In the rank's own place.
CURRENT_CALL, READY_NS, REQUESTS_READ, STACKS = range(8, 12)
_ROWS = 8
_OWN_WORDS = 16  # of a rank; two lines, since processors fetch them in pairs
# A request's header after number and masks: call id, kind, and the name, padded with zeros. Then, where there is a body, its
# bytes, arena position (0: inline) and block.
REQUEST, BODY = f"2Q{NAME_BYTES}s", struct.Struct("<3Q")
REPLY_HEAD = 64  # bytes of a reply's header

# x86-64 keeps stores in order, and loads in order. Elsewhere `fence` has to stand between two of them; untested.
IN_ORDER = platform.machine() in ("x86_64", "AMD64")
fence = os.sched_yield  # a system call orders memory


class _SystemCall:
    """What `orders_memory` is where an uncontended lock does not."""

    def __enter__(self) -> None:
        fence()

    def __exit__(self, *_: object) -> None:
        pass


def orders_memory() -> AbstractContextManager[object]:
    """To be entered and left at once, between a store and a load that must not come before it: a lock, for its instruction."""
    return threading.Lock() if IN_ORDER else _SystemCall()


def _up(nbytes: int, to: int = 64) -> int:
    return -(-nbytes // to) * to


@attrs.frozen
class Geometry:
    """Sizes of the mapping, in bytes unless said otherwise. The same on both sides.

    Attributes:
        world_size: ranks with a reply ring.
        slots: messages in each ring.
        inline_bytes: room in a slot.
        arena_bytes: address space of each arena; its memory is used as messages need it.
        spin_s: seconds that a waiter yields before it sleeps.
        room: processors for each process, the driver's among them, at most 1. With less, who is awake early keeps another from running.
    """

    world_size: int
    slots: int
    inline_bytes: int
    arena_bytes: int
    spin_s: float
    room: float = 1.0

    @functools.cached_property
    def mask_words(self) -> int:
        return -(-self.world_size // 64)

    @functools.cached_property
    def row(self) -> int:
        """Words of one row of control words."""
        return _up(self.world_size, 8)

    @functools.cached_property
    def request_head(self) -> int:
        return 8 * (1 + 2 * self.mask_words) + struct.calcsize(f"<{REQUEST}") + BODY.size

    @functools.cached_property
    def request_slot(self) -> int:
        return _up(self.request_head + self.inline_bytes)

    @functools.cached_property
    def reply_slot(self) -> int:
        return REPLY_HEAD + _up(self.inline_bytes)

    @functools.cached_property
    def request_holds(self) -> int:
        """Hold bytes of the ranks on the driver's blocks: ``BLOCKS`` rows with one byte per rank."""
        return 8 * (_ROWS * self.row + _OWN_WORDS * self.world_size)

    def reply_holds(self, rank: int) -> int:
        """Hold bytes of the driver on the blocks of ``rank``."""
        return self.request_holds + BLOCKS * (self.world_size + rank)

    @functools.cached_property
    def requests(self) -> int:
        return _up(self.reply_holds(self.world_size))

    def replies(self, rank: int) -> int:
        return self.requests + self.slots * (self.request_slot + rank * self.reply_slot)

    @functools.cached_property
    def request_arena(self) -> int:
        return _up(self.replies(self.world_size), mmap.PAGESIZE)

    def reply_arena(self, rank: int) -> int:
        return self.request_arena + (1 + rank) * self.arena_bytes

    @property
    def total(self) -> int:
        return self.reply_arena(self.world_size)


def reserve(geometry: Geometry) -> tuple[int, Geometry]:
    """A memfd large enough for ``geometry``, with smaller arenas where limits on address space or file size refuse.

    Raises:
        ExecutorError: when even the smallest does not fit.
    """
    arena_bytes = geometry.arena_bytes
    while True:
        geometry = attrs.evolve(geometry, arena_bytes=arena_bytes)
        fd = os.memfd_create("exec-mp", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, geometry.total)
            mmap.mmap(fd, geometry.total).close()
        except (OSError, OverflowError) as error:
            os.close(fd)
            arena_bytes //= 8
            if arena_bytes < 1 << 20:
                raise ExecutorError(
                    f"no shared memory for {geometry.world_size} ranks ({error}); "
                    "check ulimit -v, ulimit -f and the memory limit"
                ) from error
        else:
            return fd, geometry


def write_body(view: memoryview, parts: Sequence[Part], position: int) -> None:
    """Writes ``parts`` one after the other, from ``position`` on."""
    for part in parts:
        end = position + len(part)
        view[position:end] = part
        position = end


class Shared:
    """The mapping, as bytes (``view``) and as words.

    Memory lent out by `lend` and `private` outlives `close`: the mapping goes when the last view into it has gone.
    """

    def __init__(self, fd: int, geometry: Geometry) -> None:
        self.geometry = geometry
        self.mapping = mmap.mmap(fd, geometry.total)
        self.view = memoryview(self.mapping)
        self.words: Any = self.view.cast("Q")
        self._lent: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by position: size, and what tells of its end

    def word(self, row: int, rank: int) -> int:
        """Index of a control word."""
        rows = self.geometry.row * min(row, _ROWS)
        return rows + (rank if row < _ROWS else _OWN_WORDS * rank + row - _ROWS)

    def holds(self, start: int, nbytes: int) -> memoryview:
        """Hold bytes, in a view that `close` leaves alone."""
        return memoryview(self.mapping)[start : start + nbytes]

    def lend(self, position: int, nbytes: int, holds: memoryview, hold: int) -> memoryview:
        """Writable memory of the mapping itself, for the only reader of a block.

        ``holds[hold]`` is cleared when the last view of it is gone. What is followed is the exporter underneath all
        views: a memoryview on top may go while arrays and tensors over it live on.
        """
        exporter = (ctypes.c_char * nbytes).from_buffer(self.mapping, position)
        self._follow(exporter, position, nbytes, holds, hold)
        return memoryview(exporter).cast("B")

    def private(self, fd: int, position: int, nbytes: int, holds: memoryview, hold: int) -> memoryview:
        """A copy-on-write view of a block that others read as well, followed like that of `lend`."""
        exporter = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, offset=position)
        self._follow(exporter, position, nbytes, holds, hold)
        return memoryview(exporter)

    def _follow(self, exporter: Any, position: int, nbytes: int, holds: memoryview, hold: int) -> None:
        lent = self._lent

        def gone(_: object) -> None:  # may run inside the garbage collector: takes no lock
            lent.pop(position, None)  # first: once the hold is cleared, the same place may be lent again
            holds[hold] = 0

        lent[position] = nbytes, weakref.ref(exporter, gone)

    def close(self) -> None:
        """No more use, by either side: all memory goes, but for what is lent, which goes with its last view."""
        self.words.release()
        self.view.release()
        start = _up(self.geometry.requests, mmap.PAGESIZE)  # holds are written to as long as anything is lent
        for position, (nbytes, _) in sorted(self._lent.items()):
            self._remove(start, position)
            start = _up(position + nbytes, mmap.PAGESIZE)
        self._remove(start, self.geometry.total)

    def _remove(self, start: int, end: int) -> None:
        if end > start:
            self.mapping.madvise(mmap.MADV_REMOVE, start, end - start)


_MAP_NORESERVE = 0x4000  # else a large private mapping counts as if all of it were going to be written

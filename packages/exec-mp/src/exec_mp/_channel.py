"""Bytes between the driver and its workers: one shared mapping, an eventfd for each side to sleep on.

    driver   DriverChannel.publish ==request ring==> WorkerChannel.next      worker
    driver   DriverChannel.take    <==reply ring==   WorkerChannel.publish   worker (one ring each)

One anonymous memfd holds everything, 64-byte aligned::

    control words | request ring | reply ring of rank 0, 1, ... | request arena | reply arena of rank 0, 1, ...

A message up to ``inline_bytes`` lies in its ring slot, a larger one in the writer's arena. Each slot begins with a header of
8-byte words, the first of which is the message's number plus one.

Who writes what, in which order:

* A writer fills the slot, then stores the number: *one aligned 8-byte store* through a memoryview cast to ``Q``, a single
  instruction in CPython. On x86-64 stores become visible in order, so who sees the number sees the message; elsewhere a
  system call stands between the two (untested). Then it signals the eventfd of who may sleep on it.
* A reader copies the message out, then stores its position in its control word; the writer reuses the slot after that.
* A writer killed between the two stores leaves a slot without its number: the message was never sent.
* Each control word has one writer: the driver for ``REPLIES_READ`` and ``GATE``, the rank for the others. ``REPLIES`` of all
  ranks lie side by side, so that the driver looks at one slice to see all.
"""

from __future__ import annotations

import functools
import mmap
import os
import platform
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
from exec_core.errors import ExecutorError, MessageTooLargeError
from exec_core.messages import Encoded, Format, Part

from exec_mp._arena import Arena

SPIN_S = 100e-6  # "auto": long enough to catch a prompt answer, short enough to cost nothing in a decode cadence

REPLIES, REQUESTS_READ, CURRENT_CALL, SINCE_NS, STACKS, REPLIES_READ, GATE = range(7)  # rows of control words
_ROWS = 7
_EXIT, _GATED, _CALLABLE = 1, 2, 4  # flags of a request
_REQUEST = struct.Struct("<6Q")  # call id, flags, name bytes, body bytes, format, arena position (0: inline)
_REPLY = struct.Struct("<6Q")  # call id, status, format, body bytes, arena position, time in ns
_REPLY_HEAD = 64

if platform.machine() in ("x86_64", "AMD64"):

    def _fence() -> None:
        """Nothing: x86-64 keeps stores in order, and loads in order."""
else:
    _fence = os.sched_yield  # a system call orders memory; untested


@attrs.frozen
class Geometry:
    """Sizes of the mapping, in bytes unless said otherwise. The same on both sides.

    Attributes:
        world_size: ranks with a reply ring.
        slots: messages in each ring.
        inline_bytes: room in a slot.
        arena_bytes: address space of each arena; its memory is used as messages need it.
        spin_s: seconds that a waiter yields before it sleeps.
    """

    world_size: int
    slots: int
    inline_bytes: int
    arena_bytes: int
    spin_s: float

    @functools.cached_property
    def mask_words(self) -> int:
        return -(-self.world_size // 64)

    @functools.cached_property
    def row(self) -> int:
        """Words of one row of control words."""
        return -(-self.world_size // 8) * 8

    @functools.cached_property
    def request_head(self) -> int:
        return _up(8 * (7 + 2 * self.mask_words))

    @functools.cached_property
    def request_slot(self) -> int:
        return self.request_head + _up(self.inline_bytes)

    @functools.cached_property
    def reply_slot(self) -> int:
        return _REPLY_HEAD + _up(self.inline_bytes)

    @functools.cached_property
    def requests(self) -> int:
        return 8 * _ROWS * self.row

    def replies(self, rank: int) -> int:
        return self.requests + self.slots * (self.request_slot + rank * self.reply_slot)

    @functools.cached_property
    def request_arena(self) -> int:
        return -(-self.replies(self.world_size) // mmap.PAGESIZE) * mmap.PAGESIZE

    def reply_arena(self, rank: int) -> int:
        return self.request_arena + (1 + rank) * self.arena_bytes

    @functools.cached_property
    def total(self) -> int:
        return self.reply_arena(self.world_size)


def _up(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


class Incoming(NamedTuple):
    """A request as a worker finds it. ``body`` is valid until `WorkerChannel.done_reading`."""

    call_id: int
    name: str
    body: memoryview
    format: int
    wants_value: bool
    exits: bool


class Answer(NamedTuple):
    """A reply as the driver finds it. ``body`` is valid until `DriverChannel.consume`."""

    rank: int
    call_id: int
    status: int
    format: int
    body: memoryview
    time_ns: int


class _Shared:
    """The mapping, as bytes and as words."""

    def __init__(self, fd: int, geometry: Geometry) -> None:
        self.geometry = geometry
        self.mapping = mmap.mmap(fd, geometry.total)
        self.view = memoryview(self.mapping)
        self.words: Any = self.view.cast("Q")

    def word(self, row: int, rank: int) -> int:
        """Index of a control word."""
        return row * self.geometry.row + rank

    def write_body(self, parts: Sequence[Part], position: int) -> None:
        for part in parts:
            end = position + len(part)
            self.view[position:end] = part
            position = end

    def close(self) -> None:
        self.words.release()
        self.view.release()
        self.mapping.close()


class DriverChannel:
    """The driver's end: writes requests, reads the replies of all ranks. One thread publishes at a time, one takes.

    Raises:
        ExecutorError: when the system refuses the memory or the address space.
    """

    def __init__(self, geometry: Geometry, remote_ranks: Sequence[int]) -> None:
        self.remote_ranks = tuple(remote_ranks)
        self.fd, self.geometry = _reserve(geometry)
        self._shared = _Shared(self.fd, self.geometry)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.bells = {rank: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for rank in remote_ranks}
        self._arena = Arena(self._shared.mapping, self.geometry.request_arena, self.geometry.arena_bytes)
        self._sent = 0  # requests published; by the publishing thread
        self._held: deque[tuple[int, int]] = deque()  # (number, arena position) of requests not yet read by all
        self._masks: dict[tuple[tuple[int, ...], tuple[int, ...]], memoryview] = {}
        self._seen = [0] * self.geometry.world_size  # replies taken from each rank; by the taking thread
        self._poll = select.poll()
        self._poll.register(self.bell, select.POLLIN)

    def publish(
        self,
        call_id: int,
        name: str,
        body: Encoded,
        ranks: tuple[int, ...],
        reply_ranks: tuple[int, ...],
        *,
        gated: bool = False,
        exits: bool = False,
    ) -> int | None:
        """Sends one request to ``ranks`` and returns its number, or None while there is no room.

        Args:
            gated: a rank starts it only when `open_gate` says so.
            exits: the rank leaves its loop.
        """
        geometry, shared, number = self.geometry, self._shared, self._sent
        read = self._reclaim()
        if number - read >= geometry.slots:
            return None
        encoded_name = name.encode()
        inline = len(encoded_name) + body.nbytes <= geometry.inline_bytes
        position = 0
        if not inline and (position := self._place(name, len(encoded_name), body.nbytes) or 0) == 0:
            return None
        slot = geometry.requests + number % geometry.slots * geometry.request_slot
        flags = (_EXIT if exits else 0) | (_GATED if gated else 0) | (0 if name else _CALLABLE)
        _REQUEST.pack_into(shared.view, slot + 8, call_id, flags, len(encoded_name), body.nbytes, body.format, position)
        word = slot // 8 + 7
        shared.words[word : word + 2 * geometry.mask_words] = self._mask(ranks, reply_ranks)
        start = slot + geometry.request_head
        shared.view[start : start + len(encoded_name)] = encoded_name
        if body.nbytes:
            shared.write_body(body.parts, position or start + len(encoded_name))
        _fence()
        shared.words[slot // 8] = number + 1
        self._sent = number + 1
        if position:
            self._held.append((number, position))
        crowded = number - read >= geometry.slots // 2  # then the others must read past it soon, too
        for rank in self.remote_ranks if crowded else ranks:
            os.eventfd_write(self.bells[rank], 1)
        return number

    def _place(self, name: str, name_bytes: int, body_bytes: int) -> int | None:
        if body_bytes > self._arena.limit:
            raise MessageTooLargeError(
                f"{name or 'the call'!r}", body_bytes, self._arena.limit,
                "this is the address space that the system allows (ulimit -v, ulimit -f)",
            )  # fmt: skip
        if name_bytes > self.geometry.inline_bytes:
            raise MessageTooLargeError("a method's name", name_bytes, self.geometry.inline_bytes, "raise RpcConfig.inline_bytes")
        return self._arena.allocate(body_bytes)

    def _mask(self, ranks: tuple[int, ...], reply_ranks: tuple[int, ...]) -> memoryview:
        """One bit per rank for who runs it, then for whose value is wanted."""
        mask = self._masks.get((ranks, reply_ranks))
        if mask is None:
            nbytes = 8 * self.geometry.mask_words
            numbers = (sum(1 << rank for rank in chosen) for chosen in (ranks, reply_ranks))
            mask = memoryview(b"".join(n.to_bytes(nbytes, sys.byteorder) for n in numbers)).cast("Q")
            self._masks[ranks, reply_ranks] = mask
        return mask

    def _reclaim(self) -> int:
        """Requests that all ranks have read; their arena blocks are free again."""
        first = self._shared.word(REQUESTS_READ, 0)
        words = self._shared.words
        read = min(words[first + rank] for rank in self.remote_ranks)
        while self._held and self._held[0][0] < read:
            self._arena.free(self._held.popleft()[1])
        return int(read)

    def look(self) -> list[int]:
        """Ranks with a reply that has not been taken."""
        first = self._shared.word(REPLIES, 0)
        counts = self._shared.words[first : first + self.geometry.world_size].tolist()
        if counts == self._seen:
            return []
        return [rank for rank, count in enumerate(counts) if count != self._seen[rank]]

    def take(self, rank: int) -> Answer:
        """The next reply of ``rank``, one that `look` has seen."""
        _fence()
        geometry, shared = self.geometry, self._shared
        slot = geometry.replies(rank) + self._seen[rank] % geometry.slots * geometry.reply_slot
        call_id, status, fmt, nbytes, position, time_ns = _REPLY.unpack_from(shared.view, slot + 8)
        start = position or slot + _REPLY_HEAD
        return Answer(rank, call_id, status, fmt, shared.view[start : start + nbytes], time_ns)

    def consume(self, rank: int) -> None:
        """The reply taken last from ``rank`` is done with; its memory may be used again."""
        self._seen[rank] += 1
        self._shared.words[self._shared.word(REPLIES_READ, rank)] = self._seen[rank]

    def open_gate(self, rank: int, number: int) -> None:
        """Lets ``rank`` start gated requests up to ``number``."""
        self._shared.words[self._shared.word(GATE, rank)] = number + 1
        os.eventfd_write(self.bells[rank], 1)

    def current(self, rank: int) -> tuple[int, int]:
        """Call id that ``rank`` is in (0: none) and since when, in monotonic ns."""
        words, shared = self._shared.words, self._shared
        return words[shared.word(CURRENT_CALL, rank)], words[shared.word(SINCE_NS, rank)]

    def stacks(self, rank: int) -> int:
        """Stack reports that ``rank`` has written."""
        return int(self._shared.words[self._shared.word(STACKS, rank)])

    def sleep(self, timeout_s: float | None) -> bool:
        """Waits on the bell for at most ``timeout_s``; whether it rang."""
        if not self._poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1e3) + 1)):
            return False
        self.quiet()
        return True

    def quiet(self) -> None:
        """Takes back what rang so far. Look at the words after this, never before."""
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:  # nothing rang, or another thread was first
            return

    def ring(self) -> None:
        """Wakes whoever sleeps on the bell."""
        os.eventfd_write(self.bell, 1)

    def close(self) -> None:
        self._shared.close()
        for fd in (self.fd, self.bell, *self.bells.values()):
            os.close(fd)


def _reserve(geometry: Geometry) -> tuple[int, Geometry]:
    """A memfd large enough, with smaller arenas where limits on address space or file size refuse."""
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
                    f"no shared memory for {geometry.world_size} ranks ({error}); check ulimit -v, ulimit -f and the memory limit"
                ) from error
        else:
            return fd, geometry


class WorkerChannel:
    """A worker's end: reads requests, writes replies. The main thread reads; writers hold the caller's lock."""

    def __init__(self, fd: int, geometry: Geometry, rank: int, bell: int, driver_bell: int) -> None:
        self._shared = _Shared(fd, geometry)
        self._rank, self._bell, self._driver_bell = rank, bell, driver_bell
        self._read = 0
        self._replied = 0
        self._arena = Arena(self._shared.mapping, geometry.reply_arena(rank), geometry.arena_bytes)
        self._held: deque[tuple[int, int]] = deque()
        self._names: dict[bytes, str] = {}
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)

    def next(self) -> Incoming:
        """The next request for this rank. Skips those for others."""
        geometry, shared = self._shared.geometry, self._shared
        count = geometry.mask_words
        word, bit = divmod(self._rank, 64)
        while True:
            slot = geometry.requests + self._read % geometry.slots * geometry.request_slot
            self._await(slot // 8, self._read + 1)
            _fence()
            masks = slot // 8 + 7
            if shared.words[masks + word] >> bit & 1:
                break
            self.done_reading()
        call_id, flags, name_bytes, nbytes, fmt, position = _REQUEST.unpack_from(shared.view, slot + 8)
        if flags & _GATED:
            self._await(shared.word(GATE, self._rank), self._read + 1)
        start = slot + geometry.request_head
        name = bytes(shared.view[start : start + name_bytes])
        start = position or start + name_bytes
        return Incoming(
            call_id,
            self._names.get(name) or self._names.setdefault(name, name.decode()),
            shared.view[start : start + nbytes],
            fmt,
            bool(shared.words[masks + count + word] >> bit & 1),
            bool(flags & _EXIT),
        )

    def done_reading(self) -> None:
        """The request is copied out; its memory may be used again."""
        self._read += 1
        self._shared.words[self._shared.word(REQUESTS_READ, self._rank)] = self._read

    def _await(self, word: int, value: int) -> None:
        """Waits until a shared word has reached ``value``: yields the processor for a while, then sleeps."""
        words = self._shared.words
        if words[word] >= value:
            return
        spin_until = time.monotonic() + self._shared.geometry.spin_s
        while words[word] < value:
            if time.monotonic() < spin_until:
                os.sched_yield()
                continue
            self._reclaim()
            self._poll.poll()
            try:
                os.eventfd_read(self._bell)
            except BlockingIOError:  # already taken
                continue

    def set_current(self, call_id: int) -> None:
        """Shows the driver which call this rank is in; 0: none."""
        words, shared = self._shared.words, self._shared
        words[shared.word(SINCE_NS, self._rank)] = time.monotonic_ns()
        words[shared.word(CURRENT_CALL, self._rank)] = call_id

    def count_stack(self) -> None:
        """One more stack report is written."""
        self._shared.words[self._shared.word(STACKS, self._rank)] += 1

    def publish(self, call_id: int, status: int, body: Encoded, time_ns: int, *, droppable: bool = False) -> None:
        """Sends one reply; waits while the ring is full, unless it may be dropped.

        Raises:
            MessageTooLargeError, ExecutorError: for a body that does not fit; nothing was sent.
        """
        geometry, shared, number = self._shared.geometry, self._shared, self._replied
        if droppable and number - self._reclaim() >= geometry.slots // 2:
            return
        while number - self._reclaim() >= geometry.slots:
            time.sleep(0.0005)  # the driver drains whenever a call is pending; nothing signals room in this direction
        position = self._place(body.nbytes) if body.nbytes > geometry.inline_bytes else 0
        slot = geometry.replies(self._rank) + number % geometry.slots * geometry.reply_slot
        _REPLY.pack_into(shared.view, slot + 8, call_id, status, body.format, body.nbytes, position, time_ns)
        if body.nbytes:
            shared.write_body(body.parts, position or slot + _REPLY_HEAD)
        _fence()
        shared.words[shared.word(REPLIES, self._rank)] = number + 1
        self._replied = number + 1
        if position:
            self._held.append((number, position))
        os.eventfd_write(self._driver_bell, 1)

    def _place(self, nbytes: int) -> int:
        if nbytes > self._arena.limit:
            raise MessageTooLargeError(
                "the result", nbytes, self._arena.limit, "this is the address space that the system allows (ulimit -v, ulimit -f)"
            )
        while (position := self._arena.allocate(nbytes)) is None:
            time.sleep(0.0005)
            self._reclaim()
        return position

    def _reclaim(self) -> int:
        read = self._shared.words[self._shared.word(REPLIES_READ, self._rank)]
        while self._held and self._held[0][0] < read:
            self._arena.free(self._held.popleft()[1])
        return int(read)


NOTHING = Encoded((), 0, Format.NONE)

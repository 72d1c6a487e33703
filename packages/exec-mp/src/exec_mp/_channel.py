"""Bytes between the driver and its workers: shared memory (`exec_mp._layout`), and an eventfd for each to sleep on.

    driver   DriverChannel.publish ==request ring==> WorkerChannel.next          worker
    driver   DriverChannel.take    <==reply ring==   WorkerChannel.publish       worker (one ring each)
    driver   DriverChannel.look    <==its word==     WorkerChannel.acknowledge   worker, when there is nothing to say

A message up to ``inline_bytes`` lies in its ring slot, a larger one in a block of the writer's arena.

Who writes what, in which order:

* A writer fills the slot, then stores the message's number plus one, in the slot's first word (requests) or the rank's
  ``REPLIES`` word: *one aligned 8-byte store* through a memoryview cast to ``Q``, a single instruction in CPython. On
  x86-64 stores become visible in order, so who sees the number sees the message; elsewhere a system call stands
  between the two (untested). Then it rings the bell, an eventfd, of who sleeps.
* An id in the rank's ``ACKS`` word says that it has answered its calls up to that one: those that have a reply in the ring,
  with that, which is there before the id; all others, with nothing. So most answers are one store, and the driver sees
  those of all ranks at once, however many there are. It looks at ``ACKS`` first, then at ``REPLIES``.
* A reader copies the message out, or holds its block (`exec_mp._arena`), then stores its position; the writer reuses
  the slot.
* Who is going to sleep says so in ``SLEEPS`` or ``DRIVER_SLEEPS``, and looks once more. Between the two, as between a
  writer's number and its look at that word, stands a locked instruction (an uncontended lock's): so at least one of
  them sees the other, and nobody sleeps through a message.
* A writer killed between the two stores leaves a slot without its number: the message was never sent.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import struct
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from exec_core.errors import MessageTooLargeError
from exec_core.messages import Encoded, Format
from exec_mp import _layout
from exec_mp._arena import BLOCKS, Arena
from exec_mp._layout import IN_ORDER, REPLY_HEAD, REQUEST, Geometry, Shared, fence, reserve, write_body
from exec_mp._pace import Pace

SPIN_S = 200e-6  # "auto": catches a prompt answer; see `exec_mp._pace` for what does not come promptly

NOTHING = Encoded((), 0, Format.NONE)
_NO_BODY = memoryview(b"")
_EXIT, _GATED, _ONE_READER = 1, 2, 4  # flags of a request
_REQUEST = struct.Struct("<" + REQUEST)  # call id, flags, body bytes, format, arena position (0: inline), block, name
_REPLY = struct.Struct("<7Q")  # call id, status, format, body bytes, arena position, block, time in ns
_MASKS = 256  # remembered; a program chooses among few sets of ranks
_COPY_BYTES = 512 << 10  # with other readers, a message is copied up to this size, and mapped copy-on-write above
_LIMITS = "this is the address space that the system allows (ulimit -v, ulimit -f)"
_FD_SETSIZE = 1024  # select(2) knows no higher descriptors; poll(2), as Python calls it, counts in milliseconds
_ROOM_EVERY_S = 0.0005  # the driver drains whenever a call is pending; nothing signals room in a reply ring


Incoming = tuple[int, str, memoryview, bool, int, bool, bool]
"""A request as a worker finds it: call id, method's name, body, whether that is the worker's own (else it is valid until
`WorkerChannel.done_reading`), its format, whether the value is wanted, whether to leave instead. Not a class: one is
made for every call, and a plain tuple costs a fifth."""

Header = tuple[int, int, int, int, int, int, int]
"""A reply as it lies in its slot, see ``_REPLY``."""


class Answer(NamedTuple):
    """A reply that has a body, which is the driver's own if ``owned``, else valid until `DriverChannel.consume`."""

    rank: int
    status: int
    format: int
    body: memoryview
    owned: bool
    time_ns: int


def _rings(bell: int, poll: select.poll, timeout_s: float) -> bool:
    """Whether the bell rings within ``timeout_s``; to the millisecond if ``bell`` is 1024 or more."""
    if timeout_s == math.inf:
        return bool(poll.poll())
    if bell < _FD_SETSIZE:
        return bool(select.select([bell], [], [], max(0.0, timeout_s))[0])
    return bool(poll.poll(max(0.0, timeout_s * 1e3)))


class DriverChannel:
    """The driver's end: writes requests, reads the replies of all ranks. One thread publishes at a time, one takes.

    Raises:
        ExecutorError: when the system refuses the memory or the address space.
    """

    def __init__(self, geometry: Geometry, remote_ranks: Sequence[int]) -> None:
        self.remote_ranks = tuple(remote_ranks)
        self.fd, geometry = reserve(geometry)
        self.geometry = geometry
        self._shared = shared = Shared(self.fd, geometry)
        self._view, self._words, size = shared.view, shared.words, geometry.world_size
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.bells = {rank: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for rank in remote_ranks}
        holds = shared.holds(geometry.request_holds, BLOCKS * size)
        self._arena = Arena(shared.mapping, geometry.request_arena, geometry.arena_bytes, holds, size)
        self._reply_holds = [shared.holds(geometry.reply_holds(rank), BLOCKS) for rank in range(size)]
        self._reply_rings = [geometry.replies(rank) for rank in range(size)]
        self._reply_slot, self._replies_read = geometry.reply_slot, shared.word(_layout.REPLIES_READ, 0)
        self._slots, self._crowd = geometry.slots, geometry.slots // 2
        self._requests, self._request_slot = geometry.requests, geometry.request_slot
        self._request_head, self._inline_bytes = geometry.request_head, geometry.inline_bytes
        self._request = struct.Struct(f"<{16 * geometry.mask_words}s{REQUEST}")
        self._sleeps = slice(shared.word(_layout.SLEEPS, 0), shared.word(_layout.SLEEPS, size))
        self._sleep_word = shared.word(_layout.DRIVER_SLEEPS, 0)
        self._words[self._sleep_word] = 1
        self._in_order = threading.Lock()  # taken for the locked instruction alone
        self._sent = 0  # requests published; by the publishing thread
        self._read = 0  # of them, known to be read by all; likewise
        self._chosen: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # whom `_mask` was made for
        self._mask = b""
        self._masks: dict[tuple[tuple[int, ...], tuple[int, ...]], bytes] = {}
        self._row = geometry.row
        self._answers = slice(shared.word(_layout.ACKS, 0), shared.word(_layout.REPLIES, self._row))
        self._replies = slice(shared.word(_layout.REPLIES, 0), shared.word(_layout.REPLIES, self._row))
        self._seen = [0] * (2 * self._row)  # what `look` found that has been dealt with; by the taking thread
        self._taken = [0] * self._row  # of them, the replies in rings
        self._poll = select.poll()
        self._poll.register(self.bell, select.POLLIN)

    def publish(
        self,
        call_id: int,
        name: bytes,
        body: Encoded,
        ranks: tuple[int, ...],
        reply_ranks: tuple[int, ...],
        flags: int = 0,
    ) -> int | None:
        """Sends one request to ``ranks`` and returns its number, or None while there is no room."""
        number, view, nbytes = self._sent, self._view, body.nbytes
        crowded = number - self._read >= self._crowd  # then those who skip it must read past it soon, too
        if crowded and number - self._count_read() >= self._slots:
            return None
        position = block = 0
        if nbytes > self._inline_bytes:
            place = self._allocate(name, nbytes, ranks)
            if place is None:
                return None
            position, block = place
        if ranks is not self._chosen[0] or reply_ranks is not self._chosen[1]:
            self._mask, self._chosen = self._masked(ranks, reply_ranks), (ranks, reply_ranks)
        if len(ranks) == 1:
            flags |= _ONE_READER
        slot = self._requests + number % self._slots * self._request_slot
        self._request.pack_into(view, slot + 8, self._mask, call_id, flags, nbytes, body.format, position, block, name)
        if nbytes:
            write_body(view, body.parts, position or slot + self._request_head)
        if not IN_ORDER:
            fence()
        self._sent = self._words[slot // 8] = number + 1
        with self._in_order:
            pass
        self._wake(self.remote_ranks if crowded else ranks)
        return number

    def _allocate(self, name: bytes, nbytes: int, ranks: tuple[int, ...]) -> tuple[int, int] | None:
        """Position and number of a block in the arena; None while there is no room."""
        if nbytes > self._arena.limit:
            raise MessageTooLargeError(repr(name.decode() or "the call"), nbytes, self._arena.limit, _LIMITS)
        return self._arena.allocate(nbytes, ranks)

    def _wake(self, ranks: tuple[int, ...]) -> None:
        """Rings the bells of those of ``ranks`` that sleep."""
        sleeping = self._words[self._sleeps].tolist()
        if 1 in sleeping:
            for rank in ranks:
                if sleeping[rank]:
                    os.eventfd_write(self.bells[rank], 1)

    def publish_exit(self) -> None:
        """Tells all ranks to leave their loops."""
        self.publish(0, b"exit", NOTHING, self.remote_ranks, (), _EXIT)

    def publish_gated(
        self, call_id: int, name: bytes, body: Encoded, ranks: tuple[int, ...], reply_ranks: tuple[int, ...]
    ) -> int | None:
        """`publish`, but a rank starts the call only when `open_gate` says so."""
        return self.publish(call_id, name, body, ranks, reply_ranks, _GATED)

    def _masked(self, ranks: tuple[int, ...], reply_ranks: tuple[int, ...]) -> bytes:
        """One bit per rank for who runs it, then for whose value is wanted."""
        mask = self._masks.get((ranks, reply_ranks))
        if mask is not None:
            return mask
        nbytes = 8 * self.geometry.mask_words
        numbers = (sum(1 << rank for rank in chosen) for chosen in (ranks, reply_ranks))
        mask = b"".join(number.to_bytes(nbytes, "little") for number in numbers)
        if len(self._masks) < _MASKS:
            self._masks[ranks, reply_ranks] = mask
        return mask

    def _count_read(self) -> int:
        """Requests that all ranks have read."""
        first = self._shared.word(_layout.REQUESTS_READ, 0)
        self._read = min(self._words[first + rank] for rank in self.remote_ranks)
        return self._read

    def look(self) -> list[int] | None:
        """The words that say what the ranks have answered, or None while that is what was `consume`-d last."""
        words: list[int] = self._words[self._answers].tolist()
        if words == self._seen:
            return None
        if not IN_ORDER:
            fence()
            words[self._row :] = self._words[self._replies].tolist()
        return words

    def acks(self, words: list[int]) -> list[int]:
        """By rank: the id of the call up to which it has answered."""
        return words[: self.geometry.world_size]

    def replies(self, words: list[int]) -> list[tuple[int, int]]:
        """Rank and number of each reply in a ring that has not been consumed."""
        counts, taken = words[self._row :], self._taken
        if counts == taken:
            return []
        return [(rank, number) for rank in self.remote_ranks for number in range(taken[rank], counts[rank])]

    def take(self, rank: int, number: int) -> Header:
        """A reply that `replies` has named."""
        return _REPLY.unpack_from(self._view, self._reply_rings[rank] + number % self._slots * self._reply_slot)

    def open(self, rank: int, number: int, header: Header) -> Answer:
        """What `take` found."""
        _, status, fmt, nbytes, position, block, time_ns = header
        if position:
            body = self._shared.lend(position, nbytes, self._reply_holds[rank], block)
        else:
            start = self._reply_rings[rank] + number % self._slots * self._reply_slot + REPLY_HEAD
            body = self._view[start : start + nbytes]
        return Answer(rank, status, fmt, body, position != 0, time_ns)

    def consume(self, words: list[int], replies: bool) -> None:
        """What ``words`` say has been dealt with; if there were ``replies``, their slots may be used again."""
        self._seen = words
        if replies:
            self._taken = taken = words[self._row :]
            for rank in self.remote_ranks:
                self._words[self._replies_read + rank] = taken[rank]

    def open_gate(self, rank: int, number: int) -> None:
        """Lets ``rank`` start gated requests up to ``number``."""
        self._words[self._shared.word(_layout.GATE, rank)] = number + 1
        os.eventfd_write(self.bells[rank], 1)

    def current(self, rank: int) -> tuple[int, int]:
        """Call id that ``rank`` is in (0: none) and since when, in monotonic ns."""
        words, word = self._words, self._shared.word
        return words[word(_layout.CURRENT_CALL, rank)], words[word(_layout.SINCE_NS, rank)]

    def stacks(self, rank: int) -> int:
        """Stack reports that ``rank`` has written."""
        return int(self._words[self._shared.word(_layout.STACKS, rank)])

    def stay_awake(self) -> None:
        """Nobody sleeps on the bell, so nobody need ring it; until `may_sleep`."""
        self._words[self._sleep_word] = 0

    def may_sleep(self) -> None:
        """Somebody may sleep on the bell, who looks once more between this and sleeping."""
        self._words[self._sleep_word] = 1
        with self._in_order:
            pass

    def sleep(self, timeout_s: float) -> bool:
        """Until the bell rings, or for ``timeout_s``. Whether there is, or was, something to look at."""
        self.may_sleep()
        if self.look() is not None:
            return True
        if not _rings(self.bell, self._poll, timeout_s):
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


class WorkerChannel:
    """A worker's end: reads requests, writes replies. The main thread reads; writers hold the caller's lock."""

    def __init__(self, fd: int, geometry: Geometry, rank: int, bell: int, driver_bell: int) -> None:
        self._fd, self._geometry, self._rank = fd, geometry, rank
        self._shared = shared = Shared(fd, geometry)
        self._view, self._words, size = shared.view, shared.words, geometry.world_size
        self._bell, self._driver_bell = bell, driver_bell
        self._mask_word, self._mask_bit = 1 + rank // 64, rank % 64
        self._wants_word, self._fields = self._mask_word + geometry.mask_words, 8 * (1 + 2 * geometry.mask_words)
        self._slots, self._requests, self._request_slot = geometry.slots, geometry.requests, geometry.request_slot
        self._request_head, self._reply_slot = geometry.request_head, geometry.reply_slot
        self._inline_bytes = geometry.inline_bytes
        self._read = self._replied = 0
        self._word = self._requests // 8  # where the next request's number appears
        self._at = {row: shared.word(row, rank) for row in range(_layout.GATE + 1)}
        self._current, self._since = self._at[_layout.CURRENT_CALL], self._at[_layout.SINCE_NS]
        self._position, self._replies = self._at[_layout.REQUESTS_READ], self._at[_layout.REPLIES]
        self._replies_read, self._sleeps = self._at[_layout.REPLIES_READ], self._at[_layout.SLEEPS]
        self._driver_sleeps = shared.word(_layout.DRIVER_SLEEPS, 0)
        self._in_order = threading.Lock()  # taken for the locked instruction alone
        self._pace = Pace(geometry.spin_s)
        self._acks = self._at[_layout.ACKS]
        self._ring = geometry.replies(rank)
        self._holds = shared.holds(geometry.request_holds, BLOCKS * size)
        reply_holds = shared.holds(geometry.reply_holds(rank), BLOCKS)
        self._arena = Arena(shared.mapping, geometry.reply_arena(rank), geometry.arena_bytes, reply_holds, 1)
        self._names: dict[bytes, str] = {}
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)

    def next(self) -> Incoming:
        """The next request for this rank. Skips those for others."""
        words, view = self._words, self._view
        while True:
            word = self._word
            if words[word] <= self._read:
                self._await(word, self._read + 1)
            if not IN_ORDER:
                fence()
            if words[word + self._mask_word] >> self._mask_bit & 1:
                break
            self.done_reading()
        slot = 8 * word
        call_id, flags, nbytes, fmt, position, block, padded = _REQUEST.unpack_from(view, slot + self._fields)
        if flags & _GATED:
            self._await(self._at[_layout.GATE], self._read + 1)
        name = self._names.get(padded)
        if name is None:
            name = self._names[padded] = padded.rstrip(b"\0").decode()
        wants_value = words[word + self._wants_word] >> self._mask_bit & 1 == 1
        if not nbytes:
            return call_id, name, _NO_BODY, False, fmt, wants_value, flags & _EXIT != 0
        if position:
            body = self._body(position, nbytes, block, flags)
        else:
            start = slot + self._request_head
            body = view[start : start + nbytes]
        return call_id, name, body, position != 0, fmt, wants_value, False

    def _body(self, position: int, nbytes: int, block: int, flags: int) -> memoryview:
        """The message in an arena block, in memory of this rank's own."""
        hold = block * self._geometry.world_size + self._rank
        if flags & _ONE_READER:
            return self._shared.lend(position, nbytes, self._holds, hold)
        if nbytes > _COPY_BYTES:
            return self._shared.private(self._fd, position, nbytes, self._holds, hold)
        body = memoryview(bytearray(self._view[position : position + nbytes]))
        self._holds[hold] = 0
        return body

    def done_reading(self) -> None:
        """The request is copied out or held; its slot may be used again."""
        self._read = read = self._words[self._position] = self._read + 1
        self._word = (self._requests + read % self._slots * self._request_slot) // 8

    def _await(self, word: int, value: int) -> None:
        """Waits until a shared word has reached ``value``: yields the processor for a while, then sleeps."""
        words, clock, give_way, pace = self._words, time.monotonic, os.sched_yield, self._pace
        pace.begin(clock())
        while words[word] < value:
            now = clock()
            if now < pace.spin_until:
                give_way()
            else:
                self._sleep(word, value, pace.rest(now))
                pace.woken(clock())
        if pace.slept:
            pace.came = clock()

    def _sleep(self, word: int, value: int, timeout_s: float) -> None:
        """Until the bell rings, or for ``timeout_s``."""
        self._arena.reclaim()
        self._words[self._sleeps] = 1
        with self._in_order:
            pass
        if self._words[word] < value and _rings(self._bell, self._poll, timeout_s):
            with contextlib.suppress(BlockingIOError):  # already taken
                os.eventfd_read(self._bell)
        self._words[self._sleeps] = 0

    def set_current(self, call_id: int) -> None:
        """Shows the driver which call this rank is in."""
        words = self._words
        words[self._since] = time.monotonic_ns()
        words[self._current] = call_id

    def set_idle(self) -> None:
        """Shows the driver that this rank is in no call."""
        self._words[self._current] = 0

    def count_stack(self) -> None:
        """One more stack report is written."""
        self._words[self._at[_layout.STACKS]] += 1

    def publish(self, call_id: int, status: int, body: Encoded, time_ns: int) -> None:
        """Sends one reply; waits while the ring is full.

        Raises:
            MessageTooLargeError, ExecutorError: for a body that does not fit; nothing was sent.
        """
        number, words, nbytes = self._replied, self._words, body.nbytes
        while number - words[self._replies_read] >= self._slots:
            time.sleep(_ROOM_EVERY_S)
        position = block = 0
        if nbytes > self._inline_bytes:
            position, block = self._place(nbytes)
        slot = self._ring + number % self._slots * self._reply_slot
        _REPLY.pack_into(self._view, slot, call_id, status, body.format, nbytes, position, block, time_ns)
        if nbytes:
            write_body(self._view, body.parts, position or slot + REPLY_HEAD)
        if not IN_ORDER:
            fence()
        self._replied = words[self._replies] = number + 1
        self._announce()

    def acknowledge(self, call_id: int) -> None:
        """Says that all calls up to ``call_id`` are answered: those without a reply in the ring, with nothing to say."""
        if not IN_ORDER:
            fence()
        self._words[self._acks] = call_id
        self._announce()

    def _announce(self) -> None:
        """There is an answer."""
        with self._in_order:
            pass
        if self._words[self._driver_sleeps]:
            os.eventfd_write(self._driver_bell, 1)
        if self._words[self._word] <= self._read:  # there is nothing to do
            os.sched_yield()  # at once: the driver may be looking for it, on this very processor

    @property
    def backlog(self) -> int:
        """Replies that the driver has not taken."""
        return int(self._replied - self._words[self._replies_read])

    def _place(self, nbytes: int) -> tuple[int, int]:
        if nbytes > self._arena.limit:
            raise MessageTooLargeError("the result", nbytes, self._arena.limit, _LIMITS)
        while (place := self._arena.allocate(nbytes, (0,))) is None:
            time.sleep(_ROOM_EVERY_S)
        return place

"""A worker's end of the channel, see `exec_mp._channel`."""

from __future__ import annotations

import math
import os
import select
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from os import eventfd_read, sched_yield
from pickle import loads
from time import monotonic, monotonic_ns
from typing import Any

from exec_core.errors import MessageTooLargeError
from exec_core.messages import Encoded, Format, Reply
from exec_core.wrapper import DONE
from exec_mp import _layout
from exec_mp._arena import BLOCKS, Arena
from exec_mp._channel import (
    AWAY,
    FORMAT_SHIFT,
    GATED,
    INLINE,
    LIMITS,
    ONE_READER,
    REPLY_FIELDS,
    SPREAD,
    Body,
    Incoming,
    rings,
)
from exec_mp._layout import BODY, IN_ORDER, REPLY_HEAD, REQUEST, Geometry, Shared, fence, orders_memory, write_body
from exec_mp._pace import Pace
from exec_mp._spread import spread

_OF_EACH_CALL = _layout.ACKS, _layout.CURRENT_CALL, _layout.READY_NS, _layout.REQUESTS_READ
_ORDERS = GATED | SPREAD | AWAY  # what a request's kind may say beside what body it has, which stands above
_PLAIN = Format.PICKLE << FORMAT_SHIFT | INLINE  # the kind of a request with arguments that lie in its slot
_COPY_BYTES = 512 << 10  # with other readers, a message is copied up to this size, and mapped copy-on-write above
_CROWDED = 0.5  # processors for each process; with no more than that, ranks that are awake early gain nothing
_ROOM_EVERY_S = 0.0005  # the driver drains whenever a call is pending; nothing signals room in a reply ring


class WorkerChannel:
    """A worker's end: reads requests, writes replies. The main thread reads; writers hold the caller's lock.

    Attributes:
        is_answered: set for a request that is answered by `publish`, now or later.
    """

    def __init__(self, fd: int, geometry: Geometry, rank: int, bell: int, driver_bell: int) -> None:
        self._fd, self._geometry, self._rank = fd, geometry, rank
        self._shared = shared = Shared(fd, geometry)
        self._view, self._words, size = shared.view, shared.words, geometry.world_size
        self._bell, self._driver_bell = bell, driver_bell
        before, after = 8 * (rank // 64), 8 * (geometry.mask_words - 1 - rank // 64)  # bytes of masks for other ranks
        head = struct.Struct(f"<{before}xQ{after + before}xQ{after}x{REQUEST}")
        self._head, self._body_at, self._bit = head.unpack_from, 8 + head.size, 1 << rank % 64
        self._size_at = self._body_at // 8  # from a request's first word: bytes of its body
        self._slots = geometry.slots
        self._numbers = [(geometry.requests + slot * geometry.request_slot) // 8 for slot in range(geometry.slots)]
        self._request_head, self._reply_slot = geometry.request_head, geometry.reply_slot
        self._inline_bytes = geometry.inline_bytes
        self.is_answered = False
        self._read = self._replied = 0
        self._word = self._numbers[0]  # where the next request's number appears
        self._at = {row: shared.word(row, rank) for row in range(_layout.STACKS + 1)}
        self._position, self._replies = self._at[_layout.REQUESTS_READ], self._at[_layout.REPLIES]
        self._replies_read, self._sleeps = self._at[_layout.REPLIES_READ], self._at[_layout.SLEEPS]
        self._rejoin = shared.word(_layout.REJOIN, rank)
        self._driver_sleeps = shared.word(_layout.DRIVER_SLEEPS, 0)
        self._driver_cpu = shared.word(_layout.DRIVER_CPU, 0)
        self._in_order = orders_memory()
        # All ranks are awake early at once, so each is less early than a driver: by 150 us at most for two on two processors.
        self._pace = Pace(geometry.spin_s, geometry.room**1.5) if geometry.room > _CROWDED else None
        self._spin_s, self._is_prompt = geometry.spin_s, True  # without foresight: whether the last wait was short
        self._ring = geometry.replies(rank)
        self._holds = shared.holds(geometry.request_holds, BLOCKS * size)
        reply_holds = shared.holds(geometry.reply_holds(rank), BLOCKS)
        self._arena = Arena(shared.mapping, geometry.reply_arena(rank), geometry.arena_bytes, reply_holds, 1)
        self._names: dict[bytes, str] = {}
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)

    def requests(  # noqa: C901, PLR0912, PLR0915 # in one: the way of every call
        self,
        run: Callable[[str, Sequence[Any], Mapping[str, Any]], Reply],
        run_bare: Callable[[str], Reply],
        unsettled: Collection[int],
    ) -> Iterator[Incoming]:
        """The requests for this rank, which it is shown to be in, until it is to leave. Skips those for others.

        A common one, of a method's name without arguments or with some that lie in its slot, is run here, and is among them only
        if there is something to say about it. Who asks for the next one has run the one before, which is then acknowledged,
        unless it `is_answered`.

        Args:
            run: runs a method.
            run_bare: runs one without arguments.
            unsettled: calls before that are still to be answered: an acknowledgement would be one for them as well.
        """
        words, view, head, bit = self._words, self._view, self._head, self._bit
        names, numbers, slots, driver_sleeps = self._names, self._numbers, self._slots, self._driver_sleeps
        acks, current, ready, position = (self._at[row] for row in _OF_EACH_CALL)
        word, read, head_bytes, size = self._word, self._read, self._request_head, self._size_at
        while True:
            if words[word] <= read:
                self._await(word, read + 1)
            if not IN_ORDER:
                fence()
            runs, wants, call_id, kind, padded = head(view, 8 * word + 8)
            if not runs & bit:
                read = words[position] = read + 1
                word = numbers[read % slots]
                continue
            if not call_id:  # EXIT
                return
            if kind and kind & _ORDERS:
                self._obey(kind, read + 1)
            words[current] = call_id
            try:
                name = names[padded]
            except KeyError:
                name = names[padded] = padded.rstrip(b"\0").decode()
            if kind > _ORDERS and (kind != _PLAIN or not name):
                self._read = read
                yield call_id, name, wants & bit, self._body(8 * word, kind)
                word, read = self._word, self._read
            else:
                arguments: tuple[Any, ...] = ()
                reply: Reply | None = None
                if kind > _ORDERS:
                    try:
                        arguments = loads(view[8 * word + head_bytes : 8 * word + head_bytes + words[word + size]])
                    except BaseException as error:
                        reply = unloadable(error)
                read = words[position] = read + 1
                word = numbers[read % slots]
                if reply is None:
                    reply = run(name, *arguments) if arguments else run_bare(name)
                del arguments  # like the reply, they do not outlive the call
                if reply is not DONE or unsettled:
                    self._word, self._read = word, read
                    yield call_id, name, wants & bit, reply
                    del reply
            if kind and kind & AWAY:
                word, read = self._come_back(call_id, read)
            elif self.is_answered:
                self.is_answered = False
                words[current] = 0
            else:
                if not IN_ORDER:
                    fence()
                words[acks] = call_id  # which says "in no call" as well
                if words[word] <= read and not words[driver_sleeps]:  # there is nothing to do
                    sched_yield()  # at once: the driver may be looking for it, on this very processor
                    if not words[driver_sleeps]:  # a system call orders memory as well
                        continue
                self._ring_driver()
            if words[word] > read:
                words[ready] = monotonic_ns()  # the next one begins now, not when it was sent

    def _come_back(self, call_id: int, read: int) -> tuple[int, int]:
        """Ends a call during which others went on, and waits for the next request for this rank.

        Returns:
            The word of that one's number, and how many there are before it.
        """
        words = self._words
        if self.is_answered:
            self.is_answered = False
            words[self._at[_layout.CURRENT_CALL]] = 0
        else:
            if not IN_ORDER:
                fence()
            words[self._at[_layout.ACKS]] = call_id
        self._ring_driver()
        self._await(self._rejoin, read + 1)
        self._read = read = words[self._rejoin] - 1
        words[self._position], self._word = read, self._numbers[read % self._slots]
        return self._word, read

    def _obey(self, kind: int, number: int) -> None:
        """Before a request is run."""
        if kind & SPREAD:
            spread(self._rank, self._geometry.world_size, self._words[self._driver_cpu])
        if kind & GATED:
            self._await(self._at[_layout.GATE], number)
            self._words[self._at[_layout.READY_NS]] = monotonic_ns()

    def _body(self, slot: int, kind: int) -> Body:
        """The body of a request, in memory of this rank's own where it is in an arena block."""
        nbytes, position, block = BODY.unpack_from(self._view, slot + self._body_at)
        fmt = kind >> FORMAT_SHIFT
        if not position:
            start = slot + self._request_head
            return self._view[start : start + nbytes], fmt, False
        hold = block * self._geometry.world_size + self._rank
        if kind & ONE_READER:
            return self._shared.lend(position, nbytes, self._holds, hold), fmt, True
        if nbytes > _COPY_BYTES:
            return self._shared.private(self._fd, position, nbytes, self._holds, hold), fmt, True
        body = memoryview(bytearray(self._view[position : position + nbytes]))
        self._holds[hold] = 0
        return body, fmt, True

    def done_reading(self) -> None:
        """The body is copied out or held; its slot may be used again. Where `requests` has run the call, it has done this."""
        self._read = read = self._words[self._position] = self._read + 1
        self._word = self._numbers[read % self._slots]

    def _await(self, word: int, value: int) -> None:
        """Waits until a shared word has reached ``value``: yields the processor for a while, then sleeps."""
        pace = self._pace
        if pace is None:
            self._await_ring(word, value)
            return
        words = self._words
        pace.begin(monotonic())
        while words[word] < value:
            now = monotonic()
            if now < pace.spin_until:
                sched_yield()
            else:
                self._sleep(word, value, pace.rest(now))
                pace.woken(monotonic())
        if pace.slept:
            pace.came = monotonic()

    def _await_ring(self, word: int, value: int) -> None:
        """`_await` without foresight: it yields where the last wait was short, and where it was long, sleeps at once."""
        words, began, spin_s = self._words, monotonic(), self._spin_s
        if self._is_prompt:
            while words[word] < value and monotonic() < began + spin_s:
                sched_yield()
        while words[word] < value:
            self._sleep(word, value, math.inf)
        self._is_prompt = monotonic() < began + 4 * spin_s

    def _sleep(self, word: int, value: int, timeout_s: float) -> None:
        """Until the bell rings, or for ``timeout_s``; not at all if the word has reached ``value``."""
        self._arena.reclaim()
        words, bell = self._words, self._bell
        words[self._sleeps] = 1
        with self._in_order:
            pass
        if words[word] < value and rings(bell, self._poll, timeout_s):  # a signal ends that, unlike a read, in any case
            eventfd_read(bell)
        words[self._sleeps] = 0

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
        REPLY_FIELDS.pack_into(self._view, slot, call_id, status, body.format, nbytes, position, block, time_ns)
        if nbytes:
            write_body(self._view, body.parts, position or slot + REPLY_HEAD)
        if not IN_ORDER:
            fence()
        self._replied = words[self._replies] = number + 1
        if not IN_ORDER:
            fence()
        if words[self._word] <= self._read and not words[self._driver_sleeps]:
            sched_yield()
        self._ring_driver()

    def _ring_driver(self) -> None:
        """Wakes the driver, if it sleeps."""
        with self._in_order:
            pass
        if self._words[self._driver_sleeps]:
            os.eventfd_write(self._driver_bell, 1)

    @property
    def backlog(self) -> int:
        """Replies that the driver has not taken."""
        return int(self._replied - self._words[self._replies_read])

    def _place(self, nbytes: int) -> tuple[int, int]:
        if nbytes > self._arena.limit:
            raise MessageTooLargeError("the result", nbytes, self._arena.limit, LIMITS)
        while (place := self._arena.allocate(nbytes, (0,))) is None:
            time.sleep(_ROOM_EVERY_S)
        return place


def unloadable(error: BaseException) -> Reply:
    """The reply to a call whose arguments raise when they are unpickled. They may be of classes that cannot be imported here."""
    error.add_note("while the arguments were being unpickled in the worker")
    return Reply.of_error(error)

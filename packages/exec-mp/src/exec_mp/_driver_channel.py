"""The driver's end of the channel, see `exec_mp._channel`."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Sequence
from os import eventfd_write, sched_yield

from exec_core.errors import MessageTooLargeError
from exec_core.messages import Encoded
from exec_mp import _layout
from exec_mp._arena import BLOCKS, Arena
from exec_mp._channel import (
    AWAY,
    EXIT,
    FORMAT_SHIFT,
    INLINE,
    LIMITS,
    NOTHING,
    ONE_READER,
    REPLY_FIELDS,
    SPREAD,
    Answer,
    Header,
    rings,
)
from exec_mp._layout import (
    BODY,
    IN_ORDER,
    REPLY_HEAD,
    REQUEST,
    Geometry,
    Shared,
    fence,
    orders_memory,
    reserve,
    write_body,
)
from exec_mp._spread import processor

Words = tuple[bytes, bytes]
"""What the ranks have answered: their ``ACKS`` and their ``REPLIES``, which were looked at in this order."""

_BURST = 16  # requests, one after the other without a sleep between: now it matters who shares a processor with whom
_MASKS = 256  # remembered; a program chooses among few sets of ranks


class DriverChannel:
    """The driver's end: writes requests, reads the replies of all ranks. One thread publishes at a time, one takes.

    Attributes:
        is_awake: what `stay_awake` and `may_sleep` have said last.
        sent: requests published; written by the publishing thread.
        glance: all answers' words as they are now. With nothing but acknowledgements of one call that is ``pack_id(call_id)``,
            as often as there are ranks, and `rest`.
        seen: of them, what has been dealt with; for the taking thread, as all that follows `publish` and its kin.

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
        self._slots = geometry.slots
        self._numbers = [(geometry.requests + slot * geometry.request_slot) // 8 for slot in range(geometry.slots)]
        self._request_head, self._inline_bytes = geometry.request_head, geometry.inline_bytes
        request = struct.Struct(f"<{16 * geometry.mask_words}s{REQUEST}")
        self._request, self._body_at = request.pack_into, 8 + request.size
        sleeps = 8 * shared.word(_layout.SLEEPS, 0)
        self._sleeps = shared.view[sleeps : sleeps + 8 * geometry.row]
        self._all_awake = bytes(len(self._sleeps))
        self._rejoin_word = shared.word(_layout.REJOIN, 0)
        self._away: frozenset[int] = frozenset()  # ranks that read no requests until there is another one for them
        self._left_at: dict[int, int] = {}  # of such a rank: requests it reads before
        self._sleep_word, self._cpu_word = shared.word(_layout.DRIVER_SLEEPS, 0), shared.word(_layout.DRIVER_CPU, 0)
        self._words[self._sleep_word] = 1
        self.is_awake = False
        self._in_order = orders_memory()
        self.sent = 0
        self._word = self._numbers[0]  # where the number of the next one goes; likewise
        self._crowded_at = geometry.slots // 2  # requests, from when on it matters who has read how many; likewise
        self._spread_at = _BURST  # the request with which ranks are told to spread
        self._ranks: tuple[int, ...] = ()  # whom `_mask` was made for
        self._reply_ranks: tuple[int, ...] = ()  # likewise
        self._mask = b""
        self._masks: dict[tuple[tuple[int, ...], tuple[int, ...]], bytes] = {}
        acks, replies = 8 * shared.word(_layout.ACKS, 0), 8 * shared.word(_layout.REPLIES, 0)
        self._answers = shared.view[acks : replies + 8 * geometry.row]
        self._replies = shared.view[replies : replies + 8 * geometry.row]
        self.seen = bytes(len(self._answers))
        self._ack_bytes, self._by_rank = len(self._replies), struct.Struct(f"<{size}Q")
        self._taken = bytes(len(self._replies))  # of what was seen, the replies in rings
        self._counts = (0,) * size  # the same, by rank
        self._told = self._taken  # the same, as ranks have been told
        self._opened = [0] * size  # by rank: replies in arena blocks have been opened up to this number
        self.pack_id, self._padding = struct.Struct("<Q").pack, bytes(8 * (geometry.row - size))
        self.rest = self._padding + self._taken
        self.glance: Callable[[], bytes] = self._answers.tobytes
        self._poll = select.poll()
        self._poll.register(self.bell, select.POLLIN)

    def publish(
        self,
        call_id: int,
        name: bytes,
        body: Encoded,
        ranks: tuple[int, ...],
        reply_ranks: tuple[int, ...],
        kind: int = 0,
        yields: bool = False,
    ) -> bool:
        """Sends one request to ``ranks``, whose number is what `sent` was before. False while there is no room.

        Args:
            kind: GATED if a rank is to start the call only when `open_gate` says so; AWAY if others may be sent any number of
                requests while the call runs.
            yields: gives the processor away at once where nobody sleeps: a rank may be looking for the request, on this very
                one.
        """
        number, word = self.sent, self._word
        if number >= self._crowded_at and number - self._count_read() >= self._slots:
            return False
        if number == self._spread_at:
            self._words[self._cpu_word], kind = max(0, processor()), kind | SPREAD
        if body.nbytes:
            described = self._put(name, body, ranks, 8 * word)
            if described is None:
                return False
            kind |= described
        if ranks is not self._ranks or reply_ranks is not self._reply_ranks:
            self._address(ranks, reply_ranks, number, kind)
        self._request(self._view, 8 * word + 8, self._mask, call_id, kind, name)
        if not IN_ORDER:
            fence()
        self.sent = self._words[word] = number + 1  # Ctrl-C comes after calls only, so not before the next lines
        if kind and kind & AWAY:
            self._away, self._ranks = self._away | {*ranks}, ()
        self._word = self._numbers[(number + 1) % self._slots]
        with self._in_order:
            pass
        if (sleeps := self._sleeps.tobytes()) != self._all_awake:
            self._wake(sleeps, ranks)
        elif yields:
            sched_yield()
        return True

    def _address(self, ranks: tuple[int, ...], reply_ranks: tuple[int, ...], number: int, kind: int) -> None:
        """Request ``number`` is for other ranks than the one before, or may be."""
        self._mask = self._masked(ranks, reply_ranks)
        self._ranks, self._reply_ranks = ranks, reply_ranks
        if self._away:
            self._rejoin(ranks, number)
            self._ranks = ()  # asked again with each request
        if kind & AWAY:
            self._left_at.update(dict.fromkeys(ranks, number + 1))

    def _rejoin(self, ranks: tuple[int, ...], number: int) -> None:
        """Those of ``ranks`` that are away go on with request ``number`` as soon as they have run what they are in."""
        for rank in self._away.intersection(ranks):
            # No call between the two: Ctrl-C finds both done, or none.
            self._words[self._rejoin_word + rank] = number + 1
            self._away = self._away - {rank}

    def _wake(self, sleeps: bytes, ranks: tuple[int, ...]) -> None:
        """Rings the bells of those of ``ranks`` that sleep."""
        sleeping, bells, spread_at = self._by_rank.unpack_from(sleeps), self.bells, self.sent + _BURST
        # Those whom the request is not for must read past it soon, too, once it matters who has read how many.
        for rank in self._readers() if self.sent > self._crowded_at else ranks:
            if sleeping[rank]:
                self._spread_at = spread_at
                eventfd_write(bells[rank], 1)

    def wake_all(self) -> None:
        """Rings all bells: for a request that was published by a `publish` which Ctrl-C has cut short."""
        for bell in self.bells.values():
            os.eventfd_write(bell, 1)

    def _put(self, name: bytes, body: Encoded, ranks: tuple[int, ...], slot: int) -> int | None:
        """Writes a body, and where it is. What a request's kind says of it, or None while there is no room."""
        nbytes, position, block, kind = body.nbytes, 0, 0, body.format << FORMAT_SHIFT
        if nbytes > self._inline_bytes:
            place = self._allocate(name, nbytes, ranks)
            if place is None:
                return None
            position, block = place
            if len(ranks) == 1:
                kind |= ONE_READER
        else:
            kind |= INLINE
        BODY.pack_into(self._view, slot + self._body_at, nbytes, position, block)
        write_body(self._view, body.parts, position or slot + self._request_head)
        return kind

    def _allocate(self, name: bytes, nbytes: int, ranks: tuple[int, ...]) -> tuple[int, int] | None:
        """Position and number of a block in the arena; None while there is no room."""
        if nbytes > self._arena.limit:
            raise MessageTooLargeError(repr(name.decode() or "the call"), nbytes, self._arena.limit, LIMITS)
        return self._arena.allocate(nbytes, ranks)

    def publish_exit(self) -> None:
        """Tells all ranks to leave their loops."""
        self.publish(EXIT, b"exit", NOTHING, self.remote_ranks, ())

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

    def _readers(self) -> list[int]:
        """Ranks that read each request, be it for them or not; also who has not come to the one that lets him go."""
        return [
            rank for rank in self.remote_ranks if rank not in self._away or self._read_by(rank) < self._left_at[rank]
        ]

    def _read_by(self, rank: int) -> int:
        """Requests that ``rank`` has read, or never will."""
        words = self._words
        read: int = max(words[self._shared.word(_layout.REQUESTS_READ, rank)], words[self._rejoin_word + rank] - 1)
        return read

    def _count_read(self) -> int:
        """Requests that all ranks have read, or will not."""
        read = min(map(self._read_by, self._readers()), default=self.sent)
        self._crowded_at = read + self._slots // 2
        return read

    def look(self) -> Words | None:
        """The words that say what the ranks have answered, or None while that is what was `consume`-d last."""
        seen = self.glance()
        return None if seen == self.seen else self.words(seen)

    def words(self, seen: bytes) -> Words:
        """`look`, once `glance` has found something new: ``seen``."""
        if not IN_ORDER:
            fence()
        # Once more: a reply is there before the acknowledgement that counts on it, but bytes are copied in any order.
        return seen[: self._ack_bytes], self._replies.tobytes()

    def acks(self, words: Words) -> tuple[int, ...]:
        """By rank: the id of the call up to which it has answered."""
        return self._by_rank.unpack_from(words[0])

    def newest_acks(self) -> tuple[int, ...]:
        """`acks`, whether or not who reads has come to them."""
        return self._by_rank.unpack_from(self.glance())

    def replies(self, words: Words) -> list[tuple[int, int]]:
        """Rank and number of each reply in a ring that has not been consumed."""
        if words[1] == self._taken:
            return []
        counts, taken = self._by_rank.unpack_from(words[1]), self._counts
        return [(rank, number) for rank in self.remote_ranks for number in range(taken[rank], counts[rank])]

    def take(self, rank: int, number: int) -> Header:
        """A reply that `replies` has named."""
        return REPLY_FIELDS.unpack_from(self._view, self._reply_rings[rank] + number % self._slots * self._reply_slot)

    def open(self, rank: int, number: int, header: Header) -> Answer | None:
        """What `take` found. None if its memory was handed out before, which Ctrl-C has kept from being consumed."""
        _, status, fmt, nbytes, position, block, time_ns = header
        if position:
            if number < self._opened[rank]:
                return None
            self._opened[rank] = number + 1  # first: Ctrl-C may lose a block, but none is freed twice
            body = self._shared.lend(position, nbytes, self._reply_holds[rank], block)
        else:
            start = self._reply_rings[rank] + number % self._slots * self._reply_slot + REPLY_HEAD
            body = self._view[start : start + nbytes]
        return Answer(rank, status, fmt, body, position != 0, time_ns)

    def consume(self, words: Words) -> None:
        """What ``words`` say has been dealt with; the slots of the replies among it may be used again."""
        acks, replies = words
        if replies != self._told:  # in this order: begun again where Ctrl-C comes in between
            counts = self._by_rank.unpack_from(replies)
            self._taken, self._counts, self.rest = replies, counts, self._padding + replies
            for rank in self.remote_ranks:
                self._words[self._replies_read + rank] = counts[rank]
            self._told = replies
        self.seen = acks + replies

    def open_gate(self, rank: int, number: int) -> None:
        """Lets ``rank`` start gated requests up to ``number``."""
        self._words[self._shared.word(_layout.GATE, rank)] = number + 1
        os.eventfd_write(self.bells[rank], 1)

    def current(self, rank: int) -> tuple[int, int]:
        """Call id that ``rank`` is in (0: none), and when it was last ready for one that was there already, in monotonic ns."""
        words, word = self._words, self._shared.word
        call_id, ready_ns = words[word(_layout.CURRENT_CALL, rank)], words[word(_layout.READY_NS, rank)]
        return (0 if call_id <= words[word(_layout.ACKS, rank)] else call_id), ready_ns

    def stacks(self, rank: int) -> int:
        """Stack reports that ``rank`` has written."""
        return int(self._words[self._shared.word(_layout.STACKS, rank)])

    def stay_awake(self) -> None:
        """Nobody sleeps on the bell, so nobody need ring it; until `may_sleep`."""
        self.is_awake = True
        self._words[self._sleep_word] = 0

    def may_sleep(self) -> None:
        """Somebody may sleep on the bell, who looks once more between this and sleeping."""
        self._words[self._sleep_word] = 1
        self.is_awake = False  # last, as `stay_awake` has it first: so it is never True while the word says otherwise
        with self._in_order:
            pass

    def sleep(self, timeout_s: float, seen: bytes) -> bool:
        """Until the bell rings, or for ``timeout_s``. Whether there is, or was, something to look at beside what was ``seen``."""
        self.may_sleep()
        if self.glance() != seen:
            return True
        rang = rings(self.bell, self._poll, timeout_s)
        self._spread_at = self.sent + _BURST
        if not rang:
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
        for view in (self._sleeps, self._answers, self._replies):
            view.release()
        self._shared.close()
        for fd in (self.fd, self.bell, *self.bells.values()):
            os.close(fd)

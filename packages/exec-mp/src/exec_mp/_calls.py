"""The driver's calls in flight: who has answered, who owes what, which call fails with what. Pure: no I/O, no locks, no clock.

    open -> [value, error, acknowledge ...] -> finished (value or error) -> closed when every rank has answered

A rank answers with a value or an error, which name their call, or with an acknowledgement, which stands for all its calls up
to one that it has not answered otherwise.

A call that finishes early (a time-out, a failing rank) stays here until the last of its ranks has answered: its late
replies are recognised and dropped, its place in flight stays taken, and `Calls.late` says who is still inside.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import attrs

from exec_core.calls import Call
from exec_core.errors import ExecutorError, RpcTimeoutError
from exec_core.messages import Failure, first_failure

DEATH_GRACE_S = 0.02  # an error reply waits so long for a death: a victim's peers often complain before it is reported


# Never changed: most calls need none of their own.
_NO_VALUES: dict[int, Any] = {}
_NO_FAILURES: list[Failure] = []
_NOT_GATED: list[int] = []
_is_resident = operator.attrgetter("resident")


@attrs.define(eq=False)
class Entry(Call):
    """One call, and how it fares in flight.

    Attributes:
        id: its number on the wire, from 1; 0 before it is opened.
        number: its place in the request ring; None until sent, or when no remote rank runs it.
        sent_at: when it was put there (monotonic seconds).
        future: None for a blocking caller.
        values: of the ranks that have answered with more than an acknowledgement; None for an error.
        failures: error replies so far.
        settle_at: when a held-back error is final (monotonic seconds).
        ungated: ranks that may not start yet, in order.
        sent: all ranks have been told; its gates may be opened.
        finished: ``error`` or ``values`` are final.
        late: a rank that has answered when the call was finished already; set when it is closed.
        waiter: what wakes the blocking caller, where it waits for another thread.
        job: of rank 0 where that runs here, for a blocking caller.
        claimed: the main thread waits for its future, and delivers it once it is answered.
        delivered: a thread is setting its future, or has.
        told: its outcome, see `exec_mp._future.tell`.
    """

    id: int = 0
    future: Future[Any] | None = None
    values: dict[int, Any] = _NO_VALUES
    number: int | None = None
    sent_at: float = 0.0
    failures: list[Failure] = _NO_FAILURES
    settle_at: float = math.inf
    ungated: list[int] = _NOT_GATED
    sent: bool = False
    finished: bool = False
    late: int | None = None
    error: BaseException | None = None
    waiter: Any = None
    job: Any = None
    claimed: bool = False
    delivered: bool = False
    told: tuple[Any, BaseException | None] | None = None

    @property
    def due(self) -> float:
        """When something is to be done about this call even if no reply comes."""
        return min(self.deadline, self.settle_at)

    def is_due(self, now: float) -> bool:
        """Whether something is to be done about this call now."""
        return not self.finished and self.due <= now

    def outcome(self) -> Any:
        """The value of a finished call, or its error raised; once."""
        error = self.error
        if error is not None:
            if self.failures:
                self.failed = min((failure.time_ns, failure.rank, failure.pid) for failure in self.failures)[1:]
            self.error, self.failures = None, _NO_FAILURES  # raised, it refers to frames that have the call
            try:
                raise error
            finally:
                del error
        values, ranks = self.values, self.reply_ranks
        wanted = list(map(values.get, ranks)) if values else [None] * len(ranks)
        return wanted if self.aggregate is None else self.aggregate(wanted)


class Calls:
    """All calls in flight of one generation.

    The caller serialises access, but for two methods that each call needs: `open`, by one sender at a time, and `close_only`,
    by whoever leads. What they do takes effect in single steps of the interpreter, and the others look at copies.
    """

    def __init__(self, max_in_flight: int, world_size: int, pids: Mapping[int, int] | None = None) -> None:
        self.max_in_flight = max_in_flight
        self._pids: Mapping[int, int] = {} if pids is None else pids  # by rank, for errors
        self.closed_by: BaseException | None = None  # nothing is opened any more
        self.in_flight: dict[int, Entry] = {}  # by id, oldest first
        self.gated: list[Entry] = []  # those of them that start rank by rank, oldest first
        self._world_size = world_size
        self._acks: Sequence[int] = (0,) * world_size  # by rank: it has answered its calls up to this id
        self._next = 1

    @property
    def hopeless(self) -> bool:
        """Whether rank 0, in a call here, waits for others in vain: one of them has failed or died."""
        return self.closed_by is not None or any(entry.failures for entry in list(self.in_flight.values()))

    def open(self, entry: Entry) -> bool:
        """Takes a place for ``entry``. False when `max_in_flight` is reached. `closed_by` is to be looked at after it.

        A call that runs on few ranks at a time needs the same serialising as the other methods.
        """
        if len(self.in_flight) >= self.max_in_flight and not entry.resident:
            residents = sum(map(_is_resident, list(self.in_flight.values())))
            if len(self.in_flight) - residents >= self.max_in_flight:
                return False
        if entry.max_concurrent is not None and entry.max_concurrent < len(entry.ranks):
            entry.ungated = list(entry.ranks)
            self.gated.append(entry)
        entry.id = number = self._next
        self._next = number + 1
        self.in_flight[number] = entry
        return True

    def withdraw(self, entry: Entry) -> None:
        """``entry`` was not sent after all. What some ranks may answer all the same is nobody's."""
        self.in_flight.pop(entry.id, None)
        entry.number = None
        if entry in self.gated:
            self.gated.remove(entry)

    def name_of(self, call_id: int) -> str | None:
        """Method of a call in flight."""
        entry = self.in_flight.get(call_id)
        return None if entry is None else entry.name

    def owing(self, entry: Entry) -> list[int]:
        """Ranks that have not answered ``entry``."""
        acks, values, call_id = self._acks, entry.values, entry.id
        return [rank for rank in entry.ranks if acks[rank] < call_id and rank not in values]

    def is_answered(self, entry: Entry) -> bool:
        """Whether it is finished and nothing of its outcome is still to come, such as the stacks of ranks that are late."""
        return entry.finished and entry.late is None and entry.id not in self.in_flight

    def late(self, rank: int) -> Entry | None:
        """The oldest call that ``rank`` still owes and whose caller has given up on it."""
        return next((e for e in list(self.in_flight.values()) if e.finished and rank in self.owing(e)), None)

    def acknowledge(self, acks: Sequence[int]) -> list[Entry]:
        """Each rank has answered its calls up to the id in ``acks``. The entries that nobody owes any more.

        Values and errors of those calls have been told here before.
        """
        before, self._acks = self._acks, acks
        low, high = min(acks), max(acks)
        closed = []
        # Not the items: while pairs are made the garbage collector may come in, and a finalizer's call with it.
        for entry in list(self.in_flight.values()):
            call_id = entry.id
            if call_id > high:
                break
            if call_id <= low or not self.owing(entry):
                closed.append(entry)
                if entry.finished:
                    late = (rank for rank in entry.ranks if before[rank] < call_id and rank not in entry.values)
                    entry.late = next(late, entry.ranks[0])  # none is left when Ctrl-C has cut this short before
        for entry in closed:
            self._close(entry)
        return closed

    def close_only(self, entry: Entry) -> bool:
        """All ranks have answered ``entry`` with nothing. False, and nothing is done, unless it is the only call in flight.

        Not for a call that runs on few ranks at a time.
        """
        if len(self.in_flight) != 1 or entry.finished or entry.failures:
            return False
        try:  # no call from here on: nothing comes in between
            del self.in_flight[entry.id]
        except KeyError:
            return False
        entry.finished = True
        self._acks = (entry.id,) * self._world_size
        return True

    def value(self, rank: int, call_id: int, value: Any) -> list[Entry]:
        """``rank`` has run the call and has a value. Its entry, if nobody owes it any more."""
        entry = self._answered_by(rank, call_id)
        if entry is None:
            return []
        if rank not in entry.values:
            self._record(entry, rank, None if entry.finished else value)
        return self._close_if_answered(entry, rank)

    def error(self, call_id: int, failure: Failure, now: float) -> list[Entry]:
        """A rank has failed. While others owe an answer, the error is held back for `DEATH_GRACE_S`."""
        rank = failure.rank
        entry = self._answered_by(rank, call_id)
        if entry is None:
            return []
        if rank not in entry.values:
            if not entry.finished and all(known.rank != rank for known in entry.failures):
                entry.failures = [*entry.failures, failure]
                entry.settle_at = min(entry.settle_at, now + DEATH_GRACE_S)
                if entry.waiter is not None:
                    entry.waiter.set()  # it is due sooner now
            self._record(entry, rank, None)
        return self._close_if_answered(entry, rank)

    def _answered_by(self, rank: int, call_id: int) -> Entry | None:
        """A call in flight, unless ``rank`` has acknowledged it. It may have answered: Ctrl-C has cut short what follows."""
        entry = self.in_flight.get(call_id)
        return None if entry is None or self._acks[rank] >= call_id else entry

    @staticmethod
    def _record(entry: Entry, rank: int, value: Any) -> None:
        if entry.ungated and rank in entry.ungated:  # rank 0 inline waits for no gate
            entry.ungated.remove(rank)
        if entry.values is _NO_VALUES:
            entry.values = {}
        entry.values[rank] = value

    def _close_if_answered(self, entry: Entry, rank: int) -> list[Entry]:
        if self.owing(entry):
            return []
        if entry.finished:
            entry.late = rank
        self._close(entry)
        return [entry]

    def _close(self, entry: Entry) -> None:
        error = first_failure(entry.failures) if entry.failures else None
        if self.gated and entry in self.gated:
            self.gated.remove(entry)
        del self.in_flight[entry.id]  # no call from here on: Ctrl-C finds all of it done, or none
        if not entry.finished:
            entry.error, entry.finished, entry.settle_at = error, True, math.inf

    @staticmethod
    def _finish(entry: Entry, error: BaseException | None) -> Entry:
        entry.finished, entry.error = True, error
        entry.settle_at = math.inf
        return entry

    def _futures(self) -> Iterator[Entry]:
        return (entry for entry in list(self.in_flight.values()) if entry.future is not None and not entry.finished)

    def due(self) -> float:
        """When the next future is due (monotonic seconds), infinity for never. Blocking callers watch their own calls."""
        return min((entry.due for entry in self._futures()), default=math.inf)

    def overdue(self, now: float) -> list[Entry]:
        """Unfinished futures that are due."""
        return [entry for entry in self._futures() if entry.is_due(now)]

    def abandon(self, entry: Entry) -> None:
        """The caller of ``entry`` has left, interrupted: its replies are late ones now."""
        if not entry.finished:  # not with what interrupted it, which refers to frames that have the entry
            self._finish(entry, ExecutorError(f"the caller of {entry.name!r} was interrupted"))

    def settle(self, entry: Entry, acks: Sequence[int] = ()) -> bool:
        """Finishes an overdue call with its held-back error, or as timed out. False when it is finished already.

        Args:
            acks: newer ones than `acknowledge` has been told, for the error alone: who reads them may not have come to that.
        """
        if entry.finished:
            return False
        pending = self.owing(entry)
        if acks:  # had all answered, it would not be late for long
            pending = [rank for rank in pending if acks[rank] < entry.id] or pending
        if entry.failures:
            error = first_failure(entry.failures)
            error.add_note(f"ranks {pending} are still inside {entry.name!r}")
        else:
            answered = [rank for rank in entry.ranks if rank not in pending]
            limit, pids = entry.timeout_s or 0.0, self._pids
            error = RpcTimeoutError(entry.name, limit, answered, pending, pids=pids, request_id=entry.id)
        self._finish(entry, error)
        return True

    def close(self, error: BaseException) -> list[Entry]:
        """Nothing is opened any more; every unfinished call finishes with an ``error`` of its own: each is raised by itself.

        A call in which the rank that has ended had failed first finishes with that, which is why.
        """
        self.closed_by = self.closed_by or error
        unfinished = [entry for entry in list(self.in_flight.values()) if not entry.finished]
        for entry in unfinished:
            own = [failure.error for failure in entry.failures if failure.rank == getattr(error, "rank", None)]
            if own:
                own[0].add_note(str(error))
            self._finish(entry, own[0] if own else copy.copy(error))
        self.in_flight.clear()
        self.gated.clear()
        return unfinished

    def grants(self) -> list[tuple[int, Entry]]:
        """Ranks that may now start a gated call. Only the oldest gated call gets any: each rank runs them in order.

        They are granted again until they are taken out of its ``ungated``, once their gates are open.
        """
        if not self.gated or not self.gated[0].sent:
            return []
        oldest = self.gated[0]
        running = len(self.owing(oldest)) - len(oldest.ungated)
        return [(rank, oldest) for rank in oldest.ungated[: max(0, (oldest.max_concurrent or 0) - running)]]

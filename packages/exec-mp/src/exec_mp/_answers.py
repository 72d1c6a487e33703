"""What the ranks have answered becomes values and failures of calls.

    DriverChannel.look -> Answers.process -> Calls.value, error, acknowledge -> closed entries

Their callers are woken; futures are left to be finished, in `Answers.todo`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from exec_core import messages
from exec_core.errors import ExecutorError, WorkerError
from exec_core.messages import Failure, Status
from exec_mp._calls import Calls, Entry
from exec_mp._channel import Answer
from exec_mp._driver_channel import DriverChannel, Words

Taken = tuple[int, int, object, Failure | None]
"""A reply from a ring: rank, call id, value or failure."""


class Answers:
    """Tells the calls what has been answered. `process` is for whoever leads, see `exec_mp._receiver`.

    Args:
        lock: guards ``calls``.
        pids: process of each rank, for errors.
        finish: delivers a finished entry that has a future.
        progress: ``fn(rank, done, total, what)``.
        late: told of a call with a reply that came too late, once.

    Attributes:
        todo: what answers have led to, to be done with neither the lock nor the lead. Popped by anyone.
    """

    def __init__(
        self,
        channel: DriverChannel,
        calls: Calls,
        lock: threading.Lock,
        pids: Mapping[int, int],
        *,
        finish: Callable[[Entry], None],
        progress: Callable[[int, int, int, str], None],
        late: Callable[[Entry], None],
    ) -> None:
        self._channel, self._calls, self._lock, self._pids = channel, calls, lock, pids
        self._finish, self._progress, self._late = finish, progress, late
        self.todo: deque[Callable[[], object]] = deque()

    def process(self, words: Words) -> bool:
        """Takes what `DriverChannel.look` has found. Whether there was an error among it."""
        channel, calls = self._channel, self._calls
        taken: Sequence[Taken] = ()
        if replies := channel.replies(words):
            taken = [found for reply in replies if (found := self._take(*reply)) is not None]
        with self._lock:
            closed = self._record(taken) if taken else []
            closed += calls.acknowledge(channel.acks(words))
            if calls.gated:
                self.open_gates()
        for entry in closed:
            if entry.late is not None:
                self.todo.append(functools.partial(self._late, entry))
            elif (entry.future is not None or entry.waiter is not None) and not entry.claimed:
                self.deliver(entry)
        # After recording: interrupted in between, a reply is read again and recognised.
        channel.consume(words)
        return any(failure is not None for _, _, _, failure in taken)

    def _take(self, rank: int, number: int) -> Taken | None:
        """A reply from a ring; None for one that is no answer."""
        channel = self._channel
        header = channel.take(rank, number)
        call_id, status, has_body = header[:3]
        if not has_body:
            return rank, call_id, None, None
        answer = channel.open(rank, number, header)
        pid, name = self._pids.get(rank, 0), self._calls.name_of(call_id) or "?"
        if answer is None:  # most likely its caller, who has left
            error = ExecutorError(f"the result of {name!r} was lost: an exception came while it was being taken")
            messages.add_origin(error, rank, pid, name)
            return rank, call_id, None, Failure(rank, pid, error, header[-1])
        if status == Status.PROGRESS:
            self.todo.append(functools.partial(self._progress, rank, *messages.decode(answer.body, answer.format)))
            return None
        return rank, call_id, *decoded(answer, pid, name)

    def _record(self, taken: Sequence[Taken]) -> list[Entry]:
        """Under the lock: tells the calls of values and failures. The entries that nobody owes any more."""
        closed: list[Entry] = []
        for rank, call_id, value, failure in taken:
            if failure is None:
                closed += self._calls.value(rank, call_id, value)
            else:
                closed += self._calls.error(call_id, failure, time.monotonic())
        return closed

    def open_gates(self) -> None:
        """Under the lock: lets ranks start calls that run on few of them at a time."""
        for rank, entry in self._calls.grants():
            if entry.number is not None and rank in self._channel.remote_ranks:
                self._channel.open_gate(rank, entry.number)
            entry.ungated.remove(rank)

    def deliver(self, entry: Entry) -> None:
        """Wakes the caller of a finished entry, or leaves its future to be finished, in `todo`."""
        if entry.future is not None:
            self.todo.append(functools.partial(self._finish, entry))
        elif entry.waiter is not None:
            entry.waiter.set()


def decoded(answer: Answer, pid: int, name: str) -> tuple[object, Failure | None]:
    """The value in ``answer``, or the error: the worker's, or what unpickling raises.

    Raises:
        KeyboardInterrupt: the user's, on the main thread; nothing else.
    """
    rank = answer.rank
    try:
        if answer.status == Status.VALUE:
            return messages.decode(answer.body, answer.format, answer.owned), None
        error = messages.decode_error(answer.body, answer.format, rank, pid, name)
    except Exception as unloadable:  # of a class that is not here, say
        error = unloadable
        error.add_note(f"while the result was being unpickled in the driver: rank {rank} (pid {pid}) in {name}")
    except BaseException as unloadable:  # a result that exits the interpreter when it is unpickled must not do so here
        if isinstance(unloadable, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        kind, why = type(unloadable).__qualname__, "raised while the result was being unpickled in the driver"
        error = WorkerError(rank, pid, name, kind, str(unloadable), why=why)
    return None, Failure(rank, pid, error, answer.time_ns)

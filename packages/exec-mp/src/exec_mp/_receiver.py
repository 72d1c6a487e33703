"""Who reads the replies: at most one leader at a time, a blocking caller if there is one.

    wait(entry)      the caller leads: it looks at the reply words in its own thread, because a hand-over to another thread
                     costs more than the whole round trip; with a leader already there it sleeps until it is done or promoted
    (background)     one thread sleeps on the fork server's session and, only while calls are pending and nobody leads, on the
                     bell; it finishes futures that nobody waits on, and owns their deadlines

``_lock`` (the group's) guards the calls, ``_leader``, ``_followers``, ``_armed`` and ``_wake_at``. Only the leader touches the
reply rings. Futures are finished, and callbacks run, with neither the lock nor the lead held.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from exec_core import messages
from exec_core.messages import Failure, Format, Status

from exec_mp._calls import Calls, Entry
from exec_mp._channel import Answer, DriverChannel

Todo = list[Callable[[], None]]


class Receiver:
    """Reads replies, finishes calls.

    Args:
        lock: the group's; guards ``calls`` as well.
        pids: process of each rank, for errors.
        watched: what to call when a descriptor has something to read.
        finish: delivers a finished entry that has a future.
        settle: finishes an entry that is due.
        progress: ``fn(rank, done, total, what)``.
        late: told of a reply that came too late, once per call.
    """

    def __init__(
        self,
        channel: DriverChannel,
        calls: Calls,
        lock: threading.Lock,
        pids: Mapping[int, int],
        watched: Mapping[int, Callable[[], None]],
        *,
        finish: Callable[[Entry], None],
        settle: Callable[[Entry], None],
        progress: Callable[[int, int, int, str], None],
        late: Callable[[int, str], None],
    ) -> None:
        self._channel, self._calls, self._lock, self._pids = channel, calls, lock, pids
        self._finish, self._settle, self._progress, self._late = finish, settle, progress, late
        self._spin_s = channel.geometry.spin_s
        self._leader: object | None = None
        self._followers: deque[Entry] = deque()
        self._armed = False  # the background thread listens to the bell
        self._wake_at = math.inf  # when the background thread wakes by itself
        self._stopped = False
        self._control = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watched = {**watched, self._control: self._controlled, channel.bell: self._drain_in_background}
        self._epoll = select.epoll()
        for fd in self._watched:
            self._epoll.register(fd, 0 if fd == channel.bell else select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name="exec-mp", daemon=True)
        self._thread.start()

    # A blocking caller

    def wait(self, entry: Entry) -> None:
        """Returns when ``entry`` is finished."""
        if self.is_current_thread():  # a callback that calls: this thread must go on watching
            with self._lock:
                if self._leader is None:
                    self._arm(on=True)
            while not entry.finished:
                self.turn(entry.due)
                if entry.is_due(time.monotonic()):
                    self._settle(entry)
            return
        try:
            while not entry.finished:
                self._wait_once(entry)
                if entry.is_due(time.monotonic()):
                    self._settle(entry)
        except BaseException as error:
            with self._lock:
                self._calls.abandon(entry, error)
            raise
        finally:
            if self._followers or self._calls:
                self._step_down(None)  # a promotion that this caller no longer needed goes on to the next

    def _wait_once(self, entry: Entry) -> None:
        with self._lock:
            if entry.finished:
                return
            leads = self._leader is None
            if leads:
                self._leader = entry
            else:
                if entry.waiter is None:
                    entry.waiter = threading.Event()
                self._followers.append(entry)
        if leads:
            todo: Todo = []
            try:
                self._lead(entry, todo)
            finally:
                self._step_down(entry)
                for act in todo:
                    act()
            return
        try:
            entry.waiter.wait(None if entry.due == math.inf else max(0.0, entry.due - time.monotonic()))
        finally:
            with self._lock:
                entry.waiter.clear()
                with contextlib.suppress(ValueError):
                    self._followers.remove(entry)

    def _lead(self, entry: Entry, todo: Todo) -> None:
        """Until ``entry`` is finished or due, or something is to be done without the lead."""
        channel = self._channel
        spin_until = time.monotonic() + self._spin_s
        while not entry.finished and not todo:
            ranks = channel.look()
            now = time.monotonic()
            if ranks:
                self._process(ranks, todo)
                spin_until = now + self._spin_s
            elif now < spin_until:
                os.sched_yield()
            elif now >= entry.due:
                return
            else:
                channel.sleep(None if entry.due == math.inf else entry.due - now)

    def _step_down(self, leader: object | None) -> None:
        """Gives up the lead (if ``leader`` has it) and hands it on: to a waiting caller, else to the background thread."""
        with self._lock:
            if self._leader is not leader:
                return
            self._leader = None
            for follower in self._followers:
                if not follower.finished:
                    follower.waiter.set()
                    return
            self._arm(bool(self._calls))

    def wait_for_room(self, deadline: float) -> bool:
        """Lets replies in while there is no room to send; False when ``deadline`` has passed."""
        now = time.monotonic()
        if now >= deadline:
            return False
        if self.is_current_thread():
            self.turn(now + 0.001)
            return True
        with self._lock:
            leads = self._leader is None
            if leads:
                self._leader = leads
        if not leads:
            time.sleep(0.0005)  # the leader lets them in; a ring's room is not announced
            return True
        todo: Todo = []
        try:
            ranks = self._channel.look()
            if ranks:
                self._process(ranks, todo)
            else:
                self._channel.sleep(0.001)
        finally:
            self._step_down(leads)
            for act in todo:
                act()
        return True

    # Replies

    def _process(self, ranks: list[int], todo: Todo) -> None:
        """Takes one reply of each of ``ranks``. The leader's alone."""
        for rank in ranks:
            answer = self._channel.take(rank)
            if answer.status == Status.PROGRESS:
                done, total, what = messages.decode(answer.body, answer.format)
                todo.append(lambda r=rank, d=done, t=total, w=what: self._progress(r, d, t, w))  # type: ignore[misc] # bound now
            else:
                self._record(answer, todo)
            # After recording: interrupted in between, the reply is read again and recognised.
            self._channel.consume(rank)

    def _record(self, answer: Answer, todo: Todo) -> None:
        value, failure = self._decode(answer)
        with self._lock:
            entry = self._calls.get(answer.call_id)
            if failure is None:
                finished, late = self._calls.value(answer.rank, answer.call_id, value)
            else:
                finished, late = self._calls.error(answer.call_id, failure, time.monotonic())
                if entry is not None and entry.waiter is not None:
                    entry.waiter.set()  # it is due sooner now
            if self._calls.gated:
                self.open_gates()
        if finished is not None:
            self.deliver(finished, todo)
        elif late and entry is not None and not entry.pending:
            todo.append(lambda: self._late(answer.rank, entry.call.name))
        if failure is not None:
            self.look_again()

    def open_gates(self) -> None:
        """Under the lock: lets ranks start calls that run on few of them at a time."""
        for rank, entry in self._calls.grants():
            if entry.number is not None and rank in self._channel.remote_ranks:
                self._channel.open_gate(rank, entry.number)

    def deliver(self, entry: Entry, todo: Todo) -> None:
        """Wakes the caller of a finished entry, or leaves its future to be finished in ``todo``."""
        if entry.future is not None:
            todo.append(lambda: self._finish(entry))
        elif entry.waiter is not None:
            entry.waiter.set()

    def _decode(self, answer: Answer) -> tuple[object, Failure | None]:
        if answer.format == Format.NONE:
            return None, None
        rank, pid = answer.rank, self._pids.get(answer.rank, 0)
        name = self._calls.name_of(answer.call_id) or "?"
        try:
            if answer.status == Status.VALUE:
                return messages.decode(answer.body, answer.format, answer.owned), None
            error = messages.decode_error(answer.body, answer.format, rank, pid, name)
        except Exception as unloadable:  # a result whose unpickling raises, of a class that is not here, say
            error = unloadable
            error.add_note(f"while the result was being unpickled in the driver: rank {rank} (pid {pid}) in {name}")
        return None, Failure(rank, pid, error, answer.time_ns)

    # The background thread

    def future_added(self, entry: Entry) -> None:
        """A call was sent that nobody waits on yet."""
        with self._lock:
            if self._leader is None and not self._followers:
                self._arm(on=True)
            sooner = entry.due < self._wake_at
        if sooner:
            self.look_again()

    def look_again(self) -> None:
        """Has the background thread compute anew when it must wake."""
        with self._lock:
            if not self._stopped:
                os.eventfd_write(self._control, 1)

    def _arm(self, on: bool) -> None:
        if self._armed != on and not self._stopped:
            self._armed = on
            self._epoll.modify(self._channel.bell, select.EPOLLIN if on else 0)

    def _serve(self) -> None:
        while not self._stopped:
            self.turn(math.inf)
        with self._lock:
            self._epoll.close()
            os.close(self._control)

    def is_current_thread(self) -> bool:
        """Whether this is the background thread itself, in a callback: then it must `turn` instead of waiting."""
        return threading.get_ident() == self._thread.ident

    def forget(self, fd: int) -> None:
        """Stops watching ``fd``."""
        with contextlib.suppress(OSError, KeyError, ValueError):
            self._epoll.unregister(fd)

    def turn(self, until: float) -> None:
        """One round of the background thread: waits for something to happen until ``until`` at most, and deals with it."""
        with self._lock:
            self._wake_at = min(self._calls.due(), until)
            wait_s = self._wake_at - time.monotonic()
        for fd, _ in self._epoll.poll(None if wait_s == math.inf else max(0.0, wait_s)):
            if not self._stopped:
                self._watched[fd]()
        now = time.monotonic()
        with self._lock:
            overdue = self._calls.overdue(now)
        for entry in overdue:
            self._settle(entry)

    def _controlled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._control)

    def _drain_in_background(self) -> None:
        with self._lock:
            if self._leader is not None:
                self._arm(on=False)
                return
            self._leader = self
        todo: Todo = []
        try:
            self._channel.quiet()
            while ranks := self._channel.look():
                self._process(ranks, todo)
        finally:
            self._step_down(self)
        for act in todo:
            act()

    def stop(self) -> None:
        """Ends the background thread, and returns when nobody reads any more. The calls have been closed before."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                os.eventfd_write(self._control, 1)
        if not self.is_current_thread():  # else a callback closes the executor: the loop ends when it returns
            self._thread.join()
        while self._leader is not None:
            time.sleep(0.0005)  # its call is finished, so it leaves at its next look

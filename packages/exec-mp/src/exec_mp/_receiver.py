"""Who reads the replies: at most one leader at a time, a blocking caller if there is one. How: `exec_mp._reader`.

    wait(entry)     the caller leads: it looks at the reply words in its own thread, because a hand-over to another thread
                    costs more than the whole round trip; with a leader there it sleeps until it is done or promoted
    read_for(entry) the same for who waits on a future, which gets finished without that, too: only where it helps
                    for who has just submitted a call: a look at once, since what is there needs no other thread
    (background)    one thread sleeps on the workers' ends and, only while calls are pending and nobody leads, on the bell;
                    it finishes futures that nobody waits on, and owns their deadlines

``_lock`` (the group's) guards the calls, ``_followers``, ``_wake_at`` and what the background thread listens to. Only the
leader touches the reply rings. Futures are finished, and callbacks run, with neither the lock nor the lead held.

The lead is taken and given up without the lock, by one step each that nothing comes between; who gives it up then looks who
is left. Who found it taken enters himself (a follower among the followers, a future among the calls) and looks once more: so
one of the two sees the other.

Ctrl-C may end the main thread's work between any two calls that it makes. So it leads only while all that comes is for
its own call; replies to others' calls, and what they lead to, are the background thread's then.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from time import monotonic

from exec_mp._answers import Answers
from exec_mp._calls import Calls, Entry
from exec_mp._driver_channel import DriverChannel
from exec_mp._poller import Handler, Poller
from exec_mp._reader import MAIN, Reader
from exec_mp._wakeup import Nudge, Wakeup

_AFTER_ERROR_S = 0.05  # an error that comes again at once must not take a whole processor
_FEW = 4  # calls in flight: the answers of more come in crowds, and one thread takes those better than many in turns


class Receiver:
    """Reads replies, finishes calls.

    Args:
        lock: the group's; guards ``calls`` as well.
        answers: what becomes of replies.
        handlers: what to call when a descriptor has something to read, see `exec_mp._poller`.
        settle: finishes entries that are due.
        broken: told of an error of the background thread itself.
    """

    def __init__(
        self,
        channel: DriverChannel,
        calls: Calls,
        lock: threading.Lock,
        answers: Answers,
        handlers: Mapping[int, Handler],
        *,
        settle: Callable[[Sequence[Entry]], None],
        broken: Callable[[Exception], None],
    ) -> None:
        self._channel, self._calls, self._lock, self._answers = channel, calls, lock, answers
        self._settle, self._broken = settle, broken
        self._leader: dict[None, object] = {}  # who leads: taken by one `setdefault`, given up by one `pop`
        self._followers: deque[Entry] = deque()
        self._todo = answers.todo
        self.is_answered, self.lock = calls.is_answered, lock  # for `exec_mp._future`
        self._wake_at = math.inf  # when the background thread wakes by itself
        self._stopped = False
        self._ident = 0  # of the background thread, once it runs
        self._poller = Poller(handlers, channel.bell, self._drain_in_background)
        self._reader = Reader(channel, calls, lock, answers, self._poller, self.look_again)
        self._thread = threading.Thread(target=self._serve, name="exec-mp", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # a limit on threads
            self._poller.close()
            raise

    # A blocking caller

    def wait(self, entry: Entry) -> None:  # noqa: C901, PLR0912 # in one: the way of every call
        """Returns when ``entry`` is finished."""
        thread = get_ident()
        if thread == self._ident:
            self._turn_until_finished(entry)
            return
        leader, calls, channel, alone = self._leader, self._calls, self._channel, thread == MAIN
        try:
            while True:
                try:
                    if (alone and len(calls.in_flight) > 1) or leader.setdefault(None, entry) is not entry:
                        self._follow(entry)
                    elif not entry.finished:  # else the channel may be gone
                        if not channel.is_awake:
                            channel.stay_awake()
                        self._reader.read(entry, alone)
                finally:  # also when Ctrl-C comes between any two lines
                    if leader.get(None) is entry:
                        leader.pop(None)  # first: who has not seen this, is seen now
                        if calls.in_flight or self._followers:
                            self._step_down(None)
                    else:
                        self._unfollow(entry)
                if self._todo:
                    self.act()
                if entry.finished:
                    break
                if entry.is_due(monotonic()):
                    self._settle([entry])
        except BaseException:
            self._left(entry)
            raise
        if entry.waiter is not None:
            self._step_down(None)  # a promotion that this caller no longer needed goes on to the next

    def read_for(self, entry: Entry, until: float, *, at_once: bool = False) -> bool:
        """Leads for who waits on a future until ``entry`` is finished, something is to be done without the lead, or ``until``.

        Args:
            at_once: only what has been answered already, if there is no other call.

        Returns:
            Whether to `act` and come again. Else others will finish it, or have; also when many calls are in flight.
        """
        leader, calls, channel, alone = self._leader, self._calls, self._channel, get_ident() == MAIN
        token = entry if alone else object()  # several threads may wait on one future
        few = 1 if at_once else _FEW
        if len(calls.in_flight) > few or entry.finished or leader.setdefault(None, token) is not token:
            return False
        try:
            if entry.finished:  # the channel may be gone
                return False
            if at_once:
                return self._reader.look(entry, alone)
            channel.stay_awake()
            return self._reader.read(entry, alone, until)
        finally:
            leader.pop(None)
            if calls.in_flight or self._followers:
                self._step_down(None)

    def stop_reading_for(self, entry: Entry) -> None:
        """Ctrl-C has come while the main thread may have led."""
        self._step_down(entry)
        self._step_down(None)  # the lead may have been given up, and nobody have been looked for

    def end_reading_for(self, entry: Entry) -> None:
        """After `read_for` for another thread: delivers ``entry`` if it was answered there, unless the main thread does that."""
        if self._calls.is_answered(entry) and not entry.claimed:
            self._answers.deliver(entry)
        self.act()

    def end_claim(self, entry: Entry) -> None:
        """After `read_for` for the main thread or for a submitter: whom there is to tell, the background thread tells."""
        if self._calls.is_answered(entry) and not (entry.claimed or entry.delivered):
            self._answers.deliver(entry)
        if self._stopped:
            self._run_todo()
        elif self._todo:
            self.look_again()

    def _turn_until_finished(self, entry: Entry) -> None:
        """A callback, on the background thread, that calls: this thread must go on watching."""
        with self._lock:
            entry.waiter = Nudge(self._poller.wake)  # a leader may be the one who reads the answer
            if not self._leader:
                self._arm(on=True)
        while not entry.finished:
            self.turn(entry.due)
            if entry.is_due(monotonic()):
                self._settle([entry])

    def _left(self, entry: Entry) -> None:
        """The caller of ``entry`` no longer waits for it; Ctrl-C may have come in the middle of anything."""
        with self._lock:
            self._calls.abandon(entry)
        self._unfollow(entry)
        self.stop_reading_for(entry)
        self.look_again()

    def _follow(self, entry: Entry) -> None:
        """Waits while another leads, until ``entry`` is finished or due, or its caller is to lead."""
        with self._lock:
            if entry.finished:
                return
            if entry.waiter is None:
                entry.waiter = Wakeup()
            self._followers.append(entry)
            if not self._leader:
                if get_ident() != MAIN or len(self._calls.in_flight) <= 1:
                    return
                self._arm(on=True)
        entry.waiter.wait(None if entry.due == math.inf else max(0.0, entry.due - monotonic()))

    def _unfollow(self, entry: Entry) -> None:
        with self._lock:
            if entry.waiter is not None:
                entry.waiter.clear()
            with contextlib.suppress(ValueError):
                self._followers.remove(entry)

    def _step_down(self, leader: object | None) -> None:
        """Gives up the lead (if ``leader`` has it) and hands it on: to a waiting caller, else to the background thread."""
        with self._lock:
            if self._leader.get(None) is not leader:
                return
            if leader is not None:  # else another may have taken it since
                self._leader.pop(None)
            for follower in self._followers:
                if not follower.finished:
                    follower.waiter.set()
                    return
            self._arm(bool(self._calls.in_flight))

    def wait_for_room(self, deadline: float) -> bool:
        """Lets replies in while there is no room to send; False when ``deadline`` has passed."""
        now = monotonic()
        if now >= deadline:
            return False
        if self.is_current_thread():
            self.turn(now + 0.001)
            return True
        leader = object()
        try:
            with self._lock:
                if self._stopped:  # the channel may be gone; the next try to send says why
                    return True
                if get_ident() != MAIN:  # which has no call of its own yet: all that comes is for others
                    self._leader.setdefault(None, leader)
                elif not self._leader:
                    self._arm(on=True)
            if self._leader.get(None) is not leader:
                time.sleep(0.0005)  # the leader lets them in; a ring's room is not announced
            else:
                self._channel.sleep(0.001, self._channel.seen)
                if words := self._channel.look():
                    self._reader.process(words)
        finally:
            self._step_down(leader)
        self.act()
        return True

    def act(self) -> None:
        """Without the lead: does what replies have led to."""
        if self._todo and get_ident() == MAIN and not self._stopped:
            self.look_again()
        else:
            self._run_todo()

    def _run_todo(self) -> None:
        while self._todo:
            try:
                act = self._todo.popleft()
            except IndexError:  # another thread was faster
                return
            act()

    # The background thread

    def future_added(self, entry: Entry) -> None:
        """A call was sent that nobody waits on yet."""
        with self._lock:
            if not self._leader and not self._followers:
                self._arm(on=True)
            sooner = entry.due < self._wake_at
        if sooner:
            self.look_again()

    def look_again(self) -> None:
        """Has the background thread compute anew when it must wake."""
        with self._lock:
            if not self._stopped:
                self._poller.wake()

    def _arm(self, on: bool) -> None:
        if self._stopped:
            return
        self._poller.listen(on)
        if on:
            self._channel.may_sleep()
            if self._channel.look():  # replies that were not rung for, or whose ringing the last leader took back
                self._channel.ring()

    def _serve(self) -> None:
        self._ident = get_ident()
        while not self._stopped:
            try:
                self.turn(math.inf)
            except Exception as error:
                # Nobody must wait for a thread that has given up. It goes on, since workers still have to be ended.
                self._broken(error)
                time.sleep(_AFTER_ERROR_S)
        self._run_todo()
        with self._lock:
            self._poller.close()

    @property
    def native_id(self) -> int | None:
        """Linux's number of the background thread."""
        return self._thread.native_id

    def is_current_thread(self) -> bool:
        """Whether this is the background thread itself, in a callback: then it must `turn` instead of waiting."""
        return get_ident() == self._ident

    def turn(self, until: float) -> None:
        """One round of the background thread: waits for something to happen until ``until`` at most, and deals with it."""
        with self._lock:
            due = min(self._calls.due(), until)
            if (
                not monotonic() < self._wake_at < due
            ):  # else it stays: the next calls are due later than one that is over
                self._wake_at = due
            if not self._leader and not self._followers:  # whoever had it may have been interrupted
                self._arm(bool(self._calls.in_flight))
        self._poller.turn(self._wake_at)
        self.act()
        now = monotonic()
        with self._lock:
            overdue = self._calls.overdue(now)
        if overdue:
            self._settle(overdue)

    def _drain_in_background(self) -> bool:
        """The bell has rung. It takes the lead only for what is there: a bell may ring late for what another has read."""
        with self._lock:
            if self._stopped or self._leader:
                self._poller.listen(on=False)
                return True
        self._channel.quiet()
        if not self._channel.look():
            return True
        with self._lock:
            if self._leader.setdefault(None, self) is not self:
                self._channel.ring()  # what was taken back may have been for who leads since, and sleeps
                self._poller.listen(on=False)
                return True
        try:
            while words := self._channel.look():
                self._reader.process(words)
        finally:
            self._step_down(self)
        return True

    def stop(self) -> None:
        """Ends the background thread, and returns when nobody reads any more. The calls have been closed before."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._poller.wake()
        if not self.is_current_thread():  # else a callback closes the executor: the loop ends when it returns
            self._thread.join()
        while self._leader:
            time.sleep(0.0005)  # its call is finished, so it leaves at its next look
        self.act()

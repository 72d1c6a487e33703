"""How replies are read, by whoever leads: see `exec_mp._receiver` for who that is.

    read       looks, yields, sleeps, looks, until a call is finished or due
    look       once
    process    tells the calls what has been seen

The main thread, which Ctrl-C may end between any two calls that it makes, reads only while all that comes is for its own
call: it leaves the rest in the channel, where it is for whoever leads next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from os import sched_yield
from threading import get_ident
from time import monotonic

from exec_mp._answers import Answers
from exec_mp._calls import Calls, Entry
from exec_mp._driver_channel import DriverChannel, Words
from exec_mp._pace import Pace
from exec_mp._poller import Poller

MAIN = threading.main_thread().ident


class Reader:
    """Looks for answers, and sleeps where there are none. One thread at a time.

    Args:
        lock: guards ``calls``, and what ``poller`` listens to.
        answers: what becomes of replies.
        poller: of the background thread, which is not to listen to the bell while the leader sleeps on it.
        look_again: has the background thread compute anew when it must wake.
    """

    def __init__(
        self,
        channel: DriverChannel,
        calls: Calls,
        lock: threading.Lock,
        answers: Answers,
        poller: Poller,
        look_again: Callable[[], None],
    ) -> None:
        self._channel, self._calls, self._lock, self._answers = channel, calls, lock, answers
        self._poller, self._look_again, self._todo = poller, look_again, answers.todo
        self._pace = Pace(channel.geometry.spin_s, channel.geometry.room)
        whole = len(channel.remote_ranks) == channel.geometry.world_size
        self._remote = len(channel.remote_ranks) if whole else -1  # ranks of a call that all ranks can acknowledge

    def read(self, entry: Entry, alone: bool, until: float = math.inf) -> bool:  # noqa: C901 # in one: the way of every call
        """Until ``entry``, which is not, is finished or due, or something is to be done without the lead.

        Args:
            alone: only while what has been answered concerns no other call.
            until: at the latest.

        Returns:
            Whether the same caller may lead on when it has been done.
        """
        channel, calls, todo, pace = self._channel, self._calls, self._todo, self._pace
        complete = self._complete(entry)
        if channel.glance() == complete and calls.close_only(entry):
            channel.seen = complete
            return True
        pace.begin(monotonic())
        known = channel.seen
        while not entry.finished and (alone or not todo):  # the main thread does nothing of that
            seen, now = channel.glance(), monotonic()
            if seen != known:
                if seen == complete and calls.close_only(entry):
                    channel.seen = complete
                    break
                # What some have acknowledged changes nothing yet if all ranks will, and nobody else has a call.
                if complete and len(calls.in_flight) == 1 and seen.endswith(channel.rest):
                    known = seen
                elif self._deal_with(entry, seen, alone):
                    complete, known = b"", channel.seen
                else:
                    return False
                if pace.slept and now >= pace.spin_until:
                    pace.spin_until = now + pace.others_s  # the other ranks will not be long
            elif now < pace.spin_until:
                sched_yield()
            elif now >= entry.due or now >= until:
                self._deal_with(entry, known, alone)  # who is told that it is due is told who has answered
                return False
            else:
                self._sleep(now, min(entry.due, until), known)
        if pace.slept:
            pace.came = monotonic()
        return True

    def look(self, entry: Entry, alone: bool) -> bool:
        """`read`, without waiting. Whether ``entry`` is finished."""
        channel = self._channel
        seen, complete = channel.glance(), self._complete(entry)
        if seen == complete and self._calls.close_only(entry):
            channel.seen = complete
        elif seen != channel.seen:
            self._deal_with(entry, seen, alone)
        return entry.finished

    def process(self, words: Words) -> None:
        """Tells the calls what has been seen. What that leads to is left in `Answers.todo`."""
        if self._answers.process(words):
            self._todo.append(self._look_again)  # an error may have to be held back
        if self._todo and get_ident() == MAIN:
            self._look_again()

    def _complete(self, entry: Entry) -> bytes:
        """What it looks like when all ranks have acknowledged ``entry``; empty where that is not all there is to it.

        Then nothing needs processing while it is the only call: none can have replied. A rank that has answered with a
        value, which an earlier leader may have taken, does not acknowledge.
        """
        channel, size = self._channel, self._remote
        by_all = len(entry.ranks) == size and entry.max_concurrent is None and not entry.values
        return channel.pack_id(entry.id) * size + channel.rest if by_all else b""

    def _deal_with(self, entry: Entry, seen: bytes, alone: bool) -> bool:
        """Tells the calls what has been ``seen``. False, and nothing happens, where the caller of ``entry`` is not to do that."""
        # What has been seen belongs to calls that were open before: asked now, nobody else's can be among it.
        shared, words = len(self._calls.in_flight) > 1 or entry.future is not None, self._channel.words(seen)
        if alone and shared and not self._may_be_cut_short(entry, words):
            return False
        self.process(words)
        return True

    def _may_be_cut_short(self, entry: Entry, words: Words) -> bool:
        """Whether the main thread may deal with ``words``, and another do it again should Ctrl-C come in between.

        They must concern no other call than ``entry``, and for its future bring nothing that is handed out only once.
        """
        channel, calls, number = self._channel, self._calls, entry.id
        if calls.gated or min(list(calls.in_flight), default=0) != number or max(channel.acks(words)) > number:
            return False
        headers = [channel.take(rank, place) for rank, place in channel.replies(words)]
        return all(call_id == number and not position for call_id, _, _, _, position, *_ in headers)

    def _sleep(self, now: float, until: float, seen: bytes) -> None:
        """Rests until the bell rings or ``until`` at most; not if there is more than ``seen``."""
        channel, pace = self._channel, self._pace
        if self._poller.listens is not False:  # else the bell would wake the background thread as well
            with self._lock:
                self._poller.listen(on=False)
        channel.sleep(min(pace.rest(now), until - now), seen)
        channel.stay_awake()
        pace.woken(monotonic())

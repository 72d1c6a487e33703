"""The end of the replica's first rank, which decides for all.

The hub answers at any time, also while its own rank is elsewhere: a thread waits for frames and for what is due. While the
hub's rank makes calls it serves in its own thread, and the other one is not armed, but only looks every `_TICK_S` whether the
rank still does: waking it for every frame would multiply the time of a call.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Mapping

from exec_torchrun._frames import SPIN_S, Connection, Frame, Kind, Part
from exec_torchrun._link import Call, Describe, in_words, no_call
from exec_torchrun._page import Page
from exec_torchrun._rounds import Outgoing, Rounds

_TICK_S = 0.05


class Hub:
    """The end of the replica's first rank, which decides for all.

    Args:
        members, pids: the other ranks' connections and processes, by their positions in the replica.
        grace_s: see `Rounds`.
        page: what the ranks share, if they do.

    What is below ``_serving`` belongs to whoever holds it: the thread, or the rank while it exchanges. ``_inner`` watches the
    connections, ``_outer`` watches ``_inner`` for the thread, with an empty mask unless ``_armed``.
    """

    def __init__(
        self, members: Mapping[int, Connection], pids: Mapping[int, int], grace_s: float, page: Page | None = None
    ) -> None:
        self._pids = dict(pids)
        self._page = page
        self._serving = threading.Lock()
        self._members = dict(members)
        self._rounds = Rounds(len(members) + 1, grace_s)
        self._inbox: list[Frame] = []  # verdicts for our own rank
        self._armed = False
        self._exchanged = True  # since the thread last looked
        self._closed = False
        self._inner, self._outer = select.epoll(), select.epoll()
        self._by_fd = {connection.sock.fileno(): index for index, connection in members.items()}
        for fd in self._by_fd:
            self._inner.register(fd, select.EPOLLIN)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._outer.register(self._wake, select.EPOLLIN)
        self._outer.register(self._inner.fileno(), 0)
        for index in self._members:
            self._take(index)  # what came right behind its HELLO
        self._thread = threading.Thread(target=self._attend, name="exec-torchrun-hub", daemon=True)
        self._thread.start()

    @property
    def has_page(self) -> bool:
        return self._page is not None

    def agree(self, turn: int, deadline: float, digest: bytes | None, value: bytes | None, call: Call | None) -> bool:
        page = self._page
        if page is None:
            return False
        with self._serving:
            self._exchanged = True
            if self._armed:
                self._arm(on=False)
            if self._closed or not self._rounds.is_open(turn):
                page.give_up(turn)
                return False
            if not page.lead(turn, deadline, digest, value):
                return False
            self._rounds.agree(call)
            if sleepers := page.sleepers():
                verdict = Frame(Kind.DONE, turn, page.values()) if call is None else Frame(Kind.GO, turn)
                self._deliver([(index, verdict) for index in sleepers])
                self._serve(0.0)  # what they have said on their connections is old now
        return True

    def values(self) -> tuple[Part, ...]:
        return () if self._page is None else self._page.values()

    def exchange(self, word: Frame, describe: Describe = no_call) -> Frame:
        verdict = self._meet(word, math.inf, describe)
        assert verdict is not None  # it is waited for without a limit: the rounds have one
        return verdict

    def leave(self, turn: int, deadline: float) -> Frame | None:
        verdict = self._meet(Frame(Kind.LEAVE, turn), deadline, no_call)
        if verdict is None:
            with self._serving:
                self._deliver(self._rounds.leave())
        return verdict

    def _meet(self, word: Frame, deadline: float, describe: Describe) -> Frame | None:
        with self._serving:
            if self._closed:
                return Frame(Kind.DIED, 0, ((0, str(os.getpid()).encode()),))
            self._exchanged = True
            self._arm(on=False)
            began = time.monotonic()
            if self._page is not None:
                self._page.give_up(word.turn)
            self._deliver(self._rounds.arrive(0, word, time.monotonic()))
            spin_until = began + SPIN_S
            while (verdict := self._verdict(word.turn, describe)) is None:
                now = time.monotonic()
                if now >= deadline:
                    return None
                if now < spin_until:
                    if not self._serve(0.0):
                        os.sched_yield()
                else:
                    self._serve(min(deadline, self._rounds.due))
            return verdict

    def death(self) -> Frame | None:
        return self._rounds.death

    def _arm(self, *, on: bool) -> None:
        """Whether the thread is to wake for every frame; it is told when it has been waiting for nothing else."""
        if on is not self._armed:
            self._armed = on
            self._outer.modify(self._inner.fileno(), select.EPOLLIN if on else 0)
            if not on:
                os.eventfd_write(self._wake, 1)  # it waits for frames only, from now on it has to look by itself

    def _verdict(self, turn: int, describe: Describe) -> Frame | None:
        while self._inbox:
            frame = self._inbox.pop(0)
            if frame.kind is Kind.DIED or (frame.turn == turn and frame.kind is not Kind.DESCRIBE):
                return frame
            if frame.turn == turn:
                self._deliver(self._rounds.arrive(0, in_words(0, turn, describe), time.monotonic()))
        return None

    def _attend(self) -> None:
        """The thread: serves while our rank does not."""
        pause_s: float | None = _TICK_S
        while True:
            self._outer.poll(pause_s)
            with self._serving:
                if self._closed:
                    return
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                self._arm(on=not self._exchanged)
                self._exchanged = False
                self._serve(0.0)
                due = self._rounds.due
                pause_s = _TICK_S if not self._armed else None if due == math.inf else max(0.0, due - time.monotonic())

    def _serve(self, until: float) -> bool:
        """Takes what has come, waiting until then for something to come, and says what is due. Whether anything came."""
        timeout = -1.0 if until == math.inf else max(0.0, until - time.monotonic())
        events = self._inner.poll(timeout)
        for fd, _ in events:
            index = self._by_fd[fd]
            connection = self._members[index]
            connection.fill(socket.MSG_DONTWAIT)
            self._take(index)
            if connection.ended:
                self._lose(index)
        if (due := self._rounds.due) < math.inf and (now := time.monotonic()) >= due:
            self._deliver(self._rounds.expire(now))
        return bool(events)

    def _take(self, index: int) -> None:
        while (frame := self._members[index].pop()) is not None:
            self._deliver(self._rounds.arrive(index, frame, time.monotonic()))

    def _deliver(self, outgoing: Outgoing) -> None:
        data, packed = b"", None
        for index, frame in outgoing:
            if index == 0:
                self._inbox.append(frame)
            elif not self._members[index].ended:
                if packed is not frame:
                    data, packed = frame.packed(), frame
                self._members[index].send_packed(data)

    def _lose(self, index: int) -> None:
        self._inner.unregister(self._members[index].sock.fileno())
        self._deliver(self._rounds.gone(index, self._pids[index]))

    def close(self) -> None:
        with self._serving:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        for connection in self._members.values():
            connection.close()
        self._inner.close()
        self._outer.close()
        os.close(self._wake)

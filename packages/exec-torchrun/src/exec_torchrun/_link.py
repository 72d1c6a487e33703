"""How the ranks of a replica meet: its first rank is the hub, the others are connected to it.

    Member.exchange(word) --frame--> Hub (Rounds decides) --verdict--> every rank

Where they share a page (`exec_torchrun._page`), a turn in which all say the same at about the same time is over before any of
this is used.

The hub answers at any time, also while its own rank is elsewhere: a thread waits for frames and for what is due. While the
hub's rank makes calls it serves in its own thread, and the other one is not armed, but only looks every `_TICK_S` whether the
rank still does: waking it for every frame would multiply the time of a call.

Guarantees: every exchange of a turn ends with the same verdict on every rank; a rank whose process ends is noticed at once,
since the kernel closes its connection.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from exec_torchrun._frames import SPIN_S, Connection, Frame, Kind
from exec_torchrun._page import Page
from exec_torchrun._rounds import DESCRIBE_S, Outgoing, Rounds

_TICK_S = 0.05
_SILENCE_S = 10.0  # how much later than due a verdict may come before the hub's machine counts as gone

Describe = Callable[[], tuple[str, bytes]]


def _nothing() -> tuple[str, bytes]:
    return "", bytes(16)


def _text(index: int, turn: int, describe: Describe) -> Frame:
    words, digest = describe()
    return Frame(Kind.TEXT, turn, ((index, words.encode(errors="backslashreplace")),), digest)


class Link(Protocol):
    """One rank's end."""

    def exchange(self, word: Frame, describe: Describe = _nothing) -> Frame:
        """Says ``word`` and returns the verdict of its turn, or DIED.

        Args:
            describe: the call in words and its exact digest, for when those of the words differ.
        """

    def leave(self, turn: int, deadline: float) -> Frame | None:
        """Says that this rank shuts down. The verdict, or None when the others did not come by ``deadline``. Then `close`."""

    def death(self) -> Frame | None:
        """DIED, if that is known already. Looks only, from any thread."""

    def close(self) -> None:
        """Ends the connections. Twice is fine."""


class Member:
    """The end of a rank that is not the hub."""

    def __init__(self, index: int, connection: Connection, hub_pid: int, page: Page | None = None) -> None:
        self._index = index
        self._connection = connection
        self._page = page
        self._hub_gone = Frame(Kind.DIED, 0, ((0, str(hub_pid).encode()),))

    @property
    def has_page(self) -> bool:
        return self._page is not None

    def exchange(self, word: Frame, describe: Describe = _nothing) -> Frame:
        began = time.monotonic()
        page = self._page
        if page is not None and (verdict := page.meet(word)) is not None:
            if page.may_be_told_twice:
                self._connection.drop()
            return verdict
        patience_s = min(word.limit_s, word.wait_s) + DESCRIBE_S + _SILENCE_S
        self._connection.send(word)
        return self._verdict(word.turn, began + SPIN_S, began + patience_s, describe) or self._hub_gone

    def leave(self, turn: int, deadline: float) -> Frame | None:
        word = Frame(Kind.LEAVE, turn)
        if self._page is not None:
            self._page.meet(word)
        self._connection.send(word)
        verdict = self._verdict(turn, 0.0, deadline, _nothing)
        return self._hub_gone if verdict is None and self._connection.ended else verdict

    def _verdict(self, turn: int, spin_until: float, deadline: float, describe: Describe) -> Frame | None:
        while (frame := self._connection.receive(deadline, spin_until)) is not None:
            if frame.kind is Kind.DIED or (frame.turn == turn and frame.kind is not Kind.DESCRIBE):
                return frame
            if frame.turn == turn:
                self._connection.send(_text(self._index, turn, describe))
        return None

    def death(self) -> Frame | None:
        frame = self._connection.peek(Kind.DIED)
        return self._hub_gone if frame is None and self._connection.ended else frame

    def close(self) -> None:
        self._connection.close()


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

    def exchange(self, word: Frame, describe: Describe = _nothing) -> Frame:
        verdict = self._meet(word, math.inf, describe)
        assert verdict is not None  # it is waited for without a limit: the rounds have one
        return verdict

    def leave(self, turn: int, deadline: float) -> Frame | None:
        verdict = self._meet(Frame(Kind.LEAVE, turn), deadline, _nothing)
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
            if self._page is not None and (verdict := self._by_page(self._page, word)) is not None:
                return verdict
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

    def _by_page(self, page: Page, word: Frame) -> Frame | None:
        if not self._rounds.is_open(word.turn):
            page.give_up(word.turn)
            return None
        verdict = page.decide(word)
        if verdict is not None:
            self._rounds.agree(word)
            if sleepers := page.sleepers():
                self._deliver([(index, verdict) for index in sleepers])
                self._serve(0.0)  # what they have said on their connections is old now
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
                self._deliver(self._rounds.arrive(0, _text(0, turn, describe), time.monotonic()))
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

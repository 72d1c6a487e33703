"""How the ranks of a replica meet: its first rank is the hub, the others are connected to it.

    agree(...)      --page---> all say the same, at about the same time: that was it
    exchange(word)  --frame--> Hub (Rounds decides) --verdict--> every rank

A rank tries a turn by the page first (`exec_torchrun._page`), where they share one, and if that is not its end, by frames.

Guarantees: every exchange of a turn ends with the same verdict on every rank; a rank whose process ends is noticed at once,
since the kernel closes its connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from exec_torchrun._frames import SPIN_S, Connection, Frame, Kind, Part
from exec_torchrun._page import Page
from exec_torchrun._rounds import DESCRIBE_S

_SILENCE_S = 10.0  # how much later than due a verdict may come before the hub's machine counts as gone

Describe = Callable[[], tuple[str, bytes]]
Call = tuple[int, str]  # its number and its name


def no_call() -> tuple[str, bytes]:
    """For words that are not of a call."""
    return "", bytes(16)


def in_words(index: int, turn: int, describe: Describe) -> Frame:
    """What this rank answers to DESCRIBE."""
    words, digest = describe()
    return Frame(Kind.TEXT, turn, ((index, words.encode(errors="backslashreplace")),), digest)


class Link(Protocol):
    """One rank's end."""

    def agree(self, turn: int, deadline: float, digest: bytes | None, value: bytes | None, call: Call | None) -> bool:
        """Whether all ranks are seen to begin the same call in ``turn``, or without a digest, to end it.

        That is then the verdict; otherwise the rank goes on with `exchange`, unless it has an error to tell: then it comes to
        that at once.

        Args:
            deadline: of the call (monotonic).
            value: what others get of this rank at the end.
            call: which one begins.
        """

    def values(self) -> tuple[Part, ...]:
        """The values that came with the end that was agreed, each with its rank."""

    def exchange(self, word: Frame, describe: Describe = no_call) -> Frame:
        """Says ``word`` by frame and returns the verdict of its turn, or DIED.

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

    def agree(self, turn: int, deadline: float, digest: bytes | None, value: bytes | None, call: Call | None) -> bool:  # noqa: ARG002 # the hub's
        page = self._page
        if page is None or not page.follow(turn, deadline, digest, value):
            return False
        if page.may_be_told_twice:
            self._connection.drop()
        return True

    def values(self) -> tuple[Part, ...]:
        return () if self._page is None else self._page.values()

    def exchange(self, word: Frame, describe: Describe = no_call) -> Frame:
        began = time.monotonic()
        if self._page is not None and word.kind is Kind.ERROR:
            self._page.refuse(word.turn)
        patience_s = min(word.limit_s, word.wait_s) + DESCRIBE_S + _SILENCE_S
        self._connection.send(word)
        return self._verdict(word.turn, began + SPIN_S, began + patience_s, describe) or self._hub_gone

    def leave(self, turn: int, deadline: float) -> Frame | None:
        if self._page is not None:
            self._page.refuse(turn)
        self._connection.send(Frame(Kind.LEAVE, turn))
        verdict = self._verdict(turn, 0.0, deadline, no_call)
        return self._hub_gone if verdict is None and self._connection.ended else verdict

    def _verdict(self, turn: int, spin_until: float, deadline: float, describe: Describe) -> Frame | None:
        while (frame := self._connection.receive(deadline, spin_until)) is not None:
            if frame.kind is Kind.DIED or (frame.turn == turn and frame.kind is not Kind.DESCRIBE):
                return frame
            if frame.turn == turn:
                self._connection.send(in_words(self._index, turn, describe))
        return None

    def death(self) -> Frame | None:
        frame = self._connection.peek(Kind.DIED)
        return self._hub_gone if frame is None and self._connection.ended else frame

    def close(self) -> None:
        self._connection.close()

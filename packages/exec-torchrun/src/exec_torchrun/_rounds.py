"""The hub's decisions, without any I/O: what has come from which rank, and so what every rank is told.

The ranks of a replica meet in turns. In each turn every rank says one word and all get the same verdict, in one order, so that
all go on alike:

    begin   BEGIN of every rank, same call                -> GO
            BEGIN of different calls, or none in time     -> DESCRIBE to those present, then DIVERGED, or GO where the
                                                             exact digests are the same
            LEAVE of every rank                           -> BYE
    end     END of every rank                             -> DONE
            ERROR of some, and the rest has come as well  -> FAILED
            ERROR of some, the rest stays away            -> FAILED, naming who has not come out of the call
    either  the call's time is over                       -> TIMEOUT
            a rank is gone                                -> DIED, from then on
            the hub's rank has waited long enough         -> LEFT

A rank that was late finds its verdict waiting: words of a turn that is over are dropped.
"""

from __future__ import annotations

import math

from exec_torchrun._frames import Frame, Kind, Part

DESCRIBE_S = 1.0  # how long a rank may take to describe its call

Outgoing = list[tuple[int, Frame]]


def named(number: int, name: str) -> bytes:
    """A call in few words."""
    return f"call {number}: {name}".encode(errors="backslashreplace")


class Rounds:
    """What the hub of ``size`` ranks knows. Its methods return the frames to send, each with its rank.

    Args:
        grace_s: how long ranks may stay in a call that has failed elsewhere before they count as stuck in it.
    """

    def __init__(self, size: int, grace_s: float) -> None:
        self._size = size
        self._grace_s = grace_s
        self.turn = 0
        self._words: dict[int, Frame] = {}  # of this turn
        self._ends = False  # whether this turn ends a call
        self._texts: dict[int, Frame] | None = None  # what each rank's call is, once they seem to differ
        self._over = math.inf  # when the time of a call of this turn is over
        self._apart = math.inf  # when the ranks that are not here count as diverged, or as stuck
        self._absent_are_late = False
        self._all = frozenset(range(size))
        self._inside: frozenset[int] = frozenset()  # ranks that were told GO and have said nothing since
        self._last_calls = [b"none"] * size
        self._agreed_call: tuple[int, str] | None = None  # the last of all ranks, if they knew by themselves
        self._final: Frame | None = None  # DIED or BYE: nothing comes after it

    @property
    def due(self) -> float:
        """When `expire` will have something to say."""
        return min(self._over, self._apart)

    @property
    def death(self) -> Frame | None:
        """The verdict on everything, once a rank is gone."""
        final = self._final
        return final if final is not None and final.kind is Kind.DIED else None

    def is_open(self, turn: int) -> bool:
        """Whether this turn goes on, and nothing has gone wrong in it so far."""
        if turn != self.turn or self._final is not None:
            return False
        return not self._words or (self._texts is None and not self._of(Kind.ERROR))

    def agree(self, call: tuple[int, str] | None) -> None:
        """All ranks have said the same, and know it: the verdict of this turn is GO for ``call``, or DONE without one.

        Args:
            call: number and name.
        """
        if call is not None:
            self._agreed_call = call
        if self._words:
            self._next_turn()
        else:
            self.turn += 1  # nothing else has changed
        self._inside = frozenset() if call is None else self._all

    def arrive(self, rank: int, frame: Frame, now: float) -> Outgoing:
        """``frame`` has come from ``rank``."""
        if self._final is not None:
            return [(rank, self._final)]
        if frame.kind is Kind.TEXT:
            if self._texts is None or frame.turn != self.turn:
                return []
            self._texts[rank] = frame
            return self._diverged_if_known()
        if frame.turn < self.turn:
            if frame.kind is not Kind.BEGIN:  # one that took the verdict for lost has not said anything since
                self._inside -= {rank}
            return []
        self._inside -= {rank}
        self._words[rank] = frame
        kind = frame.kind
        self._over = min(self._over, now + frame.limit_s)
        if kind is Kind.BEGIN:
            self._forget_agreed_call()
            self._last_calls[rank] = frame.parts[0][1]
            # Where a rank is still inside a call, that keeps it away: then only the call's own time counts.
            if now + frame.wait_s < self._apart and not self._inside:
                self._apart = now + frame.wait_s
        elif kind is not Kind.LEAVE:
            self._ends = True
            if kind is Kind.ERROR:
                self._apart = min(self._apart, now + self._grace_s)
        return self._settle_end() if self._ends else self._settle_begin(rank, now)

    def gone(self, rank: int, pid: int) -> Outgoing:
        """The connection to ``rank`` has ended."""
        word = self._words.get(rank)
        if self._final is not None or (word is not None and word.kind is Kind.LEAVE):
            return []
        return self._die(rank, pid)

    def expire(self, now: float) -> Outgoing:
        """It is ``now``."""
        if now < self.due:
            return []
        if self._texts is not None:
            return self._verdict(Kind.DIVERGED, self._described())
        if self._ends:
            return self._fail() if self._of(Kind.ERROR) else self._time_out()
        if now >= self._over:
            return self._time_out()
        self._absent_are_late = True
        return self._ask(list(self._words), now)

    def leave(self) -> Outgoing:
        """The hub goes now: whoever has not left is told so."""
        return [] if self._final is not None else self._verdict(Kind.LEFT, self._described())

    # One of the two ways a turn goes

    def _settle_begin(self, came: int, now: float) -> Outgoing:
        if self._texts is not None:
            return self._ask([came], now) or self._diverged_if_known()
        words = self._words
        first, last = next(iter(words.values())), words[came]
        if first.digest != last.digest or first.kind is not last.kind:
            return self._ask(list(words), now)
        if len(words) < self._size:
            return []
        return self._verdict(Kind.BYE if self._of(Kind.LEAVE) else Kind.GO)

    def _settle_end(self) -> Outgoing:
        words = self._words
        for rank in self._of(Kind.LEAVE):
            return self._die(rank, 0)  # it shuts down in the middle of a call
        if len(words) < self._size:
            return []
        if self._of(Kind.ERROR):
            return self._fail()
        return self._verdict(Kind.DONE, tuple([part for rank in sorted(words) for part in words[rank].parts]))

    def _ask(self, ranks: list[int], now: float) -> Outgoing:
        """The calls differ: each rank that is here tells its own, so that the verdict can name them."""
        if self._texts is None:
            self._texts = {}
            self._over = self._apart = now + DESCRIBE_S
        return [(rank, Frame(Kind.DESCRIBE, self.turn)) for rank in ranks if self._words[rank].kind is Kind.BEGIN]

    def _diverged_if_known(self) -> Outgoing:
        texts = self._texts or {}
        expected = len(self._words) if self._absent_are_late else self._size
        if len(texts) + len(self._of(Kind.LEAVE)) < expected:
            return []
        if len(texts) == self._size and len({text.digest for text in texts.values()}) == 1:
            return self._verdict(Kind.GO)  # equal calls that did not look equal
        return self._verdict(Kind.DIVERGED, self._described())

    # Verdicts

    def _described(self) -> tuple[Part, ...]:
        self._forget_agreed_call()
        parts = []
        for rank in range(self._size):
            word = self._words.get(rank)
            if self._texts is not None and rank in self._texts:
                text = self._texts[rank].parts[0][1]
            elif word is None:
                text = b"no call, its last was " + self._last_calls[rank]
            else:
                text = b"shutdown()" if word.kind is Kind.LEAVE else word.parts[0][1]
            parts.append((rank, text))
        return tuple(parts)

    def _fail(self) -> Outgoing:
        errors = [part for word in self._words.values() if word.kind is Kind.ERROR for part in word.parts]
        return self._verdict(Kind.FAILED, (*errors, *self._absent()))

    def _time_out(self) -> Outgoing:
        return self._verdict(Kind.TIMEOUT, self._absent())

    def _die(self, rank: int, pid: int) -> Outgoing:
        self._final = Frame(Kind.DIED, self.turn, ((rank, str(pid).encode()),))
        self._over = self._apart = math.inf
        return [(other, self._final) for other in range(self._size) if other != rank]

    def _verdict(self, kind: Kind, parts: tuple[Part, ...] = ()) -> Outgoing:
        verdict = Frame(kind, self.turn, parts)
        if kind is Kind.BYE:
            self._final = verdict
        self._next_turn()
        if kind is Kind.GO:
            self._inside = self._all
        return [(rank, verdict) for rank in range(self._size)]

    def _forget_agreed_call(self) -> None:
        """Makes it every rank's last call."""
        if self._agreed_call is not None:
            number, name = self._agreed_call
            self._last_calls = [named(number, name)] * self._size
            self._agreed_call = None

    def _next_turn(self) -> None:
        self.turn += 1
        self._words, self._ends, self._texts = {}, False, None
        self._over = self._apart = math.inf
        self._absent_are_late = False

    def _of(self, kind: Kind) -> list[int]:
        return [rank for rank, word in self._words.items() if word.kind is kind]

    def _absent(self) -> tuple[Part, ...]:
        return tuple((rank, b"") for rank in range(self._size) if rank not in self._words)

"""The hub's decisions: which words give which verdict, without processes, sockets or clocks."""

from __future__ import annotations

import math

import pytest

from exec_torchrun._frames import Frame, Kind
from exec_torchrun._rounds import DESCRIBE_S, Outgoing, Rounds


class Hub(Rounds):
    """Rounds of three ranks that make it short to say who says what."""

    def __init__(self, size: int = 3) -> None:
        super().__init__(size, grace_s=2.0)
        self.now = 100.0

    def begin(self, *ranks: int, call: str = "step", turn: int | None = None, limit_s: float = math.inf) -> Outgoing:
        """The ranks want to run ``call``, for which they wait 4 s; the frames that the last of them caused."""
        out: Outgoing = []
        for rank in ranks:
            word = Frame(
                Kind.BEGIN,
                self.turn if turn is None else turn,
                ((rank, call.encode()),),
                call.encode().ljust(16),
                4.0,
                limit_s,
            )
            out = self.arrive(rank, word, self.now)
        return out

    def end(self, *ranks: int, turn: int | None = None, limit_s: float = math.inf, error: bytes = b"") -> Outgoing:
        """The ranks have run it."""
        out: Outgoing = []
        for rank in ranks:
            parts = ((rank, error or b"value"),)
            kind = Kind.ERROR if error else Kind.END
            out = self.arrive(rank, Frame(kind, self.turn if turn is None else turn, parts, limit_s=limit_s), self.now)
        return out

    def text(self, *ranks: int, call: str = "") -> Outgoing:
        """The ranks describe their calls, which are ``call`` or each its own."""
        out: Outgoing = []
        for rank in ranks:
            digest = (call or str(rank)).encode().ljust(16)
            text = Frame(Kind.TEXT, self.turn, ((rank, f"call of {rank}".encode()),), digest)
            out = self.arrive(rank, text, self.now)
        return out

    def leaves(self, rank: int) -> Outgoing:
        """A rank shuts down."""
        return self.arrive(rank, Frame(Kind.LEAVE, self.turn), self.now)

    def after(self, seconds: float) -> Outgoing:
        """Time passes."""
        self.now += seconds
        return self.expire(self.now)


def verdict(out: Outgoing) -> tuple[Kind, dict[int, bytes], list[int]]:
    """What all were told, and who they are."""
    assert len({(frame.kind, frame.turn) for _, frame in out}) == 1
    return out[0][1].kind, dict(out[0][1].parts), [rank for rank, _ in out]


def test_all_begin_the_same_call() -> None:
    """The last rank to come makes all go."""
    hub = Hub()
    assert [] == hub.begin(2, 0)
    assert (Kind.GO, {}, [0, 1, 2]) == verdict(hub.begin(1))


def test_what_the_ranks_have_agreed_on_counts() -> None:
    """Turns that went by elsewhere: the next one is open, and ranks are inside a call from its begin to its end."""
    hub = Hub()
    assert hub.is_open(0)
    hub.agree((1, "first"))
    hub.begin(0, 1, limit_s=30.0)
    assert [] == hub.after(20.0)
    hub.agree(None)
    assert (False, True) == (hub.is_open(1), hub.is_open(2))
    hub.begin(0, 1)
    assert Kind.DESCRIBE is verdict(hub.after(4.0))[0]
    assert not hub.is_open(2)
    assert b"no call, its last was call 1: first" == verdict(hub.text(0, 1))[1][2]


def test_all_have_run_it() -> None:
    """The values of all come back in rank order."""
    hub = Hub()
    hub.begin(0, 1, 2)
    assert [] == hub.end(2, 1)
    assert (Kind.DONE, {0: b"value", 1: b"value", 2: b"value"}, [0, 1, 2]) == verdict(hub.end(0))


def test_a_different_call_is_asked_for_at_once() -> None:
    """Two calls that differ are enough: those present describe theirs, the third when it comes."""
    hub = Hub()
    hub.begin(0)
    assert (Kind.DESCRIBE, {}, [0, 1]) == verdict(hub.begin(1, call="other"))
    assert [] == hub.text(0, 1)
    assert (Kind.DESCRIBE, {}, [2]) == verdict(hub.begin(2))
    told = {0: b"call of 0", 1: b"call of 1", 2: b"call of 2"}
    assert (Kind.DIVERGED, told, [0, 1, 2]) == verdict(hub.text(2))
    assert 1 == hub.turn


def test_calls_that_only_look_different_go_on() -> None:
    """Where the exact digests of all ranks are the same, the quick ones had nothing to say."""
    hub = Hub()
    hub.begin(0, 1)
    hub.begin(2, call="looks different")
    assert [] == hub.text(0, 1, call="the same")
    assert (Kind.GO, {}, [0, 1, 2]) == verdict(hub.text(2, call="the same"))


def test_who_does_not_come_to_different_calls_is_not_waited_for() -> None:
    """The third rank has a second to come, then the verdict says what it did last."""
    hub = Hub()
    hub.begin(0, 1, 2, call="first")
    hub.end(0, 1, 2)
    hub.begin(0)
    hub.begin(1, call="other")
    hub.text(0, 1)
    told = {0: b"call of 0", 1: b"call of 1", 2: b"no call, its last was first"}
    assert (Kind.DIVERGED, told, [0, 1, 2]) == verdict(hub.after(DESCRIBE_S))


def test_who_does_not_come_in_time_has_diverged() -> None:
    """After the time that ranks may be apart those present describe their call, and nobody waits any longer."""
    hub = Hub()
    hub.begin(0)
    hub.now += 3.0
    hub.begin(2)
    assert [] == hub.after(0.9)
    assert (Kind.DESCRIBE, {}, [0, 2]) == verdict(hub.after(0.1))
    told = {0: b"call of 0", 1: b"no call, its last was none", 2: b"call of 2"}
    assert (Kind.DIVERGED, told, [0, 1, 2]) == verdict(hub.text(0, 2))


def test_a_late_word_finds_its_verdict_and_changes_nothing() -> None:
    """A rank that comes to a turn that is over is not counted for the next one."""
    hub = Hub()
    hub.begin(0, 2)
    hub.after(4.0)
    hub.text(0, 2)
    assert [] == hub.begin(1, turn=0)
    assert [] == hub.begin(0, 2)
    assert Kind.GO is verdict(hub.begin(1))[0]


def test_the_calls_own_time_comes_first() -> None:
    """A rank that is late for a call with a shorter limit is a time-out, not a divergence."""
    hub = Hub()
    hub.begin(0, 2, limit_s=1.0)
    assert (Kind.TIMEOUT, {1: b""}, [0, 1, 2]) == verdict(hub.after(1.0))


def test_an_error_waits_for_the_others_and_comes_first() -> None:
    """Errors come in the order in which they came."""
    hub = Hub()
    hub.begin(0, 1, 2)
    hub.end(2, error=b"boom")
    hub.end(0, error=b"too")
    kind, parts, _ = verdict(hub.end(1))
    assert (Kind.FAILED, [2, 0]) == (kind, list(parts))


def test_who_stays_in_a_failed_call_is_named() -> None:
    """After the grace time the error goes to all, with the ranks that have not come out."""
    hub = Hub()
    hub.begin(0, 1, 2)
    hub.end(2, error=b"boom")
    assert [] == hub.after(1.9)
    assert (Kind.FAILED, {2: b"boom", 0: b"", 1: b""}, [0, 1, 2]) == verdict(hub.after(0.1))
    assert [] == hub.end(0, turn=1)


def test_a_call_that_takes_too_long_is_a_time_out() -> None:
    """The limit counts from when a rank has run it and says how much time is left."""
    hub = Hub()
    hub.begin(0, 1, 2)
    hub.end(0, limit_s=5.0)
    hub.end(1, limit_s=3.0)
    assert [] == hub.after(2.9)
    assert (Kind.TIMEOUT, {2: b""}, [0, 1, 2]) == verdict(hub.after(0.1))


def test_a_rank_inside_an_old_call_has_not_diverged() -> None:
    """The next call waits for it for as long as its own limit, however long ranks may be apart."""
    hub = Hub()
    hub.begin(0, 1, 2)
    hub.end(0, 1, limit_s=1.0)
    hub.after(1.0)
    hub.begin(0, 1, limit_s=30.0)
    assert [] == hub.after(20.0)
    hub.end(2, turn=1)
    assert Kind.GO is verdict(hub.begin(2))[0]


@pytest.mark.parametrize("caller_first", [True, False])
def test_a_rank_that_leaves_while_others_call(caller_first: bool) -> None:
    """All are told at once, the leaving rank too."""
    hub = Hub()
    if caller_first:
        hub.begin(0, 2)
        out = hub.leaves(1)
    else:
        hub.leaves(1)
        out = hub.begin(0)
    assert Kind.DESCRIBE is verdict(out)[0]
    hub.begin(2)
    kind, parts, told = verdict(hub.text(0, 2))
    assert (Kind.DIVERGED, b"shutdown()", [0, 1, 2]) == (kind, parts[1], told)


def test_all_leave() -> None:
    """When the last one leaves all may go, and connections that end then are no deaths."""
    hub = Hub()
    hub.leaves(0)
    hub.leaves(1)
    assert Kind.BYE is verdict(hub.leaves(2))[0]
    assert [] == hub.gone(1, 11)


def test_a_rank_that_has_left_may_be_gone() -> None:
    """Its connection may end before the others leave; a call of theirs still names it."""
    hub = Hub()
    hub.leaves(1)
    assert [] == hub.gone(1, 11)
    hub.begin(0, 2)
    assert b"shutdown()" == verdict(hub.text(0, 2))[1][1]


def test_the_hub_leaves_without_the_others() -> None:
    """Whoever comes later finds that it has left."""
    hub = Hub()
    hub.leaves(0)
    kind, parts, _ = verdict(hub.leave())
    assert (Kind.LEFT, b"shutdown()", b"no call, its last was none") == (kind, parts[0], parts[1])


def test_a_rank_is_gone() -> None:
    """All others are told at once and whatever they say from then on."""
    hub = Hub()
    hub.begin(0, 1, 2)
    hub.end(0)
    assert (Kind.DIED, {1: b"11"}, [0, 2]) == verdict(hub.gone(1, 11))
    assert (Kind.DIED, {1: b"11"}, [2]) == verdict(hub.end(2))
    assert ([], [], math.inf) == (hub.gone(2, 12), hub.leave(), hub.due)


def test_a_rank_that_shuts_down_in_the_middle_of_a_call_is_gone() -> None:
    """It will not say how the call went."""
    hub = Hub()
    hub.begin(0, 1, 2)
    hub.leaves(1)
    assert (Kind.DIED, {1: b"0"}) == verdict(hub.end(0))[:2]

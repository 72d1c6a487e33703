"""Which call is finished with what, decided without a process, a lock or a clock."""

import gc
import math
from concurrent.futures import Future
from typing import Any

import pytest

from exec_core import RpcTimeoutError, WorkerDiedError
from exec_core.messages import Failure
from exec_mp._calls import DEATH_GRACE_S, Calls, Entry


def call(ranks: tuple[int, ...] = (0, 1), reply_ranks: tuple[int, ...] | None = None, **fields: Any) -> Entry:
    """A call to ``ranks``."""
    return Entry("load", ranks=ranks, reply_ranks=ranks if reply_ranks is None else reply_ranks, **fields)


def opened(calls: Calls, one: Entry | None = None, future: Future[Any] | None = None) -> Entry:
    """A call in flight, sent."""
    entry = call() if one is None else one
    assert calls.open(entry)
    entry.sent, entry.future = True, future
    return entry


def failure(rank: int, time_ns: int = 0, text: str = "wrong") -> Failure:
    """What a rank that raised says."""
    return Failure(rank, 100 + rank, ValueError(text), time_ns)


def test_calls_that_begin_while_answers_are_recorded() -> None:
    """A finalizer may call, and the garbage collector may run it wherever memory is allocated."""
    calls = Calls(1000, 2)
    before = [opened(calls) for _ in range(50)]

    def begin(phase: str, _: object) -> None:
        if phase == "start":
            opened(calls)

    thresholds = gc.get_threshold()
    gc.callbacks.append(begin)
    gc.set_threshold(1)
    try:
        closed = calls.acknowledge((before[-1].id,) * 2)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(begin)

    assert before == closed
    assert len(calls.in_flight) > 0


def test_values_in_rank_order() -> None:
    """A call is finished by its last rank, and its values are in rank order whoever was first."""
    calls = Calls(4, 4)
    entry = opened(calls)

    assert [] == calls.value(1, entry.id, "b")
    assert [entry] == calls.value(0, entry.id, "a")
    assert ["a", "b"] == entry.outcome()
    assert 0 == len(calls.in_flight)


def test_only_call_is_closed_at_once() -> None:
    """A call that all ranks have acknowledged is closed without asking who owes what, if no other is in flight."""
    calls = Calls(4, 2)
    first = opened(calls)
    second = opened(calls)
    assert not calls.close_only(first)
    assert [first] == calls.acknowledge([first.id, first.id])
    assert calls.close_only(second)
    assert not calls.close_only(second)

    assert [None, None] == second.outcome()
    assert {} == calls.in_flight
    third = opened(calls)
    assert [0, 1] == calls.owing(third)
    assert [] == calls.owing(second)


def test_only_call_that_has_failed_keeps_its_error() -> None:
    """An error that was held back is the call's outcome, though the rest has acknowledged."""
    calls = Calls(4, 2)
    entry = opened(calls)
    calls.error(entry.id, failure(0), now=0.0)
    assert not calls.close_only(entry)
    assert [entry] == calls.acknowledge((entry.id, entry.id))

    with pytest.raises(ValueError, match="wrong"):
        entry.outcome()


def test_interrupted_acknowledgement_is_taken_up_again() -> None:
    """What Ctrl-C has cut short between noting who has answered and closing the call is finished by the next look."""
    calls = Calls(4, 2)
    entry = opened(calls)
    calls._acks = (entry.id, entry.id)
    calls.abandon(entry)

    assert [entry] == calls.acknowledge((entry.id, entry.id))
    assert entry.late in (0, 1)
    assert {} == calls.in_flight


def test_given_up_call_is_not_closed_as_the_only_one() -> None:
    """Its answers are late ones, which somebody is told of."""
    calls = Calls(4, 2)
    entry = opened(calls)
    calls.abandon(entry)

    assert not calls.close_only(entry)


def test_values_of_reply_ranks_only() -> None:
    """Every rank acknowledges, the values of some are returned, through the aggregate where there is one."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0, 1, 2), (2,), aggregate=len))
    for rank in (2, 0, 1):
        calls.value(rank, entry.id, rank)

    assert 1 == entry.outcome()


def test_ids_are_never_used_again() -> None:
    """A late reply to an old call cannot be taken for one to a new call."""
    calls = Calls(4, 4)
    first = opened(calls)
    calls.withdraw(first)

    assert first.id != opened(calls).id


def test_reply_read_twice() -> None:
    """A reply that is read again, after an interruption, changes nothing."""
    calls = Calls(4, 4)
    entry = opened(calls)
    calls.value(0, entry.id, "a")

    assert [] == calls.value(0, entry.id, "other")
    calls.value(1, entry.id, "b")
    assert ["a", "b"] == entry.outcome()
    assert [] == calls.value(1, entry.id, "other")


def test_acknowledgement_of_all_ranks() -> None:
    """An acknowledgement of every rank finishes the calls up to it, in their order, with nothing for values."""
    calls = Calls(4, 2)
    first, second, third = opened(calls), opened(calls), opened(calls)

    assert [] == calls.acknowledge([second.id, 0])
    assert [first, second] == calls.acknowledge([third.id, second.id])
    assert [third] == calls.acknowledge([third.id, third.id])
    assert [[None, None]] * 3 == [entry.outcome() for entry in (first, second, third)]
    assert {first.late, second.late, third.late} == {None}


def test_acknowledgement_beside_values_and_errors() -> None:
    """An acknowledgement stands for what a rank has not answered otherwise: values and errors told before it stay."""
    calls = Calls(4, 2)
    valued, failed, bare = opened(calls), opened(calls), opened(calls)
    calls.value(1, valued.id, "b")
    calls.error(failed.id, failure(1), now=10.0)

    assert [valued, failed, bare] == calls.acknowledge([bare.id, bare.id])
    assert [[None, "b"], [None, None]] == [valued.outcome(), bare.outcome()]
    with pytest.raises(ValueError, match="wrong"):
        failed.outcome()


def test_acknowledgement_of_some_ranks() -> None:
    """Ranks that do not run a call have no say in it, however far behind or ahead they are."""
    calls = Calls(4, 4)
    first, second = opened(calls, call((0, 2))), opened(calls, call((1, 2, 3)))

    assert [first] == calls.acknowledge([first.id, 0, first.id, 0])
    assert [1, 2, 3] == calls.owing(second)
    assert [] == calls.acknowledge([first.id, second.id, first.id, second.id])
    assert [2] == calls.owing(second)
    assert [second] == calls.acknowledge([first.id, second.id, second.id, second.id])


def test_acknowledgement_read_twice() -> None:
    """What was acknowledged already, and is read again after an interruption, changes nothing."""
    calls = Calls(4, 2)
    first, second = opened(calls), opened(calls)
    calls.acknowledge([first.id, first.id])

    assert [] == calls.acknowledge([first.id, first.id])
    assert [] == calls.value(0, first.id, "again")
    assert [0, 1] == calls.owing(second)


def test_late_acknowledgement() -> None:
    """An acknowledgement after the time-out is late, and says of which rank."""
    calls = Calls(4, 3)
    entry = opened(calls, call((0, 1, 2), deadline=1.0))
    calls.acknowledge([entry.id, 0, entry.id])
    calls.settle(entry)

    assert calls.late(1) is entry
    assert [entry] == calls.acknowledge([entry.id] * 3)
    assert 1 == entry.late
    assert calls.late(1) is None


def test_acknowledged_rank_opens_the_next_gate() -> None:
    """A rank that is through lets the next one in, also when it has nothing to say."""
    calls = Calls(4, 3)
    entry = opened(calls, call((0, 1, 2), max_concurrent=2))
    assert [0, 1] == granted(calls)
    calls.acknowledge([0, entry.id, 0])

    assert [2] == granted(calls)


def test_no_more_than_the_limit_in_flight() -> None:
    """A call beyond the limit gets no place until one of the others is through."""
    calls = Calls(1, 4)
    entry = opened(calls, call((0,)))

    assert not calls.open(call())
    calls.value(0, entry.id, None)
    assert calls.open(call())


def test_answers_to_a_withdrawn_call_are_nobodys() -> None:
    """What a rank says of a call that was given up while it was being sent changes nothing."""
    calls = Calls(4, 2)
    sent, cut_short = opened(calls), opened(calls)
    calls.withdraw(cut_short)

    assert [] == calls.value(0, cut_short.id, "late")
    assert [sent] == calls.acknowledge((cut_short.id, cut_short.id))


def test_withdrawn_call_gives_its_place_back() -> None:
    """A call that was not sent after all takes no place, not even before it has one."""
    calls = Calls(1, 4)
    calls.withdraw(opened(calls))

    assert 0 == len(calls.in_flight)


# Errors


def test_error_of_the_only_rank_is_final_at_once() -> None:
    """When nobody else owes an answer an error finishes the call."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0,)))

    assert [entry] == calls.error(entry.id, failure(0), now=10.0)
    with pytest.raises(ValueError, match="wrong"):
        entry.outcome()
    assert (0, 100) == entry.failed


def test_error_waits_a_moment_for_a_death() -> None:
    """While others owe an answer an error is held back: a death that explains it may be on its way."""
    calls = Calls(4, 4)
    entry = opened(calls)

    assert [] == calls.error(entry.id, failure(0), now=10.0)
    assert not entry.is_due(10.0)
    assert entry.is_due(10.0 + DEATH_GRACE_S)
    assert calls.settle(entry)
    with pytest.raises(ValueError, match="wrong") as caught:
        entry.outcome()
    assert ["ranks [1] are still inside 'load'"] == caught.value.__notes__


def test_death_wins_over_a_peers_error() -> None:
    """A death that is reported before the held-back error is final is what the caller gets."""
    calls = Calls(4, 4)
    entry = opened(calls)
    calls.error(entry.id, failure(0, text="connection closed"), now=10.0)
    calls.close(WorkerDiedError(1, 101, signal_name="SIGKILL"))

    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        entry.outcome()


def test_error_of_the_rank_that_ended_says_why() -> None:
    """A rank that fails and then leaves: its error is what the caller gets, with its end in the notes."""
    calls = Calls(4, 4)
    entry = opened(calls)
    calls.error(entry.id, failure(1, text="out of order"), now=10.0)
    calls.close(WorkerDiedError(1, 101, exit_code=1))

    with pytest.raises(ValueError, match="out of order") as caught:
        entry.outcome()
    assert "rank 1 (pid 101) exited with code 1" in caught.value.__notes__[-1]


def test_first_error_by_time_is_raised() -> None:
    """Of several errors the first by time is raised, whichever was read first, and lists the others."""
    calls = Calls(4, 4)
    entry = opened(calls)
    calls.error(entry.id, failure(0, 2_000, "second"), now=10.0)
    calls.error(entry.id, failure(1, 1_000, "first"), now=10.0)

    with pytest.raises(ValueError, match="first") as caught:
        entry.outcome()
    assert ["also failed: rank 0 (pid 100): ValueError('second')"] == caught.value.__notes__
    assert entry.failed is not None
    assert 1 == entry.failed[0]


def test_error_beats_values() -> None:
    """One failing rank fails the call, however many have answered."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0, 1, 2)))
    calls.value(0, entry.id, 0)
    calls.error(entry.id, failure(1), now=10.0)
    assert [entry] == calls.value(2, entry.id, 2)

    with pytest.raises(ValueError, match="wrong"):
        entry.outcome()


# Time-outs and late replies


def test_time_out_names_who_is_missing() -> None:
    """At its deadline a call fails, saying who has answered and who has not."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0, 1, 2), timeout_s=2.5, deadline=12.5))
    calls.value(1, entry.id, None)
    assert not entry.is_due(12.0)
    assert entry.is_due(12.5)
    assert calls.settle(entry)
    with pytest.raises(RpcTimeoutError) as caught:
        entry.outcome()

    error = caught.value
    assert ("load", 2.5, (1,), (0, 2)) == (error.method, error.timeout_s, error.answered_ranks, error.pending_ranks)


@pytest.mark.parametrize(
    ("acks", "pending"),
    [
        pytest.param((), (0, 2), id="nothing newer"),
        pytest.param((0, 0, 0, 0), (0, 2), id="nobody else"),
        pytest.param((1, 1, 0, 1), (2,), id="one more"),
        pytest.param((1, 1, 1, 1), (0, 2), id="all, which who reads will find"),
    ],
)
def test_time_out_knows_what_nobody_was_told(acks: tuple[int, ...], pending: tuple[int, ...]) -> None:
    """Who reads what ranks have acknowledged may be late, while another thread says that the time is over."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0, 1, 2), deadline=1.0))
    calls.value(1, entry.id, None)
    assert 1 == entry.id
    assert calls.settle(entry, acks)

    assert isinstance(entry.error, RpcTimeoutError)
    assert pending == entry.error.pending_ranks
    assert [0, 2] == calls.owing(entry)  # what they have answered is still to be told


def test_late_reply_is_dropped() -> None:
    """A reply after the time-out reaches nobody; the call keeps its place until all have answered, which is told as late."""
    calls = Calls(4, 4)
    old = opened(calls, call(deadline=1.0))
    calls.settle(old)
    new = opened(calls)

    assert [] == calls.value(0, old.id, "old")
    calls.value(0, new.id, "new 0")
    assert 2 == len(calls.in_flight)
    assert [old] == calls.error(old.id, failure(1), now=5.0)
    assert (1, {0: None, 1: None}, []) == (old.late, old.values, old.failures)
    assert 1 == len(calls.in_flight)
    calls.value(1, new.id, "new 1")
    assert ["new 0", "new 1"] == new.outcome()


def test_rank_that_owes_a_late_reply_is_known() -> None:
    """It is known which rank is still inside a call that was given up, and inside which."""
    calls = Calls(4, 4)
    entry = opened(calls, call(deadline=1.0))
    calls.value(0, entry.id, None)
    assert calls.late(1) is None
    calls.settle(entry)

    assert calls.late(0) is None
    assert calls.late(1) is entry
    calls.value(1, entry.id, None)
    assert calls.late(1) is None


def test_settling_what_is_finished_changes_nothing() -> None:
    """A call that finished while somebody was about to time it out keeps its values."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0,), deadline=1.0))
    calls.value(0, entry.id, "in time")

    assert not calls.settle(entry)
    assert ["in time"] == entry.outcome()


def test_next_deadline_is_that_of_futures() -> None:
    """Blocking callers watch their own deadlines; those of futures are watched for them."""
    calls = Calls(8, 4)
    opened(calls, call(deadline=1.0))
    assert math.inf == calls.due()
    later, sooner = opened(calls, call(deadline=9.0), Future()), opened(calls, call(deadline=5.0), Future())

    assert 5.0 == calls.due()
    assert [sooner] == calls.overdue(5.0)
    assert [later, sooner] == calls.overdue(9.0)
    calls.settle(sooner)
    assert 9.0 == calls.due()


def test_error_makes_a_future_due_sooner() -> None:
    """A held-back error is due long before the call's own deadline."""
    calls = Calls(4, 4)
    entry = opened(calls, call(deadline=99.0), Future())
    calls.error(entry.id, failure(0), now=10.0)

    assert 10.0 + DEATH_GRACE_S == calls.due()


def test_abandoned_call() -> None:
    """A caller that was interrupted leaves a call whose replies are late ones."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0,)))
    calls.abandon(entry)

    assert [entry] == calls.value(0, entry.id, None)
    assert 0 == entry.late


# The end


def test_close_fails_what_is_pending() -> None:
    """At the end every unfinished call fails, each with an error of its own, and finished ones keep their values."""
    calls = Calls(4, 4)
    done, first, second = opened(calls, call((0,))), opened(calls), opened(calls)
    calls.value(0, done.id, "kept")
    error = WorkerDiedError(1, 101)

    assert [first, second] == calls.close(error)
    assert ["kept"] == done.outcome()
    raised = []
    for entry in (first, second):
        with pytest.raises(WorkerDiedError) as caught:
            entry.outcome()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert calls.closed_by is error
    assert [] == calls.value(0, first.id, "after the end")


def test_first_end_counts() -> None:
    """A shutdown after a death does not hide the death."""
    calls, death = Calls(4, 4), WorkerDiedError(1, 101)
    calls.close(death)
    calls.close(RuntimeError("shut down"))

    assert calls.closed_by is death


# Gates


def granted(calls: Calls) -> list[int]:
    """Ranks that start now: their gates are opened."""
    grants = calls.grants()
    assert grants == calls.grants()  # until they are open: Ctrl-C may come before
    for rank, entry in grants:
        entry.ungated.remove(rank)
    return [rank for rank, _ in grants]


def test_gates_open_one_after_the_other() -> None:
    """With a limit of two, two ranks start, and each that is through lets the next one in."""
    calls = Calls(4, 4)
    entry = opened(calls, call((0, 1, 2, 3), max_concurrent=2))

    assert [0, 1] == granted(calls)
    assert [] == granted(calls)
    calls.value(1, entry.id, None)
    assert [2] == granted(calls)
    calls.error(entry.id, failure(0), now=1.0)
    assert [3] == granted(calls)


def test_gates_wait_for_the_sending() -> None:
    """A call that is not sent yet opens no gate, and loses none."""
    calls = Calls(4, 4)
    entry = call((0, 1), max_concurrent=1)
    assert calls.open(entry)
    assert [] == granted(calls)
    entry.sent = True

    assert [0] == granted(calls)


def test_limit_that_does_not_limit() -> None:
    """With room for all ranks there is no gate."""
    calls = Calls(4, 4)
    opened(calls, call((0, 1), max_concurrent=2))

    assert not calls.gated


def test_gated_calls_take_turns() -> None:
    """The second gated call starts when the first is through, since each rank runs them in order."""
    calls = Calls(4, 4)
    first, second = opened(calls, call(max_concurrent=1)), opened(calls, call(max_concurrent=1))
    seen = []
    for entry in (first, second):
        for rank in (0, 1):
            seen += [(entry.id, rank)] * (granted(calls) == [rank])
            calls.value(rank, entry.id, None)

    assert [(first.id, 0), (first.id, 1), (second.id, 0), (second.id, 1)] == seen
    assert not calls.gated


def test_gates_of_a_call_that_timed_out_still_open() -> None:
    """A staggered call that was given up goes on: its ranks have it in their rings and would wait for ever."""
    calls = Calls(4, 4)
    entry = opened(calls, call(max_concurrent=1, deadline=1.0))
    assert [0] == granted(calls)
    calls.settle(entry)
    calls.value(0, entry.id, None)

    assert [1] == granted(calls)

"""What the guard does when the ranks of a replica do not do the same, or one of them fails."""

from __future__ import annotations

from typing import Any

import pytest

RANKS = range(4)


@pytest.fixture(scope="module")
def job(torchrun: Any) -> Any:
    """`programs/guard.py` on four ranks."""
    return torchrun(4, "guard.py")


def calls_named(outcome: dict[str, Any]) -> list[str]:
    """What a `RankDivergenceError` says that each rank wanted, without the number of the call."""
    assert "RankDivergenceError" == outcome["type"]
    return [outcome["calls"][str(rank)].partition(": ")[2] for rank in RANKS]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("other_method", ["note(1)", "where(1)", "note(1)", "note(1)"]),
        (
            "other_arguments",
            [f"where({{'tokens': [1, 2, {rank == 1}]}})" for rank in RANKS],
        ),
        ("other_keyword", [f"where(x=tensor([1.0, {float(rank == 2)}]))" for rank in RANKS]),
        ("other_ranks", [f"where() on ranks {[0, 1, 2] if rank == 3 else [0, 1]}" for rank in RANKS]),
        ("other_step", [f"execute_model(('prompt', {rank == 3}))" for rank in RANKS]),
    ],
)
def test_different_calls_are_told_to_every_rank(job: Any, name: str, calls: list[str]) -> None:
    """Each rank gets `RankDivergenceError` at once, with the call of each rank, and says them in its text."""
    for outcome in job.of_all(name):
        assert calls == calls_named(outcome)
        assert outcome["seconds"] < 3.0
        assert all(call in outcome["text"] for call in calls)


def test_no_rank_runs_a_call_that_differs(job: Any) -> None:
    """After five differing calls the workers have run none of them."""
    assert [[[]]] * 4 == [outcome["value"] for outcome in job.of_all("nothing_ran")]


def test_equal_values_are_no_difference(job: Any) -> None:
    """Sets in another order and objects that are equal but not the same compare equal."""
    assert ["value" in outcome for outcome in job.of_all("equal_values")] == [True] * 4
    assert ["value" in outcome for outcome in job.of_all("equal_objects")] == [True] * 4


@pytest.mark.parametrize("name", ["raised", "raised_in_future", "raised_in_wave", "unasked"])
def test_one_rank_raises_all_raise(job: Any, name: str) -> None:
    """An error of one rank is raised by all, as its own type, with a note that names the rank."""
    culprit = {"raised_in_future": 3, "raised_in_wave": 0}.get(name, 2)
    for outcome in job.of_all(name):
        assert ("KeyError", f"('layer', {culprit})") == (outcome["type"], outcome["text"])
        assert outcome["notes"][0].startswith(f"rank {culprit} (pid ")
        assert outcome["notes"][0].endswith(" in fail_on")


def test_the_traceback_of_the_failing_rank_comes_along(job: Any) -> None:
    """Where another rank has raised, its traceback is the error's cause."""
    for rank, outcome in enumerate(job.of_all("raised")):
        assert (rank == 2) or "in fail_on\n    raise KeyError" in outcome["cause"]


def test_all_ranks_raise(job: Any) -> None:
    """When all ranks raise, each raises the first one's error and lists the others."""
    for outcome in job.of_all("raised_by_all"):
        assert "ValueError" == outcome["type"]
        assert [True] * 4 == [any(f"rank {rank} (pid" in note for note in outcome["notes"]) for rank in RANKS]


def test_errors_that_do_not_travel(job: Any) -> None:
    """What cannot be pickled, and what is no error but ends a process, arrives elsewhere as `WorkerError`."""
    for rank, outcome in enumerate(job.of_all("unpicklable")):
        assert ("UnpicklableError" if rank == 1 else "WorkerError") == outcome["type"]
    for outcome in job.of_all("system_exit"):
        assert ("WorkerError", "SystemExit", 1) == (outcome["type"], outcome["type_name"], outcome["rank"])


def test_classes_of_the_program_are_each_ranks_own(job: Any) -> None:
    """An error of a class in ``__main__`` is caught there on every rank, and such values are of the rank's own class."""
    assert [True] * 4 == job.of_all("caught_as_own")
    assert [[True] * 4] * 4 == job.of_all("gathered_as_own")


def test_calls_go_on_after_errors(job: Any) -> None:
    """Errors leave the executor READY, and the next call gets its own answer."""
    assert [[[rank, 1]] for rank in RANKS] == [outcome["value"] for outcome in job.of_all("after_errors")]
    assert ["ready"] * 4 == job.of_all("state_after_errors")


def test_a_late_rank_is_a_time_out_on_all(job: Any) -> None:
    """A call's time-out names who has answered and who has not, on every rank, also the late one."""
    for rank, outcome in enumerate(job.of_all("late")):
        assert ("RpcTimeoutError", [1], [0, 2, 3]) == (
            outcome["type"], outcome["pending_ranks"], outcome["answered_ranks"]
        )  # fmt: skip
        assert rank == 1 or outcome["seconds"] < 2.0


def test_the_next_call_waits_for_a_late_rank(job: Any) -> None:
    """The next call waits for a rank that is still in the old one, within its own time-out, and gets its own answer."""
    assert [[[rank, 2]] for rank in RANKS] == [outcome["value"] for outcome in job.of_all("after_late")]
    assert [[3]] * 4 == [outcome["pending_ranks"] for outcome in job.of_all("while_busy")]
    assert [[[rank, 4]] for rank in RANKS] == [outcome["value"] for outcome in job.of_all("after_busy")]
    assert ["ready"] * 4 == job.of_all("state_after_late")


def test_one_call_less_is_told_within_the_bound(job: Any) -> None:
    """A rank that does something else instead of calling: the others are told after 4 s, and it is when it calls again."""
    for rank, outcome in enumerate(job.of_all("one_less")):
        calls = calls_named(outcome)
        assert "no call, its last was call 24: where" == outcome["calls"]["1"]
        assert ["where(5)"] * 3 == [call for other, call in enumerate(calls) if other != 1]
        assert (0.0 if rank == 1 else 4.0) <= outcome["seconds"] < (3.0 if rank == 1 else 7.0)
    assert [[[rank, 6]] for rank in RANKS] == [outcome["value"] for outcome in job.of_all("after_one_less")]


def test_one_call_less_at_the_end_is_told_at_once(job: Any) -> None:
    """A rank that shuts down while the others call is named, and its own ``shutdown`` raises, closed all the same."""
    told = [*(job.ranks[rank]["last"] for rank in RANKS if rank != 1), job.ranks[1]["shutdown"]]
    for outcome in told:
        assert "RankDivergenceError" == outcome["type"]
        assert ("shutdown()", "call 27: where(7)") == (outcome["calls"]["1"], outcome["calls"]["0"])
        assert outcome["seconds"] < 3.0
    assert ["closed"] * 4 == job.of_all("state_after_shutdown")


def test_the_bound_can_be_set_and_the_first_rank_may_be_the_late_one(job: Any) -> None:
    """With half a second in the class the others are told after half a second, also when it is rank 0 that is away."""
    for rank, outcome in enumerate(job.of_all("hub_late")):
        assert "no call, its last was call 3: load_model" == outcome["calls"]["0"]
        assert rank == 0 or 0.5 <= outcome["seconds"] < 0.9
    assert [[[rank, None]] for rank in RANKS] == [outcome["value"] for outcome in job.of_all("after_hub_late")]


def test_an_error_frees_ranks_that_wait_in_a_collective(job: Any) -> None:
    """One rank raises before a collective: the others come out of it soon, with that error, and the executor is FAILED."""
    for outcome in job.of_all("stuck"):
        assert ("KeyError", "('layer', 2)") == (outcome["type"], outcome["text"])
        assert (
            "ranks [0, 1, 3] did not come out of the call: the process groups were given up, call restart()"
            in (outcome["notes"][1])
        )
        assert outcome["seconds"] < 3.0
    assert ["failed"] * 4 == job.of_all("state_after_stuck")
    assert ["ExecutorFailedError"] * 4 == [outcome["type"] for outcome in job.of_all("call_after_stuck")]
    assert [1] * 4 == job.of_all("heard")


def test_restart_on_every_rank_makes_a_new_world(job: Any) -> None:
    """``restart()`` on all ranks brings the executor back with new process groups."""
    assert [[6.0]] * 4 == [outcome["value"] for outcome in job.of_all("restarted")]
    assert [(1, "ready")] * 4 == list(zip(job.of_all("generation"), job.of_all("state_after_restart"), strict=True))


def test_the_guard_can_be_off(job: Any) -> None:
    """Without it calls may differ and an error stays on its rank, and gathering works all the same."""
    assert [[[rank, rank]] for rank in RANKS] == [outcome["value"] for outcome in job.of_all("unguarded")]
    assert [[[rank, rank] for rank in RANKS]] * 4 == [outcome["value"] for outcome in job.of_all("unguarded_gather")]
    assert ["type" if rank == 2 else "value" for rank in RANKS] == [
        "type" if "type" in outcome else "value" for outcome in job.of_all("unguarded_error")
    ]


def test_without_the_guard_what_a_failed_call_held_goes_with_its_error(job: Any) -> None:
    """As with it, which the contract holds: it does not wait for the garbage collector."""
    assert [[True]] * 4 == [outcome["value"] for outcome in job.of_all("unguarded_let_go")]


def test_different_configurations_are_told_before_anything_is_started(job: Any) -> None:
    """Ranks that start with other configurations all hear of it, with what each has."""
    for outcome in job.of_all("other_config"):
        assert "RankDivergenceError" == outcome["type"]
        assert ["cache.block_size=32" in outcome["calls"][str(rank)] for rank in RANKS] == [True, False, False, False]
    for outcome in job.of_all("other_sizes"):
        assert "RankDivergenceError" == outcome["type"]
        assert "parallel.pipeline_parallel_size=2" in outcome["calls"]["2"]


def test_one_rank_fails_to_start_all_fail(job: Any) -> None:
    """What goes wrong at the start of one rank is every rank's `WorkerStartupError`, and nothing is left."""
    for outcome in job.of_all("init_fails"):
        assert ("WorkerStartupError", 2, "init_worker") == (outcome["type"], outcome["rank"], outcome["phase"])
        assert "ZeroDivisionError" in outcome["text"]
    assert [False] * 4 == job.of_all("left_over")

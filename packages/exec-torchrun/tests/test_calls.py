"""Calls under torchrun: what runs where, and who gets which value."""

from __future__ import annotations

import os
from typing import Any

import pytest

WORLDS = {"tp2": (2, 1, 1), "pp3": (1, 3, 1), "tp2-dp2": (2, 1, 2)}


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    """Tensor, pipeline and data parallel sizes."""
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def job(torchrun: Any, world: tuple[int, int, int]) -> Any:
    """`programs/calls.py` in that world."""
    tp, pp, dp = world
    return torchrun(tp * pp * dp, "calls.py", *map(str, world), str(os.getpid()))


def replicas(world: tuple[int, int, int]) -> list[list[int]]:
    """The ranks of each replica."""
    size = world[0] * world[1]
    return [list(range(first, first + size)) for first in range(0, size * world[2], size)]


def everywhere(world: tuple[int, int, int], value: Any) -> list[Any]:
    """``value(ranks of the replica, rank)`` of each rank."""
    return [value(ranks, rank) for ranks in replicas(world) for rank in ranks]


def test_a_call_runs_here(job: Any, world: tuple[int, int, int]) -> None:
    """Each rank gets a list with its own value."""
    assert everywhere(world, lambda ranks, rank: [[rank, 7]]) == job.of_all("local")
    assert everywhere(world, lambda ranks, rank: [10 * rank]) == job.of_all("by_callable")
    assert everywhere(world, lambda ranks, rank: [[rank, 9]]) == job.of_all("future")


def test_gather_returns_the_replicas_values(job: Any, world: tuple[int, int, int]) -> None:
    """With ``gather=True`` each rank gets the values of its replica, in rank order."""
    assert everywhere(world, lambda ranks, rank: [[r, 7] for r in ranks]) == job.of_all("gathered")
    assert everywhere(world, lambda ranks, rank: len(ranks)) == job.of_all("aggregated")


def test_call_says_otherwise_than_its_class(job: Any, world: tuple[int, int, int]) -> None:
    """A class whose calls gather by default still leaves values where they are if the call says so."""
    assert everywhere(world, lambda ranks, rank: [[r, 7] for r in ranks]) == job.of_all("gathered_by_class")
    assert everywhere(world, lambda ranks, rank: [[rank, 7]]) == job.of_all("gathered_by_neither")


def test_explicit_reply_ranks_reach_every_rank(job: Any, world: tuple[int, int, int]) -> None:
    """The value of a rank that is asked for by name is returned on every rank."""
    assert everywhere(world, lambda ranks, rank: [[ranks[-1], 8]]) == job.of_all("reply_of_last")


def test_ranks_choose_who_runs(job: Any, world: tuple[int, int, int]) -> None:
    """With ``ranks`` only those run it; the others get an empty list."""
    assert everywhere(world, lambda ranks, rank: [[rank, 8]] * (rank == ranks[-1])) == job.of_all("run_by_last")


def test_arguments_may_differ_where_that_is_said(job: Any, world: tuple[int, int, int]) -> None:
    """An argument wrapped in `PerRank` may differ between ranks, and the worker gets what is inside."""
    assert everywhere(world, lambda ranks, rank: [[rank, rank]]) == job.of_all("per_rank")


def test_steps_return_the_output_ranks_value_everywhere(job: Any, world: tuple[int, int, int]) -> None:
    """``execute_model`` returns the output of the last stage on every rank of the replica, in all its forms."""
    output = -world[0]
    assert everywhere(world, lambda ranks, rank: ["token", "request", ranks[output]]) == job.of_all("step")
    assert everywhere(world, lambda ranks, rank: ["token", "async", ranks[output]]) == job.of_all("step_async")
    assert everywhere(world, lambda ranks, rank: list(range(5))) == job.of_all("steps")


def test_execution_loop_keeps_nobody_from_calling(job: Any, world: tuple[int, int, int]) -> None:
    """While the execution loop is on, every rank's program makes the steps as before."""
    assert everywhere(world, lambda ranks, rank: ([0, 1], True)) == list(
        zip(job.of_all("looped"), job.of_all("loop_ended"), strict=True)
    )


def test_number_of_blocks_is_the_replicas_minimum(job: Any, world: tuple[int, int, int]) -> None:
    """``determine_num_available_blocks`` is the minimum over the ranks of the replica, the same on each."""
    assert everywhere(world, lambda ranks, rank: [100 - ranks[-1], 10 + ranks[0]]) == job.of_all("blocks")


def test_groups_follow_the_mesh(job: Any, world: tuple[int, int, int]) -> None:
    """All-reduces in tp, pp, dp and world add up over exactly those ranks."""
    tp, pp, dp = world
    total = tp * pp * dp

    def sums(ranks: list[int], rank: int) -> dict[str, float]:
        return {
            "tp": sum(r for r in ranks if r // tp == rank // tp),
            "pp": sum(r for r in ranks if r % tp == rank % tp),
            "dp": sum(r for r in range(total) if r % (tp * pp) == rank % (tp * pp)),
            "world": sum(range(total)),
        }

    assert everywhere(world, sums) == job.of_all("sums")


def test_context_comes_from_the_environment(job: Any, world: tuple[int, int, int]) -> None:
    """Local rank, data-parallel rank and device are those of the launcher."""
    assert everywhere(world, lambda ranks, rank: [[rank, rank // len(ranks), "cpu"]]) == job.of_all("places")


def test_staggered_calls(job: Any, world: tuple[int, int, int]) -> None:
    """``max_concurrent_workers`` holds over all ranks of the replica."""
    assert everywhere(world, lambda ranks, rank: 1) == job.of_all("overlap_one_by_one")
    assert all(most > 1 for most in job.of_all("overlap_at_once"))


def test_ready_then_closed(job: Any, world: tuple[int, int, int]) -> None:
    """The executor is READY with its process group, which is gone when it is closed."""
    assert everywhere(world, lambda ranks, rank: ["ready", True]) == [
        list(pair) for pair in zip(job.of_all("state"), job.of_all("default_group_before"), strict=True)
    ]
    assert everywhere(world, lambda ranks, rank: ["closed", False]) == [
        list(pair) for pair in zip(job.of_all("state_after"), job.of_all("default_group_after"), strict=True)
    ]


def test_leaving_first_does_not_hang(job: Any, world: tuple[int, int, int]) -> None:
    """A rank that shuts down before the others waits for them for ``shutdown_timeout_s`` at most, and they are fine."""
    assert all(seconds < 2.0 for seconds in job.of_all("closing_s"))


def test_nothing_is_said_on_the_way_out(job: Any) -> None:
    """No warning about process groups that were not destroyed, and no other noise."""
    noise = [line for line in job.output.splitlines() if "OMP_NUM_THREADS" not in line and line.strip(" *")]
    assert [] == noise

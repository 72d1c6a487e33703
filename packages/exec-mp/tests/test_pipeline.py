"""Steps overlap in a pipeline, and come back in order."""

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing.workers import StageWorker

Launch = Callable[..., ec.Executor]

STAGE_S, STEPS = 0.05, 10


@pytest.fixture(params=["process", "inline"])
def pipeline(request: pytest.FixtureRequest, launch: Launch) -> ec.Executor:
    """Two stages that take 50 ms for each step."""
    return launch(
        1,
        StageWorker,
        gloo=True,
        parallel={"pipeline_parallel_size": 2, "driver_worker": request.param},
        worker_kwargs={"stage_s": STAGE_S},
    )


def overlaps(executor: ec.Executor) -> list[bool]:
    """For each step but the last: whether the first stage worked on the next one while the second was at it."""
    first, second = executor.collective_rpc(lambda worker: worker.intervals)
    return [first[n + 1][0] < second[n][1] and second[n][0] < first[n + 1][1] for n in range(STEPS - 1)]


def test_awaited_steps_overlap(pipeline: ec.Executor) -> None:
    """Ten awaited steps in flight: while the second stage is at one, the first is at the next; values come in order."""

    async def main() -> list[Any]:
        return await asyncio.gather(*(pipeline.execute_model_async(n) for n in range(STEPS)))

    assert [n + 2 for n in range(STEPS)] == asyncio.run(main())
    assert [True] * (STEPS - 1) == overlaps(pipeline)


def test_futures_overlap(pipeline: ec.Executor) -> None:
    """So do steps sent without waiting; each stage takes one step at a time, in the order of sending."""
    futures: list[Future[Any]] = [pipeline.execute_model(n, non_block=True) for n in range(STEPS)]

    assert [n + 2 for n in range(STEPS)] == [future.result(30) for future in futures]
    assert [True] * (STEPS - 1) == overlaps(pipeline)
    for intervals in pipeline.collective_rpc(lambda worker: worker.intervals):
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(intervals))

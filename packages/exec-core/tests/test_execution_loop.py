"""The execution loop, where its ends overlap in ways that no backend shows at will."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import pytest

from exec_core.config import ExecutorConfig, ParallelConfig
from exec_core.execution_loop import ExecutionLoop
from exec_core.executor import Executor
from exec_core.testing.workers import EchoWorker


class SlowlyTold(Future[Any]):
    """Whose callbacks run when `tell` is called: another thread is between setting it and running them."""

    def __init__(self) -> None:
        super().__init__()
        self._untold: list[Callable[[Future[Any]], object]] = []

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        self._untold.append(fn)

    def tell(self) -> None:
        for fn in self._untold:
            fn(self)


class TwoRanks:
    """What the loop asks of its executor, with one driver and one rank that loops."""

    world_size, is_down = 2, False
    config = ExecutorConfig(worker_cls=EchoWorker, parallel=ParallelConfig(tensor_parallel_size=2))

    def __init__(self) -> None:
        self.entered: list[SlowlyTold] = []
        self.driven: Future[Any] = Future()
        self.down: Exception | None = None

    def check_open(self, method: str) -> None:
        """It is."""

    def enter_loop(self, _rank: int) -> Future[Any]:
        if self.down is not None:
            raise self.down
        self.entered.append(SlowlyTold())
        return self.entered[-1]

    def submit_step(self, _method: str, _request: Any, _ranks: Any) -> Future[Any]:
        return self.driven


def test_rank_that_has_just_failed_is_sent_in_for_the_end() -> None:
    """The drivers may have broadcast it before anybody has looked at why the rank has left; then it is still to come."""
    ranks = TwoRanks()
    loop = ExecutionLoop(cast("Executor", ranks))
    ended = loop.start()
    end = loop.step(None)
    assert end is not None
    ranks.entered[0].set_exception(ValueError("in the loop"))
    ranks.driven.set_result(None)
    assert not end.done()
    ranks.entered[0].tell()
    assert len(ranks.entered) == 2
    assert not end.done()
    ranks.entered[1].set_result(None)
    ranks.entered[1].tell()

    with pytest.raises(ValueError, match="in the loop"):
        end.result(0)
    assert isinstance(ended.exception(0), ValueError)
    assert loop.step(None) is None


@pytest.mark.parametrize("seen_first", [False, True])
def test_end_of_a_loop_whose_executor_goes_down(seen_first: bool) -> None:
    """A rank that can no longer be sent in for the end is gone: who stops the loop is told why, and nobody waits for ever."""
    ranks = TwoRanks()
    loop = ExecutionLoop(cast("Executor", ranks))
    loop.start()
    ranks.entered[0].set_exception(ValueError("in the loop"))
    ranks.down = RuntimeError("down")
    if seen_first:
        ranks.entered[0].tell()
    end = loop.step(None)
    assert end is not None
    ranks.driven.set_result(None)
    ranks.entered[0].tell()

    with pytest.raises((ValueError, RuntimeError), match="in the loop|down"):
        end.result(0)
    assert loop.step(None) is None

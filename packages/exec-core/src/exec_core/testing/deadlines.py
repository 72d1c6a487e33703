"""The contract of calls that take long: deadlines, room for one more, values that come later."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from exec_core.config import RpcConfig
from exec_core.errors import ExecutorBusyError, RpcTimeoutError
from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import ContractBase, Start
from exec_core.testing.sync import Gate, eventually

AMPLE_S = 0.5  # a deadline that a rank held at a gate misses, and the others meet, or begin in time, on a busy machine


class DeadlineContract(ContractBase):
    """Deadlines, room, async outputs."""

    def test_future_honours_its_deadline(self, executor: Executor, gate: Gate) -> None:
        """A future without a waiter fails at its deadline; the next call gets its own answer."""
        future = executor.collective_rpc(workers.wait_at, 0.05, args=(gate,), non_block=True)
        error = future.exception(30)

        assert isinstance(error, RpcTimeoutError)
        assert ("wait_at", 0.05, (), tuple(self.world())) == (
            error.method, error.timeout_s, error.answered_ranks, error.pending_ranks,
        )  # fmt: skip
        gate.open()
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", 30.0, args=(1,))

    def test_timeout_of_a_blocking_call(self, executor: Executor, gate: Gate) -> None:
        """A rank that does not answer in time makes the call raise; one in the caller's process cannot be interrupted."""
        held = self.last()
        if held in self.local_ranks:
            opener = threading.Timer(0.1, gate.open)
            opener.start()
            assert self.world() == executor.collective_rpc(workers.wait_at, 0.05, args=(gate, held))
            opener.join()
            return
        with pytest.raises(RpcTimeoutError) as caught:
            executor.collective_rpc(workers.wait_at, AMPLE_S, args=(gate, held))
        gate.open()

        answered = tuple(rank for rank in self.world() if rank != held)
        assert (answered, (held,)) == (caught.value.answered_ranks, caught.value.pending_ranks)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", 30.0, args=(1,))

    def test_rank_inside_an_old_call_counts_against_the_next(self, executor: Executor, gate: Gate) -> None:
        """A call behind one that timed out waits for it within its own deadline, and says which rank is pending."""
        old = executor.collective_rpc(workers.wait_at, AMPLE_S, args=(gate, self.last()), non_block=True)
        assert isinstance(old.exception(30), RpcTimeoutError)
        with pytest.raises(RpcTimeoutError) as caught:
            executor.collective_rpc("where", 0.05)

        assert self.last() in caught.value.pending_ranks
        gate.open()
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", 30.0, args=(1,))

    def test_health_names_the_rank_that_is_still_inside(self, executor: Executor, gate: Gate) -> None:
        """After a time-out ``check_health`` names the rank and the call that it is still in, until it has left."""
        held = self.last()
        future = executor.collective_rpc(workers.wait_at, 0.02, args=(gate, held), non_block=True)
        assert isinstance(future.exception(30), RpcTimeoutError)
        gate.entered([held])
        with pytest.raises(RpcTimeoutError, match=rf"rank {held} \(pid \d+\) has been in 'wait_at'"):
            executor.check_health()
        gate.open()
        executor.collective_rpc("where", 30.0)
        executor.check_health()

    def test_stuck_rank_is_unhealthy(self, start: Start, gate: Gate) -> None:
        """With ``stuck_after_s`` a rank that has been in one call for longer makes ``check_health`` raise."""
        executor = start(rpc=RpcConfig(stuck_after_s=0.02))
        executor.check_health()
        future = executor.collective_rpc(workers.wait_at, args=(gate, self.last()), non_block=True)
        gate.entered([self.last()])
        eventually(lambda: executor.workers[self.last()].busy_s > 0.02)
        with pytest.raises(RpcTimeoutError, match=rf"rank {self.last()} "):
            executor.check_health()
        gate.open()
        future.result(30)
        executor.check_health()

    def test_default_timeout_is_the_configs(self, start: Start, gate: Gate) -> None:
        """Without a time-out of its own a call has ``RpcConfig.timeout_s``."""
        executor = start(rpc=RpcConfig(timeout_s=0.05))
        error = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True).exception(30)
        gate.open()

        assert isinstance(error, RpcTimeoutError)
        assert error.timeout_s == 0.05

    # Room

    def fill(self, executor: Executor, gate: Gate, calls: int) -> list[Future[Any]]:
        """``calls`` futures in flight, the first at the gate."""
        futures = [executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True) for _ in range(calls)]
        gate.entered(self.world())
        return futures

    def test_no_room_for_a_future(self, start: Start, gate: Gate) -> None:
        """With ``max_in_flight`` calls pending, one more future is refused once its time-out has passed."""
        executor = start(rpc=RpcConfig(max_in_flight=2))
        futures = self.fill(executor, gate, 2)
        with pytest.raises(ExecutorBusyError) as caught:
            executor.collective_rpc("where", 0.05, non_block=True)

        assert (caught.value.method, caught.value.in_flight, caught.value.limit) == ("where", 2, 2)
        gate.open()
        assert [self.world()] * 2 == self.results(futures)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc(
            "where", args=(1,), non_block=True
        ).result(30)

    def test_future_waits_for_room(self, start: Start, gate: Gate) -> None:
        """Within its time-out a future waits for room."""
        executor = start(rpc=RpcConfig(max_in_flight=1))
        futures = self.fill(executor, gate, 1)
        opener = threading.Timer(0.02, gate.open)
        opener.start()

        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc(
            "where", 30.0, args=(1,), non_block=True
        ).result(30)
        assert [self.world()] == self.results(futures)
        opener.join()

    def test_blocking_call_waits_for_room(self, start: Start, gate: Gate) -> None:
        """A blocking call waits for room within its deadline, then raises that it timed out."""
        executor = start(rpc=RpcConfig(max_in_flight=1))
        futures = self.fill(executor, gate, 1)
        with pytest.raises(RpcTimeoutError):
            executor.collective_rpc("where", 0.05)
        opener = threading.Timer(0.02, gate.open)
        opener.start()

        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", 30.0, args=(1,))
        assert [self.world()] == self.results(futures)
        opener.join()

    def test_async_calls_await_room(self, start: Start) -> None:
        """Many more awaited calls than fit in flight all get their answers."""
        executor = start(rpc=RpcConfig(max_in_flight=2))

        async def main() -> Sequence[Any]:
            return await asyncio.gather(*(executor.collective_rpc_async("where", args=(n,)) for n in range(40)))

        assert [[(rank, n) for rank in self.world()] for n in range(40)] == asyncio.run(main())

    def test_async_deadline_covers_the_wait_for_room(self, start: Start, gate: Gate) -> None:
        """An awaited call that finds no room within its time-out raises that it timed out."""
        executor = start(rpc=RpcConfig(max_in_flight=1))
        futures = self.fill(executor, gate, 1)
        begin = time.monotonic()
        with pytest.raises(RpcTimeoutError):
            asyncio.run(executor.collective_rpc_async("where", 0.05))

        assert time.monotonic() - begin >= 0.05
        gate.open()
        assert [self.world()] == self.results(futures)

    @staticmethod
    def results(futures: Sequence[Future[Any]]) -> list[Any]:
        """Results of futures that end by themselves."""
        return [future.result(30) for future in futures]

    # Async outputs

    def test_async_output_lets_the_next_call_start(self, start: Start, gate: Gate) -> None:
        """A method that returns an object with ``get_output`` gives the worker free; its value comes from a second thread."""
        executor = start(workers.AsyncOutputWorker, worker_kwargs={"gate": gate})
        first = executor.execute_model("a", non_block=True)
        second = executor.execute_model("b", non_block=True)
        steps = executor.collective_rpc("entries", 30.0, args=("step",))

        assert [[("step", "a"), ("step", "b")]] * len(self.world()) == steps
        assert not first.done()
        gate.open()
        assert self.results([first, second]) == [("a", False), ("b", False)]

    def test_unwanted_async_output_is_not_asked_for(self, start: Start, gate: Gate) -> None:
        """On a rank whose value nobody wants ``get_output`` is not called."""
        executor = start(workers.AsyncOutputWorker, worker_kwargs={"gate": gate})

        assert executor.collective_rpc("execute_model", 30.0, args=("a",), reply_ranks=[]) == []

    def test_error_of_an_async_output(self, start: Start, gate: Gate) -> None:
        """What ``get_output`` raises arrives as the step's error."""
        executor = start(workers.AsyncOutputWorker, worker_kwargs={"gate": gate})
        gate.open()
        with pytest.raises(ValueError, match="late") as caught:
            executor.execute_model(ValueError("late"))

        assert any(f"rank {executor.output_rank} (pid" in note for note in caught.value.__notes__)

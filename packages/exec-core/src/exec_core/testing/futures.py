"""The contract of calls that are not waited for: futures, asyncio, deadlines, room."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import ContractBase
from exec_core.testing.sync import Gate


class FutureContract(ContractBase):
    """Futures and their asyncio counterparts."""

    def test_future_is_a_real_one(self, executor: Executor) -> None:
        """``non_block`` returns a `concurrent.futures.Future` of the list."""
        future = executor.collective_rpc("where", args=(1,), non_block=True)

        assert isinstance(future, Future)
        assert [(rank, 1) for rank in self.world()] == future.result(30)

    def test_future_is_sent_at_once(self, executor: Executor, gate: Gate) -> None:
        """``non_block`` returns while the workers are still at it."""
        future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
        gate.entered(self.world())

        assert not future.done()
        gate.open()
        assert self.world() == future.result(30)

    def test_future_of_some_ranks(self, executor: Executor) -> None:
        """A call to some ranks only may be sent without waiting; the other ranks are free meanwhile."""
        others = self.world()[:-1]
        future = executor.collective_rpc("where", args=(1,), ranks=[self.last()], non_block=True)
        of_others = executor.collective_rpc("where", args=(2,), ranks=others, non_block=True)

        assert [(rank, 2) for rank in others] == of_others.result(30)
        assert [(self.last(), 1)] == future.result(30)

    def test_result_can_be_read_again(self, executor: Executor) -> None:
        """A result is readable many times, and is the same object each time."""
        future = executor.collective_rpc("where", non_block=True)

        assert future.result(30) is future.result(0)

    def test_futures_work_with_wait(self, executor: Executor) -> None:
        """`concurrent.futures.wait` takes them."""
        futures = [executor.collective_rpc("where", args=(n,), non_block=True) for n in range(6)]
        done, not_done = concurrent.futures.wait(futures, timeout=30)

        assert (len(done), len(not_done)) == (6, 0)
        assert [[(rank, n) for rank in self.world()] for n in range(6)] == [future.result() for future in futures]

    def test_callback_runs_without_a_waiter(self, executor: Executor) -> None:
        """A done callback runs though nobody waits for the result."""
        called: Future[Any] = Future()
        executor.collective_rpc("where", args=(1,), non_block=True).add_done_callback(called.set_result)

        assert [(rank, 1) for rank in self.world()] == called.result(30).result()

    def test_callback_may_send_the_next_call(self, executor: Executor) -> None:
        """A done callback may send a further call."""
        called: Future[Any] = Future()

        def go_on(future: Future[Any]) -> None:
            executor.collective_rpc("where", args=(2,), non_block=True).add_done_callback(called.set_result)

        executor.collective_rpc("where", args=(1,), non_block=True).add_done_callback(go_on)

        assert [(rank, 2) for rank in self.world()] == called.result(30).result()

    def test_callback_may_wait_for_a_call(self, executor: Executor, gate: Gate) -> None:
        """A done callback may make a blocking call, also while further futures are queued before that."""
        called: Future[Any] = Future()

        def go_on(future: Future[Any]) -> None:
            try:
                called.set_result(executor.collective_rpc("where", 3.0, args=(2,)))
            except Exception as error:
                called.set_exception(error)

        held = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
        held.add_done_callback(go_on)
        queued = executor.collective_rpc("where", args=(1,), non_block=True)
        gate.open()

        assert [(rank, 2) for rank in self.world()] == called.result(30)
        assert [(rank, 1) for rank in self.world()] == queued.result(30)

    def test_error_of_a_callback_harms_nobody(self, executor: Executor) -> None:
        """A done callback that raises does not disturb later calls."""
        future = executor.collective_rpc("where", non_block=True)
        logger = threading.Event()

        def broken(_: Future[Any]) -> None:
            logger.set()
            raise ZeroDivisionError

        future.add_done_callback(broken)

        assert logger.wait(30)
        assert [(rank, 3) for rank in self.world()] == executor.collective_rpc("where", 30.0, args=(3,))
        assert [(rank, 4) for rank in self.world()] == executor.collective_rpc(
            "where", args=(4,), non_block=True
        ).result(30)

    def test_future_in_asyncio(self, executor: Executor) -> None:
        """`asyncio.wrap_future` awaits it."""

        async def main() -> list[Any]:
            return await asyncio.wrap_future(executor.collective_rpc("where", args=(1,), non_block=True))

        assert [(rank, 1) for rank in self.world()] == asyncio.run(main())

    def test_future_carries_the_workers_error(self, executor: Executor) -> None:
        """An error of a worker is the future's exception, of its own type."""
        future = executor.collective_rpc(workers.fail, args=(ValueError("wrong"), self.last()), non_block=True)

        assert isinstance(future.exception(30), ValueError)

    def test_results_come_in_the_order_of_sending(self, executor: Executor) -> None:
        """Many futures in flight: each rank runs them in the order of sending."""
        entries = [("future", n) for n in range(30)]
        futures = [executor.collective_rpc("note", args=(entry,), non_block=True) for entry in entries]
        for future in futures:
            future.result(30)
        journals = executor.collective_rpc("entries", args=("future",))
        executor.collective_rpc(lambda worker: worker.journal.clear())

        assert [entries] * len(self.world()) == journals

    def test_blocking_call_runs_after_earlier_futures(self, executor: Executor, gate: Gate) -> None:
        """A blocking call takes its turn behind futures that were sent before it."""
        future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
        gate.entered(self.world())
        opened: list[bool] = []

        def open_gate() -> None:
            opened.append(True)
            gate.open()

        opener = threading.Timer(0.02, open_gate)
        opener.start()

        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))
        assert [True] == opened
        opener.join()
        assert self.world() == future.result(1.0)  # answered before, but another thread may be about to set it

    def test_collective_rpc_async(self, executor: Executor) -> None:
        """``collective_rpc_async`` takes the same arguments and awaits the values."""

        async def main() -> tuple[Any, Any]:
            every = await executor.collective_rpc_async("where", args=(1,))
            one = await executor.collective_rpc_async("where", 30.0, (2,), reply_ranks=[self.last()], aggregate=tuple)
            return every, one

        assert ([(rank, 1) for rank in self.world()], ((self.last(), 2),)) == asyncio.run(main())

    def test_async_calls_overlap(self, executor: Executor, gate: Gate) -> None:
        """Awaiting a call leaves the event loop free."""

        async def main() -> Any:
            held = asyncio.ensure_future(executor.collective_rpc_async(workers.wait_at, args=(gate,)))
            await asyncio.to_thread(gate.entered, self.world())
            gate.open()
            return await held

        assert self.world() == asyncio.run(main())

    def test_async_error(self, executor: Executor) -> None:
        """An awaited call raises what a worker raised."""
        with pytest.raises(ValueError, match="wrong"):
            asyncio.run(executor.collective_rpc_async(workers.fail, args=(ValueError("wrong"),)))

    def test_cancelled_task_leaves_the_executor_usable(self, executor: Executor, gate: Gate) -> None:
        """Cancelling an awaiting task gives up the answer, nothing else."""

        async def main() -> None:
            task = asyncio.ensure_future(executor.collective_rpc_async(workers.wait_at, args=(gate,)))
            await asyncio.to_thread(gate.entered, self.world())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        gate.open()

        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_check_health_async(self, executor: Executor) -> None:
        """Health is also there to be awaited."""
        asyncio.run(executor.check_health_async())

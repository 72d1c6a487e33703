"""The contract of the execution loop: steps that only the TP drivers are sent, and hand to their groups."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from exec_core.config import RpcConfig
from exec_core.errors import ExecutorBusyError
from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import GROUPS, ContractBase, Start
from exec_core.testing.sync import Gate


class LoopContract(ContractBase):
    """What an inference engine asks of the execution loop."""

    def drivers(self) -> list[int]:
        """First rank of each tensor-parallel group."""
        return self.world()[:: self.parallel.tensor_parallel_size]

    def test_execution_loop(self, executor: Executor) -> None:
        """While the loop runs, a step is sent to the TP drivers only and still reaches every rank; stopping it ends it."""
        self.steps(executor)
        ended = executor.start_worker_execution_loop()
        values = [executor.execute_model(n) for n in range(3)]
        executor.stop_remote_worker_execution_loop()

        assert [(executor.output_rank, n) for n in range(3)] == values
        ended.result(30)
        assert [[0, 1, 2]] * len(self.world()) == self.steps(executor)
        assert (executor.output_rank, "after") == executor.execute_model("after")

    def test_execution_loop_in_asyncio(self, executor: Executor) -> None:
        """Steps and the end of the loop can be awaited."""

        async def main() -> Any:
            executor.start_worker_execution_loop()
            values = await asyncio.gather(*(executor.execute_model_async(n) for n in range(3)))
            await executor.stop_remote_worker_execution_loop_async()
            return values

        assert [(executor.output_rank, n) for n in range(3)] == asyncio.run(main())

    def test_step_of_a_class_that_only_the_caller_has(self, executor: Executor) -> None:
        """It travels by value, as with any call: from the driver to its TP drivers, and from those to their groups."""

        class Step:
            def __init__(self, number: int) -> None:
                self.number = number

        self.steps(executor)
        executor.start_worker_execution_loop()
        rank, step = executor.execute_model(Step(3))
        executor.stop_remote_worker_execution_loop()

        assert (executor.output_rank, 3) == (rank, step.number)
        numbers = executor.collective_rpc(lambda worker: [step.number for _, step in worker.journal])
        assert [[3]] * len(self.world()) == numbers
        self.steps(executor)

    def test_none_ends_the_execution_loop(self, executor: Executor) -> None:
        """A step of None ends the loop, as stopping it does."""
        ended = executor.start_worker_execution_loop()

        assert executor.execute_model(None) is None
        ended.result(30)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_stopping_without_a_loop_is_fine(self, executor: Executor) -> None:
        """Without a loop there is nothing to stop."""
        executor.stop_remote_worker_execution_loop()
        asyncio.run(executor.stop_remote_worker_execution_loop_async())

    def test_call_to_a_looping_rank_is_refused(self, executor: Executor) -> None:
        """A call to a rank that is in the loop would wait for its end, and is refused; the drivers can be called."""
        looping = [rank for rank in self.world() if rank not in self.drivers()]
        executor.start_worker_execution_loop()
        try:
            if looping:
                with pytest.raises(ExecutorBusyError, match=r"ranks \[1\] are in the execution loop"):
                    executor.collective_rpc("where")
                with pytest.raises(ExecutorBusyError, match="the loop runs already"):
                    executor.start_worker_execution_loop()
            assert [(rank, 1) for rank in self.drivers()] == executor.collective_rpc(
                "where", args=(1,), ranks=self.drivers()
            )
        finally:
            executor.stop_remote_worker_execution_loop()

    def test_stopping_raises_what_a_rank_raised_in_the_loop(self, start: Start) -> None:
        """An error of a rank in the loop is raised by the step or by stopping, not lost, and the executor goes on."""
        executor = start(
            workers.FailingWorker, worker_kwargs={"phase": "execute_model", "rank": self.last()}, device=GROUPS
        )
        executor.start_worker_execution_loop()
        with pytest.raises(ValueError, match="told to fail in execute_model"):
            executor.execute_model("r")
            executor.stop_remote_worker_execution_loop()
        executor.stop_remote_worker_execution_loop()

        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", 30.0, args=(1,))

    def test_execution_loop_goes_on(self, start: Start) -> None:
        """Any number of steps: looping ranks take no place among the calls in flight, and keep nobody back."""
        executor = start(device=GROUPS, rpc=RpcConfig(timeout_s=60.0, startup_timeout_s=60.0, max_in_flight=1))
        for _ in range(2):
            ended = executor.start_worker_execution_loop()
            values = [executor.execute_model(n) for n in range(40)]
            executor.stop_remote_worker_execution_loop()
            ended.result(30)

            assert [(executor.output_rank, n) for n in range(40)] == values
            assert [list(range(40))] * len(self.world()) == self.steps(executor)

    def test_awaited_step_waits_for_room(self, start: Start, gate: Gate) -> None:
        """A step for which there is no room leaves the event loop free, and so does the end of the loop."""
        executor = start(device=GROUPS, rpc=RpcConfig(timeout_s=60.0, startup_timeout_s=60.0, max_in_flight=1))
        drivers = self.drivers()

        async def main() -> Any:
            executor.start_worker_execution_loop()
            held = asyncio.ensure_future(executor.collective_rpc_async(workers.wait_at, args=(gate,), ranks=drivers))
            await asyncio.to_thread(gate.entered, drivers)
            step = asyncio.ensure_future(executor.execute_model_async("r"))
            await asyncio.sleep(0)
            ended = asyncio.ensure_future(executor.stop_remote_worker_execution_loop_async())
            await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(held, ended)
            return await step

        assert (executor.output_rank, "r") == asyncio.run(main())
        assert [["r"]] * len(self.world()) == self.steps(executor)

    def test_looping_ranks_are_not_stuck(self, start: Start) -> None:
        """A rank may be in the loop for longer than a call may take."""
        executor = start(device=GROUPS, rpc=RpcConfig(timeout_s=60.0, startup_timeout_s=60.0, stuck_after_s=0.05))
        executor.start_worker_execution_loop()
        executor.execute_model("r")
        time.sleep(0.1)

        executor.check_health()
        executor.stop_remote_worker_execution_loop()

    def test_loop_that_is_being_ended(self, executor: Executor, gate: Gate) -> None:
        """It takes no more steps, rather than losing them; who ends it as well waits for the same end."""
        self.steps(executor)
        drivers = self.drivers()
        executor.start_worker_execution_loop()
        held = executor.collective_rpc(workers.wait_at, args=(gate,), ranks=drivers, non_block=True)
        if self.local_ranks.isdisjoint(drivers):
            ends = [executor.execute_model(None, non_block=True) for _ in range(2)]
            with pytest.raises(ExecutorBusyError, match="the execution loop is being ended"):
                executor.execute_model("late")
            gate.open()
            assert [None, None] == [end.result(30) for end in ends]
        else:
            gate.open()
            executor.stop_remote_worker_execution_loop()

        assert drivers == held.result(30)
        assert (executor.output_rank, "r") == executor.execute_model("r")
        assert [["r"]] * len(self.world()) == self.steps(executor)

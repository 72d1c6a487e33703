"""The contract of an executor's end: closing always closes, and what later calls get."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from exec_core.backends import create_executor
from exec_core.config import RpcConfig
from exec_core.errors import ExecutorClosedError
from exec_core.executor import Executor
from exec_core.lifecycle import State
from exec_core.testing import workers
from exec_core.testing.base import ContractBase, Start
from exec_core.testing.sync import Gate


class LifecycleContract(ContractBase):
    """States, shutdown, and use from where it must not be used."""

    def test_states(self, start: Start) -> None:
        """READY when it has started, CLOSED when it has been shut down."""
        executor = start()
        states = [executor.state]
        executor.shutdown()
        assert [State.READY, State.CLOSED] == [*states, executor.state]
        assert executor.workers == []

    def test_shutdown_twice(self, start: Start) -> None:
        """Closing what is closed is fine."""
        executor = start()
        executor.shutdown()
        executor.shutdown()

        assert State.CLOSED is executor.state

    def test_context_manager_closes(self, start: Start) -> None:
        """Leaving the ``with`` block closes, also by an error, which is not swallowed."""
        executor = start()
        with pytest.raises(ZeroDivisionError), executor as entered:
            assert entered is executor
            raise ZeroDivisionError

        assert State.CLOSED is executor.state

    def test_shutdown_from_several_threads(self, start: Start) -> None:
        """Whoever calls ``shutdown``, it has closed when it returns."""
        executor = start()
        together = threading.Barrier(4)

        def close(_: int) -> State:
            together.wait(30)
            executor.shutdown()
            return executor.state

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(close, range(4))) == [State.CLOSED] * 4

    def test_shutdown_from_a_callback(self, start: Start) -> None:
        """A done callback may close the executor."""
        executor = start()
        closed: Future[State] = Future()

        def close(_: Future[Any]) -> None:
            executor.shutdown()
            closed.set_result(executor.state)

        executor.collective_rpc("where", non_block=True).add_done_callback(close)

        assert State.CLOSED is closed.result(30)

    def test_calls_after_shutdown(self, start: Start) -> None:
        """Every call after the end raises `ExecutorClosedError` naming it."""
        executor = start()
        executor.shutdown()
        calls: list[Any] = [
            lambda: executor.collective_rpc("where"),
            lambda: executor.collective_rpc("where", non_block=True),
            lambda: asyncio.run(executor.collective_rpc_async("where")),
            lambda: executor.execute_model("r"),
            lambda: asyncio.run(executor.execute_model_async("r")),
            executor.determine_num_available_blocks,
            executor.start_worker_execution_loop,
            executor.check_health,
            executor.restart,
        ]
        for call in calls:
            with pytest.raises(ExecutorClosedError, match="closed"):
                call()
        executor.stop_remote_worker_execution_loop()

    def test_futures_in_flight_at_shutdown(self, start: Start, gate: Gate) -> None:
        """Futures that are pending when the executor closes raise `ExecutorClosedError`."""
        executor = start(rpc=RpcConfig(shutdown_timeout_s=0.5))
        futures = [executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True) for _ in range(3)]
        gate.entered(self.world())
        opener = threading.Timer(0.1, gate.open)  # a method in the caller's process cannot be stopped
        if self.local_ranks:
            opener.start()
        executor.shutdown()

        assert [ExecutorClosedError] * 3 == [type(future.exception(30)) for future in futures]
        if self.local_ranks:
            opener.join()

    def test_blocking_call_in_flight_at_shutdown(self, start: Start, gate: Gate) -> None:
        """A blocking call in another thread raises `ExecutorClosedError` when the executor closes."""
        if self.local_ranks:
            return  # the calling thread itself is inside the worker's method
        executor = start(rpc=RpcConfig(shutdown_timeout_s=0.5))
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(executor.collective_rpc, workers.wait_at, None, (gate,))
            gate.entered(self.world())
            executor.shutdown()

            assert isinstance(call.exception(30), ExecutorClosedError)

    def test_shutdown_of_stuck_workers_is_bounded(self, start: Start, gate: Gate) -> None:
        """Workers that do not leave by themselves are ended within ``shutdown_timeout_s``."""
        if self.local_ranks:
            return
        executor = start(rpc=RpcConfig(shutdown_timeout_s=0.4))
        executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
        gate.entered(self.world())
        begin = time.monotonic()
        executor.shutdown()

        assert time.monotonic() - begin < 2.0
        assert State.CLOSED is executor.state

    def test_workers_are_told_of_the_end(self, start: Start, tmp_path: Path) -> None:
        """Each worker's ``shutdown`` runs before its process ends."""

        class Leaving(workers.EchoWorker):
            def shutdown(self) -> None:
                (tmp_path / f"left-{self.context.rank}").touch()

        start(Leaving).shutdown()

        assert [f"left-{rank}" for rank in self.world()] == sorted(os.listdir(tmp_path))

    def test_worker_that_raises_at_the_end(self, start: Start) -> None:
        """An error in a worker's ``shutdown`` does not keep the executor from closing."""
        executor = start(workers.FailingWorker, worker_kwargs={"phase": "shutdown"})
        executor.shutdown()

        assert State.CLOSED is executor.state

    def test_failure_callback_is_for_failures(self, start: Start) -> None:
        """Closing is no failure: the callback does not run."""
        called: list[BaseException] = []
        executor = start()
        executor.register_failure_callback(fn=called.append)
        executor.shutdown()

        assert called == []

    def test_restart_needs_a_failure(self, executor: Executor) -> None:
        """``restart`` on an executor that has not failed is refused, and does it no harm."""
        with pytest.raises(ExecutorClosedError, match="needs a failed executor, this one is ready"):
            executor.restart()

        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_forked_child_of_the_host(self, executor: Executor) -> None:
        """In a forked child of the host the executor refuses calls and does not close the parent's."""

        def in_child() -> str:
            try:
                executor.collective_rpc("where")
            except ExecutorClosedError as error:
                executor.shutdown()
                return str(error)
            return "answered"

        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: what this is about
            pid = os.fork()
        if pid == 0:
            try:
                os.write(writing, in_child().encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        os.waitpid(pid, 0)

        assert f"'where': the executor belongs to process {os.getpid()}, this is a forked child" == said
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_start_interrupted_by_shutdown_is_clean(self, start: Start) -> None:
        """Starting and closing at once, many times, leaves nothing behind."""
        for _ in range(3):
            create_executor(self.make_config()).shutdown()
        start()

"""The contract of what a call holds: all of it is free when the call is over, without the garbage collector.

An error refers to the frames that it came through, and each of those to the one that called it. Where one of them refers to
the error, be it by way of a call or a future, all that they hold stays until a collection: arguments, and what the worker
had computed when it failed. That is the memory of a step for which there was too little, and the next one needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import GROUPS, ContractBase, Start
from exec_core.testing.sync import eventually

Way = Callable[..., Any]


def _blocking(executor: Executor, method: Any, *args: Any) -> Any:
    return executor.collective_rpc(method, 30.0, args)


def _staggered(executor: Executor, method: Any, *args: Any) -> Any:
    return executor.collective_rpc(method, 30.0, args, max_concurrent_workers=1)


def _future(executor: Executor, method: Any, *args: Any) -> Any:
    return executor.collective_rpc(method, 30.0, args, non_block=True).result(30.0)


def _future_elsewhere(executor: Executor, method: Any, *args: Any) -> Any:
    futures = [executor.collective_rpc(method, 30.0, args, non_block=True)]
    thread = threading.Thread(target=futures[0].exception, args=(30.0,))
    thread.start()
    thread.join()
    return futures.pop().result(0)  # where it is raised, nobody is to know the future


def _exception(executor: Executor, method: Any, *args: Any) -> Any:
    error = executor.collective_rpc(method, 30.0, args, non_block=True).exception(30.0)
    try:
        if error is not None:
            raise error
    finally:
        del error


def _awaited(executor: Executor, method: Any, *args: Any) -> Any:
    return asyncio.run(executor.collective_rpc_async(method, 30.0, args))


WAYS: dict[str, Way] = {
    way.__name__.strip("_"): way for way in (_blocking, _staggered, _future, _future_elsewhere, _awaited)
}


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _fails(way: str, executor: Executor, method: Any, *args: Any) -> bool:
    if way == "awaited":
        return asyncio.run(_fails_when_awaited(executor, method, *args))
    try:
        {**WAYS, "exception": _exception}[way](executor, method, *args)
    except ValueError:
        return True
    return False


async def _fails_when_awaited(executor: Executor, method: Any, *args: Any) -> bool:
    try:
        await executor.collective_rpc_async(method, 30.0, args)
    except ValueError:  # here: out of `asyncio.run` it would refer to a task that knows it
        return True
    return False


def _fails_in_the_loop(executor: Executor, request: Any, awaited: bool) -> bool:
    if awaited:
        return asyncio.run(_fails_in_the_loop_when_awaited(executor, request))
    try:
        executor.execute_model(request)
        executor.stop_remote_worker_execution_loop()
    except ValueError:
        return True
    return False


async def _fails_in_the_loop_when_awaited(executor: Executor, request: Any) -> bool:
    try:
        await executor.execute_model_async(request)
        await executor.stop_remote_worker_execution_loop_async()
    except ValueError:
        return True
    return False


class MemoryContract(ContractBase):
    """Nothing of a call outlives it."""

    def test_arguments_are_not_kept(self, executor: Executor) -> None:
        """A worker lets go of the arguments of a call that is over."""

        class Big:
            pass

        def remember(worker: Any, value: Any) -> None:
            worker.remembered = weakref.ref(value)

        def is_gone(worker: Any) -> bool:
            return worker.remembered() is None

        executor.collective_rpc(lambda worker: gc.disable())
        executor.collective_rpc(remember, args=(Big(),))
        assert [True] * len(self.world()) == executor.collective_rpc(is_gone)
        executor.collective_rpc(lambda worker: gc.enable())

    @pytest.mark.parametrize("way", WAYS)
    def test_value_goes_with_the_last_that_refers_to_it(self, executor: Executor, way: str) -> None:
        """However the call was waited for."""

        class Value:
            pass

        with _no_collection():
            values = WAYS[way](executor, lambda worker: Value())
            gone = [weakref.ref(value) for value in values]
            del values
            eventually(lambda: all(value() is None for value in gone))

    @pytest.mark.parametrize("way", [*WAYS, "exception"])
    def test_what_a_failed_call_held_goes_with_its_error(self, executor: Executor, way: str) -> None:
        """The arguments in the driver, and in the workers what they held where they failed."""

        class Big:
            pass

        def fail(worker: Any, value: Any) -> None:
            held = Big()
            worker.remembered = weakref.ref(held)
            raise ValueError

        def is_gone(worker: Any) -> bool:
            return worker.remembered() is None

        executor.collective_rpc(lambda worker: gc.disable())
        with _no_collection():
            value = Big()
            gone = weakref.ref(value)
            assert _fails(way, executor, fail, value)
            del value
            eventually(lambda: gone() is None)
            assert [True] * len(self.world()) == executor.collective_rpc(is_gone)
        executor.collective_rpc(lambda worker: gc.enable())

    @pytest.mark.parametrize("awaited", [False, True])
    def test_what_a_failed_step_held_goes_with_the_execution_loop(self, start: Start, awaited: bool) -> None:
        """The request in the driver, at the latest when the loop has ended."""

        class Big:
            pass

        class Fails(workers.EchoWorker):
            def execute_model(self, request: Any) -> Any:  # which a worker in this process must not keep
                if self.context.rank == self.context.world_size - 1:
                    raise ValueError

        executor = start(Fails, device=GROUPS)
        with _no_collection():
            executor.start_worker_execution_loop()
            request = Big()
            gone = weakref.ref(request)
            assert _fails_in_the_loop(executor, request, awaited)
            executor.stop_remote_worker_execution_loop()
            del request
            eventually(lambda: gone() is None)

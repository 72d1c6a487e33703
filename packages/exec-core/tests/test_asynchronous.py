"""Futures that are awaited: others have their turns, and whoever is gone harms nobody."""

import asyncio
import concurrent.futures
import logging
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from exec_core.asynchronous import awaited_future


def _answered(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def test_answered_futures_leave_others_their_turns() -> None:
    """A program that awaits nothing but calls which are answered at once does not keep the loop to itself."""

    async def main() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        for number in range(20):
            assert number == await awaited_future(_answered(number))
        task.cancel()
        return turns

    assert asyncio.run(main()) >= 20


def test_answer_comes_on_another_thread() -> None:
    """The loop sleeps meanwhile, and is woken."""

    async def main() -> Any:
        future: Future[Any] = Future()
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, lambda: threading.Thread(target=future.set_result, args=("answer",)).start())
        return await asyncio.wait_for(awaited_future(future), 30.0)

    assert "answer" == asyncio.run(main())


def test_cancelled_task_cancels_what_has_not_begun() -> None:
    """A call that waits for its turn need not run for a task that is gone."""
    future: Future[Any] = Future()

    async def main() -> None:
        task = asyncio.ensure_future(awaited_future(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert future.cancelled()


def test_cancelled_task_leaves_alone_what_runs() -> None:
    """Its answer comes, to nobody."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    wrong: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        task = asyncio.ensure_future(awaited_future(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        future.set_result(None)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert future.done()
    assert not future.cancelled()
    assert [] == wrong


def test_answer_for_a_loop_that_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever brings it is not disturbed."""
    future: Future[Any] = Future()
    loop = asyncio.new_event_loop()
    task = loop.create_task(awaited_future(future))
    loop.run_until_complete(asyncio.sleep(0))
    future.set_running_or_notify_cancel()
    loop.close()
    with caplog.at_level(logging.DEBUG, "concurrent.futures"):
        future.set_result(None)
    task._log_destroy_pending = False  # type: ignore[attr-defined] # that it is never run is the point
    assert [] == caplog.records


def test_error_that_is_called_cancelled_is_an_error() -> None:
    """What a worker raised keeps its type, also where the loop has another meaning for it."""
    future: Future[Any] = Future()

    async def main() -> None:
        task = asyncio.ensure_future(awaited_future(future))
        await asyncio.sleep(0)
        future.set_exception(concurrent.futures.CancelledError("the worker's"))
        with pytest.raises(concurrent.futures.CancelledError, match="the worker's"):
            await task
        assert not task.cancelled()

    asyncio.run(main())

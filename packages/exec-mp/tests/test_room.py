"""What happens when there is no room in the ring, and when the driver does not drain it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing import Gate, workers

Launch = Callable[..., ec.Executor]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A closed gate."""
    return Gate(str(tmp_path))


def test_rank_that_is_far_behind_fills_the_ring(launch: Launch, gate: Gate) -> None:
    """Calls that others run pile up behind a rank that does not read: a future is refused, the executor recovers."""
    executor = launch(2, rpc={"max_in_flight": 4, "timeout_s": None})
    held = executor.collective_rpc(workers.wait_at, args=(gate,), ranks=[0], non_block=True)
    gate.entered([0])
    sent = 0
    with pytest.raises(ec.ExecutorBusyError, match="far behind and the ring is full") as caught:
        for _ in range(100):
            executor.collective_rpc("note", 0.2, args=(("x",),), ranks=[1], non_block=True).result(30)
            sent += 1
    with pytest.raises(ec.RpcTimeoutError, match="not sent"):
        executor.collective_rpc("note", 0.05, args=(("x",),), ranks=[1])
    gate.open()

    assert [0] == held.result(30)
    assert "note" == caught.value.method
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", 30.0, args=(1,))
    assert [sent] == executor.collective_rpc(lambda worker: len(worker.entries("x")), ranks=[1])


def test_awaited_calls_wait_for_a_rank_that_is_far_behind(launch: Launch, gate: Gate) -> None:
    """An awaited call waits for room in the ring without blocking the event loop."""
    executor = launch(2, rpc={"max_in_flight": 2, "timeout_s": None})

    async def main() -> list[Any]:
        held = asyncio.ensure_future(executor.collective_rpc_async(workers.wait_at, args=(gate,), ranks=[0]))
        await asyncio.to_thread(gate.entered, [0])
        many = [asyncio.ensure_future(executor.collective_rpc_async("where", args=(n,), ranks=[1])) for n in range(30)]
        await many[0]
        gate.open()
        await held
        return await asyncio.gather(*many)

    assert [[(1, n)] for n in range(30)] == asyncio.run(main())


def test_replies_that_nobody_takes_do_not_block_the_worker(launch: Launch) -> None:
    """Far more futures than fit in the ring, taken by nobody until the end, all finish."""
    executor = launch(2, rpc={"max_in_flight": 8, "timeout_s": None})
    futures = [executor.collective_rpc("where", args=(n,), non_block=True) for n in range(300)]

    assert [[(0, n), (1, n)] for n in range(300)] == [future.result(30) for future in futures]


def test_large_messages_wait_for_memory(launch: Launch) -> None:
    """Many large arguments and results in flight go through, one behind the other."""
    executor = launch(2, rpc={"max_in_flight": 16, "timeout_s": None})
    data = bytes(3 << 20)
    futures = [
        executor.collective_rpc(lambda worker, value: value, args=(data,), non_block=True, aggregate=_lengths)
        for _ in range(24)
    ]

    assert [[len(data)] * 2] * 24 == [future.result(60) for future in futures]


def _lengths(values: list[bytes]) -> list[int]:
    return [len(value) for value in values]


def test_messages_beyond_the_limit_are_refused(launch: Launch) -> None:
    """``max_message_bytes`` refuses a request with its size and the limit; nothing is sent."""
    executor = launch(1, rpc={"max_message_bytes": 20_000})
    with pytest.raises(ec.MessageTooLargeError, match=r"RpcConfig.max_message_bytes") as caught:
        executor.collective_rpc("note", args=(bytes(30_000),), non_block=True)

    assert 20_000 == caught.value.limit
    assert [2] == executor.collective_rpc(lambda worker: len(worker.journal))


@pytest.mark.parametrize("spin_s", ["auto", 0, 0.01])
def test_any_way_of_waiting(launch: Launch, spin_s: Any) -> None:
    """Whether waiters spin or sleep, calls are answered."""
    executor = launch(2, rpc={"spin_s": spin_s})

    assert [[(0, n), (1, n)] for n in range(200)] == [executor.collective_rpc("where", args=(n,)) for n in range(200)]

"""Several ranks over NCCL, on one device: collectives, deaths within them, other worlds."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import exec_core as ec
from exec_core import ReconfigureDistributedRequest
from exec_core.testing import eventually

Launch = Callable[..., ec.Executor]

FOUR = ec.ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
TOLD_S = 5.0  # a death; NCCL's own limit is ten minutes


def test_groups_reduce_on_device_and_host(launch_shared: Launch) -> None:
    """Tensor and pipeline parallel groups and the world, each with NCCL and gloo."""
    executor = launch_shared(FOUR)
    tp, pp = ({0: 1.0, 1: 1.0, 2: 5.0, 3: 5.0}, {0: 2.0, 1: 4.0, 2: 2.0, 3: 4.0})

    assert [
        {"tp": [tp[rank]] * 2, "pp": [pp[rank]] * 2, "world": [6.0] * 2} for rank in range(4)
    ] == executor.collective_rpc("sums")


def test_groups_with_rank_0_inline(launch_shared: Launch) -> None:
    """A rank in the driver is one like the others, and leaves its groups behind it."""
    executor = launch_shared(ec.ParallelConfig(tensor_parallel_size=2, driver_worker="inline"))
    assert executor.collective_rpc("sums") == [{"tp": [1.0] * 2, "world": [1.0] * 2}] * 2


def test_execution_loop(launch_shared: Launch) -> None:
    """Requests of the loop go from driver rank to driver rank's group on the host, beside NCCL on the device."""
    executor = launch_shared(ec.ParallelConfig(tensor_parallel_size=2))
    executor.start_worker_execution_loop()
    assert [(0, number) for number in range(5)] == [executor.execute_model(number) for number in range(5)]
    executor.stop_remote_worker_execution_loop()
    assert executor.collective_rpc("sums") == [{"tp": [1.0] * 2, "world": [1.0] * 2}] * 2


@pytest.mark.parametrize("driver_worker", ["process", "inline"])
def test_death_within_a_collective_is_told(launch_shared: Launch, driver_worker: Any) -> None:
    """Ranks that wait for a dead one, on the device, do not keep the caller, rank 0 in the driver's process included.

    That process lives, and can hold a rank of another world at once.
    """
    parallel = ec.ParallelConfig(tensor_parallel_size=2, driver_worker=driver_worker)
    executor = launch_shared(parallel)
    executor.collective_rpc("sums")
    pids = executor.collective_rpc(lambda worker: os.getpid())
    killed_at = 0.0

    def kill() -> None:
        nonlocal killed_at
        killed_at = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)

    timer = threading.Timer(1.0, kill)  # by then rank 0 is inside
    timer.start()
    with pytest.raises(ec.WorkerDiedError, match=f"rank 1 \\(pid {pids[1]}\\)"):
        executor.collective_rpc("wait_for_others", args=(1,), timeout=60)
    assert time.monotonic() - killed_at < TOLD_S
    timer.join()
    began = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - began < TOLD_S

    assert launch_shared(parallel).collective_rpc("sums") == [{"tp": [1.0] * 2, "world": [1.0] * 2}] * 2
    eventually(lambda: all(thread.name != "exec-abort" for thread in threading.enumerate()))


def test_restart_after_a_death(launch_shared: Launch) -> None:
    """New processes meet anew."""
    executor = launch_shared(ec.ParallelConfig(tensor_parallel_size=2))
    os.kill(executor.collective_rpc(lambda worker: os.getpid())[1], signal.SIGKILL)
    eventually(lambda: executor.state is ec.State.FAILED)
    executor.restart()
    assert executor.collective_rpc("sums") == [{"tp": [1.0] * 2, "world": [1.0] * 2}] * 2


def test_replicas_join_one_world(launch_shared: Launch) -> None:
    """Two executors of one rank become data-parallel replicas of one world, over NCCL, and part again."""
    replicas = [launch_shared(ec.ParallelConfig()) for _ in range(2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def both(call: Callable[[int, ec.Executor], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(call, range(2), replicas))

    both(
        lambda number, executor: executor.reinitialize_distributed(
            ReconfigureDistributedRequest(
                new_data_parallel_size=2,
                new_data_parallel_rank=number,
                new_data_parallel_master_ip="127.0.0.1",
                new_data_parallel_master_port=port,
            )
        )
    )
    assert both(lambda _, executor: executor.collective_rpc("sums")) == [[{"dp": [1.0] * 2, "world": [1.0] * 2}]] * 2

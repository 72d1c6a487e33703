"""What the tests that only a CUDA device can answer share. Every executor is in a process of its own or in pytest's."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import exec_core as ec
import exec_mp
from exec_core.testing import leak_check

sys.path.insert(0, str(Path(__file__).parent))  # where workers find `shared_device`

Launch = Callable[..., ec.Executor]


@pytest.fixture(scope="session", autouse=True)
def _context() -> Iterator[None]:
    """What CUDA and NCCL open and start once in this process is here before any test looks for what is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_SOCKET_IFNAME", "lo")
        patch.setenv("NCCL_HOSTID", "driver")  # of an inline rank 0, see `launch_shared`
        patch.setenv("NCCL_RAS_ENABLE", "0")  # a thread that stays, and connects to other processes whenever it likes
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined] # public
        dist.all_reduce(torch.zeros(1, device="cuda"))
        dist.destroy_process_group()
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Fails a test that leaves a process, descriptor, thread or file behind. Only the fork server stays."""
    exec_mp.prestart()
    with leak_check():
        yield


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts executors, on one device unless told otherwise, and closes them after the test."""
    started: list[ec.Executor] = []

    def launch(**config: Any) -> ec.Executor:
        config.setdefault("worker_cls", "exec_core.testing.workers:EchoWorker")
        config.setdefault("device", ec.DeviceConfig(device="cuda"))
        started.append(ec.create_executor(ec.ExecutorConfig(**config)))
        return started[-1]

    yield launch
    for executor in started:
        executor.shutdown()


@pytest.fixture
def launch_shared(launch: Launch) -> Launch:
    """Starts executors whose ranks share the device, over NCCL: it lets ranks of different hosts do so."""
    hosts = itertools.count()

    def launch_shared(parallel: ec.ParallelConfig, **config: Any) -> ec.Executor:
        return launch(
            worker_cls="shared_device:SharedDeviceWorker",
            parallel=parallel,
            device=ec.DeviceConfig(device="none"),
            worker_env=tuple({"NCCL_HOSTID": f"host-{next(hosts)}"} for _ in range(parallel.world_size)),
            **config,
        )

    return launch_shared


@pytest.fixture
def free_bytes() -> Callable[[], int]:
    """Asks the driver how much of the device's memory nobody holds."""

    def free_bytes() -> int:
        query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20

    return free_bytes

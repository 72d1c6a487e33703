"""What the tests that only a CUDA device can answer share. Every executor is in a process of its own or in pytest's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import exec_core as ec
import exec_mp
from exec_core.testing import leak_check

sys.path.insert(0, str(Path(__file__).parent))  # where workers find `shared_device`

Launch = Callable[..., ec.Executor]


@pytest.fixture(scope="session", autouse=True)
def _context() -> None:
    """What CUDA opens and starts in this process is here before any test looks for what is left behind."""
    torch.zeros(1, device="cuda")


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
def launch_shared(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Starts executors whose ranks share the device, over NCCL: it lets ranks of different hosts do so."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_HOSTID", "rank-0")  # of an inline rank 0

    def launch_shared(parallel: ec.ParallelConfig, **config: Any) -> ec.Executor:
        return launch(
            worker_cls="shared_device:SharedDeviceWorker",
            parallel=parallel,
            device=ec.DeviceConfig(device="none"),
            worker_env=tuple({"NCCL_HOSTID": f"rank-{rank}"} for rank in range(parallel.world_size)),
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

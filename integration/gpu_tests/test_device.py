"""One rank on one device: what it is given, what it costs others, and what becomes of what goes wrong on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import torch

import exec_core as ec
from exec_core import affinity
from exec_core.testing import eventually

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

Launch = Callable[..., ec.Executor]

BACKENDS: dict[str, dict[str, Any]] = {
    "uniproc": {"backend": "uniproc"},
    "inline": {"parallel": ec.ParallelConfig(driver_worker="inline")},
    "mp": {},
}
HELD_BYTES = 4 << 30


def hold(worker: Any, nbytes: int = HELD_BYTES) -> int:
    """Takes that much of the device's memory, for as long as the worker lives."""
    worker.itself = worker  # as a model may be part of a cycle
    worker.held = torch.ones(nbytes, dtype=torch.uint8, device=worker.context.device)
    torch.cuda.synchronize()
    return os.getpid()


def add_one(worker: Any, value: torch.Tensor) -> torch.Tensor:
    """``value`` plus one, computed on the device and returned from there."""
    return value.to(worker.context.device) + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_worker_computes_on_its_device(launch: Launch, backend: str) -> None:
    """``auto`` is the device where there is one, and every backend selects it."""
    executor = launch(device=ec.DeviceConfig(), **BACKENDS[backend])

    def where(worker: Any) -> tuple[str, int, float]:
        product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
        return str(worker.context.device), torch.cuda.current_device(), float(product[0, 0])

    assert executor.collective_rpc(where) == [("cuda:0", 0, 64.0)]
    assert torch.equal(torch.full((3,), 2.0), executor.collective_rpc(add_one, args=(torch.ones(3),))[0].cpu())


def test_device_is_given_by_its_uuid(launch: Launch) -> None:
    """A worker sees the device that ``device_ids`` names, under the number of its local rank."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    executor = launch(device=ec.DeviceConfig(device_ids=(uuid,)))
    seen = executor.collective_rpc(
        lambda worker: (
            os.environ["CUDA_VISIBLE_DEVICES"],
            f"GPU-{torch.cuda.get_device_properties(worker.context.device).uuid}",
        )
    )

    assert [(uuid, uuid)] == seen


def test_too_few_devices_are_an_error() -> None:
    """It says how many are needed and how many there are, and starts nobody."""
    config = ec.ExecutorConfig(
        worker_cls="exec_core.testing.workers:EchoWorker", parallel=ec.ParallelConfig(tensor_parallel_size=64)
    )
    with pytest.raises(ec.DeviceError, match="tensor_parallel_size=64 needs as many CUDA devices") as caught:
        ec.create_executor(config)

    assert (64, torch.cuda.device_count()) == (caught.value.requested, caught.value.found)


FORKED = """
import os, sys, torch
import exec_core as ec

torch.zeros(1, device="cuda")
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    ec.create_executor(ec.ExecutorConfig(worker_cls="exec_core.testing.workers:EchoWorker", backend="uniproc"))
except Exception as error:
    print(repr(error), flush=True)
os._exit(0)
"""


def test_forked_driver_is_refused_a_worker_in_its_process() -> None:
    """CUDA does not work there, and ``auto`` is not the CPU for that."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=120, check=False
    )
    assert "was forked from one that had" in done.stdout, done.stderr


PROGRAM = """
import os, sys
import exec_core as ec

if __name__ == "__main__":
    sys.path.insert(0, {directory!r})
    from test_device import hold
    config = ec.ExecutorConfig(
        worker_cls="exec_core.testing.workers:EchoWorker", device=ec.DeviceConfig(device="cuda", cpu_affinity="auto")
    )
    executor = ec.create_executor(config)
    print(*executor.collective_rpc(hold), flush=True)
    sys.stdin.read()
    executor.shutdown()
"""


def start_program() -> subprocess.Popen[str]:
    """A driver whose worker holds memory of the device; it waits for the end of its input."""
    program = PROGRAM.format(directory=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def devices_open(pid: int) -> list[str]:
    """Which device files of the CUDA driver a process has open, or mapped."""
    opened = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.exists() or path.is_symlink()]
    return sorted({path for path in opened if path.startswith("/dev/nvidia")})


def test_only_the_worker_has_a_context() -> None:
    """Neither the driver nor the fork server has opened the device, although devices were counted and their places asked."""
    with start_program() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        (server,) = {child.pid for child in psutil.Process(process.pid).children(recursive=True)} - {worker}
        opened = {name: devices_open(pid) for name, pid in (("driver", process.pid), ("server", server))}
        in_worker = devices_open(worker)
        process.stdin.close()
    assert opened == {"driver": [], "server": []}
    assert in_worker
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_memory_is_free_after_the_driver_is_killed(free_bytes: Callable[[], int], number: int) -> None:
    """No orphan holds the device's memory."""
    before = free_bytes()
    with start_program() as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert before - free_bytes() >= HELD_BYTES
        process.send_signal(number)
    assert -number == process.returncode
    eventually(lambda: free_bytes() > before - HELD_BYTES // 4, every_s=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_free_after_shutdown(launch: Launch, free_bytes: Callable[[], int], backend: str) -> None:
    """At once: the worker's process has ended when ``shutdown`` returns, or torch has given back what it kept of it."""
    before = free_bytes()
    executor = launch(**BACKENDS[backend])
    executor.collective_rpc(hold)
    assert before - free_bytes() >= HELD_BYTES
    executor.shutdown()

    assert free_bytes() > before - HELD_BYTES // 4


def test_out_of_memory_is_told_and_survived(launch: Launch) -> None:
    """The error is torch's own, with its rank and traceback; the next call finds the worker as it was."""
    executor = launch()
    (pid,) = executor.collective_rpc(hold)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        executor.collective_rpc(hold, args=(1 << 50,))

    assert f"rank 0 (pid {pid}) in hold" in caught.value.__notes__
    assert [pid] == executor.collective_rpc(hold)
    executor.check_health()


def test_kernel_that_fails_is_told_and_a_restart_mends_it(launch: Launch) -> None:
    """A device-side assertion breaks the context for good: the caller gets CUDA's error, and the rank leaves."""
    executor = launch()

    def index(worker: Any, number: int) -> float:
        table = torch.arange(10.0, device=worker.context.device)
        return float(table[torch.tensor([number], device=worker.context.device)][0])

    assert executor.collective_rpc(index, args=(7,)) == [7.0]
    (pid,) = executor.collective_rpc(lambda worker: os.getpid())
    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        executor.collective_rpc(index, args=(1 << 20,))
    assert any(note.startswith(f"rank 0 (pid {pid}) in ") for note in caught.value.__notes__)
    eventually(lambda: executor.state is ec.State.FAILED)
    with pytest.raises(ec.ExecutorFailedError) as failed:
        executor.collective_rpc(index, args=(7,))
    assert "rank 0 leaves: CUDA refuses it everything from now on, after " in str(failed.value.__cause__)
    executor.restart()
    assert executor.collective_rpc(index, args=(7,)) == [7.0]


def test_kernel_that_hangs_is_told_and_ended(launch: Launch, free_bytes: Callable[[], int]) -> None:
    """The time-out says where the rank waits; ``shutdown`` ends it, and its memory is free."""
    before = free_bytes()
    executor = launch(rpc=ec.RpcConfig(shutdown_timeout_s=2.0))
    executor.collective_rpc(hold)

    def hang(_worker: Any) -> None:
        torch.cuda._sleep(1 << 50)  # type: ignore[no-untyped-call] # noqa: SLF001 # cycles: days
        wait_for_kernel()

    def wait_for_kernel() -> None:
        torch.cuda.synchronize()

    with pytest.raises(ec.RpcTimeoutError) as caught:
        executor.collective_rpc(hang, 1.0)
    assert "wait_for_kernel" in str(caught.value)
    started = time.monotonic()
    executor.shutdown()

    assert time.monotonic() - started < 10
    eventually(lambda: free_bytes() > before - HELD_BYTES // 4, every_s=0.05)


class Output:
    """The end of a step: what the device computes is copied while the worker goes on."""

    def __init__(self, computed: torch.Tensor) -> None:
        self._host = torch.empty(computed.shape, pin_memory=True)
        self._host.copy_(computed, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def get_output(self) -> Any:
        """The values, and the device of the thread that has waited for them."""
        self._copied.synchronize()
        return self._host.tolist(), torch.cuda.current_device()


def test_outputs_end_on_another_thread(launch: Launch) -> None:
    """Steps are sent ahead; each output belongs to its step."""
    executor = launch()

    def step(worker: Any, number: int) -> Output:
        return Output(torch.full((4,), float(number), device=worker.context.device) * 2)

    futures = [executor.collective_rpc(step, args=(number,), non_block=True) for number in range(20)]
    assert [[([2.0 * number] * 4, 0)] for number in range(20)] == [future.result(60) for future in futures]


def test_cores_are_near_the_device(launch: Launch) -> None:
    """``cpu_affinity="auto"``: the cores that the kernel calls local to the device's PCI address."""
    executor = launch(device=ec.DeviceConfig(device="cuda", cpu_affinity="auto"))
    found: Any = torch.cuda.get_device_properties(0)
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    listed = Path(affinity.PCI_DEVICES, address, "local_cpulist")
    near = affinity.parse_cpulist(listed.read_text()) if listed.exists() else frozenset()

    (cores,) = executor.collective_rpc(lambda worker: os.sched_getaffinity(0))
    assert cores == (near & os.sched_getaffinity(0) or os.sched_getaffinity(0))


def test_profile_has_kernels(launch: Launch) -> None:
    """A profile counts the device's time, too."""
    executor = launch()
    executor.collective_rpc(add_one, args=(torch.ones(1000),))
    executor.collective_rpc("start_profile")
    executor.collective_rpc(add_one, args=(torch.ones(1000),))
    (table,) = executor.collective_rpc("stop_profile")

    assert "aten::add" in table
    assert "CUDA time total" in table

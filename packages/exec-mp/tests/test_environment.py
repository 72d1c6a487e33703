"""What a worker process starts with: its variables, threads, cores and devices."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest

import exec_core as ec
import exec_mp.executor
from exec_core import affinity, devices

Launch = Callable[..., ec.Executor]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


def torch_threads(worker: Any) -> int:
    """Threads that torch would compute with."""
    import torch

    return torch.get_num_threads()


def test_variable_that_torch_reads_on_import(launch: Launch) -> None:
    """A worker whose environment has OMP_NUM_THREADS gets a fresh interpreter, in which it counts; the others do not."""

    def seen(worker: Any) -> tuple[str | None, list[str]]:
        with open("/proc/self/cmdline", "rb") as file:
            return os.environ.get("OMP_NUM_THREADS"), file.read().decode().split("\0")

    device = ec.DeviceConfig(device="cpu", distributed_backend="none")  # which sets no number of threads itself
    executor = launch(2, worker_env=({"OMP_NUM_THREADS": "3"}, {"OTHER": "1"}), device=device)
    (set_to, command), (_, forked) = executor.collective_rpc(seen)

    assert "3" == set_to
    assert any("exec_mp._boot import run" in part for part in command)
    assert not any("exec_mp._boot import run" in part for part in forked)


def test_threads_setting_has_the_last_word(launch: Launch) -> None:
    """``threads_per_worker`` wins over OMP_NUM_THREADS, which counts where it is not set."""
    device = ec.DeviceConfig(device="cpu", distributed_backend="none")
    environment_only = launch(1, worker_env={"OMP_NUM_THREADS": "2"}, device=device)
    both = launch(1, worker_env={"OMP_NUM_THREADS": "2"})

    assert [2] == environment_only.collective_rpc(torch_threads)
    assert [1] == both.collective_rpc(torch_threads)


def test_spawned_workers(launch: Launch) -> None:
    """With ``start_method="spawn"`` every worker is a fresh interpreter, and everything else is as ever."""
    executor = launch(2, gloo=True, rpc={"start_method": "spawn"})

    def command(worker: Any) -> bytes:
        with open("/proc/self/cmdline", "rb") as file:
            return file.read()

    assert [True, True] == [b"exec_mp._boot" in line for line in executor.collective_rpc(command)]
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))
    assert (0, "r") == executor.execute_model("r")


def test_worker_without_groups_does_not_import_torch(launch: Launch) -> None:
    """Without a process group a worker that does not need torch does not pay for it."""
    executor = launch(1, rpc={"start_method": "spawn"})

    assert [False] == executor.collective_rpc(lambda worker: "torch" in __import__("sys").modules)


def test_threads_are_shared_out(launch: Launch) -> None:
    """Without a setting the cores are shared out over the ranks, and the host's own threads stay as they are."""
    import torch

    before = torch.get_num_threads()
    executor = launch(2, device=ec.DeviceConfig(device="cpu", distributed_backend="none"))
    expected = devices.threads_per_worker(ec.DeviceConfig(), 2, os.environ)

    assert [expected, expected] == executor.collective_rpc(torch_threads)
    assert before == torch.get_num_threads()


def test_cores_are_pinned_when_asked_for(launch: Launch) -> None:
    """``cpu_affinity="auto"`` gives each rank its own cores; by default a rank has all that the driver has."""
    pinned = launch(2, device=ec.DeviceConfig(device="cpu", distributed_backend="none", cpu_affinity="auto"))
    free = launch(2)

    expected = affinity.cores_of_ranks(devices.Placement("cpu"), 2)
    assert list(expected) == pinned.collective_rpc(lambda worker: os.sched_getaffinity(0))
    assert [os.sched_getaffinity(0)] * 2 == free.collective_rpc(lambda worker: os.sched_getaffinity(0))


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four CUDA devices, as far as counting goes."""
    monkeypatch.setattr(exec_mp.executor, "_count", lambda session, deadline: 4)


def deviceless() -> Any:
    """A worker class that leaves the devices alone, since there are none; it travels by value."""

    class Deviceless(ec.Worker):
        def init_device(self) -> None:
            """Nothing to initialise."""

        def seen(self) -> tuple[str | None, str | None, int]:
            return os.environ.get("CUDA_VISIBLE_DEVICES"), self.context.device_name, self.context.local_rank

    return Deviceless


@pytest.mark.usefixtures("four_devices")
class TestDevices:
    """Workers see the devices of their executor, in the order of their ranks."""

    def test_first_devices_by_default(self, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
        """Unset, CUDA_VISIBLE_DEVICES names the first devices in every worker, and stays unset in the host."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        executor = launch(2, deviceless(), device=ec.DeviceConfig(device="cuda"))

        assert [("0,1", "cuda:0", 0), ("0,1", "cuda:1", 1)] == executor.collective_rpc("seen")
        assert "CUDA_VISIBLE_DEVICES" not in os.environ

    def test_devices_of_the_environment(self, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the environment chooses devices, those are taken in its order."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,MIG-bb,5,7")
        executor = launch(2, deviceless(), device=ec.DeviceConfig(device="cuda", device_ids=(1, "GPU-aa")))

        assert [("MIG-bb,GPU-aa", "cuda:0", 0), ("MIG-bb,GPU-aa", "cuda:1", 1)] == executor.collective_rpc("seen")
        assert "GPU-aa,MIG-bb,5,7" == os.environ["CUDA_VISIBLE_DEVICES"]

    def test_auto_takes_them(self, launch: Launch) -> None:
        """``auto`` is cuda where there are devices."""
        (seen,) = launch(1, deviceless(), device=ec.DeviceConfig()).collective_rpc("seen")

        assert "cuda:0" == seen[1]

    def test_too_few(self, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
        """More ranks than devices is refused before any worker starts, and says what hides the others."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        with pytest.raises(ec.DeviceError, match=r"tensor_parallel_size=5 .*5 requested, 4 found") as caught:
            launch(5, deviceless(), device=ec.DeviceConfig(device="cuda"))

        error = caught.value
        assert (5, 4, "CUDA_VISIBLE_DEVICES=0,1,2,3") == (error.requested, error.found, error.hidden_by)

    def test_cpu_is_asked_for(self, launch: Launch) -> None:
        """On cpu the devices are left alone."""
        (seen,) = launch(1, deviceless()).collective_rpc("seen")

        assert ("cpu", 0) == seen[1:]


def test_devices_are_counted_in_a_child(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    """Counting runs in a fork of the server: the driver makes no CUDA context, and neither does the server."""
    monkeypatch.setattr(devices, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(devices, "COUNT_PROGRAM", "import os; print('noise'); print(os.getppid() % 2 + 2)")
    executor = launch(2, deviceless(), device=ec.DeviceConfig())

    assert ["cuda:0", "cuda:1"] == [device for _, device, _ in executor.collective_rpc("seen")]


def test_no_port_is_opened(launch: Launch) -> None:
    """The ranks meet in shared memory: nothing of ours listens, beyond this machine least of all."""
    executor = launch(2, gloo=True)

    def listening(worker: Any) -> list[str]:
        with open("/proc/self/net/tcp", encoding="ascii") as four, open("/proc/self/net/tcp6", encoding="ascii") as six:
            lines = [line.split() for line in (*four, *six)]
        mine = set()
        for fd in os.listdir("/proc/self/fd"):
            try:
                mine.add(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                continue
        return [line[1] for line in lines if "0A" == line[3] and f"socket:[{line[9]}]" in mine]

    addresses = {address for of_rank in executor.collective_rpc(listening) for address in of_rank}

    assert all(re.fullmatch(r"0100007F:[0-9A-F]{4}|0{24}01000000:[0-9A-F]{4}", address) for address in addresses)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_timed_waits_of_workers_are_precise(launch: Launch, start_method: str) -> None:
    """A worker's timers are due within a microsecond, however it was started."""

    def slack(worker: Any) -> str:
        with open("/proc/self/timerslack_ns", encoding="ascii") as file:
            return file.read()

    assert ["1000\n"] == launch(1, rpc={"start_method": start_method}).collective_rpc(slack)


def slacks_of_gloo() -> list[str]:
    """By how many ns the threads of gloo's in this process may be late."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/comm", encoding="utf-8") as file:
            is_gloo = file.read() == "gloo_tcp_loop\n"
        if is_gloo:
            try:
                with open(f"/proc/{thread}/timerslack_ns", encoding="ascii") as file:
                    found.append(file.read().strip())
            except PermissionError:
                found.append("may not be seen")
    return found


def where_allowed(slack_ns: str) -> set[str]:
    """What is seen where this process may look at other threads (CAP_SYS_NICE), and where it may not."""
    with open("/proc/self/status", encoding="ascii") as file:
        (effective,) = (line.split()[1] for line in file if line.startswith("CapEff:"))
    return {slack_ns if int(effective, 16) >> 23 & 1 else "may not be seen"}


def test_threads_of_gloo_doze(launch: Launch) -> None:
    """They wake each worker up a few times a second instead of fifty times, where the system lets it say so."""
    for slacks in launch(2, gloo=True).collective_rpc(lambda worker: slacks_of_gloo()):
        assert where_allowed("290000000") == set(slacks)


def test_threads_of_gloo_are_roused_before_a_world_is_left(launch: Launch) -> None:
    """Leaving waits for each of them once per peer, which takes as long as they may be late."""

    def leave(worker: Any) -> list[str]:
        import torch.distributed as dist

        found, destroy = [], dist.destroy_process_group

        def destroyed(*args: Any) -> None:
            found.extend(slacks_of_gloo())
            destroy(*args)

        vars(dist)["destroy_process_group"] = destroyed
        worker.context.leave()
        return found

    for slacks in launch(2, gloo=True).collective_rpc(leave):
        assert where_allowed("10000000") == set(slacks)

"""Which rank gets which device, with counts and environments that no machine need have."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from exec_core import ConfigError, DeviceConfig, DeviceError, ParallelConfig, devices
from exec_core.devices import Placement


def place(found: int, device: DeviceConfig, tp: int = 1, pp: int = 1, env: dict[str, str] | None = None) -> Placement:
    """The placement of all ranks on a machine where ``found`` devices are visible."""
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    return devices.place(device, parallel, tp * pp, count=lambda: found, env=env or {})


def never() -> int:
    """A count that must not be asked for."""
    raise AssertionError("counted")


def test_cpu_counts_nothing() -> None:
    """On cpu, and where the worker handles devices itself, nobody counts devices."""
    for name in ("cpu", "none"):
        placement = devices.place(DeviceConfig(device=name), ParallelConfig(), 1, count=never, env={})
        assert (name, (), {}) == (placement.kind, placement.ids, placement.env())


def test_auto_is_cuda_when_there_is_one() -> None:
    """``auto`` is cuda where a device is visible, and cpu where none is."""
    assert ("cuda", "cpu") == (place(1, DeviceConfig()).kind, place(0, DeviceConfig()).kind)


def test_cuda_is_not_quietly_cpu() -> None:
    """``cuda`` on a machine without a device is an error that says what there is."""
    with pytest.raises(DeviceError, match="1 requested, 0 found"):
        place(0, DeviceConfig(device="cuda"))


def test_first_devices_are_taken() -> None:
    """Without ids each rank gets the next visible device, and a worker sees exactly those of its executor."""
    placement = place(8, DeviceConfig(device="cuda"), tp=2)

    assert ({"CUDA_VISIBLE_DEVICES": "0,1"}, (0, 1)) == (placement.env(), placement.indices)


def test_visible_devices_are_counted_from_zero() -> None:
    """Where the environment already hides devices, an index counts those that are visible."""
    placement = place(2, DeviceConfig(device="cuda", device_ids=(1, 0)), tp=2, env={"CUDA_VISIBLE_DEVICES": "5, 7"})

    assert (("7", "5"), (1, 0)) == (placement.ids, placement.indices)


UUID = "GPU-8a5c0f3e-1234"
MIG = "MIG-7d1e0000-5678"


@pytest.mark.parametrize("ids", [(UUID, MIG), ("MIG-GPU-5/1/0", UUID), ("00000000:3B:00.0", "07")])
def test_names_are_never_parsed(ids: Sequence[Any]) -> None:
    """UUIDs and MIG names reach the workers as they were given."""
    placement = place(2, DeviceConfig(device="cuda", device_ids=tuple(ids)), tp=2)

    assert ({"CUDA_VISIBLE_DEVICES": ",".join(ids)}, (None, None)) == (placement.env(), placement.indices)


def test_names_in_the_environment_are_never_parsed() -> None:
    """Names in the environment stay names: an index picks one of them."""
    env = {"CUDA_VISIBLE_DEVICES": f"{UUID},{MIG}"}

    assert (UUID, MIG) == place(2, DeviceConfig(device="cuda"), tp=2, env=env).ids
    assert (MIG,) == place(2, DeviceConfig(device="cuda", device_ids=(1,)), env=env).ids
    named = place(2, DeviceConfig(device="cuda", device_ids=(MIG,)), env=env)
    assert ((MIG,), (1,)) == (named.ids, named.indices)


def test_too_few_devices_for_tensor_parallelism() -> None:
    """The common case, tensor parallelism only, is named; what hides devices is said."""
    with pytest.raises(DeviceError) as caught:
        place(1, DeviceConfig(device="cuda"), tp=4, env={"CUDA_VISIBLE_DEVICES": "3"})

    error = caught.value
    assert (4, 1, "CUDA_VISIBLE_DEVICES=3") == (error.requested, error.found, error.hidden_by)
    assert str(error).startswith(
        "tensor_parallel_size=4 needs as many CUDA devices on this machine: 4 requested, 1 found"
    )
    assert "CUDA_VISIBLE_DEVICES=3 hides the others" in str(error)
    assert "device='cpu'" in str(error)


def test_too_few_devices_for_both_kinds() -> None:
    """With stages too, both sizes are named, and nothing is said to hide devices where nothing does."""
    with pytest.raises(DeviceError) as caught:
        place(2, DeviceConfig(device="auto"), tp=2, pp=3)

    assert (6, 2, None) == (caught.value.requested, caught.value.found, caught.value.hidden_by)
    assert "tensor_parallel_size=2 x pipeline_parallel_size=3 needs 6 CUDA devices" in str(caught.value)
    assert "hides" not in str(caught.value)


def test_one_id_for_each_rank() -> None:
    """As many ids as ranks, no more and no fewer."""
    with pytest.raises(ConfigError, match=r"DeviceConfig.device_ids must have one id for each of 2 ranks"):
        place(8, DeviceConfig(device="cuda", device_ids=(0,)), tp=2)


def test_index_beyond_the_visible_devices() -> None:
    """An index that no visible device has is an error, not the next device."""
    with pytest.raises(DeviceError, match="device_ids names index 3"):
        place(2, DeviceConfig(device="cuda", device_ids=(3,)))


def test_counting_in_a_child_gives_a_number() -> None:
    """Devices are counted in a child process; without a driver there is nothing to count."""
    if not devices.has_cuda_driver():
        assert 0 == devices.count_cuda_devices()
    else:
        assert devices.count_cuda_devices() >= 0


def test_count_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that cannot count is an error with its last line, never zero devices."""
    monkeypatch.setattr(devices, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(devices, "COUNT_PROGRAM", "raise SystemExit('driver too old')")
    with pytest.raises(DeviceError, match="driver too old"):
        devices.count_cuda_devices()


def test_count_is_the_last_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the child prints, the count is its last number."""
    monkeypatch.setattr(devices, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(devices, "COUNT_PROGRAM", "print('a warning'); print(7)")

    assert 7 == devices.count_cuda_devices()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes torch find that many devices."""

    def pretend(found: int) -> None:
        monkeypatch.setattr(devices, "has_cuda_driver", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: found)

    return pretend


@pytest.mark.parametrize("found", [3, 0])
def test_counting_in_this_process(cuda: Callable[[int], None], found: int) -> None:
    """As many as torch finds."""
    cuda(found)
    assert found == devices.count_in_this_process()


@pytest.mark.parametrize("told", [2, 0])
def test_forked_process_has_no_devices_of_its_own(
    cuda: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    """CUDA refuses it all, whatever torch remembers: that is an error, and no reason to compute on the CPU."""
    cuda(told)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(DeviceError, match=r"was forked from one that had.*'spawn', or use backend 'mp'"):
        devices.place(DeviceConfig(), ParallelConfig(), 1, count=devices.count_in_this_process)


@pytest.mark.parametrize(
    ("configured", "env", "expected"),
    [(3, {"OMP_NUM_THREADS": "5"}, 3), (None, {"OMP_NUM_THREADS": "5"}, 5), (None, {"OMP_NUM_THREADS": "a"}, None)],
)
def test_threads(configured: int | None, env: dict[str, str], expected: int | None) -> None:
    """CPU threads are as configured, else as OMP_NUM_THREADS says, else the cores shared out."""
    shared = max(1, len(os.sched_getaffinity(0)) // 2)

    assert (expected or shared) == devices.threads_per_worker(DeviceConfig(threads_per_worker=configured), 2, env)


def test_more_ranks_than_cores_get_a_thread_each() -> None:
    """Every rank has a thread at least."""
    assert 1 == devices.threads_per_worker(DeviceConfig(), 10_000, {})

"""Devices: what is there, and which rank gets which. Nothing here creates a CUDA context in this process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import attrs

from exec_core.config import DeviceConfig, ParallelConfig
from exec_core.errors import ConfigError, DeviceError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu")
COUNT_PROGRAM = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def has_cuda_driver() -> bool:
    """Whether a CUDA driver's device files exist: where they do not, nothing needs counting."""
    return any(map(os.path.exists, _DRIVER_FILES))


def count_cuda_devices() -> int:
    """CUDA devices that a worker started now would see, counted in a child process."""
    if not has_cuda_driver():
        return 0
    done = subprocess.run(
        [sys.executable, "-P", "-c", COUNT_PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    numbers = re.findall(r"^\d+$", done.stdout, re.MULTILINE)
    if done.returncode or not numbers:
        raise DeviceError(
            f"CUDA devices cannot be counted ({done.stderr.strip().splitlines()[-1:] or 'no output'})",
            requested=1, found=0, hidden_by=_hidden_by(os.environ),
            remedy="check the driver with nvidia-smi, or device='cpu'",
        )  # fmt: skip
    return int(numbers[-1])


def count_in_this_process() -> int:
    """CUDA devices that this process sees, for a worker that runs in it: torch may be loaded and CUDA be used here.

    Raises:
        DeviceError: CUDA refuses this process, whatever there is, as it does after a fork.
    """
    if not has_cuda_driver():
        return 0
    import torch

    # Asked first: there torch may go on telling the number that it knew before the fork.
    if torch.cuda._is_in_bad_fork():  # noqa: SLF001 # else only a failure would say so, and not before the worker's
        raise DeviceError(
            "this process cannot use CUDA, since it was forked from one that had", 1, 0, None,
            "start it with the method 'spawn', or use backend 'mp': its workers are not forked from this process",
        )  # fmt: skip
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@attrs.frozen
class Placement:
    """Where the ranks of this machine run.

    Attributes:
        kind: ``cuda``, ``cpu`` or ``none``.
        ids: one device id per local rank as `CUDA_VISIBLE_DEVICES` wants it (empty unless cuda).
        indices: the same devices as indices into what the driver process sees (None for one given by name).
    """

    kind: str
    ids: tuple[str, ...] = ()
    indices: tuple[int | None, ...] = ()

    def env(self) -> dict[str, str]:
        """Environment of a worker process: it sees this executor's devices, and its local rank is its index."""
        return {VISIBLE: ",".join(self.ids)} if self.kind == "cuda" else {}


def place(
    device: DeviceConfig,
    parallel: ParallelConfig,
    local_size: int,
    *,
    count: Callable[[], int],
    env: Mapping[str, str] | None = None,
) -> Placement:
    """Chooses a device for each of ``local_size`` ranks of this machine.

    Args:
        count: counts the visible CUDA devices.
        env: the environment that the workers will start from; default: this process's.

    Raises:
        DeviceError: when there are fewer devices than ranks.
        ConfigError: when ``device_ids`` does not have one id per local rank.
    """
    env = os.environ if env is None else env
    if device.device == "none":
        return Placement("none")
    if device.device == "cpu":
        return Placement("cpu")
    if device.device_ids is not None and len(device.device_ids) != local_size:
        raise ConfigError(
            "DeviceConfig.device_ids", f"must have one id for each of {local_size} ranks", device.device_ids
        )
    found = count()
    if device.device == "auto" and found == 0 and device.device_ids is None:
        return Placement("cpu")
    if found < local_size:
        raise DeviceError(
            _what(parallel, local_size), local_size, found, _hidden_by(env),
            "lower the parallel sizes, make more devices visible, or use device='cpu'",
        )  # fmt: skip
    return _choose(device.device_ids or tuple(range(local_size)), visible_ids(env), found, env)


def visible_ids(env: Mapping[str, str]) -> tuple[str, ...] | None:
    """The entries of `CUDA_VISIBLE_DEVICES`, never parsed as numbers; None when it is unset."""
    value = env.get(VISIBLE)
    return None if value is None else tuple(entry.strip() for entry in value.split(",") if entry.strip())


def _choose(
    wanted: Sequence[int | str], visible: tuple[str, ...] | None, found: int, env: Mapping[str, str]
) -> Placement:
    ids, indices = [], []
    for device_id in wanted:
        index = device_id if isinstance(device_id, int) else None
        if index is None and visible and device_id in visible:
            index = visible.index(str(device_id))
        if index is not None and index >= found:
            raise DeviceError(
                f"device_ids names index {index}", index + 1, found, _hidden_by(env),
                "an index counts the visible devices, from 0",
            )  # fmt: skip
        ids.append(visible[index] if visible and index is not None else str(device_id))
        indices.append(index)
    return Placement("cuda", tuple(ids), tuple(indices))


def _what(parallel: ParallelConfig, local_size: int) -> str:
    if local_size == parallel.tensor_parallel_size:
        return f"tensor_parallel_size={local_size} needs as many CUDA devices on this machine"
    return (
        f"tensor_parallel_size={parallel.tensor_parallel_size} x "
        f"pipeline_parallel_size={parallel.pipeline_parallel_size} "
        f"needs {local_size} CUDA devices on this machine"
    )


def _hidden_by(env: Mapping[str, str]) -> str | None:
    return f"{VISIBLE}={env[VISIBLE]}" if VISIBLE in env else None


def threads_per_worker(device: DeviceConfig, local_size: int, env: Mapping[str, str]) -> int:
    """CPU threads of each of ``local_size`` workers: as configured, as OMP_NUM_THREADS says, or its share of cores."""
    if device.threads_per_worker is not None:
        return device.threads_per_worker
    omp = env.get("OMP_NUM_THREADS", "")
    if omp.isdigit() and int(omp) > 0:
        return int(omp)
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def index_in_this_process(placement: Placement, local_rank: int) -> int:
    """The CUDA index, in this process, of a rank that runs in the driver, whose own environment stays as it is."""
    index = placement.indices[local_rank]
    if index is not None:
        return index
    import torch

    wanted = placement.ids[local_rank].removeprefix("GPU-")
    for number in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(number).uuid).startswith(wanted):
            return number
    raise DeviceError(
        f"device {placement.ids[local_rank]} is not visible in the driver", 1, 0, _hidden_by(os.environ),
        "name one of the visible devices in device_ids",
    )  # fmt: skip

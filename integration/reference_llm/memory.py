"""How much memory the KV cache of one rank may take, and how much a process has taken at its peak."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a number of this size


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that processes of this machine and this control group may still take.

    The smaller of what the kernel calls available and what the control groups above this process leave. Page cache that
    is not in use counts as free: the kernel drops it first.
    """
    meminfo = (root / "proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    available = int(found[1]) * 1024 if found else 0
    return min([available, *_cgroup_rooms(root)])


def _cgroup_rooms(root: Path) -> list[int]:
    """What each control group with a limit leaves, from this process's own up to the root."""
    rooms = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / path.lstrip("/")
        # In a container the path may be the host's: then the mount itself is this container's group.
        groups = [own, *own.parents] if own.exists() else [base]
        rooms += [room for group in groups if group.is_relative_to(base) and (room := _room(group, *names)) is not None]
    return rooms


def _room(group: Path, limit_name: str, usage_name: str, cache_key: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        cache = re.search(rf"^{cache_key} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    return max(0, int(limit) - usage + (int(cache[1]) if cache else 0))


def available_cuda_bytes(device: torch.device, utilization: float) -> int:
    """Bytes of ``device`` that are left for the cache, after a profiling run, within a share of its memory.

    Counts what torch took at its peak and what others hold now (other processes, CUDA itself, NCCL).
    """
    free, total = torch.cuda.mem_get_info(device)
    held_elsewhere = total - free - torch.cuda.memory_reserved(device)
    return int(total * utilization) - held_elsewhere - torch.cuda.max_memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since `reset_peak`: of the device, or of the host where that is the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def reset_peak(device: torch.device) -> int:
    """Starts measuring the peak anew; returns it, which is what the process holds now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # What the allocator has kept would hide new allocations: they would be made there.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)

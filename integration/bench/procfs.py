"""What processes cost, read from /proc: processor time, memory, descriptors."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """``root`` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                children.setdefault(int(_stat(int(name))[1]), []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the command's name: state, ppid, ..."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time of all threads of these processes and of the children that they have waited for.

    Of the processes themselves it comes from their CPU clocks, in ns: /proc counts in ticks of 10 ms.
    """
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            total += time.clock_gettime(~pid << 3 | 2)  # the process's clock, see clock_getcpuclockid(3)
            total += sum(map(int, _stat(pid)[13:15])) * _TICK_S
    return total


def machine_cpu_seconds() -> tuple[float, float]:
    """Processor time since this machine started: of everything on it, and what its host gave to other machines instead."""
    line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq, stolen, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq) * _TICK_S, stolen * _TICK_S


@dataclass(frozen=True)
class Held:
    """What processes hold.

    Attributes:
        pss: bytes of memory, shared pages divided among those who map them.
        data: those of them that come from no file on disk. Unlike libraries, other programs cannot share them.
        descriptors: open descriptors of all processes together.
        memfds: different anonymous memory files among them.
        memfd_bytes: memory of those files, mapped or not.
    """

    pss: int
    data: int
    descriptors: int
    memfds: int
    memfd_bytes: int


def held(pids: Iterable[int]) -> Held:
    """What these processes hold now."""
    pss = data = descriptors = 0
    files: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            rollup = _rollup(pid)
            pss += rollup["Pss"]
            data += rollup["Pss_Anon"] + rollup["Pss_Shmem"]
            for entry in os.scandir(f"/proc/{pid}/fd"):
                descriptors += 1
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).startswith("/memfd:"):
                        status = entry.stat()
                        files[status.st_dev, status.st_ino] = status.st_blocks * 512
    return Held(pss, data, descriptors, len(files), sum(files.values()))


def _rollup(pid: int) -> dict[str, int]:
    """Memory of one process by kind, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}

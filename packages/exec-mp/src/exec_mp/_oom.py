"""Whether the kernel's out-of-memory killer has been at work: its counters, before and after.

A SIGKILL says nothing of its sender. The counters are those of this process's memory cgroup (in a container: of the
container), which the workers share, and the machine's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

_CGROUP_ROOT = "/sys/fs/cgroup"


class OomWatch:
    """Compares the counters with what they were when it was made."""

    def __init__(self, files: Sequence[str] | None = None) -> None:
        self._files = list(_counter_files()) if files is None else files
        self._before = {file: _count(file) for file in self._files}

    def hint(self) -> str:
        """For an error's text: that it has probably been the out-of-memory killer, or nothing."""
        for file, before in self._before.items():
            after = _count(file)
            if before is not None and after is not None and after > before:
                return (
                    f"probably the kernel's out-of-memory killer (oom_kill in {file} rose from {before} to {after}); "
                    "give it more memory, or lower the model's, the cache's or the batch's share"
                )
        return ""


def _counter_files() -> Iterator[str]:
    """The nearest first: cgroup v2, cgroup v1, the machine."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        lines = []
    for number, controllers, path in lines:
        # In a container's own namespace the path is relative to what is mounted, or outside of it: then the root it is.
        if number == "0":
            for root in (_CGROUP_ROOT, os.path.join(_CGROUP_ROOT, "unified")):
                yield from (f"{root}{place}/memory.events" for place in dict.fromkeys([path.rstrip("/"), ""]))
        elif "memory" in controllers.split(","):
            yield from (
                f"{_CGROUP_ROOT}/memory{place}/memory.oom_control" for place in dict.fromkeys([path.rstrip("/"), ""])
            )
    yield "/proc/vmstat"


def _count(file: str) -> int | None:
    """The counter ``oom_kill`` in a file of ``name value`` lines; None where there is none."""
    try:
        with open(file, encoding="ascii") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
    except (OSError, ValueError):
        return None

"""The memory for the KV cache respects what the kernel and the control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from reference_llm.memory import available_host_bytes

GIB = 1 << 30


def make_root(path: Path, cgroup: str, files: dict[str, dict[str, str]]) -> Path:
    """A file system with 8 GiB available, and control groups as given."""
    (path / "proc/self").mkdir(parents=True)
    (path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (path / "proc/self/cgroup").write_text(cgroup)
    for group, contents in files.items():
        (path / group).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (path / group / name).write_text(text)
    return path


def v2(limit: object, usage: int, cache: int = 0) -> dict[str, str]:
    """The files of a group in the unified hierarchy."""
    stat = f"anon 5\ninactive_file {cache}\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat}


def v1(limit: int, usage: int) -> dict[str, str]:
    """The files of a group in the memory controller's own hierarchy."""
    stat = "inactive_file 1\ntotal_inactive_file 0\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{usage}\n", "memory.stat": stat}


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param("", {}, 8 * GIB, id="no groups"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a": v2("max", GIB)}, 8 * GIB, id="no limit"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a": v2(3 * GIB, GIB)}, 2 * GIB, id="own limit"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a": v2(3 * GIB, 2 * GIB, GIB)}, 2 * GIB, id="page cache is free"),
        pytest.param(
            "0::/a/b\n",
            {"sys/fs/cgroup/a": v2(2 * GIB, GIB), "sys/fs/cgroup/a/b": v2(5 * GIB, GIB)},
            GIB,
            id="tighter parent",
        ),
        pytest.param("0::/host/path\n", {"sys/fs/cgroup": v2(2 * GIB, GIB)}, GIB, id="container"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a": v2(GIB, 2 * GIB)}, 0, id="over the limit"),
        pytest.param("4:memory:/a\n", {"sys/fs/cgroup/memory/a": v1(3 * GIB, GIB)}, 2 * GIB, id="v1"),
        pytest.param("4:memory:/a\n", {"sys/fs/cgroup/memory/a": v1(2**63 - 4096, GIB)}, 8 * GIB, id="v1, no limit"),
    ],
)
def test_the_tightest_limit_counts(
    cgroup: str, files: dict[str, dict[str, str]], expected: int, tmp_path: Path
) -> None:
    """Of the kernel's word and of each group above this process."""
    assert expected == available_host_bytes(make_root(tmp_path, cgroup, files))


def test_this_machine_has_some() -> None:
    """The files are where the kernel has them."""
    assert available_host_bytes() > 0

"""Whether something was left behind: processes, descriptors, threads, shared memory, temporary files."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import attrs

from exec_core.testing.sync import eventually

_MARK = "EXEC_CORE_LEAK_CHECK"  # in the environment of every process that starts inside `leak_check`
_KEPT = "torchinductor_"  # torch's cache of compiled code, made by its profiler too, and kept by design
_COMMAND_LENGTH = 60  # enough to know it; the rest of a program given by -c may name paths of the moment
_SETTLE_S = 3.0  # for what ends by itself: a thread in its last lines, a process that is being reaped


@attrs.frozen
class Snapshot:
    """What exists now. Numbers in names (descriptors, pids, inodes) are left out, so that like is equal to like.

    Attributes:
        processes: command lines of all descendants.
        descriptors: what this process has open.
        threads: names of this process's threads.
        shared_memory: entries of /dev/shm.
        temporary: entries of the temporary directory.
    """

    processes: Counter[str]
    descriptors: Counter[str]
    threads: Counter[str]
    shared_memory: Counter[str]
    temporary: Counter[str]

    def added_since(self, before: Snapshot) -> dict[str, list[str]]:
        """What is here now and was not before, by kind; kinds without any are left out."""
        added = {
            name: sorted((getattr(self, name) - getattr(before, name)).elements())
            for name in (field.name for field in attrs.fields(Snapshot))
        }
        return {name: items for name, items in added.items() if items}


def snapshot(*, orphans: bool = True) -> Snapshot:
    """What exists now, see `Snapshot`. Looking for ``orphans`` reads the environment of every process of the machine."""
    return Snapshot(
        processes=Counter(
            _like(_command(pid)) for pid in (descendants() | (_marked_processes() if orphans else set()))
        ),
        descriptors=Counter(map(_like, _descriptors())),
        threads=Counter(thread.name for thread in threading.enumerate()),
        shared_memory=Counter(os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ()),  # noqa: S108 # only listed
        temporary=Counter(_like(name) for name in os.listdir(tempfile.gettempdir()) if not name.startswith(_KEPT)),
    )


@contextlib.contextmanager
def leak_check(
    *, allowed: Callable[[str, str], bool] = lambda kind, item: False, orphans: bool = True
) -> Iterator[None]:
    """Fails when more is there at the end of the block than at its start.

    Inside, `tempfile` uses a directory of the block's own, which must be empty in the end. Where there is a CUDA device and torch is
    loaded, this process has a context on it from the first check on: else whoever happens to need one first would leave it behind.

    Args:
        allowed: ``fn(kind, item)`` for what may stay; ``kind`` is an attribute of `Snapshot`.
        orphans: look also for processes that have started in here and have lost their parent; takes longer.

    Raises:
        AssertionError: listing what was left behind.
    """
    if "torch" in sys.modules:
        _open_cuda()
    with _marked(), _own_tempdir():
        before = snapshot(orphans=orphans)

        def left() -> dict[str, list[str]]:
            added = snapshot(orphans=orphans).added_since(before)
            kept = {kind: [item for item in items if not allowed(kind, item)] for kind, items in added.items()}
            return {kind: items for kind, items in kept.items() if items}

        yield
        if left():
            with contextlib.suppress(TimeoutError):  # a cycle may hold what its owner has dropped, or is about to drop
                eventually(lambda: gc.collect() >= 0 and not left(), deadline_s=_SETTLE_S, every_s=0.01)
        if found := left():
            raise AssertionError(f"left behind: {found}")


@functools.cache
def _open_cuda() -> None:
    """Opens what CUDA and torch's profiler open in a process when they are first used, and keep.

    With a device that is soon: torch.distributed asks for devices when a group is made, whatever for.
    """
    import torch

    if torch.cuda.is_available():
        with warnings.catch_warnings(action="ignore"), torch.autograd.profiler.profile(use_device="cuda"):
            torch.zeros(1, device="cuda")


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    outer = os.environ.get(_MARK)
    if outer is not None:  # inside another check: its mark tells our processes just as well
        yield
        return
    os.environ[_MARK] = uuid.uuid4().hex
    try:
        yield
    finally:
        del os.environ[_MARK]


@contextlib.contextmanager
def _own_tempdir() -> Iterator[None]:
    outer, outer_env = tempfile.tempdir, os.environ.get("TMPDIR")
    path = tempfile.mkdtemp(prefix="leak-check-")
    tempfile.tempdir = os.environ["TMPDIR"] = path
    try:
        yield
    finally:
        tempfile.tempdir = outer
        if outer_env is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = outer_env
        shutil.rmtree(path, ignore_errors=True)


def descendants() -> set[int]:
    """Pids of this process's children, and theirs, and so on; zombies included."""
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for thread in os.listdir(f"/proc/{pid}/task"):
                children = {int(child) for child in _read(pid, f"task/{thread}/children").split()} - found
                found |= children
                waiting += children
    return found


def _marked_processes() -> set[int]:
    """Processes that were started inside `leak_check`, whoever is their parent now."""
    mark = f"{_MARK}={os.environ.get(_MARK, '?')}".encode()
    found = set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if mark in _read(pid, "environ").split(b"\0"):
                found.add(pid)
    return found - {os.getpid()}


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _command(pid: int) -> str:
    try:
        # It is empty for a zombie, and for a moment while a program is being started.
        while not (text := _read(pid, "cmdline")) and _read(pid, "stat").rpartition(b")")[2].split()[0] not in b"ZX":
            time.sleep(0.001)
    except OSError:
        return "(ended)"
    return text.replace(b"\0", b" ").decode(errors="replace").strip()[:_COMMAND_LENGTH] or "(zombie)"


def _descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def _like(name: str) -> str:
    return re.sub(r"\d+", "N", name)

"""A new worker process: cuts its ties to the fork server, takes over the driver's state, runs its entry."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29
_SLACK_NS = 1000  # by which a worker's timed waits may be late; the default is 50 us
_libc = ctypes.CDLL(None)  # loaded here: a child should not have to

FIRST_FD = (
    3  # a worker finds its descriptors here, in order, after stdin, stdout and stderr; the boot record is the first
)


class Boot(NamedTuple):
    """What a new process takes over from the driver's present state, and what it then runs.

    Attributes:
        entry: ``module:function`` called with ``args``.
    """

    environ: dict[str, str]
    sys_path: list[str]
    cwd: str | None
    umask: int
    affinity: frozenset[int]
    entry: str
    args: tuple[Any, ...]


def be_worker(server: int, execs: bool, fds: Sequence[int]) -> NoReturn:
    """In the forked child: becomes a worker.

    Args:
        server: pid of the fork server, without which it must not live.
        execs: run a fresh interpreter.
        fds: its boot record (a memfd), stdout, stderr, then what it finds after the boot record.
    """
    try:
        os.setpgid(0, 0)  # a group of its own: what it starts can be ended with it
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _libc.prctl(_PR_SET_TIMERSLACK, _SLACK_NS)
        if os.getppid() != server:  # it died before the line above
            os._exit(1)
        _take_descriptors(fds)
        if execs:
            program = f"from exec_mp._boot import run; run({FIRST_FD})"
            os.execv(sys.executable, [sys.executable, "-P", "-c", _with_path(program)])  # noqa: S606 # our own program
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    run(FIRST_FD)


def run(fd: int) -> NoReturn:
    """`boot`, then the end of the process, whatever threads and exit handlers have been left in it."""
    code = 1
    try:
        code = boot(fd)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        flush_buffers()
        os._exit(code)


def _take_descriptors(fds: Sequence[int]) -> None:
    """Puts stdout and stderr in place, the boot record and the rest from `FIRST_FD` on, and closes everything else."""
    boot_fd, stdout, stderr, *rest = fds
    order = [stdout, stderr, boot_fd, *rest]
    high = [os.dup2(fd, place, inheritable=True) for place, fd in enumerate(order, start=max(fds) + 1)]
    for place, fd in enumerate(high, start=1):
        os.dup2(fd, place, inheritable=True)
    os.closerange(1 + len(order), max(map(int, os.listdir("/proc/self/fd"))) + 1)


def buffer_lines() -> None:
    """What is printed is seen at once, and not lost with a process that is killed; into a pipe it would wait for more."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def flush_buffers() -> None:
    """What stays in a buffer would be written by each fork of this process as well, and not at all when it leaves by os._exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):  # whatever a module has put there
            stream.flush()
    # Not of all streams: a thread may read from one, and have its lock.
    _libc.fflush(ctypes.c_void_p.in_dll(_libc, "stdout"))


def _with_path(program: str) -> str:
    """``program`` for a fresh interpreter started with -P: our own packages found as here, the standard library first."""
    return f"import sys; sys.path.extend(p for p in {sys.path!r} if p not in sys.path); {program}"


def boot(fd: int) -> int:
    """Takes over the state in the boot record at ``fd`` and runs its entry; the exit code."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        record: Boot = pickle.load(file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # its terminal is there to be written to
    buffer_lines()
    os.environ.clear()
    os.environ.update(record.environ)
    sys.path[:] = record.sys_path
    os.umask(record.umask)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, record.affinity)
    if record.cwd is not None:
        with contextlib.suppress(OSError):
            os.chdir(record.cwd)
    module, _, name = record.entry.partition(":")
    entry: Callable[..., int | None] = getattr(importlib.import_module(module), name)
    return entry(*record.args) or 0

"""What a forked process is to be and do: the driver's state of this moment; programs of ours that run in one."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any

from exec_core.errors import WorkerStartupError
from exec_mp._boot import Boot

if TYPE_CHECKING:  # a program needs none of it
    from exec_mp._launcher import Session


def boot_record(entry: str, args: tuple[Any, ...], env: dict[str, str], affinity: frozenset[int] | None = None) -> Boot:
    """The driver's state of this moment, with ``env`` on top, for a process that runs ``entry``."""
    try:
        cwd: str | None = os.getcwd()
    except FileNotFoundError:
        cwd = None
    allowed = frozenset(os.sched_getaffinity(0)) if affinity is None else affinity
    return Boot({**os.environ, **env}, [p or cwd or "" for p in sys.path], cwd, _umask(), allowed, entry, args)


def _umask() -> int:
    """Read from /proc: asking os.umask would set it for a moment, for all threads."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), 0o022)


def run_program(session: Session, program: str, env: dict[str, str], deadline: float) -> str:
    """Runs Python code in a forked child and returns what it printed."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as output:
        with os.fdopen(writing, "wb"), os.fdopen(session.output(), "wb") as said:
            boot = boot_record("exec_mp._program:run_code", (program,), env)
            pid, pidfd = session.fork(-1, boot, [writing, said.fileno()], execs=False, deadline=deadline)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()) * 1e3):
                raise WorkerStartupError(
                    None, "launch", f"timed out waiting for {program!r}", pid, remedy="raise startup_timeout_s"
                )
        finally:
            os.close(pidfd)
        return output.read()


def run_code(program: str) -> None:
    """Entry of `run_program`."""
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102 # our own text

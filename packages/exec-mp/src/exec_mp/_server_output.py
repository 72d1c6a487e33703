"""What the fork server writes: kept in memory until the driver makes events of it.

server, forks of it until they have output of their own --memfd--> ServerOutput.log --> one event for each line

Not a pipe: somebody would have to read that for the server to go on, and it lives longer than any executor. A memfd takes what
comes, and is gone with the last process that has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import deque
from typing import Any

from exec_mp._output import KEPT_LINES, split_lines

_CHUNK = 1 << 16


class ServerOutput:
    """Read by whichever thread of the driver has to do with the server just now; each line is logged once.

    ``_lock`` guards all fields. Events are made without it: what the host's logging does is the host's.

    Raises:
        OSError: when the system refuses the memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: int | None = os.memfd_create("exec-mp-server-output", os.MFD_CLOEXEC)
        fcntl.fcntl(self._memory, fcntl.F_SETFL, os.O_APPEND)  # the driver's programs write here as well
        self._read, self._rest = 0, b""  # bytes that have been read; those after the last newline
        self._unlogged: list[str] = []
        self._last: deque[str] = deque(maxlen=KEPT_LINES)

    def descriptor(self) -> int:
        """A descriptor to write to, which the caller closes."""
        with self._lock:
            if self._memory is None:
                return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            return fcntl.fcntl(self._memory, fcntl.F_DUPFD_CLOEXEC, 3)

    def log(self, log: Any, pid: int) -> None:
        """Makes events of the lines that are there by now and have not been logged.

        Args:
            pid: of the server.
        """
        with self._lock:
            self._take()
            lines, self._unlogged = self._unlogged, []
        for line in lines:
            with contextlib.suppress(Exception):  # the host's logging raises; who logs here has more to do
                log.info(line, logger="fork_server.output", pid=pid)

    def tail(self) -> list[str]:
        """What was written last, oldest line first."""
        with self._lock:
            self._take()
            return [*self._last, *([self._rest.decode(errors="replace")] if self._rest else [])]

    def _take(self) -> None:
        """Under the lock: up to the present end, also while somebody goes on writing."""
        if self._memory is None:
            return
        end = os.fstat(self._memory).st_size
        while self._read < end and (data := os.pread(self._memory, _CHUNK, self._read)):
            self._read += len(data)
            lines, self._rest = split_lines(self._rest + data)
            self._keep(lines)

    def _keep(self, lines: list[str]) -> None:
        self._unlogged += lines
        self._last += lines

    def close(self) -> None:
        """The server has ended. What nobody has logged yet still can be. Twice is fine."""
        with self._lock:
            if self._memory is not None:
                self._take()
                self._keep([self._rest.decode(errors="replace")] if self._rest else [])
                self._rest = b""
                self.forget()

    def forget(self) -> None:
        """In a forked child of the driver, where another thread may have had the lock."""
        memory, self._memory = self._memory, None
        if memory is not None:
            os.close(memory)

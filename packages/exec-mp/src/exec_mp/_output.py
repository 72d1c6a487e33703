"""Where the workers' stdout and stderr go: to the driver's, to files, or, line by line, into the driver's log.

worker print, C++, NCCL ... --pipe--> WorkerOutput.read --> one event for each line
worker structlog, logging --as marked JSON--> the same pipe --> the same event, in the driver's format
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import deque
from typing import Any

from exec_core.config import LogConfig
from exec_core.logs import RELAY_MARK

_F_SETPIPE_SZ = 1031
_PIPE_BYTES = 1 << 20  # a worker that writes faster than the driver reads waits when this is full
_MAX_LINE = 1 << 16
_READS = 2 * _PIPE_BYTES // _MAX_LINE  # in a row
KEPT_LINES = 20
_TAIL_BYTES = 1 << 14


class WorkerOutput:
    """Output of one rank.

    Args:
        path: file for ``worker_output="files"``.
        log: logger for the events of ``worker_output="log"``.
    """

    def __init__(self, config: LogConfig, path: str, rank: int, log: Any) -> None:
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.reading: int | None = None
        self._log, self._rank, self._pid = log, rank, 0
        self._partial = b""
        self._path: str | None = None
        if config.worker_output == "log":
            self.reading, writing = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.reading, False)
            with contextlib.suppress(OSError):  # over the user's limit on pipe memory: the default size then
                fcntl.fcntl(writing, _F_SETPIPE_SZ, _PIPE_BYTES)
            self._writing = [writing, writing]
        elif config.worker_output == "files":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._path = path
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._writing = [file, file]
        else:
            self._writing = [_duplicate(1), _duplicate(2)]

    @property
    def descriptors(self) -> list[int]:
        """What the worker's stdout and stderr become."""
        return self._writing

    def started(self, pid: int) -> None:
        """The worker runs and has the descriptors."""
        self._pid = pid
        self._close_writing()

    def _close_writing(self) -> None:
        writing, self._writing = set(self._writing), []
        for fd in writing:
            os.close(fd)

    def read(self) -> bool:
        """Turns what has been written by now into events; False at the end, when nobody can write any more."""
        for _ in range(_READS):  # one that never stops writing must not keep this thread
            if self.reading is None:
                return False
            try:
                data = os.read(self.reading, _MAX_LINE)
            except BlockingIOError:
                return True
            if not data:
                return False
            lines, self._partial = split_lines(self._partial + data)
            for line in lines:
                self._event(line)
        return True

    def tail(self) -> list[str]:
        """What was written last, oldest line first; empty for ``worker_output="inherit"``."""
        if self._path is None:
            self.read()
            return [*self.last_lines, *([self._partial.decode(errors="replace")] if self._partial else [])]
        try:
            with open(self._path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                return file.read().decode(errors="replace").splitlines()[-KEPT_LINES:]
        except OSError:
            return []

    def _event(self, line: str) -> None:
        with contextlib.suppress(Exception):  # the host's logging raises; the thread that reads here has more to do
            self._log_line(line)

    def _log_line(self, line: str) -> None:
        before, mark, record = line.rpartition(RELAY_MARK)
        if before or not mark:  # text without a newline may stand before a record
            self.last_lines.append(before or line)
            self._log.info(before or line, logger="worker.output", rank=self._rank, pid=self._pid)
        if mark:
            self._relay(record)

    def _relay(self, record: str) -> None:
        try:
            event = json.loads(record)
            text, level = event.pop("event"), event.pop("level", "info")
            emit = getattr(self._log, level if level in _LEVELS else "info")
        except (ValueError, KeyError, AttributeError):  # cut short by the worker's death
            self._log.info(record, logger="worker.output", rank=self._rank, pid=self._pid)
            return
        self.last_lines.append(f"{level}: {text}")
        emit(text, **event)

    def close(self) -> None:
        self._close_writing()
        if self.reading is not None:
            self.read()
            if self._partial:
                self._event(self._partial.decode(errors="replace"))
            os.close(self.reading)
            self.reading = None


_LEVELS = frozenset({"debug", "info", "warning", "error", "critical"})


def split_lines(data: bytes) -> tuple[list[str], bytes]:
    """The lines that are whole or too long to wait for, without empty ones, and the beginning of the next."""
    *lines, rest = data.split(b"\n")
    if len(rest) > _MAX_LINE:
        lines, rest = [*lines, rest], b""
    return [line.decode(errors="replace") for line in (line.rstrip(b"\r") for line in lines) if line], rest


def _duplicate(fd: int) -> int:
    """The driver's present stdout or stderr, or /dev/null where it has none."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

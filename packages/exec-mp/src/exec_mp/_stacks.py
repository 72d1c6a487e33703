"""Where a rank is: its Python stack, asked for when a call times out.

    driver   Stacks.ask --eventfd--> helper thread of the worker: the main thread's frames, with source lines
                        --signal---> faulthandler, when the helper stays silent because C code holds the GIL

Both append to one memfd, each rank in a region of its own; a control word counts the helper's answers. faulthandler dumps the
main thread only: dumping other threads while they run crashes the process now and then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping

from exec_mp import _proc
from exec_mp._protocol import STACK_SIGNAL

REGION_BYTES = 1 << 30  # address space of each rank's reports; a sparse file
_HELPER_S = 0.2  # how long the helper may be silent before the signal is sent
_DUMP_S = 0.2  # for the signal's dump
_SETTLED_S = 0.01  # a dump that has not grown for so long is complete
_RUNS_METHOD = "exec_core/wrapper.py"  # the frame below which the worker's own begin
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


class StackReporter:
    """The worker's side."""

    def __init__(self, bell: int, memory: int, rank: int, count: Callable[[], None]) -> None:
        self._bell, self._count = bell, count
        # A file description of its own: its offset is where the next report goes, also for faulthandler.
        self._file = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
        os.lseek(self._file, rank * REGION_BYTES, os.SEEK_SET)
        os.close(memory)
        self._main = threading.main_thread().ident
        faulthandler.register(STACK_SIGNAL, file=self._file, all_threads=False, chain=False)
        threading.Thread(target=self._serve, name="exec-stacks", daemon=True).start()

    def _serve(self) -> None:
        while True:
            os.eventfd_read(self._bell)
            with contextlib.suppress(Exception):  # this thread is needed again; the report is empty then
                frame = sys._current_frames().get(self._main or 0)  # noqa: SLF001 # the documented way to other threads' frames
                text = "".join(_worker_frames(traceback.format_stack(frame)))
                os.write(self._file, text.encode(errors="replace"))
            self._count()


def _worker_frames(frames: list[str]) -> list[str]:
    """``frames``, outermost first, from the worker's method on; all of them when it is not in one."""
    start = max((i for i, frame in enumerate(frames) if _RUNS_METHOD in frame), default=-1)
    return frames[start + 1 :] or frames


class Stacks:
    """The driver's side.

    Args:
        ranks: processes that can be asked.
        answers: reads the control word of a rank.
    """

    def __init__(self, ranks: Iterable[int], answers: Callable[[int], int]) -> None:
        self.memory = os.memfd_create("exec-mp-stacks", os.MFD_CLOEXEC)
        self.bells: dict[int, int] = {}
        self._closing = False  # cuts a report short; set by the closer
        self._lock = threading.Lock()  # one report at a time, none once closed; guards _read_to
        try:
            for rank in ranks:
                self.bells[rank] = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError:
            self.close()
            raise
        self._answers = answers
        self._read_to = {rank: rank * REGION_BYTES for rank in self.bells}

    def ask(self, pids: Mapping[int, int], send_signal: Callable[[int, int], None]) -> dict[int, str]:
        """The present stack of each of ``pids`` (by rank), or why there is none.

        Args:
            send_signal: ``fn(number, rank)``.
        """
        with self._lock:
            return {} if self._closing else dict(sorted(self._ask(pids, send_signal).items()))

    def _ask(self, pids: Mapping[int, int], send_signal: Callable[[int, int], None]) -> dict[int, str]:
        stats = {rank: _proc.stat(pid) for rank, pid in pids.items()}
        stopped = {rank for rank, stat in stats.items() if stat is not None and stat.stopped}
        asked = {rank: self._answers(rank) for rank in pids if rank not in stopped}
        for rank in asked:
            self._read(rank)  # what came too late for the last report
            os.eventfd_write(self.bells[rank], 1)
        deadline = time.monotonic() + _HELPER_S
        reports = dict.fromkeys(stopped, "the process is stopped (SIGSTOP or a debugger)\n")
        while (silent := asked.keys() - reports.keys()) and time.monotonic() < deadline:
            if self._closing:
                return {}
            time.sleep(0.001)
            for rank in silent:
                # Without text it was the answer to an earlier report, or the helper has met an error: no answer to this one.
                if (count := self._answers(rank)) != asked[rank] and (text := self._read(rank)):
                    reports[rank] = text
                asked[rank] = count
        for rank in silent:
            send_signal(STACK_SIGNAL, rank)
        return reports | {rank: self._dumped(rank) for rank in silent}

    def _dumped(self, rank: int) -> str:
        deadline = time.monotonic() + _DUMP_S
        text, grown_at = "", time.monotonic()
        while (now := time.monotonic()) < deadline and not (self._closing or (text and now - grown_at > _SETTLED_S)):
            if more := self._read(rank):
                text, grown_at = text + more, now
            time.sleep(0.001)
        return "".join(_with_source(text.splitlines())) or "no answer: the process is stuck in the kernel\n"

    def _read(self, rank: int) -> str:
        data = os.pread(self.memory, 1 << 20, self._read_to[rank]).rstrip(b"\0")
        self._read_to[rank] += len(data)
        return data.decode(errors="replace")

    def close(self) -> None:
        self._closing = True
        with self._lock:
            for fd in (self.memory, *self.bells.values()):
                os.close(fd)


def _with_source(lines: list[str]) -> list[str]:
    """A faulthandler dump in the order and form of a traceback: outermost first, with the source lines."""
    frames = []
    for frame in filter(None, map(_FRAME.fullmatch, reversed(lines))):
        source = linecache.getline(frame["file"], int(frame["line"])).strip()
        where = f'  File "{frame["file"]}", line {frame["line"]}, in {frame["name"]}\n'
        frames.append(where + (f"    {source}\n" if source else ""))
    return [*_worker_frames(frames), "  (C code there holds the interpreter)\n"] if frames else []

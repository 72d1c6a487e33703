"""The driver's side of processes: the fork server of this process, and a session with it for each group of workers.

    ForkServer (one per driver process) --open--> Session --fork--> worker, worker, ...
    what the server writes --ServerOutput--> events of whichever executor has a session with it

The session's socket owns the workers: whatever closes it, this process's end included, ends them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from exec_core.base import shutdown_all
from exec_core.errors import WorkerStartupError
from exec_mp._boot import Boot
from exec_mp._protocol import MAX_BYTES, Exited, Fork, Forked, Open, Opened, Refused, Signal
from exec_mp._server_output import ServerOutput

_STOP_S = 5.0  # for a fork server to end; it only has to kill and reap
_LISTEN_S = 0.1  # how often a start that takes long looks what the server has written
_BLAS = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's would start threads on import
# glibc's heap asks for huge pages, where the system gives them to who asks: a fork then copies the page tables of the 80 MB
# that torch needs of it in a third of the time.
_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
LIMITS = "check the limits on processes, open files and memory (ulimit -a)"

_lock = threading.Lock()  # guards _server
_server: ForkServer | None = None


class ForkServer:
    """The process that forks this process's workers (see `exec_mp._forkserver`).

    Raises:
        OSError: when the system refuses the process or its descriptors.
    """

    def __init__(self) -> None:
        self.driver = os.getpid()
        self._stopping = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as stack:
            on_error = stack.enter_context(contextlib.ExitStack())
            on_error.callback(ours.close)
            stack.callback(theirs.close)
            self.output = ServerOutput()
            on_error.callback(self.output.close)
            written = self.output.descriptor()
            stack.callback(os.close, written)
            pidfd = os.pidfd_open(self.driver)
            stack.callback(os.close, pidfd)
            passed = [_copy(fd, stack) for fd in (theirs.fileno(), pidfd)]
            paths = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), *(p for p in sys.path if p)]
            program = (
                f"import sys; sys.path.extend(p for p in {paths!r} if p not in sys.path); "
                f"from exec_mp._forkserver import main; main({passed[0]}, {passed[1]})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                pass_fds=passed,
                # Ctrl-C in the terminal is the driver's. Not a session: Linux shares processors between sessions (autogroup),
                # and then N workers together get as much as the driver, and are packed on the core that it does not use.
                process_group=0,
                env={**_MALLOC, **os.environ, **_BLAS},
            )
            on_error.pop_all()
        self._socket = ours

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self.driver == os.getpid() and self._process.poll() is None

    def how_it_ended(self) -> str:
        """For an error's text."""
        if self._stopping:
            return f"the fork server (pid {self.pid}) was stopped"
        code = self._process.poll()
        if code is None:
            return f"the fork server (pid {self.pid}) closed its session"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"the fork server (pid {self.pid}) {how}"

    def last_lines(self) -> list[str]:
        """What it wrote last, for an error; nothing of one that was ended on purpose."""
        return [] if self._stopping else self.output.tail()

    def log_output(self, log: Any) -> None:
        """Makes events of what it has written since somebody last did."""
        self.output.log(log, self.pid)

    def open(self, preload: Sequence[str], private_root: str = "", log: Any = None) -> Session:
        """Asks for a session; `Session.ready` waits for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            record = pickle.dumps(Open(tuple(preload), [p for p in sys.path if p], private_root))
            socket.send_fds(self._socket, [record], [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Session(ours, self, log)

    def stop(self) -> None:
        """Ends the server and with it all its workers."""
        self._stopping = True
        _end_connection(self._socket)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.output.close()

    def forget(self) -> None:
        """When it has ended, or in a forked child, whose server this is not."""
        self._socket.close()
        if self._process.returncode is None:
            self._process.returncode = 0  # else it warns that it was not waited for
        if self.driver == os.getpid():
            self.output.close()
        else:
            self.output.forget()


class Session:
    """One group's connection to the fork server. One thread at a time receives; any may send.

    Args:
        log: for what the server writes; without, that waits for the next session.
    """

    def __init__(self, sock: socket.socket, server: ForkServer, log: Any) -> None:
        self._socket = sock
        self._server, self._log = server, log
        self._early: deque[Exited] = deque()  # ends reported while something else was awaited
        self._gone = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def ready(self, deadline: float) -> None:
        """Waits until the server has imported what was asked for."""
        self._expect(Opened, deadline, "the fork server to be ready")

    def fork(self, rank: int, boot: Boot, fds: Sequence[int], *, execs: bool, deadline: float) -> tuple[int, int]:
        """Starts a process and returns its pid and a pidfd of it, which the caller closes.

        Args:
            fds: its stdout and stderr, then what it finds from descriptor 4 on (3 is taken by the boot record).
        """
        memory = os.memfd_create("exec-mp-boot", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(memory), "wb") as file:
                pickle.dump(boot, file)
            asked = Fork(rank, execs, 1 + len(fds))
            with contextlib.suppress(ConnectionError):  # the server is gone; receiving says so
                socket.send_fds(self._socket, [pickle.dumps(asked)], [memory, *fds])
        finally:
            os.close(memory)
        forked, pidfd = self._expect(Forked, deadline, "a fork", rank)
        if pidfd is None:
            raise WorkerStartupError(rank, "launch", "no descriptor is left for it", forked.pid, remedy=LIMITS)
        return forked.pid, pidfd

    def _expect(self, wanted: type[Any], deadline: float, what: str, rank: int | None = None) -> tuple[Any, int | None]:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._error(rank, f"timed out waiting for {what}", "raise startup_timeout_s")
            self._socket.settimeout(min(remaining, _LISTEN_S))
            try:
                record, pidfd = self._receive()
            except TimeoutError:
                continue
            finally:
                self._log_output()
            if record is None:
                raise self._error(rank, f"{self.how_it_ended} while waiting for {what}", LIMITS)
            if isinstance(record, wanted):
                return record, pidfd
            if isinstance(record, Refused):
                raise WorkerStartupError(rank, "launch", record.why)
            self._early.append(record)

    def _error(self, rank: int | None, why: str, remedy: str) -> WorkerStartupError:
        """What the server wrote last is often the reason."""
        lines = self.last_lines()
        said = "; the last lines of the fork server:\n  " + "\n  ".join(lines) if lines else ""
        return WorkerStartupError(rank, "launch", why, remedy=remedy + said)

    def _receive(self) -> tuple[Any, int | None]:
        """The next record, None at the end, and the descriptor that came along."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MAX_BYTES, 1)
        except ConnectionError:
            data, fds = b"", []
        return pickle.loads(data) if data else None, fds[0] if fds else None

    def exits(self) -> list[Exited] | None:
        """Workers whose end has been reported by now; None when the server itself is gone."""
        found = list(self._early)
        self._early.clear()
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while (record := self._receive()[0]) is not None:
                found.append(record)
            self._gone = True
        self._log_output()
        return None if self._gone and not found else found

    def wait(self, timeout_s: float) -> bool:
        """Whether the server says something within ``timeout_s``, its end included."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1e3))

    @property
    def how_it_ended(self) -> str:
        """What became of a server that is gone."""
        until = time.monotonic() + 0.05  # its sockets close a moment before it can be reaped
        while self._server.alive() and time.monotonic() < until:
            time.sleep(0.001)
        return self._server.how_it_ended()

    def last_lines(self) -> list[str]:
        """What the server wrote last."""
        return self._server.last_lines()

    def output(self) -> int:
        """A descriptor to write to as the server does; the caller closes it."""
        return self._server.output.descriptor()

    def _log_output(self) -> None:
        if self._log is not None:
            self._server.log_output(self._log)

    def signal(self, number: int) -> None:
        """Sends ``number`` to all workers and their process groups."""
        with contextlib.suppress(OSError):  # the server is gone, and with it they are
            self._socket.send(pickle.dumps(Signal(number)))

    def abort(self) -> None:
        """Ends the connection, not the object: a thread that waits here gets an error, the server kills the workers."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the workers up: the server kills those that still run."""
        _end_connection(self._socket)
        self._log_output()


def _copy(fd: int, stack: contextlib.ExitStack) -> int:
    """A copy of ``fd`` beyond the standard streams, whose numbers a host without any has free; ``stack`` closes it."""
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    stack.callback(os.close, copy)
    return copy


def _end_connection(sock: socket.socket) -> None:
    """Closes ``sock`` for everyone: a forked child of this process has a copy, which would keep it open."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def fork_server(log: Any = None) -> ForkServer:
    """This process's fork server, started if there is none.

    Args:
        log: for what one that has ended has left unsaid.
    """
    global _server
    ended = None
    with _lock:
        if _server is not None and not _server.alive():
            ended, _server = _server, None
            ended.forget()
        server = _server = _server or ForkServer()
    if ended is not None and log is not None:
        ended.log_output(log)
    return server


def open_session(preload: Sequence[str], private_root: str = "", log: Any = None) -> Session:
    """A session with this process's fork server, or with another one when that is just ending."""
    while True:
        server = fork_server(log)
        try:
            return server.open(preload, private_root, log)
        except ConnectionError:  # its sockets close a moment before it can be reaped
            server.stop()


def prestart(preload: Sequence[str] = ("torch",)) -> None:
    """Starts the fork server early and has it import ``preload``, without waiting: the first executor then starts at once."""
    open_session(preload).close()


def stop_fork_server() -> None:
    """Ends the fork server and every worker of this process. Twice is fine; the next executor starts another."""
    global _server
    with _lock:
        server, _server = _server, None
        if server is not None and server.driver == os.getpid():
            server.stop()


@atexit.register
def _at_exit() -> None:
    shutdown_all()  # first: to an executor the end of its server is a failure
    stop_fork_server()


def _forget() -> None:
    """In a forked child: the server is the parent's, and so may the lock be."""
    global _server, _lock
    _lock = threading.Lock()
    server, _server = _server, None
    if server is not None:
        server.forget()


os.register_at_fork(after_in_child=_forget)


def end_groups(pids: Sequence[int]) -> None:
    """Kills what is left of the process groups of workers whose server is gone and can no longer do it."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

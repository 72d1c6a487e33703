"""The fork server: a process that imports torch once and forks workers that have it.

    driver --Open + socket--> server                       one session for each group of workers
    driver <=Fork, Signal / Opened, Forked, Refused, Exited=> server   over that session's socket

Guarantees:

* It owns its workers. When a session's socket closes, that session's workers and their process groups are killed and its
  private directory is swept; when the driver ends (its pidfd says so, or the main socket closes), so are all, and the server
  ends. EOF alone would not do: a forked child of the driver keeps the sockets open.
* When the server itself is killed, the kernel kills the workers (PR_SET_PDEATHSIG).

It assumes that it has one thread whenever it forks, and checks: a preloaded module that computes or starts threads would leave
locks behind that no child could ever take.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # loaded here: a child should not have to

MAX_BYTES = 1 << 16  # of a record; whatever may be larger travels in a memfd
MAX_FDS = 16
FIRST_FD = 3  # a worker finds the descriptors of its `Fork` here, in order, after stdin, stdout and stderr


class Open(NamedTuple):
    """Starts a session; the socket for it comes along."""

    preload: tuple[str, ...]
    sys_path: list[str]
    private_root: str


class Opened(NamedTuple):
    """The session is open, the modules are imported."""


class Refused(NamedTuple):
    """What was asked for last has failed."""

    why: str


class Fork(NamedTuple):
    """Start a worker. Descriptors along with it: its boot record (a memfd), stdout, stderr, then those it finds from `FIRST_FD` on.

    ``execs`` runs a fresh interpreter in it.
    """

    rank: int
    execs: bool


class Forked(NamedTuple):
    """The worker runs."""

    rank: int
    pid: int


class Signal(NamedTuple):
    """Send a signal to one rank's process, or, without a rank, to the process groups of all workers of the session."""

    number: int
    rank: int | None


class Exited(NamedTuple):
    """A worker has ended; ``code`` is the exit code, or ``-signal``."""

    rank: int
    pid: int
    code: int


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


class _Child(NamedTuple):
    rank: int
    pid: int
    pidfd: int


class _Session:
    def __init__(self, sock: socket.socket, private_root: str) -> None:
        self.sock, self.private_root = sock, private_root
        self.children: dict[int, _Child] = {}  # by pidfd

    def tell(self, record: tuple[Any, ...]) -> None:
        with contextlib.suppress(OSError):  # a driver that is gone is noticed by the poll
            self.sock.send(pickle.dumps(record))


class _Server:
    def __init__(self, main: socket.socket, driver: int) -> None:
        self._main, self._driver = main, driver
        self._sessions: dict[int, _Session] = {}  # by descriptor of the socket
        self._poll = select.poll()
        for fd in (main.fileno(), driver):
            self._poll.register(fd, select.POLLIN)

    def serve(self) -> None:
        """Until the driver ends or closes the main socket."""
        try:
            while self._turn():
                continue
        finally:
            for session in list(self._sessions.values()):
                self._end(session)

    def _turn(self) -> bool:
        for fd, _ in self._poll.poll():
            if fd == self._driver:
                return False
            if fd == self._main.fileno():
                if not self._open():
                    return False
            elif fd in self._sessions:
                self._request(self._sessions[fd])
            else:
                self._reap(fd)
        return True

    def _open(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._main, MAX_BYTES, MAX_FDS)
        if not data:
            return False
        asked: Open = pickle.loads(data)
        session = _Session(socket.socket(fileno=fds[0]), asked.private_root)
        self._sessions[fds[0]] = session
        self._poll.register(fds[0], select.POLLIN)
        session.tell(_preload(asked.preload, asked.sys_path))
        return True

    def _request(self, session: _Session) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(session.sock, MAX_BYTES, MAX_FDS)
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self._end(session)
            return
        asked = pickle.loads(data)
        if isinstance(asked, Signal):
            for child in session.children.values():
                if asked.rank is None:
                    _kill(child.pid, asked.number)
                elif asked.rank == child.rank:
                    os.kill(child.pid, asked.number)
        else:
            try:
                session.tell(self._fork(session, asked, fds))
            except OSError as error:
                session.tell(Refused(f"fork failed: {error.strerror} (a limit on processes or memory?)"))
        for fd in fds:
            os.close(fd)

    def _fork(self, session: _Session, asked: Fork, fds: Sequence[int]) -> Forked | Refused:
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1 and not asked.execs:
            return Refused(
                f"the fork server has {threads} threads, so a fork of it could hang; a module in RpcConfig.preload starts threads "
                "or computes when it is imported: take it out, or use start_method='spawn'"
            )
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_worker(server, asked, fds)
        with contextlib.suppress(OSError):  # the child has done it itself, and may be past an exec
            os.setpgid(pid, pid)
        # Opened before anybody reaps, so it can only be this process.
        child = _Child(asked.rank, pid, os.pidfd_open(pid))
        session.children[child.pidfd] = child
        self._poll.register(child.pidfd, select.POLLIN)
        return Forked(asked.rank, pid)

    def _reap(self, pidfd: int) -> None:
        session = next((s for s in self._sessions.values() if pidfd in s.children), None)
        if session is not None:
            self._poll.unregister(pidfd)
            session.tell(_reaped(session.children.pop(pidfd)))

    def _end(self, session: _Session) -> None:
        self._poll.unregister(session.sock.fileno())
        del self._sessions[session.sock.fileno()]
        for child in session.children.values():
            _kill(child.pid, signal.SIGKILL)
        for child in session.children.values():
            self._poll.unregister(child.pidfd)
            session.tell(_reaped(child))
        session.sock.close()
        if session.private_root:
            shutil.rmtree(session.private_root, ignore_errors=True)


def _reaped(child: _Child) -> Exited:
    """Waits for the end of ``child``, ends its process group too, and says how it ended."""
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    _kill(child.pid, signal.SIGKILL)  # before the pid can be used again
    status = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    os.close(child.pidfd)
    assert status is not None  # without WNOHANG there is always one
    code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
    return Exited(child.rank, child.pid, code)


def _kill(pid: int, number: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, number)


def _preload(modules: Sequence[str], sys_path: Sequence[str]) -> Opened | Refused:
    sys.path.extend(entry for entry in sys_path if entry not in sys.path)  # last: the standard library wins
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            return Refused(f"module {name!r} of RpcConfig.preload cannot be imported in the fork server: {why}")
    gc.collect()
    gc.freeze()  # keeps what is shared with the workers out of their collections, which would copy its pages
    return Opened()


def _be_worker(server: int, asked: Fork, fds: Sequence[int]) -> NoReturn:
    """In the forked child: cuts every tie to the server, then runs the boot record. Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it died before the line above
            os._exit(1)
        _take_descriptors(fds)
        if asked.execs:
            program = f"from exec_mp._forkserver import boot; boot({FIRST_FD})"
            os.execv(sys.executable, [sys.executable, "-P", "-c", _with_path(program)])
        code = boot(FIRST_FD)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _take_descriptors(fds: Sequence[int]) -> None:
    """Puts stdout and stderr in place, the boot record and the rest from `FIRST_FD` on, and closes everything else."""
    boot_fd, stdout, stderr, *rest = fds
    order = [stdout, stderr, boot_fd, *rest]
    high = [os.dup2(fd, place, inheritable=True) for place, fd in enumerate(order, start=max(fds) + 1)]
    for place, fd in enumerate(high, start=1):
        os.dup2(fd, place, inheritable=True)
    os.closerange(1 + len(order), max(map(int, os.listdir("/proc/self/fd"))) + 1)


def _with_path(program: str) -> str:
    """``program`` for a fresh interpreter started with -P: our own packages found as here, the standard library first."""
    return f"import sys; sys.path.extend(p for p in {sys.path!r} if p not in sys.path); {program}"


def boot(fd: int) -> int:
    """Takes over the state in the boot record at ``fd`` and runs its entry; the exit code."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        record: Boot = pickle.load(file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
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


def main(main_fd: int, driver_pidfd: int) -> None:
    """The server process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module("exec_mp._worker_main")  # what every worker needs
    _Server(socket.socket(fileno=main_fd), driver_pidfd).serve()

"""The fork server: a process that imports torch once and forks workers that have it (see `exec_mp._protocol`).

Guarantees:

* It owns its workers. When a session's socket closes, that session's workers and their process groups are killed and its
  private directory is swept; when the driver ends (its pidfd says so, or the main socket closes), so are all, and the server
  ends. EOF alone would not do: a forked child of the driver keeps the sockets open.
* What a worker has started outside of its process group becomes the server's child when the worker ends, and is killed once
  no worker is left.
* When the server itself is killed, the kernel kills the workers (PR_SET_PDEATHSIG).

It assumes that it has one thread whenever it forks, and checks: a preloaded module that computes or starts threads would leave
locks behind that no child could ever take.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from exec_mp import _proc
from exec_mp._boot import be_worker, buffer_lines, flush_buffers
from exec_mp._protocol import MAX_BYTES, MAX_FDS, STACK_SIGNAL, Exited, Fork, Forked, Open, Opened, Refused, Signal

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)

_SWEEP_MS = 10_000  # how often zombies that nobody reports are looked for
_ORPHANS_S = 1.0  # for killed orphans to end; one stuck in the kernel must not stop the server
_THREAD_EXIT_S = 0.1  # a thread that was joined still counts for a moment


class _Child(NamedTuple):
    rank: int
    pid: int
    pidfd: int


class _Session:
    def __init__(self, sock: socket.socket, private_root: str) -> None:
        self.sock, self.private_root = sock, private_root
        self.children: dict[int, _Child] = {}  # by pidfd

    def tell(self, record: tuple[Any, ...], fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(OSError):  # a driver that is gone is noticed by the poll
            socket.send_fds(self.sock, [pickle.dumps(record)], fds)

    def kill(self) -> None:
        for child in self.children.values():
            _kill(child.pid, signal.SIGKILL)


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
                _reap_zombies({child.pid for session in self._sessions.values() for child in session.children.values()})
        finally:
            self.end()

    def end(self) -> None:
        """Kills all workers first, then waits for them: together they end sooner than one after the other."""
        for session in self._sessions.values():
            session.sock.shutdown(socket.SHUT_RDWR)  # before the deaths: they are to be put down to this
            session.kill()
        for session in list(self._sessions.values()):
            self._end(session)

    def _turn(self) -> bool:
        for fd, _ in self._poll.poll(_SWEEP_MS):
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
        if not fds:  # no descriptor left for it: its sender sees the other end close
            return True
        asked: Open = pickle.loads(data)
        session = _Session(socket.socket(fileno=fds[0]), asked.private_root)
        self._sessions[fds[0]] = session
        self._poll.register(fds[0], select.POLLIN)
        with contextlib.nullcontext() if sys.modules.keys() >= {*asked.preload} else self._watched():
            answer = _preload(asked.preload, asked.sys_path)
        flush_buffers()  # first: who gets the answer looks what has been written
        session.tell(answer)
        return True

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Looks after the driver on a thread while an import, of seconds perhaps, keeps this one from it."""
        imported = os.eventfd(0, os.EFD_CLOEXEC)

        def watch() -> None:
            poll = select.poll()
            poll.register(self._main, select.POLLRDHUP)
            for fd in (self._driver, imported):
                poll.register(fd, select.POLLIN)
            if all(fd != imported for fd, _ in poll.poll()):
                self.end()
                os._exit(0)

        thread = threading.Thread(target=watch, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a limit on threads: then the driver's end is noticed after the import
            yield
        else:
            try:
                yield
            finally:
                os.eventfd_write(imported, 1)
                thread.join()
        finally:
            os.close(imported)

    def _request(self, session: _Session) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(session.sock, MAX_BYTES, MAX_FDS, socket.MSG_DONTWAIT)
        except BlockingIOError:  # its descriptor's number was another's when the poll returned
            return
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self._end(session)
            return
        asked = pickle.loads(data)
        if isinstance(asked, Signal):
            for child in session.children.values():
                _kill(child.pid, asked.number)
        else:
            try:
                self._fork(session, asked, fds)
            except OSError as error:
                session.tell(Refused(f"fork failed: {error.strerror} (a limit on processes, memory or open files?)"))
        for fd in fds:
            os.close(fd)

    def _fork(self, session: _Session, asked: Fork, fds: Sequence[int]) -> None:
        if len(fds) != asked.descriptors:
            session.tell(
                Refused(
                    f"{len(fds)} of {asked.descriptors} descriptors arrived: raise the limit on open files (ulimit -n)"
                )
            )
            return
        if not asked.execs and (threads := _threads()) > 1:
            session.tell(Refused(
                f"the fork server has {threads} threads, so a fork of it could hang; a module in RpcConfig.preload starts threads "
                "or computes when it is imported: take it out, or use start_method='spawn'"
            ))  # fmt: skip
            return
        server = os.getpid()
        flush_buffers()
        pid = os.fork()
        if pid == 0:
            be_worker(server, asked.execs, fds)
        with contextlib.suppress(OSError):  # the child has done it itself, and may be past an exec
            os.setpgid(pid, pid)
        try:
            child = _Child(asked.rank, pid, os.pidfd_open(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        session.children[child.pidfd] = child
        self._poll.register(child.pidfd, select.POLLIN)
        session.tell(Forked(asked.rank, pid), [child.pidfd])

    def _reap(self, pidfd: int) -> None:
        session = next((s for s in self._sessions.values() if pidfd in s.children), None)
        if session is not None:
            self._poll.unregister(pidfd)
            session.tell(_reaped(session.children.pop(pidfd)))
            self._end_orphans()

    def _end(self, session: _Session) -> None:
        self._poll.unregister(session.sock.fileno())
        del self._sessions[session.sock.fileno()]
        session.kill()
        for child in session.children.values():
            self._poll.unregister(child.pidfd)
            _reaped(child)
        session.sock.close()
        if session.private_root:
            shutil.rmtree(session.private_root, ignore_errors=True)
        self._end_orphans()

    def _end_orphans(self) -> None:
        """Once no worker is left: ends the processes that workers have started and moved out of their process groups."""
        if any(session.children for session in self._sessions.values()):
            return
        until = time.monotonic() + _ORPHANS_S
        while _has_children() and time.monotonic() < until:
            for pid in _proc.children():
                _kill(pid, signal.SIGKILL)
            _reap_zombies(set())
            time.sleep(0.001)


def _threads() -> int:
    until = time.monotonic() + _THREAD_EXIT_S
    while (count := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < until:
        time.sleep(0.001)
    return count


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _reap_zombies(workers: set[int]) -> None:
    """Reaps adopted processes that have ended, up to the first of ``workers``, whose end has its own way."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in workers:
            os.waitpid(ended.si_pid, 0)


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
    kills: tuple[Callable[[int, int], None], ...] = (os.killpg, os.kill)
    for kill in kills:
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


def main(main_fd: int, driver_pidfd: int) -> NoReturn:
    """The server process. It leaves without the interpreter's clean-up, which would only delay the end of everything."""
    code = 1
    try:
        buffer_lines()
        faulthandler.enable(all_threads=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # workers may write to the driver's terminal
        signal.signal(STACK_SIGNAL, signal.SIG_IGN)  # in a worker too, until it can answer
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for module in ("exec_mp._worker_main", "exec_core.stores"):  # what workers need
            importlib.import_module(module)
        _Server(socket.socket(fileno=main_fd), driver_pidfd).serve()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        flush_buffers()
        os._exit(code)

"""Errors, named by who caused them.

Each class keeps its facts as attributes, survives pickling (also with custom constructors, notes included), and says in
``str(error)`` alone what happened, where, and what to do next: some hosts show nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence


class ExecutorError(Exception):
    """Base of every error that this library raises on its own account."""

    def __reduce__(self) -> tuple[object, ...]:
        # The default calls ``cls(*args)`` again, which fails for constructors with keyword facts.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls: type[ExecutorError], args: tuple[object, ...], facts: dict[str, object]) -> ExecutorError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class ConfigError(ExecutorError, ValueError):
    """A configuration value breaks a rule.

    Attributes:
        field: dotted name of the field, such as ``ParallelConfig.tensor_parallel_size``.
        rule: what the field must be.
        value: what it was (its repr when it could not be sent between processes).
    """

    def __init__(self, field: str, rule: str, value: object, remedy: str = "") -> None:
        self.field, self.rule, self.value = field, rule, value
        super().__init__(f"{field} {rule}, got {value!r}" + (f"; {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[object, ...]:
        try:
            pickle.dumps(self.value)
        except Exception:
            return _rebuild, (type(self), self.args, {**self.__dict__, "value": repr(self.value)})
        return super().__reduce__()


class BackendNotFoundError(ExecutorError, LookupError):
    """No installed package provides the requested backend.

    Attributes:
        backend: the name asked for.
        available: the names that are installed.
    """

    def __init__(self, backend: str, available: Sequence[str], remedy: str) -> None:
        self.backend, self.available = backend, tuple(available)
        installed = ", ".join(self.available) or "none"
        super().__init__(f"no executor backend {backend!r} is installed (installed: {installed}); {remedy}")


class DeviceError(ExecutorError):
    """Fewer devices than the configuration needs, or a device that is not there.

    Attributes:
        requested: devices asked for (one per rank on this machine).
        found: devices that the workers would see.
        hidden_by: ``NAME=value`` of the environment variable that hides devices, or None.
    """

    def __init__(self, what: str, requested: int, found: int, hidden_by: str | None, remedy: str) -> None:
        self.requested, self.found, self.hidden_by = requested, found, hidden_by
        hidden = f" ({hidden_by} hides the others)" if hidden_by else ""
        super().__init__(f"{what}: {requested} requested, {found} found{hidden}; {remedy}")


class SerializationError(ExecutorError, pickle.PicklingError, TypeError):
    """Something in a message cannot be pickled. Nothing was sent.

    Attributes:
        path: where it sits, such as ``args[0]['lock']``.
    """

    def __init__(self, path: str, what: str, remedy: str = "") -> None:
        self.path = path
        super().__init__(f"{path} cannot be pickled: {what}" + (f"; {remedy}" if remedy else ""))


class MessageTooLargeError(ExecutorError, ValueError):
    """A message, a request or a result, exceeds a limit and was not sent.

    Attributes:
        nbytes: size of the message in bytes.
        limit: the limit in bytes.
    """

    def __init__(self, what: str, nbytes: int, limit: int, remedy: str) -> None:
        self.nbytes, self.limit = nbytes, limit
        super().__init__(f"{what} takes {nbytes} bytes, the limit is {limit}; {remedy}")


class ExecutorBusyError(ExecutorError):
    """There is no room for one more call now; nothing was sent.

    Attributes:
        method: the call refused.
        in_flight: calls in flight.
        limit: ``RpcConfig.max_in_flight``.
    """

    def __init__(self, method: str, why: str, in_flight: int, limit: int, remedy: str) -> None:
        self.method, self.in_flight, self.limit = method, in_flight, limit
        super().__init__(f"{method!r} was not sent: {why} ({in_flight} of {limit} calls in flight); {remedy}")


class ExecutorClosedError(ExecutorError):
    """The executor is closing or closed, or belongs to another process.

    Attributes:
        method: the call refused or abandoned, or None.
    """

    def __init__(self, why: str, method: str | None = None) -> None:
        self.method = method
        super().__init__((f"{method!r}: " if method else "") + why)


class ExecutorFailedError(ExecutorError):
    """A call after a worker's death. ``__cause__`` is the failure itself.

    Attributes:
        method: the call refused, or None.
    """

    def __init__(self, failure: BaseException, method: str | None = None) -> None:
        self.method = method
        called = f"{method!r} was not sent: " if method else ""
        remedy = "" if "restart()" in str(failure) else "; call restart() or shutdown()"  # once is enough
        super().__init__(f"{called}the executor has failed ({failure}){remedy}")


class WorkerStartupError(ExecutorError):
    """A worker did not become ready. ``__cause__`` is the original error where there is one.

    Attributes:
        rank: the first rank to fail, or None when no single rank did (a fork server that cannot start, say).
        phase: ``launch``, ``init_worker``, ``init_device`` or ``load_model``.
        pid: process of that rank, or None.
    """

    def __init__(self, rank: int | None, phase: str, why: str, pid: int | None = None, remedy: str = "") -> None:
        self.rank, self.phase, self.pid = rank, phase, pid
        who = "the workers" if rank is None else f"rank {rank}" + (f" (pid {pid})" if pid else "")
        super().__init__(f"{who} failed in {phase}: {why}" + (f"; {remedy}" if remedy else ""))


class WorkerDiedError(ExecutorError):
    """A worker process ended while it was needed. It names the first worker to fail, by time.

    Attributes:
        rank, pid: the worker; None when all went at once, with the process that forked them.
        exit_code: its exit code, or None when a signal ended it or the code is unknown.
        signal_name: such as ``SIGKILL``, or None.
        method, request_id: the call it was in, and its number in the logs; None when idle.
        last_log_lines: what it last wrote, oldest first.
    """

    def __init__(
        self,
        rank: int | None,
        pid: int | None,
        *,
        exit_code: int | None = None,
        signal_name: str | None = None,
        method: str | None = None,
        request_id: int | None = None,
        last_log_lines: Sequence[str] = (),
        why: str = "",
        remedy: str = "call restart() or shutdown(), or set RpcConfig.max_restarts",
    ) -> None:
        self.rank, self.pid, self.exit_code, self.signal_name = rank, pid, exit_code, signal_name
        self.method, self.request_id, self.last_log_lines, self.why = method, request_id, tuple(last_log_lines), why
        super().__init__(self.described(remedy))

    def described(self, remedy: str = "") -> str:
        """What happened, what to do about it, and what the worker last wrote."""
        if self.signal_name is not None:
            how = f"was killed by {self.signal_name}"
        elif self.exit_code is not None:
            how = f"exited with code {self.exit_code}"
        else:
            how = "is gone, exit code unknown"
        where = f" in {self.method!r}" if self.method else " while idle"
        text = "all workers are gone" if self.rank is None else f"rank {self.rank} (pid {self.pid}) {how}{where}"
        text += (f": {self.why}" if self.why else "") + (f"; {remedy}" if remedy else "")
        return text + ("; its last lines:\n  " + "\n  ".join(self.last_log_lines) if self.last_log_lines else "")


class RpcTimeoutError(ExecutorError, TimeoutError):
    """A call's deadline passed. The executor stays usable; the late replies are dropped.

    Attributes:
        method, request_id: the call, and its number in the logs where it has one.
        timeout_s: its limit in seconds.
        answered_ranks, pending_ranks: who has acknowledged and who has not.
        pids: processes of the pending ranks, by rank, where they are known.
        stacks: Python stack of each pending rank that could be asked, by rank.
    """

    def __init__(
        self,
        method: str,
        timeout_s: float,
        answered_ranks: Sequence[int],
        pending_ranks: Sequence[int],
        stacks: Mapping[int, str] | None = None,
        why: str = "",
        pids: Mapping[int, int] | None = None,
        request_id: int | None = None,
    ) -> None:
        self.method, self.timeout_s, self.request_id = method, timeout_s, request_id
        self.answered_ranks, self.pending_ranks = tuple(answered_ranks), tuple(pending_ranks)
        self.stacks, self.why = dict(stacks or {}), why
        self.pids = {rank: pids[rank] for rank in self.pending_ranks if rank in pids} if pids else {}
        pending = ", ".join(f"{r} (pid {self.pids[r]})" if r in self.pids else str(r) for r in self.pending_ranks)
        text = (
            f"{method!r} took longer than {timeout_s:g} s" + (f" ({why})" if why else "") + ": "
            f"ranks [{pending}] have not answered, ranks {list(self.answered_ranks)} have; "
            "raise the timeout, or see check_health() and workers for what they are doing"
        )
        for rank, stack in self.stacks.items():
            text += f"\nrank {rank}:\n{stack.rstrip()}"
        super().__init__(text)

    def with_stacks(self, stacks: Mapping[int, str]) -> RpcTimeoutError:
        """The same error with the stacks of the pending ranks."""
        ranks = self.answered_ranks, self.pending_ranks
        return RpcTimeoutError(self.method, self.timeout_s, *ranks, stacks, self.why, self.pids, self.request_id)


class RankDivergenceError(ExecutorError):
    """Ranks of an SPMD program issued different calls.

    Attributes:
        calls: the first differing call of each rank, by rank.
    """

    def __init__(self, calls: Mapping[int, str], remedy: str = "run the same calls in the same order") -> None:
        self.calls = dict(calls)
        listed = ", ".join(f"rank {rank}: {call}" for rank, call in sorted(self.calls.items()))
        super().__init__(f"ranks diverged: {listed}; {remedy}")


class WorkerError(ExecutorError):
    """An error of worker code that cannot arrive as its own type.

    That is: a SystemExit or KeyboardInterrupt, or an exception that cannot be pickled there or loaded here.

    Attributes:
        rank, pid, method: where it happened.
        type_name, text: the original's type and ``str``.
        traceback: the remote traceback as text.
    """

    def __init__(
        self, rank: int, pid: int, method: str, type_name: str, text: str, traceback: str = "", why: str = ""
    ) -> None:
        self.rank, self.pid, self.method = rank, pid, method
        self.type_name, self.text, self.traceback = type_name, text, traceback
        super().__init__(f"rank {rank} (pid {pid}) in {method!r}: {type_name}: {text}" + (f" ({why})" if why else ""))


class WorldJoinError(ExecutorError):
    """A rank has left its world and could not join another one.

    Attributes:
        rank, world_size: in the world that it wanted to join.
        address: where that meets.
        is_alone: it is a world of its own again, and goes on; otherwise it belongs to no world.
    """

    def __init__(self, rank: int, world_size: int, address: str, why: str, is_alone: bool) -> None:
        self.rank, self.world_size, self.address, self.is_alone = rank, world_size, address, is_alone
        now = "it is on its own again" if is_alone else "it belongs to no world now; call restart() or shutdown()"
        super().__init__(f"rank {rank} of {world_size} could not join the world at {address}: {why}; {now}")


class RemoteTraceback(Exception):  # noqa: N818 # not an error itself: where one came from
    """The traceback of another process, as text; the ``__cause__`` of an error that came from a worker."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return f"\n{self.text}"

"""`ExecutorWithExternalLauncher`: one worker in each process that a launcher has started, on any number of machines."""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs

from exec_core import devices, messages
from exec_core.base import OnProgress
from exec_core.config import CacheConfig, ExecutorConfig, ParallelConfig
from exec_core.context import WorkerInit
from exec_core.devices import Placement
from exec_core.errors import ConfigError, ExecutorError
from exec_core.executor import Executor
from exec_core.lifecycle import State
from exec_torchrun._env import LauncherEnv, read_env
from exec_torchrun._group import SpmdGroup, SpmdLoop
from exec_torchrun._guard import GuardedWrapper
from exec_torchrun._meeting import Meeting, Report, meet
from exec_torchrun._plan import Plan, diverged
from exec_torchrun._sockets import Patience
from exec_torchrun._store import warn_others

_numbers = itertools.count()  # of this process's executors: all ranks make theirs in the same order
_exiting = False


class ExecutorWithExternalLauncher(Executor):
    """Runs the worker of this process's rank. Every rank runs the same program and makes the same calls.

    torchrun, Slurm or another launcher has started the processes and set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT. A default process group that the program has made already is used. The executor is one replica: its
    ``world_size``, ``ranks`` and ``reply_ranks`` count the replica's ranks.

    A call runs here and returns a list with this rank's value; `execute_model` returns the value of `output_rank` on every
    rank. Methods run in the calling thread and cannot be interrupted.

    To change what follows, derive a class and name it as ``ExecutorConfig.backend``.

    Attributes:
        divergence_timeout_s: how long the ranks of a replica may be apart when they come to a call, in seconds. Then, or at
            once when they come with different calls, each raises `RankDivergenceError`. None: calls are not compared, and
            an error or a death is raised by its own rank only, and by the others when they next exchange anything.
        error_grace_s: how long ranks may stay in a call that one of them has raised in, in seconds. Then they count as waiting
            for it in a collective: all give up their process groups, which frees them, and the executors are FAILED.
        gather: whether calls return the values of all ranks where they do not say.
    """

    backend: ClassVar[str] = "torchrun"
    _call_type = Plan
    divergence_timeout_s: ClassVar[float | None] = 4.0
    error_grace_s: ClassVar[float] = 5.0
    gather: ClassVar[bool] = False

    def __init__(self, config: ExecutorConfig, *, on_progress: OnProgress | None = None) -> None:
        self._number = next(_numbers)
        self._patience: Patience | None = None  # of the start in progress, or the last one
        super().__init__(config, on_progress=on_progress)

    def _reset(self) -> None:
        super()._reset()
        self._loop = SpmdLoop(self)

    def _launch(self, deadline: float) -> SpmdGroup:
        name = f"{self._number}-{self.generation}"
        patience = self._patience = Patience(deadline)
        if self.state is not State.STARTING:  # shut down before there was anything to interrupt
            patience.give_up()
        try:
            env = read_env(self._config.parallel)
        except ConfigError as wrong:
            warn_others(name, b"".join(messages.encode_error(wrong).parts), patience)
            raise
        report, placement = self._report(env)
        meeting = meet(env, name, report, patience, self.error_grace_s)
        try:
            self._check(meeting)
            assert placement is not None  # or the report had an error
            init = self._init(env, placement, meeting.init_method)
            wrapper = GuardedWrapper(
                env.rank, env.index, env.replica_size, meeting.link,
                apart_s=self.divergence_timeout_s, barrier_s=self._config.parallel.distributed_timeout_s,
                failed=lambda error: self._fail(error, lambda: None),
                progress=lambda *reported: self._report_progress(env.rank, *reported),
            )  # fmt: skip
            return SpmdGroup(init, self._room, self._report_progress, wrapper, self.gather)
        except BaseException:
            if meeting.link is not None:
                meeting.link.close()
            raise

    def _interrupt_launch(self) -> None:
        if self._patience is not None:
            self._patience.give_up()

    def _report(self, env: LauncherEnv) -> tuple[Report, Placement | None]:
        """What the other ranks have to know of this one before anything is started: above all, why it cannot."""
        config, placement, error = _described(self._config, self.divergence_timeout_s), None, b""
        try:
            placement = devices.place(
                self._config.device, self._config.parallel, env.least_local_size, count=devices.count_in_this_process
            )
        except ExecutorError as wrong:
            error = b"".join(messages.encode_error(wrong).parts)
        return Report(env.rank, os.getpid(), config, error), placement

    def _check(self, meeting: Meeting) -> None:
        for report in meeting.reports:
            if report.error:
                body = memoryview(report.error)
                raise messages.decode_error(body, messages.Format.PICKLE, report.rank, report.pid, "launch")
        if len({report.config for report in meeting.reports}) > 1:
            raise diverged({report.rank: report.config for report in meeting.reports}, None)

    def _init(self, env: LauncherEnv, placement: Placement, init_method: str | None) -> WorkerInit:
        local_rank = env.local_rank
        index = devices.index_in_this_process(placement, local_rank) if placement.kind == "cuda" else local_rank
        return WorkerInit(
            config=self._config,
            rank=env.rank,
            local_rank=local_rank,
            distributed_init_method=init_method,
            device_name={"cuda": f"cuda:{index}", "cpu": "cpu", "none": None}[placement.kind],
            private_root=self._private_root,
            executor=self._name,
            backend=self.backend,
            generation=self.generation,
            in_driver=True,
            existing_group="use",
        )

    def collective_rpc(  # one signature for the four overloads of the base: a caller who wants their types has the base's
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        non_block: bool = False,
        *,
        ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None,
        max_concurrent_workers: int | None = None,
        aggregate: Callable[[list[Any]], Any] | None = None,
        gather: bool | None = None,
    ) -> Any:
        """Runs ``method`` on this rank, as every rank does; returns a list with its value.

        Args:
            gather: return the values of all ranks, or of ``reply_ranks`` where given, on every rank; they are pickled, but
                for this rank's own. None: the class's `gather`. Values of explicit ``reply_ranks`` are always gathered.

        The other arguments are those of `Executor.collective_rpc`. An argument that may differ between ranks is passed as
        `exec_torchrun.PerRank`.

        Raises:
            RankDivergenceError: the ranks make different calls; none has run.
            Exception: what the first rank to fail has raised, on every rank.
        """
        call = self._new_call(method, timeout, args, kwargs, ranks, reply_ranks, max_concurrent_workers, aggregate)
        assert isinstance(call, Plan)  # see `_call_type`
        call.gather = gather
        group = self._group or self._open_group(call)
        return group.submit(call, wait=True) if non_block else group.run(call)

    def _profiled_blocks(self, timeout: float) -> list[Any]:
        # Free memory differs between ranks. Their link takes the answers to all: unlike a collective it needs no process group.
        answers: list[Any] = self.collective_rpc("determine_num_available_blocks", timeout, gather=True)
        return answers

    def check_health(self) -> None:
        """Raises as that of `Executor` does, also when another rank of the replica has gone since the last call."""
        if isinstance(self._group, SpmdGroup):
            self._group.check()
        super().check_health()

    def shutdown(self) -> None:
        """Closes, whatever the state, together with the other ranks or without them after ``shutdown_timeout_s``.

        Raises:
            RankDivergenceError: the others went on to a call that this rank has not made. It is closed all the same.
        """
        group = self._group
        super().shutdown()
        if isinstance(group, SpmdGroup) and group.divergence is not None and not _exiting:
            raise group.divergence

    def __exit__(self, *exc: object) -> None:
        try:
            self.shutdown()
        except ExecutorError:
            if exc[0] is None:
                raise


def _described(config: ExecutorConfig, apart_s: float | None) -> str:
    """What must be the same on all ranks, in words."""
    worker = config.worker_cls
    name = worker if isinstance(worker, str) else getattr(worker, "__qualname__", type(worker).__qualname__)
    sections: dict[str, ParallelConfig | CacheConfig] = {"parallel": config.parallel, "cache": config.cache}
    changed = [
        f"{section}.{field.name}={getattr(values, field.name)!r}"
        for section, values in sections.items()
        for field in attrs.fields(type(values))
        if getattr(values, field.name) != field.default
    ]
    return ", ".join(
        [f"worker_cls={name}", *changed, f"output_rank={config.output_rank}", f"divergence_timeout_s={apart_s}"]
    )


@atexit.register
def _note_exit() -> None:
    """Runs before the executors are closed at exit, where nobody could catch what closing raises."""
    global _exiting
    _exiting = True

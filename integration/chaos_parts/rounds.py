"""One round: an executor, callers, and something that goes wrong at a moment of its life."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs

import exec_core
import exec_mp
from chaos_parts.faults import Fault, children, choose, fork_server
from chaos_parts.load import Callers
from chaos_parts.worker import ChaosWorker
from exec_core import ExecutorError, State
from exec_core.testing import eventually

BOUND_S = 40.0  # for a start, a restart or a shutdown to come to its end
SHUTDOWN_S = 2.0
CLOSABLE = (1, 2, 4, 5, 6, 7, 8, 9)  # a worker's standard streams and its channel; 3 was its boot record

MIXED = ("blocking", "subset", "future", "tasks", "health")
MOMENTS: dict[str, tuple[str, ...]] = {  # and which calls are made in it
    "start": (),
    "load": (),
    "idle": (),
    "in a call": (*MIXED, "slow"),
    "in a large message": ("large", "large", "blocking"),
    "in a collective": ("collective", "collective", "blocking"),
    "with a full ring": ("future", "tasks", "blocking"),
    "with a slow rank": ("slow", "timeout", "blocking", "future", "health"),
    "with odd errors": ("odd", "unpicklable", "blocking", "timeout"),
    "with a closed descriptor": (*MIXED, "large"),
    "in a restart": MIXED,
    "in shutdown": (*MIXED, "large", "slow"),
}


@attrs.define
class Round:
    """What was done, and what came of it.

    Attributes:
        wrong: what must not have happened.
    """

    text: str
    outcome: str = ""
    wrong: list[str] = attrs.field(factory=list)


def play(seed: str, *, stops: bool = True) -> Round:
    """Plays the round of this seed in this process, which is the driver.

    Args:
        stops: whether processes may be stopped for a while: not when nobody may be left to continue them.
    """
    dice = random.Random(seed)
    moment = dice.choice(list(MOMENTS))
    world = dice.choice([1, 2, 2, 3])
    within_s = 0.3 if moment in {"start", "load"} else 0.08
    fault = choose(dice, ("worker", "worker", "worker", "fork server"), within_s, stops=stops)
    if moment in {"with odd errors", "with a full ring"} and dice.random() < 0.5:
        fault = attrs.evolve(fault, number=None)
    executing = _Execution(dice, seed, moment, world, fault)
    played = Round(f"{world} ranks, {moment}, {executing.what}")
    threading.excepthook = lambda args: played.wrong.append(
        f"{args.thread}: {args.exc_type.__name__}: {args.exc_value}"
    )
    try:
        played.outcome = executing.run()
    finally:
        threading.excepthook = threading.__excepthook__
    played.wrong += executing.wrong
    return played


def config(dice: random.Random, moment: str, world: int) -> exec_core.ExecutorConfig:
    """An executor for ``moment``; what does not matter to it is left to the dice."""
    slow_load = 0.2 if moment in {"load", "in a restart"} else 0.0
    gloo = moment == "in a collective"
    return exec_core.ExecutorConfig(
        worker_cls=ChaosWorker,
        worker_kwargs={"load_s": dice.random() * slow_load},
        parallel=exec_core.ParallelConfig(tensor_parallel_size=world),
        device=exec_core.DeviceConfig(device="cpu", threads_per_worker=1, distributed_backend=None if gloo else "none"),
        rpc=exec_core.RpcConfig(
            preload=("torch",) if gloo else (),
            startup_timeout_s=BOUND_S,
            shutdown_timeout_s=SHUTDOWN_S,
            max_in_flight=2 if moment == "with a full ring" else None,
            max_restarts=dice.choice([0, 0, 1]) if moment == "in a restart" else 0,
            inline_bytes=dice.choice([512, 20 * 1024]),
        ),
        log=exec_core.LogConfig(level="critical", format="json"),
    )


class _Execution:
    def __init__(self, dice: random.Random, seed: str, moment: str, world: int, fault: Fault) -> None:
        self.wrong: list[str] = []
        self._dice, self._seed, self._moment, self._fault = dice, seed, moment, fault
        self._config = config(dice, moment, world)
        self._closed = (dice.choice(CLOSABLE), dice.randrange(world))
        self._told: list[BaseException] = []
        self._executor: exec_core.Executor | None = None
        if moment == "with a closed descriptor":
            self.what = f"descriptor {self._closed[0]} of rank {self._closed[1]}"
        else:
            self.what = str(fault)

    def run(self) -> str:
        """Plays it to its end; in a few words what happened."""
        exec_mp.prestart(())  # a round may have ended it
        server = fork_server()
        if self._moment in {"start", "load"}:
            thread = self._in_background(lambda: self._fault.strike(self._victims(server)))
        started = self._bounded("start", self._start)
        if self._moment in {"start", "load"}:
            thread.join()
        if self._executor is None:
            return started
        self._executor.register_failure_callback(self._told.append)
        callers = Callers(self._executor, self._seed, MOMENTS[self._moment] or MIXED, self._dice.randint(1, 3))
        try:
            self._spoil(server)
        finally:
            if self._moment != "in shutdown":
                callers.stop()
            closed = self._bounded("shutdown", self._executor.shutdown, SHUTDOWN_S + 1.0)
            callers.stop()
        self.wrong += callers.wrong
        self._check_end(callers)
        return f"{started}, {dict(sorted(callers.outcomes.items()))}, {closed}"

    def _start(self) -> str:
        try:
            self._executor = exec_core.create_executor(self._config)
        except exec_core.WorkerStartupError as error:
            if not self._fault.ends or self._moment not in {"start", "load"}:
                self.wrong.append(f"did not start: {error}")
            return f"did not start: {str(error).splitlines()[0]:.100}"
        return "started"

    def _spoil(self, server: int) -> None:
        assert self._executor is not None
        if self._moment == "with a closed descriptor":
            time.sleep(self._fault.delay_s)
            try:
                self._executor.collective_rpc("close", 20.0, self._closed, ranks=[self._closed[1]])
            except (exec_core.WorkerDiedError, exec_core.ExecutorFailedError, OSError):
                return
        elif self._moment == "in a restart":
            self._restart(server)
        elif self._moment == "in shutdown":
            thread = self._in_background(lambda: self._fault.strike(self._victims(server)))
            self._bounded("shutdown", self._executor.shutdown, SHUTDOWN_S + 1.0)
            thread.join()
        elif self._moment not in {"start", "load"} and self._fault.number is not None:
            self._fault.strike(self._victims(server))
        time.sleep(self._dice.random() * 0.1)

    def _restart(self, server: int) -> None:
        assert self._executor is not None
        os.kill(self._executor.workers[0].pid, 9)
        executor = self._executor
        eventually(lambda: executor.state is not State.READY or executor.generation > 0)
        thread = self._in_background(lambda: self._fault.strike(self._victims(server)))
        if self._config.rpc.max_restarts:
            eventually(lambda: executor.state is not State.STARTING, deadline_s=BOUND_S)
        else:
            self._bounded("restart", lambda: _quietly(executor.restart))
        thread.join()

    def _victims(self, server: int) -> list[int]:
        if self._fault.victim == "fork server":
            return [server]
        if self._moment in {"start", "load", "in a restart"}:
            return children(server)
        assert self._executor is not None
        return [worker.pid for worker in self._executor.workers]

    def _in_background(self, act: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=act, name="fault")
        thread.start()
        return thread

    def _bounded(self, name: str, act: Callable[[], Any], bound_s: float = BOUND_S) -> str:
        began = time.monotonic()
        said = act()
        took = time.monotonic() - began
        slack_s = self._fault.stopped_s + 10.0  # a busy machine
        if took > bound_s + slack_s:
            self.wrong.append(f"{name} took {took:.1f} s")
        return said or f"{name} {took:.2f} s"

    def _check_end(self, callers: Callers) -> None:
        assert self._executor is not None
        if self._executor.state is not State.CLOSED:
            self.wrong.append(f"state {self._executor.state} after shutdown")
        harmless = not self._fault.ends and self._moment not in {"with a closed descriptor", "in a restart"}
        if harmless and (self._told or callers.outcomes["WorkerDiedError"]):
            self.wrong.append(f"nobody was to die: {self._told}")
        if len(self._told) > 1 + self._executor.generation:
            self.wrong.append(f"told {len(self._told)} times of {1 + self._executor.generation} failures at most")


def _quietly(act: Callable[[], None]) -> None:
    try:
        act()
    except ExecutorError:
        return

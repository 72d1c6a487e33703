"""A driver to be killed: it starts workers, prints the pids of all that must go with it, and stays.

python driver.py idle|call|collective|gil|load|thread|forked
"""

import os
import sys
import threading
import time
from typing import Any

import exec_core as ec
import exec_mp
from exec_core.testing import faults
from exec_core.testing.workers import EchoWorker

PRELOAD = ("torch",)  # where it is needed: importing it is most of a test's time


class Loading(EchoWorker):
    """Says where it is, and loads for ever."""

    def load_model(self) -> None:
        tell("pid", os.getpid(), faults.start_child(self))
        if self.context.rank == 1:
            tell("ready")
        time.sleep(faults.FOREVER_S)


def tell(*words: object) -> None:
    """One line for the test, whole also when several processes write."""
    os.write(int(os.environ["TELL_FD"]), (" ".join(map(str, words)) + "\n").encode())


def start(mode: str) -> ec.Executor:
    """An executor of two ranks."""
    return ec.create_executor(
        ec.ExecutorConfig(
            worker_cls=Loading if mode == "load" else EchoWorker,
            parallel=ec.ParallelConfig(tensor_parallel_size=2),
            device=ec.DeviceConfig(device="cpu", distributed_backend=None if mode == "collective" else "none"),
            rpc=ec.RpcConfig(preload=PRELOAD if mode == "collective" else ()),
        )
    )


def run(mode: str) -> None:
    """Starts, and says who is there."""
    executor = start(mode)
    pids = executor.collective_rpc(faults.pid_of)
    pids += executor.collective_rpc(faults.start_child)
    pids += executor.collective_rpc(faults.start_child, kwargs={"own_session": True})
    method: dict[str, Any] = {
        "call": faults.nap,
        "gil": faults.hold_gil,
        "collective": faults.collectives_for_ever,
        "thread": faults.nap,
    }
    if mode in method:
        executor.collective_rpc(method[mode], non_block=True)
        while any(worker.method is None for worker in executor.workers):
            time.sleep(0.001)
    tell("pid", *pids)


def main(mode: str) -> None:
    """Runs until it is killed."""
    exec_mp.prestart(PRELOAD if mode == "collective" else ())
    tell("pid", exec_mp._launcher.fork_server().pid)  # no other way to know it
    if mode == "thread":
        thread = threading.Thread(target=run, args=(mode,))
        thread.start()
        thread.join()
    else:
        run(mode)
    if mode == "forked":
        child = os.fork()
        if child == 0:
            time.sleep(faults.FOREVER_S)
            os._exit(0)
        tell("bystander", child)
    tell("ready")
    time.sleep(faults.FOREVER_S)


if __name__ == "__main__":
    main(sys.argv[1])

"""How long it takes until workers are there: `python -m bench.startup WHAT [N]`, a fresh interpreter's line of JSON.

    import-torch        one `import torch`, the least that any first start can take
    import-exec-core    what `import exec_core` takes, and whether torch came with it
    exec-mp, exec-mp-spawn      the first executor of a process (cold), then more of them (warm), and their shutdown
    mp-spawn            `multiprocessing` processes that import torch

``built_s`` is when the last worker's class has been built, before its device and its model; ``ready_s`` when the
executor was returned, process groups included.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Literal

_WARM_STARTS = 5
_SETTLE_S = 0.3  # until the workers sleep


def import_torch() -> dict[str, float]:
    """In this interpreter."""
    began = time.perf_counter()
    import torch  # noqa: F401 # that is what is measured

    return {"seconds": time.perf_counter() - began}


def import_exec_core() -> dict[str, float]:
    """In this interpreter."""
    began = time.perf_counter()
    import exec_core  # noqa: F401 # that is what is measured

    return {"seconds": time.perf_counter() - began, "imports_torch": float("torch" in sys.modules)}


def exec_mp(n: int, start_method: Literal["forkserver", "spawn"]) -> dict[str, float]:
    """Cold, then warm."""
    import exec_core
    from bench.peers.exec_mp_peer import config

    chosen = config(n, rpc=exec_core.RpcConfig(start_method=start_method))

    def once() -> tuple[float, float, float]:
        began = time.monotonic()
        executor = exec_core.create_executor(chosen)
        ready = time.monotonic()
        built: float = max(executor.collective_rpc("built"))
        time.sleep(_SETTLE_S)
        closing = time.monotonic()
        executor.shutdown()
        return built - began, ready - began, time.monotonic() - closing

    cold = once()
    warm = [once() for _ in range(_WARM_STARTS if start_method == "forkserver" else 1)]
    built, ready, shutdown = (statistics.median(values) for values in zip(*warm, strict=True))
    return {
        "built_s": cold[0],
        "ready_s": cold[1],
        "warm_built_s": built,
        "warm_ready_s": ready,
        "shutdown_s": statistics.median([cold[2], shutdown]),
    }


def mp_spawn(n: int) -> dict[str, float]:
    """Until each process has imported torch."""
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe() for _ in range(n)]
    processes = [spawn.Process(target=_spawned, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    for ours, _ in pairs:
        ours.recv()
    ready = time.monotonic()
    for ours, _ in pairs:
        ours.send(None)
    for process in processes:
        process.join()
    return {"built_s": ready - began, "ready_s": ready - began, "shutdown_s": time.monotonic() - ready}


def _spawned(connection: Connection) -> None:
    import torch  # noqa: F401 # as every worker needs it

    connection.send(None)
    connection.recv()


def main(what: str, n: str = "1") -> None:
    """Prints one measurement."""
    if what == "import-torch":
        found = import_torch()
    elif what == "import-exec-core":
        found = import_exec_core()
    elif what == "mp-spawn":
        found = mp_spawn(int(n))
    else:
        found = exec_mp(int(n), "spawn" if what == "exec-mp-spawn" else "forkserver")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What the programs share: recording what happened, and starting an executor."""

from __future__ import annotations

import json
import os
import time
import warnings
from typing import Any

import exec_core as ec

warnings.simplefilter("error")

RANK = int(os.environ.get("RANK", "0"))


def record(**values: Any) -> None:
    """Keeps ``values`` for the test, also if this process is killed next."""
    with open(os.path.join(os.environ["RECORDS"], f"rank-{RANK}.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(values, default=repr) + "\n")


def told(error: BaseException) -> dict[str, Any]:
    """An error as the test wants to see it."""
    facts = {name: value for name, value in vars(error).items() if isinstance(value, int | str | dict | tuple | None)}
    notes = list(getattr(error, "__notes__", ()))
    return {**facts, "type": type(error).__name__, "text": str(error), "notes": notes, "cause": str(error.__cause__)}


def outcome(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What calling ``function`` gave, and how long it took."""
    started = time.monotonic()
    try:
        what = {"value": function(*args, **kwargs)}
    except Exception as error:
        what = told(error)
    return {**what, "seconds": time.monotonic() - started}


def config(worker_cls: Any, backend: Any = "torchrun", tp: int = 1, pp: int = 1, dp: int = 1, **changes: Any) -> Any:
    """A configuration on CPU."""
    rpc = {"timeout_s": 30.0, "startup_timeout_s": 40.0, **changes.pop("rpc", {})}
    return ec.ExecutorConfig(
        worker_cls=worker_cls,
        backend=backend,
        parallel=ec.ParallelConfig(
            tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, distributed_timeout_s=20.0
        ),
        device=changes.pop("device", ec.DeviceConfig(device="cpu")),
        rpc=ec.RpcConfig(**rpc),
        log=ec.LogConfig(level="critical", format="json"),
        **changes,
    )

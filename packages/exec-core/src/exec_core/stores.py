"""Where the ranks of a world meet: torch's stores, with limits on the waits that torch has none for."""

from __future__ import annotations

import datetime
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any
from urllib.parse import urlsplit

from exec_core.errors import ExecutorError

_MOMENT = datetime.timedelta(milliseconds=1)
_LOOK_EVERY_S = 0.001
_CONNECT_EVERY_S = 0.02


def _limit_s(timeout_s: float | None) -> float:
    import torch.distributed as dist

    return float(timeout_s or dist.default_pg_timeout.total_seconds())


def file_store(path: str, world_size: int, timeout_s: float | None, given_up: Callable[[], bool]) -> Any:
    """The store of ``file://path``, once all ranks have come to it.

    torch's own rendezvous cannot be interrupted: a rank in the driver would wait for a dead one until the time-out.

    Args:
        timeout_s: limit in seconds; None: torch's default.
        given_up: asked while waiting; True when the others will not come.

    Raises:
        ExecutorError: they did not come.
    """
    import torch.distributed as dist

    store = dist.FileStore(path, world_size)  # type: ignore[attr-defined] # public, not listed in its __all__
    deadline = time.monotonic() + _limit_s(timeout_s)
    here = store.add("ranks here", 1)
    while here < world_size:
        if given_up() or time.monotonic() > deadline:
            raise ExecutorError(f"only {here} of {world_size} ranks came to join torch.distributed")
        time.sleep(_LOOK_EVERY_S)
        here = store.add("ranks here", 0)
    return store


def tcp_store(url: str, rank: int, world_size: int, timeout_s: float | None) -> Any:
    """What ``tcp://host:port`` means everywhere, but not to torch in a process of torchrun, where nobody would listen.

    Args:
        timeout_s: limit in seconds; None: torch's default.

    Raises:
        ExecutorError: nobody listens there in time, or not a store.
    """
    import torch.distributed as dist

    parsed, limit_s = urlsplit(url), _limit_s(timeout_s)
    host, port = str(parsed.hostname), int(parsed.port or 0)
    deadline = time.monotonic() + limit_s

    def store() -> Any:
        return dist.TCPStore(  # type: ignore[attr-defined] # public, not listed in its __all__
            host, port, world_size, is_master=rank == 0, timeout=datetime.timedelta(seconds=limit_s), multi_tenant=True
        )

    if rank == 0:
        return store()
    # Torch tries for up to twice its time-out to connect, and has none for the answer of whoever is there.
    _wait_for_listener(host, port, limit_s)
    return _within(store, deadline, f"what listens at {host}:{port} has not answered as a store within {limit_s:g} s")


def _wait_for_listener(host: str, port: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), max(_LOOK_EVERY_S, deadline - time.monotonic())).close()
        except OSError as error:  # the name, too, may become known only with the host
            if time.monotonic() + _CONNECT_EVERY_S > deadline:
                raise ExecutorError(f"nobody listens at {host}:{port} after {timeout_s:g} s: {error}") from error
            time.sleep(_CONNECT_EVERY_S)
        else:
            return


def _within(make: Callable[[], Any], deadline: float, otherwise: str) -> Any:
    """What ``make`` returns. It cannot be interrupted: a thread that is late stays behind."""
    made: Future[Any] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=run, name="exec-core-join", daemon=True).start()
    if wait([made], max(0.0, deadline - time.monotonic())).not_done:
        raise ExecutorError(otherwise)
    return made.result()


def give_up(store: Any) -> None:
    """Nobody is to wait at ``store`` any more.

    NCCL's watchdog may yet have to write there of an abort; a file that is gone it would seek for minutes.
    """
    store.set_timeout(_MOMENT)
